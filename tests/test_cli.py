"""The command line: what it does, what it says, and how it exits."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support import teachers
from support.commands import parsers
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import slimkernels
from slimkernels.cli import main, terminal, train
from slimkernels.store import Store
from slimkernels.store.errors import NotAStoreError
from slimkernels.teacher import capture, read_documents
from slimkernels.trainer import SlimConfig

CORPUS = [
    "When the rain stopped, Anna put on her boots.",
    "The apple trees were still wet.",
    "A black cat was sleeping on the wooden bench.",
    "She thought about the long summer that was coming.",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(teachers.save_teacher(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def corpus(tmp_path) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS))
    return str(path)


@pytest.fixture
def store(tmp_path, corpus) -> str:
    path = tmp_path / "store"
    tokenizer = teachers.make_tokenizer()
    capture(teachers.make_teacher(), tokenizer, read_documents(corpus, tokenizer), path, top_k=17)
    return str(path)


def run(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slimkernels", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | environment,
    )


PROGRAMS = [parser.prog for parser in parsers()]


def test_help_of_every_command_loads_nothing_but_the_standard_library() -> None:
    code = f"""if True:
        import sys
        before = set(sys.modules)
        from slimkernels.cli import main
        for words in {[program.split()[1:] for program in PROGRAMS]}:
            try:
                main([*words, "--help"])
            except SystemExit as stop:
                assert stop.code == 0, words
        loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        assert "argparse" in loaded
        foreign = loaded - set(sys.stdlib_module_names)
        assert foreign == {{"slimkernels"}}, foreign
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    for command in ("demo", "capture", "train", "eval", "store"):
        assert command in process.stdout


def test_a_mistyped_option_loads_no_torch() -> None:
    code = """if True:
        import sys
        from slimkernels.cli import main
        assert main(["capture", "--teacher", "x", "--prompts", "--out", "y"]) == 2
        assert main(["eval", "--store", "y"]) == 2
        assert main(["compare", "--out", "y"]) == 2
        assert main(["decode", "--model", "x"]) == 2
        assert not {"torch", "transformers"} & set(sys.modules)
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("slimkernels: ") == 4


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_command(program, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*program.split()[1:], "--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: {program}")
    if program.split()[1:] and program.split()[1] in ("capture", "train", "eval", "compare"):
        assert f"{program} --" in output.partition("examples:")[2]


@pytest.mark.parametrize("parser", list(parsers()), ids=lambda parser: parser.prog)
def test_every_argument_is_described(parser) -> None:
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help, action.dest


def test_train_lists_what_option_takes(capsys) -> None:
    """The help cannot load the configuration, so its list is held to it here."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name: field.default for field in dataclasses.fields(SlimConfig) if field.name not in inherited}
    assert {name: own[name] for name in own if name not in {*train._FIELDS, "method"}} == train.OPTIONS
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert all(f"\n  {name}={json.dumps(value)}\n" in shown for name, value in train.OPTIONS.items())
    examples = re.findall(r"(\w+)=\S", shown.rpartition("TrainingArguments, such as")[2])
    assert len(examples) > 4
    assert set(examples) <= inherited


def test_help_says_every_default_of_train() -> None:
    (parser,) = (parser for parser in parsers() if parser.prog == "slimkernels train")
    silent = [
        action.option_strings[0]
        for action in parser._actions
        if not action.required and action.dest not in ("help", "option") and "(default: " not in action.help
    ]
    assert silent == []


@pytest.mark.parametrize("command", ["demo", "capture", "train", "eval", "compare", "decode"])
def test_help_says_how_long_a_command_takes(command) -> None:
    (parser,) = (parser for parser in parsers() if parser.prog == f"slimkernels {command}")
    assert re.search(r"\b(seconds?|minutes?)\b", parser.epilog)
    assert "Estimated time on two idle CPU cores" in parser.epilog  # nobody has measured them on the reader's machine


def test_version_is_printed_without_torch() -> None:
    code = """if True:
        import sys
        from slimkernels.cli import main
        try:
            main(["--version"])
        finally:
            assert "torch" not in sys.modules
    """
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert process.stdout == f"slimkernels {slimkernels.__version__}\n"
    assert (process.returncode, process.stderr) == (0, "")


def test_train_documents_the_defaults_of_the_configuration() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(SlimConfig)}
    own = {
        "rest": "renorm with forward_kl and soft_ce, else ghost",
        "divergence": "set by --method",
        "support": SlimConfig.support,
        "kd_weight": "3;",
        "schedules": "none",
        "document_order": SlimConfig.document_order,
        "learning_rate": "5e-5;",
    }
    for field, (_, _, text) in train._FIELDS.items():
        stated = text.partition("(default: ")[2].removesuffix(")")
        if field in own:
            assert stated.startswith(own[field])
        elif field != "max_steps":  # --epochs is its default
            assert float(stated) == float(defaults[field]), field


def printed(function, *arguments) -> str:
    """What a function prints in a terminal of 80 columns."""
    output = io.StringIO()
    function(*arguments, Console(file=output, width=80))
    assert max(map(len, output.getvalue().splitlines())) <= 80
    assert "…" not in output.getvalue()
    return output.getvalue()


def test_a_long_value_is_wrapped_at_80_columns() -> None:
    content = {"entropy_bound_bits_per_entry": "14.37", "teacher": "{'name': '" + "a[bold]name/" * 12 + "'}"}
    text = printed(terminal.print_table, content)
    for word in (*content, *content.values()):
        assert re.sub(r"\s", "", word) in re.sub(r"\s", "", text)


def test_metrics_of_many_models_fit_80_columns() -> None:
    names = [f"demo-output/students/a-long-name-{i}" for i in range(9)]
    metrics = {"teacher_perplexity": "1.234e+04", "tokens_per_second": "4.912e+05"}
    text = printed(terminal.print_columns, dict.fromkeys(names, metrics))
    for metric, value in metrics.items():
        lines = [line for line in text.splitlines() if line.split()[:1] == [metric]]
        assert sum(line.split().count(value) for line in lines) == len(names)
    # A name is spread over the lines of its column.
    assert text.count("demo-") == len(names)
    assert all(re.search(rf"-{i}\b", text) for i in range(9))


def test_capture_of_a_text_file(teacher, corpus, tmp_path, capsys) -> None:
    out = str(tmp_path / "store")
    arguments = ["capture", "--teacher", teacher, "--text", corpus, "--out", out, "--top-fraction", "0.1"]
    assert main([*arguments, "--temperatures", "1", "2"]) == 0
    assert "added 4 documents" in capsys.readouterr().out
    assert (Store(out).temperatures, Store(out)[0].teacher.top_k) == ((1.0, 2.0), 30)
    assert main([*arguments, "--temperatures", "1", "2"]) == 0
    assert "added 0 documents, 0 tokens; skipped 4" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "was made with temperatures=(1.0, 2.0)" in capsys.readouterr().err


def test_capture_cut_at_a_probability_in_six_bits(teacher, corpus, tmp_path, capsys) -> None:
    out = str(tmp_path / "store")
    arguments = ["capture", "--teacher", teacher, "--text", corpus, "--out", out, "--top-k", "30"]
    assert main([*arguments, "--top-p", "0.5", "--codec", "affine6"]) == 0
    assert Store(out).manifest["selection"] == {"kind": "top_k", "value": 30, "top_k": 30, "top_p": 0.5}
    assert "quantisation_kl_nats" in capsys.readouterr().out
    assert main([*arguments, "--top-p", "1.5"]) == 2
    assert "--top-p must lie in (0, 1], got 1.5" in capsys.readouterr().err


def test_capture_of_the_teachers_own_text(teacher, tmp_path, capsys) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(teachers.PROMPTS))
    out = tmp_path / "runs" / "store"
    arguments = ["capture", "--teacher", teacher, "--prompts", str(prompts), "--out", str(out), "--batch-size", "4"]
    assert main([*arguments, "--tokens", "150", "--max-new-tokens", "10"]) == 0
    lines = (tmp_path / "runs" / "store.jsonl").read_text().splitlines()
    documents = [json.loads(line)["input_ids"] for line in lines]
    assert sum(map(len, documents)) >= 150
    assert sorted(document.input_ids.tolist() for document in Store(out)) == sorted(documents)
    assert main([*arguments, "--tokens", "300", "--max-new-tokens", "10"]) == 0
    assert f"skipped {len(documents)}" in capsys.readouterr().out


def test_train_then_eval(store, tmp_path, capsys) -> None:
    config = tmp_path / "student.json"
    teachers.make_teacher().config.to_json_file(config)
    students = []
    for method, student in (("slim", ["--student", str(config)]), ("sft", [])):
        out = str(tmp_path / method)
        students.append(out)
        arguments = ["train", "--store", store, "--method", method, "--out", out, *student, "--max-steps", "2"]
        assert main([*arguments, "--batch-size", "2", "--option", "use_cpu=true", "--eval-store", store]) == 0
        output, errors = capsys.readouterr()
        assert re.search(r"slimkernels: learning rate 0\.00\d+, the default \(--learning-rate sets another\)", errors)
        assert f"student saved in {out}" in output
        assert "eval_kl_ghost" in output
    assert main(["eval", "--store", store, "--model", *students, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == students
    assert all(result["perplexity"] > 1 and result["kl_ghost"] > 0 for result in results.values())
    assert results[students[0]]["tokens"] == Store(store).num_rows
    assert main(["eval", "--store", store, "--model", students[0]]) == 0
    assert "kl_ghost" in capsys.readouterr().out


@pytest.mark.parametrize(("layers", "kept"), [("1", [1]), ("0,1", [0, 1])])
def test_train_some_of_the_layers_of_a_model(layers, kept, store, teacher, tmp_path, capsys) -> None:
    out, whole = tmp_path / "out", AutoModelForCausalLM.from_pretrained(teacher)
    arguments = ["train", "--store", store, "--method", "kd", "--student", teacher, "--layers", layers]
    small = ["--max-steps", "1", "--learning-rate", "1e-12", "--batch-size", "2", "--option", "use_cpu=true"]
    assert main([*arguments, "--out", str(out), *small]) == 0
    student = AutoModelForCausalLM.from_pretrained(out)
    assert student.config.num_hidden_layers == len(kept)
    for layer, index in zip(student.model.layers, kept, strict=True):
        torch.testing.assert_close(layer.state_dict(), whole.model.layers[index].state_dict())
    assert (out / "tokenizer.json").exists()


def test_train_takes_the_folder_of_a_tokenizer(store, tmp_path, capsys) -> None:
    teachers.make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    arguments = ["train", "--store", store, "--method", "sft", "--out", str(tmp_path / "out"), "--max-steps", "1"]
    assert main([*arguments, "--tokenizer", str(tmp_path / "tokenizer"), "--option", "use_cpu=true"]) == 0
    assert "student saved in" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_train_with_a_teacher_beside_the_student(store, teacher, tmp_path, capsys) -> None:
    for method, writing in (("gkd", ["--option", "max_new_tokens=4"]), ("kd", [])):
        arguments = ["train", "--store", store, "--method", method, "--out", str(tmp_path / method)]
        options = ["--option", "use_cpu=true", *writing, "--max-steps", "2", "--batch-size", "2"]
        assert main([*arguments, "--teacher", teacher, *options]) == 0
        assert "student saved in" in capsys.readouterr().out
    assert main([*arguments[:3], "--method", "gkd", "--out", str(tmp_path / "alone")]) == 2
    assert "'gkd' needs a --teacher" in capsys.readouterr().err


def test_store_info_and_verify(store, capsys) -> None:
    assert main(["store", "info", store, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["vocab_size"], content["documents"]) == (300, 4)
    assert {"rows", "entries", "bytes", "bits_per_entry", "bytes_per_token"} <= set(content)
    assert main(["store", "info", store]) == 0
    assert "bits_per_entry" in capsys.readouterr().out
    assert main(["store", "verify", store]) == 0
    assert "every byte of 4 documents" in capsys.readouterr().out


def test_a_damaged_store_exits_1_and_names_the_place(store) -> None:
    (shard,) = Path(store).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    process = run("store", "verify", store)
    assert process.returncode == 1
    assert shard.name in process.stderr
    assert "row " in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("store verify {tmp}", "holds no manifest.json: is it the directory of a store?"),
        ("store info {tmp}/absent", "holds no manifest.json"),
        ("capture --teacher {teacher} --text {tmp}/absent.jsonl --out {tmp}/s", "there is no file"),
        ("capture --teacher {tmp}/absent.gguf --text {corpus} --out {tmp}/s", "there is no file"),
        ("capture --teacher {tmp} --text {corpus} --out {tmp}/s", "has no config.json"),
        ("capture --teacher {teacher} --text {corpus} --out {tmp}/s --top-k 301", "--top-k must be an integer in"),
        ("capture --teacher {teacher} --text {corpus} --out {tmp}/s --text-field body", "no field 'body' in record 1"),
        ("capture --teacher {teacher} --text {corpus} --out {corpus}", "is not a directory"),
        ("capture --teacher {teacher} --text {corpus} --out {tmp}", "choose an empty or new directory"),
        (
            "capture --teacher {teacher} --text {corpus} --out {tmp}/s --generated x",
            "--generated has no meaning with --text",
        ),
        ("capture --teacher {teacher} --prompts --out {tmp}/s", "give --tokens N or --documents N"),
        ("capture --teacher {teacher} --prompts {tmp}/no.txt --tokens 5 --out {tmp}/s", "prompts file not found"),
        ("train --store {tmp} --method slim --out {tmp}/o", "holds no manifest.json"),
        ("train --store {store} --method slim --out {tmp}/o --student {tmp}/no", "there is no folder or .gguf file"),
        ("train --store {store} --method slim --out {tmp}/o --student no.json", "no configuration file no.json"),
        ("train --store {store} --method slim --out {tmp}/o --option colour=red", "a field of SlimConfig"),
        ("train --store {store} --method kd --out {tmp}/o --layers 0,1", "--layers has no meaning without --student"),
        ("train --store {store} --method kd --out {tmp}/o --layers 1 --student c.json", "without --student MODEL"),
        (
            "train --store {store} --method kd --out {tmp}/o --student {teacher} --layers 0,2",
            "--layers must be increasing indices from 0 to 1, as the teacher has 2 layers, got [0, 2]",
        ),
        ("eval --store {store} --model {tmp}", "has no config.json"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(arguments, message, teacher, corpus, store, tmp_path, capsys) -> None:
    words = arguments.format(teacher=teacher, corpus=corpus, store=store, tmp=tmp_path).split()
    assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("slimkernels: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: COMMAND"),
        ("encode", "invalid choice: 'encode'"),
        ("capture --teacher x --out y", "one of the arguments --text --prompts is required"),
        ("capture --teacher x --text a --prompts --out y", "not allowed with argument"),
        ("capture --teacher x --text a --out y --batch-tokens 0", "must be a whole number of at least 1, got '0'"),
        ("capture --teacher x --text a --out y --top-k 5 --top-fraction 0.5", "not allowed with argument"),
        ("train --store x --out y --method dpo", "invalid choice: 'dpo'"),
        ("train --store x --out y --method kd --option novalue", "must be NAME=VALUE"),
    ],
)
def test_bad_usage_exits_2(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_traceback_can_be_asked_for(tmp_path) -> None:
    with pytest.raises(NotAStoreError):
        main(["--traceback", "store", "info", str(tmp_path)])


@pytest.mark.parametrize(
    "command",
    ["tree {no}", "decode --model x --questions {no}", "decode --model x --template-file {no} hi"],
)
def test_a_missing_file_is_named_in_a_sentence(command, tmp_path, capsys) -> None:
    missing = tmp_path / "nope.jsonl"
    assert main(command.format(no=missing).split()) == 2
    assert capsys.readouterr().err == f"slimkernels: there is no file {missing}\n"


@pytest.mark.parametrize(
    "command", ["capture --teacher {name} --text {corpus}", "train --student {name} --store {store} --method kd"]
)
def test_a_hub_that_cannot_be_reached_is_not_asked_again(command, corpus, store, tmp_path, monkeypatch, capsys) -> None:
    """transformers repeats a request without a network for half a minute."""
    import httpx2
    import huggingface_hub

    name, asked = "nobody/no-such-model", []

    def refuse(self, request):
        asked.append(request.url.path)
        raise httpx2.ConnectError("no network")

    monkeypatch.setattr(httpx2.HTTPTransport, "handle_request", refuse)
    huggingface_hub.close_session()
    words = command.format(name=name, corpus=corpus, store=store).split()
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert [path for path in asked if name in path] == [f"/api/models/{name}"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"slimkernels: model not found: {name!r} is no local folder")
    huggingface_hub.close_session()


def test_an_unknown_teacher_is_one_sentence_without_a_traceback(corpus, tmp_path) -> None:
    arguments = ["capture", "--teacher", "nobody/no-such-model", "--text", corpus, "--out", tmp_path / "store"]
    process = run(*arguments, HF_HUB_OFFLINE="1")
    assert process.returncode == 2
    assert process.stderr.startswith("slimkernels: model not found: 'nobody/no-such-model' is no local folder")
    assert len(process.stderr.splitlines()) == 1


def test_ctrl_c_exits_130_and_the_same_command_continues(teacher, tmp_path, capsys) -> None:
    out = tmp_path / "store"
    arguments = ["capture", "--teacher", teacher, "--prompts", "--out", str(out), "--batch-size", "4"]
    arguments += ["--max-new-tokens", "8", "--documents"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slimkernels", *arguments, "1000000"], stderr=subprocess.PIPE, text=True
    )
    generated = tmp_path / "store.jsonl"
    deadline = time.monotonic() + 900
    while not (generated.exists() and generated.stat().st_size):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=900)
    assert process.returncode == 130
    assert "slimkernels: interrupted" in error
    assert "Traceback" not in error
    count = len(generated.read_text().splitlines())
    assert count % 4 == 0
    assert main([*arguments, str(count + 2)]) == 0
    assert f"added {count + 2} documents" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error(store) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "slimkernels", "store", "info", store],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=900)


def test_capture_stops_at_a_number_of_documents_or_tokens_of_a_text(teacher, corpus, tmp_path) -> None:
    command = ["capture", "--teacher", teacher, "--text", corpus, "--top-k", "5", "--out"]
    assert main([*command, str(tmp_path / "a"), "--documents", "2"]) == 0
    assert len(Store(tmp_path / "a")) == 2
    assert main([*command, str(tmp_path / "b"), "--tokens", "20"]) == 0
    assert sum(len(document.input_ids) for document in Store(tmp_path / "b")) == 20


def test_capture_of_logits_of_token_ids_needs_no_tokenizer(tmp_path) -> None:
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 3]}\n')
    np.save(tmp_path / "logits.npy", np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32))
    command = f"capture --logits {tmp_path}/logits.npy --model a --text {tmp_path}/ids.jsonl --text-field input_ids"
    assert main([*command.split(), "--out", str(tmp_path / "store")]) == 0
    store = Store(tmp_path / "store")
    assert (store.vocab_size, store.tokenizer_fingerprint) == (50, "")


def test_capture_of_a_conversation_has_the_assistants_tokens_as_labels(tmp_path) -> None:
    folder = teachers.save_teacher(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(folder)
    messages = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    command = f"capture --teacher {folder} --text {tmp_path}/chat.jsonl --text-field messages --out {tmp_path}/store"
    assert main(command.split()) == 0
    (document,) = Store(tmp_path / "store")
    assert tokenizer.decode(document.input_ids[document.positions]) == "There.<|end|>"


def test_train_layers_are_numbers(store, teacher, capsys) -> None:
    command = ["train", "--store", store, "--method", "kd", "--out", "o", "--student", teacher, "--layers"]
    for layers in ("0,", "0:3", "all"):
        with pytest.raises(SystemExit):
            main([*command, layers])
        assert f"argument --layers: expected indices such as 0,1,2,4, got '{layers}'" in capsys.readouterr().err
    for layers in ("1,0", "1,1"):
        with pytest.raises(SystemExit):
            main([*command, layers])
        assert f"argument --layers: the indices must increase, got '{layers}'" in capsys.readouterr().err
