"""The demonstration from end to end with a tiny teacher, and what a second run does."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shlex
import shutil
import sys

import pytest
import torch
from rich.console import Console
from support.teachers import save_teacher
from transformers import AutoModelForCausalLM

from slimkernels.cli import main
from slimkernels.cli.parser import make_parser
from slimkernels.demo import DemoSettings, run_demo
from slimkernels.demo.report import results_table
from slimkernels.evaluate import evaluate_store
from slimkernels.store import Store, verify
from slimkernels.teacher import shipped_prompts


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> DemoSettings:
    teacher = save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")
    return DemoSettings(
        teacher=str(teacher),
        teacher_dtype="float32",
        prompts=12,
        heldout_every=4,
        documents=24,
        max_new_tokens=12,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        epochs=3,
        evaluations=3,
    )


def run(output_dir, settings) -> tuple[dict, str]:
    output = io.StringIO()
    results = run_demo(output_dir, settings=settings, console=Console(file=output, width=150))
    return results, output.getvalue()


@pytest.fixture(scope="module")
def first(tmp_path_factory, settings):
    output_dir = tmp_path_factory.mktemp("demo") / "out"
    return output_dir, *run(output_dir, settings)


def test_demo_writes_measured_numbers(first, settings):
    output_dir, results, printed = first
    assert json.loads((output_dir / "results.json").read_text()) == results
    assert (output_dir / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(results["students"]) == ["sft", "kd", "slim"]
    tokens = results["store"]["tokens"] * settings.epochs
    for method, student in results["students"].items():
        curve = student["curve"]
        assert [point["tokens_seen"] for point in (curve[0], curve[-1])] == [0, tokens], method
        assert len(curve) == 1 + settings.evaluations
        assert all(math.isfinite(value) for point in curve for value in point.values())
        assert student["train_tokens_per_second"] == pytest.approx(tokens / student["train_seconds"])
        assert curve[-1]["perplexity"] < curve[0]["perplexity"]
    starts = [student["curve"][0]["perplexity"] for student in results["students"].values()]
    assert len(set(starts)) == 1, "the three students start from the same weights"
    ends = [student["curve"][-1]["perplexity"] for student in results["students"].values()]
    assert len(set(ends)) == 3, "and end elsewhere"
    for words in (
        "perplexity",
        "KL: divergence from the teacher",
        "per s",
        "B/token",
        "SLIM",
        "slimkernels train --store",
    ):
        assert words in printed, words


def test_saved_students_are_those_that_were_measured(first):
    output_dir, results, _ = first
    heldout = Store(output_dir / "store" / "heldout")
    for method, student in results["students"].items():
        model = AutoModelForCausalLM.from_pretrained(output_dir / "students" / method)
        metrics = evaluate_store(model, heldout, batch_size=16)
        assert metrics["kl_ghost"] == pytest.approx(student["curve"][-1]["kl_ghost"], rel=1e-5)
        assert (output_dir / "students" / method / "tokenizer.json").exists()


def test_heldout_documents_come_from_prompts_not_trained_on(first, settings):
    output_dir, results, _ = first
    lines = [json.loads(line) for line in (output_dir / "text" / "documents.jsonl").read_text().splitlines()]
    prompt_of = {tuple(line["input_ids"]): line["prompt"] for line in lines}
    stores = {split: Store(output_dir / "store" / split) for split in ("train", "heldout")}
    prompts = {split: {prompt_of[tuple(d.input_ids.tolist())] for d in stores[split]} for split in stores}
    assert prompts["heldout"] == set(shipped_prompts()[: settings.prompts : settings.heldout_every])
    assert len(prompts["train"]) == settings.prompts - len(prompts["heldout"])
    assert not prompts["train"] & prompts["heldout"]
    assert len(stores["train"]) + len(stores["heldout"]) == settings.documents
    for split, store in stores.items():
        verify(output_dir / "store" / split)
        assert store[0].teacher.top_k == math.ceil(settings.top_fraction * store.vocab_size)
    assert results["heldout"]["documents"] == len(stores["heldout"])


def test_second_run_reuses_what_is_done_and_redoes_what_changed(first, settings):
    output_dir, results, _ = first
    stamps = {path: path.stat().st_mtime_ns for path in output_dir.rglob("*.safetensors")}
    assert len(stamps) == 5
    again, printed = run(output_dir, settings)
    assert again == results
    assert printed.count("reused from an earlier run") == 5
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

    slower, printed = run(output_dir, dataclasses.replace(settings, learning_rate=1e-4))
    assert printed.count("reused from an earlier run") == 2
    stores = [path for path in stamps if "store" in path.parts]
    assert {path: path.stat().st_mtime_ns for path in stores} == {path: stamps[path] for path in stores}
    assert slower["students"]["kd"]["curve"][0]["loss"] == results["students"]["kd"]["curve"][0]["loss"]
    assert slower["students"]["kd"]["curve"][-1]["loss"] > results["students"]["kd"]["curve"][-1]["loss"]


def test_interrupted_phases_are_continued(tmp_path, settings, first, monkeypatch):
    """A run that is stopped between the two stores continues with the text it has."""
    from slimkernels.demo import demo

    original, calls = demo.capture, []

    def stop_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(demo, "capture", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, settings)
    monkeypatch.setattr(demo, "capture", original)
    results, printed = run(tmp_path, settings)
    assert "text: reused" in printed
    assert "store: reused" not in printed
    expected = first[1]["students"]["slim"]["curve"][-1]
    assert results["students"]["slim"]["curve"][-1]["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_every_slow_step_is_announced(first, settings):
    """In the order in which they run, and before the bar that shows their progress."""
    printed = first[2]
    steps = [
        "5 phases",
        f"loading the teacher {settings.teacher}",
        "text: the teacher writes 24 documents",
        "documents",
    ]
    steps += ["store: the top 5% of the teacher's logits of", "tokens ", "student sft: 3 epochs over 18 documents"]
    steps += ["steps", "student kd:", "student slim:", "finished in"]
    places, start = [], 0
    for step in steps:
        assert step in printed[start:], step
        start = printed.index(step, start)
        places.append(start)
    assert places == sorted(places)


def test_printed_command_runs(first, settings, capsys):
    output_dir, _, printed = first
    (command,) = (line for line in printed.splitlines() if "slimkernels train" in line)
    words = shlex.split(command)
    # By the recipe of the three students, with which its result is to be compared.
    given = make_parser().parse_args(words[words.index("slimkernels") + 1 :])
    assert (given.num_train_epochs, given.learning_rate) == (settings.epochs, settings.learning_rate)
    assert (given.per_device_train_batch_size, given.seed) == (settings.batch_size, settings.seed)
    assert {("lr_scheduler_type", "cosine"), ("warmup_steps", 0.1)} <= set(given.option)
    assert main(words[words.index("slimkernels") + 1 :]) == 0
    assert "eval_perplexity" in capsys.readouterr().out
    assert (output_dir / "students" / "slim-ghost" / "tokenizer.json").exists()


def test_printed_command_starts_this_program(monkeypatch, tmp_path):
    from slimkernels.demo import demo

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert demo._program() == [".venv/bin/python", "-m", "slimkernels"]
    monkeypatch.setattr(shutil, "which", lambda _: "/elsewhere/bin/slimkernels")
    assert demo._program() == [".venv/bin/python", "-m", "slimkernels"]
    monkeypatch.setattr(shutil, "which", lambda _: str(tmp_path / ".venv" / "bin" / "slimkernels"))
    assert demo._program() == ["slimkernels"]


@pytest.mark.parametrize("scale", [1, 1000, 1e5])
def test_table_fits_80_columns(first, scale):
    """At the sizes of the default run, and with perplexities that differ by orders of magnitude."""
    curve = [
        {"perplexity": 712.43 * scale, "kl_ghost": 14.538, "tokens_seen": 50_843, "teacher_perplexity": 5.74},
        {"perplexity": 734.61 * scale, "kl_ghost": 14.618, "tokens_seen": 102_580, "teacher_perplexity": 5.74},
    ]
    student = {"curve": curve, "train_tokens_per_second": 12_398.9}
    results = {"heldout": {"documents": 1032, "rows": 103_857}, "store": {"bytes_per_token": 14_400.2}}
    output = io.StringIO()
    Console(file=output, width=80).print(
        results_table(results | {"students": dict.fromkeys(("sft", "kd", "slim"), student)})
    )
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    cells = {1: ("734.6", "712.4 (51k)"), 1000: ("734,610", "712,430 (51k)"), 1e5: ("7.3e+07", "7.1e+07 (51k)")}[scale]
    assert re.search(r"^method +perplexity +\(after\) +KL +\(after\) +per s +B/token *$", text, re.M)
    for method, stored in (("SFT", "-"), ("KD", "14,400"), ("SLIM", "14,400")):
        row = (method, *cells, "14.618", "14.538 (51k)", "12,399", stored)
        assert re.search("^" + " +".join(map(re.escape, row)) + " *$", text, re.M), text


def test_demo_leaves_other_peoples_folders_alone(tmp_path, settings):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "novel.txt").write_text("chapter one")
    with pytest.raises(ValueError, match="holds files that the demo did not write"):
        run(tmp_path, settings)
    assert (tmp_path / "text" / "novel.txt").read_text() == "chapter one"
    with pytest.raises(ValueError, match="give quick or settings, got both"):
        run_demo(tmp_path, quick=True, settings=settings)


def test_student_has_the_size_that_was_asked_for(first, settings):
    output_dir, results, _ = first
    model = AutoModelForCausalLM.from_pretrained(output_dir / "students" / "slim")
    assert model.config.hidden_size == settings.hidden_size
    assert results["students"]["slim"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.dtype == torch.float32
