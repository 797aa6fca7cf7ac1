"""Multiple choice side by side: records with lm-eval's scores, asked once per model and not once per decoder."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from support.evaluation import make_data, needs_lm_eval
from support.teachers import save_teacher

from slimkernels.cli import main
from slimkernels.evaluate import models as evaluated_models
from slimkernels.evaluate.records import RecordFile, read_records
from slimkernels.evaluate.runner import load_run

# lm-eval and its dependencies warn; no warning is about this package's calls.
pytestmark = [pytest.mark.cpu_kernels, pytest.mark.filterwarnings("ignore")]
ARC = [
    ("Which one barks?", ["a cat", "a dog", "a stone", "rain"], 1),
    ("What is wet?", ["rain", "sand"], 0),
    ("What is hard?", ["water", "milk", "a stone"], 2),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("data"))
    rows = [{"query": f"Question: {question}", "choices": choices, "gold": gold} for question, choices, gold in ARC]
    (folder / "arc").mkdir()
    (folder / "arc" / "arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "truthfulqa").mkdir()
    lines = [
        "Type,Question,Best Answer,Correct Answers,Incorrect Answers",
        "x,Are fish wet?,They are wet,They are wet; Yes,No; They are dry",
        "x,Do stones talk?,Stones do not talk,Stones do not talk; No,They do",
    ]
    (folder / "truthfulqa" / "TruthfulQA.csv").write_text("\n".join(lines) + "\n")
    return folder


@needs_lm_eval
def test_choices_are_records_with_lm_evals_scores_and_are_asked_once(data, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slimkernels.evaluate.lm_eval.tasks import evaluate_multiple_choice

    folders = [str(save_teacher(tmp_path / name, seed=seed)) for seed, name in enumerate(["a", "b"])]
    out = tmp_path / "out"
    words = ["compare", "--models", *folders, "--tasks", "arc_easy", "gsm8k", "truthfulqa_mc2", "--data", str(data)]
    words += ["--out", str(out), "--samples", "2", "--decoders", "greedy", "self-consistency", "--chains", "2"]
    words += ["--max-depth", "1", "--max-step-tokens", "2", "--shots", "0"]
    assert main(words) == 0
    records = load_run(out)[1]
    chosen = [record for record in records if record.task != "gsm8k"]
    # Multiple choice is asked once, gsm8k once per decoder.
    assert [len(chosen), len(records)] == [2 * 2 * 2, 2 * 2 * 2 + 2 * 2 * 2]
    assert {record.decoder for record in chosen} == {""}

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[1]), AutoTokenizer.from_pretrained(folders[1])
    theirs = evaluate_multiple_choice(model, tokenizer, ["arc_easy", "truthfulqa_mc2"], data=data, limit=2)
    for task, found in theirs.tasks.items():
        own = [record for record in chosen if (record.model, record.task) == ("b", task)]
        samples = [sample for sample in theirs.samples if sample.task == task]
        assert [record.scores for record in own] == [sample.scores for sample in samples]
        for metric, score in found.scores.items():
            assert sum(record.scores[metric] for record in own) / len(own) == score
        for record, sample in zip(own, samples, strict=True):
            assert record.prompt == sample.prompt
            assert [entry["sum_logprob"] for entry in record.candidates] == sample.loglikelihoods
            assert record.output == sample.choices[sample.prediction].strip()
    easy = [record for record in chosen if (record.model, record.task) == ("a", "arc_easy")]
    assert [(record.question, record.choices, record.reference) for record in easy] == [
        (f"Question: {question}\nAnswer:", tuple(choices), choices[gold]) for question, choices, gold in ARC[:2]
    ]
    assert set(easy[0].scores) == {"acc", "acc_norm"}

    page = (out / "report.html").read_text()
    assert "2 of 3" in page
    assert "0-shot" in page
    for task, metric in (("arc_easy", "acc"), ("arc_easy", "acc norm"), ("truthfulqa_mc2", "acc")):
        assert f"<td>{task}, {metric}</td>" in page
    # Nothing is asked again: no model is loaded.
    monkeypatch.setattr(evaluated_models, "_loader", lambda *_: pytest.fail)
    assert main(words) == 0
    assert load_run(out)[1] == records
    assert main(["compare", "--rescore", "--out", str(out)]) == 0
    assert load_run(out)[1] == records


@pytest.fixture
def forwards(monkeypatch):
    """Records the number of sequences in every forward pass of lm-eval."""
    from lm_eval.models.huggingface import HFLM

    original, seen = HFLM._model_call, []

    def call(self, inputs, **options):
        seen.append(len(inputs))
        return original(self, inputs, **options)

    monkeypatch.setattr(HFLM, "_model_call", call)
    return seen


@needs_lm_eval
def test_a_killed_command_line_asks_no_batch_of_choices_twice(tmp_path, forwards):
    (tmp_path / "arc").mkdir()
    rows = [{"query": f"Question: {n} {'x ' * (n % 7)}?", "choices": ["a", "a dog"], "gold": 1} for n in range(150)]
    (tmp_path / "arc/arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "compare",
        "--models",
        str(save_teacher(tmp_path / "model")),
        "--tasks",
        "arc_easy",
        "--data",
        str(tmp_path),
    ]
    words += ["--batch-size", "1", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    whole = list(forwards)
    assert set(whole) == {1}

    lines: list = []
    out = tmp_path / "cut"
    with subprocess.Popen([sys.executable, "-m", "slimkernels", *words, out], stderr=subprocess.DEVNULL) as process:
        while len(lines) < 9 and process.poll() is None:
            time.sleep(0.01)
            lines = [line for file in out.glob("records/*.batches") for line in file.read_bytes().split(b"\n")]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    [journal] = out.glob("records/*.batches")
    done = journal.read_bytes().count(b"\n")
    assert 8 <= done < len(whole)
    assert not load_run(out)[1]
    with open(journal, "ab") as file:
        file.write(b'{"batch": "torn')

    forwards.clear()
    assert main([*words, str(out)]) == 0
    assert len(forwards) == len(whole) - done
    # Apart from their times, the records equal those of the uninterrupted run.
    [file], [expected] = (list((tmp_path / name).glob("records/*.jsonl")) for name in ("cut", "whole"))
    assert file.name == expected.name
    assert len(read_records(file)) == 150
    seconds = re.compile(rb'"seconds": [^,]*')
    assert seconds.sub(b"", file.read_bytes()) == seconds.sub(b"", expected.read_bytes())
    assert not journal.exists()


@needs_lm_eval
def test_records_missing_after_a_kill_are_made_without_the_model(data, tmp_path, forwards, monkeypatch):
    words = ["compare", "--models", str(save_teacher(tmp_path / "model")), "--tasks", "arc_easy", "--data", str(data)]
    words += ["--out", str(tmp_path / "out")]
    # Simulates a kill between the first and the second record.
    append, written = RecordFile.append, []

    def append_one(file, record):
        if written:
            raise KeyboardInterrupt
        written.append(record)
        append(file, record)

    with monkeypatch.context() as patched:
        patched.setattr(RecordFile, "append", append_one)
        assert main(words) == 130
    assert len(forwards) == 2
    assert main(words) == 0
    assert len(forwards) == 2
    assert load_run(tmp_path / "out")[1][0] == written[0]
    assert len(load_run(tmp_path / "out")[1]) == 3
    # A finished task is not asked again when an unfinished one comes before it.
    assert main([*words, "--tasks", "truthfulqa_mc1", "arc_easy"]) == 0
    assert len(forwards) == 3
    assert not list(tmp_path.glob("out/records/*.batches"))


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks gsm9k", "tasks must be heldout, gsm8k, strategyqa, commonsenseqa, self_instruct, dolly, or multiple"),
        ("--tasks hellaswag", "hellaswag needs a file hellaswag/hellaswag_val"),
        ("--tasks arc_easy --num-fewshot 2", "num_fewshot must be 0 for arc_easy"),
    ],
)
def test_choices_bad_input_exits_2_with_one_sentence(arguments, message, data, tmp_path, capsys):
    words = ["compare", "--models", "not-looked-for", "--data", str(data), "--out", str(tmp_path), *arguments.split()]
    assert main(words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_choices_without_lm_eval_name_the_extra(data, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    words = ["compare", "--models", "x", "--tasks", "arc_easy", "--data", str(data), "--out", str(tmp_path)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "or multiple-choice tasks of lm-eval, got arc_easy" in error
    assert "pip install 'slimkernels[harness]'" in error
