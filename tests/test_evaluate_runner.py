"""Side-by-side runs of real small models: every question is asked once, runs resume, and the command line."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from support.evaluation import make_data, make_folder

from slimkernels.cli import main
from slimkernels.evaluate import models as evaluated_models
from slimkernels.evaluate.decoders import DecoderSettings
from slimkernels.evaluate.models import find_models
from slimkernels.evaluate.records import RecordFile, read_records
from slimkernels.evaluate.runner import Plan, load_run, rescore, run
from slimkernels.evaluate.tasks import load_task

pytestmark = pytest.mark.cpu_kernels
SETTINGS = DecoderSettings(max_steps=2, max_step_tokens=5, num_chains=2, branching_factor=2, beam=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [str(make_folder(tmp_path_factory.mktemp("models") / name, seed)) for seed, name in enumerate("ab")]


def make_plan(folders, data, samples=3, **changes):
    tasks = [load_task(name, data, samples) for name in ("gsm8k", "commonsenseqa")]
    given = {"decoders": ["greedy", "self-consistency"], "seeds": [0, 1], "shots": 0, "batch_questions": 2}
    return Plan(find_models(folders), tasks=tasks, settings=SETTINGS, **given | changes)


def test_every_model_decoder_task_sample_and_seed_is_answered_once(folders, data, tmp_path):
    records = run(make_plan(folders, data), tmp_path)
    cells = {(r.model, r.decoder, r.task, r.sample, r.seed) for r in records}
    # There are two models, two tasks and three samples. Greedy decoding runs once, sampling with two seeds.
    assert len(records) == len(cells) == 2 * 2 * 3 * (1 + 2)
    assert {record.seed for record in records if record.decoder == "greedy"} == {None}
    assert len(list((tmp_path / "records").iterdir())) == 8
    chains = [record for record in records if record.decoder == "self-consistency"]
    assert len({record.output for record in chains}) > 1
    assert {len(record.candidates) for record in chains} == {1, 2}
    for record in chains:
        # A chain without an end is not a candidate if another chain has one, but its tokens count as spent.
        spent = [candidate["spent"] for candidate in record.candidates]
        assert spent == sorted(spent)
        assert spent[0] >= record.candidates[0]["tokens"]
        assert spent[-1] == record.tokens if len(spent) == 2 else spent[-1] <= record.tokens
        assert record.output in [candidate["text"] for candidate in record.candidates]
        assert record.prompt == f"Q: {record.question}\nA:"
        assert 1 <= record.output_tokens <= 10
        assert record.seconds > 0
    assert load_run(tmp_path)[1] == records


def test_a_stopped_run_resumes_where_it_was(folders, data, tmp_path, monkeypatch):
    whole = {record.key: record.output for record in run(make_plan(folders, data), tmp_path / "whole")}

    def stop_after(count):
        def progress(description):
            def report(done, total):
                nonlocal count
                count -= 1
                if count < 0:
                    raise KeyboardInterrupt

            return report

        return progress

    def written():
        return {r.key: r.seconds for file in (tmp_path / "cut").rglob("*.jsonl") for r in read_records(file)}

    before: dict = {}
    for count in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            run(make_plan(folders, data), tmp_path / "cut", stop_after(count))
        # Written records keep their times, so they were not made again.
        assert before.items() < written().items()
        before = written()
    run(make_plan(folders, data), tmp_path / "cut")
    assert before.items() < written().items()
    assert {r.key: r.output for r in load_run(tmp_path / "cut")[1]} == whole
    # All records exist, so no model is loaded, and a smaller number of samples is a part of them.
    monkeypatch.setattr(evaluated_models, "_loader", lambda *_: pytest.fail)
    assert len(run(make_plan(folders, data), tmp_path / "cut")) == len(whole)
    assert len(run(make_plan(folders, data, samples=2), tmp_path / "cut")) == len(whole) * 2 // 3
    assert len(load_run(tmp_path / "cut")[1]) == len(whole) * 2 // 3


def test_other_settings_and_other_weights_are_other_records(folders, data, tmp_path):
    plan = make_plan(folders[:1], data, decoders=["greedy"], samples=1)
    (first, _) = run(plan, tmp_path)
    (other, _) = run(make_plan(folders[:1], data, decoders=["greedy"], samples=1, shots=1), tmp_path)
    assert first.key != other.key
    assert other.prompt.count("Q:") == 2
    assert len(list((tmp_path / "records").iterdir())) == 4
    identities = {model.identity for name in folders for model in find_models([name])}
    identities |= {find_models(folders[:1], dtype="bfloat16")[0].identity}
    assert len(identities) == 3
    assert find_models(folders)[0].identity in identities


def test_an_adapters_settings_are_another_model(tmp_path):
    folder = make_folder(tmp_path / "m")
    identities = {find_models([str(folder)])[0].identity}
    for file, content in (("adapter_config.json", '{"lora_alpha": 8}'), ("adapter_config.json", '{"lora_alpha": 16}')):
        (folder / file).write_text(content)
        identities.add(find_models([str(folder)])[0].identity)
    assert len(identities) == 3
    # The training state is not part of the model.
    (folder / "training_args.bin").write_bytes(b"x")
    assert find_models([str(folder)])[0].identity in identities


def test_rescoring_does_not_replace_records_during_a_run(folders, data, tmp_path):
    plan = make_plan(folders[:1], data, decoders=["greedy"], samples=1)
    records = run(plan, tmp_path)
    file = next(tmp_path.glob("records/*.jsonl"))
    with RecordFile(file) as held, pytest.raises(BlockingIOError, match="being written by another process"):
        rescore(tmp_path)
    assert list(held.records.values()) == read_records(file)
    assert rescore(tmp_path)[1] == records


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoders": ["beam"]}, "decoder must be one of greedy, self-consistency, pathfinder, got 'beam'"),
        ({"decoders": ["greedy", "greedy"]}, "decoders must be at least one, all different"),
        ({"seeds": []}, "seeds must be at least one"),
        ({"shots": 9}, "shots must be between 0 and 3 for gsm8k, got 9"),
    ],
)
def test_bad_plans(changes, message, folders, data):
    with pytest.raises(ValueError, match=message):
        make_plan(folders, data, **changes)
    with pytest.raises(ValueError, match="models must be different and have different names"):
        find_models([folders[0], folders[0]])


def test_command_line(folders, data, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compare", "--models", *folders, "--tasks", "gsm8k", "strategyqa", "--data", str(data), "--out", str(out)]
    words += ["--decoders", "greedy", "pathfinder", "--samples", "2", "--shots", "0"]
    words += ["--max-depth", "2", "--max-step-tokens", "4", "--branching-factor", "2", "--beam", "1"]
    assert main(words) == 0
    assert f"16 outputs; report in {out / 'report.html'}" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "2 of 7" in page
    assert "b · pathfinder" in page
    # Rescoring computes the scores from the outputs, one of which is changed here.
    file = next(out.glob("records/a--greedy--gsm8k--*.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["scores"]["strict"] for row in rows} == {0}
    rows[0]["output"] = f"The answer is {rows[0]['reference']}."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["compare", "--rescore", "--out", str(out)]) == 0
    assert [record.scores["strict"] for record in read_records(file)] == [1, 0]
    assert "50.0 [9.5, 90.5]" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "compare needs --out DIR with --models, --rescore or --outputs"),
        ("--out {tmp}", "--out needs one of --models, --rescore and --outputs"),
        ("--out {tmp} --models x --rescore", "--out needs one of"),
        ("--out {tmp} --models x --tasks gsm8k", "--models needs --data"),
        ("--out {tmp} --rescore --store {tmp}", "--store has no meaning with --rescore"),
        ("--out {tmp} --models x --tasks gsm8k --data {tmp}", "data for gsm8k not found: looked for {tmp}/gsm8k/test"),
        ("--out {tmp} --models {tmp}/no --tasks gsm8k --data {data}", "there is no folder or .gguf file {tmp}/no"),
        ("--out {tmp} --models http:// --tasks gsm8k --data {data}", "url must be the base URL of a server"),
        (
            "--out {tmp} --models {model} --tasks gsm8k --data {data} --prompt-style chat",
            "tokenizer of {model} has none",
        ),
        ("--out {tmp} --rescore", "no run found: {tmp}/run.json does not exist"),
        ("--out {tmp} --outputs {tmp}/no.jsonl", "outputs not found"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(arguments, message, folders, data, tmp_path, capsys):
    names = {"tmp": tmp_path, "data": data, "model": folders[0]}
    assert main(["compare", *arguments.format(**names).split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("slimkernels: ")
    assert message.format(**names) in error


def test_a_killed_command_line_redoes_nothing_finished(folders, data, tmp_path):
    words = [
        "compare",
        "--models",
        folders[0],
        "--tasks",
        "gsm8k",
        "--data",
        str(data),
        "--decoders",
        "self-consistency",
    ]
    words += ["--chains", "4", "--shots", "0", "--max-step-tokens", "60", "--batch-questions", "1"]
    words += ["--out", str(tmp_path)]
    before: list = []
    with subprocess.Popen([sys.executable, "-m", "slimkernels", *words], stderr=subprocess.DEVNULL) as process:
        while len(before) < 2 and process.poll() is None:
            time.sleep(0.01)
            before = [record for file in tmp_path.glob("records/*.jsonl") for record in read_records(file)]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    (file,) = tmp_path.glob("records/*.jsonl")
    before = read_records(file)
    assert 2 <= len(before) < 7
    assert not (tmp_path / "report.html").exists()
    # The unfinished run has a report, which says that it is unfinished.
    assert main(["compare", "--rescore", "--out", str(tmp_path)]) == 0
    said = f"The run is unfinished. Outputs so far: a, self-consistency, gsm8k: {len(before)} of 7."
    assert said in (tmp_path / "report.html").read_text()
    assert main(words) == 0
    assert "unfinished" not in (tmp_path / "report.html").read_text()
    # The old lines come first, unchanged even in their times.
    assert read_records(file)[: len(before)] == before
    assert len(load_run(tmp_path)[1]) == 7
