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
from slimkernels.demo.report import curve_table, results_table, texts_table
from slimkernels.demo.speed import LEAST_TOKENS, MOST_TOKENS, Speed
from slimkernels.evaluate import evaluate_store
from slimkernels.models.make_student import drop_layers
from slimkernels.store import Store, verify
from slimkernels.teacher import generate_documents, load_model, load_teacher, shipped_prompts


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> DemoSettings:
    teacher = save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")
    return DemoSettings(
        teacher=str(teacher),
        teacher_dtype="float32",
        layers=(1,),
        prompts=12,
        heldout_every=4,
        tokens=800,
        max_new_tokens=12,
        epochs=3,
        batch_size=4,
        learning_rate=5e-3,
        evaluations=3,
        shown_tokens=6,
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
    assert set(starts) == {results["before"]["perplexity"]}, "the three students start from the same weights"
    ends = [student["curve"][-1]["perplexity"] for student in results["students"].values()]
    assert len(set(ends)) == 3, "and end elsewhere"
    for words in ("perplexity", "KL to the teacher: nats per token", "per s", "SLIM", "slimkernels train --store"):
        assert words in printed, words


def test_kd_and_slim_give_the_divergence_the_same_weight(first):
    """SLIM's mean is that of its own training, so nothing is chosen on the held-out documents."""
    _, results, printed = first
    sft, kd, slim = (results["students"][method] for method in ("sft", "kd", "slim"))
    weights = [entry["weight"] for entry in slim["logs"]]
    assert len(weights) == slim["curve"][-1]["step"]
    assert len(set(weights)) > 1
    assert slim["kd_weight"] == pytest.approx(3 * sum(weights) / len(weights))
    assert kd["kd_weight"] == pytest.approx(slim["kd_weight"], abs=1e-4)
    assert sft["kd_weight"] == 0
    assert {entry["weight"] for entry in kd["logs"]} == {1.0}
    factor = f"{kd['kd_weight']:.2f}"
    assert f"KL x {factor}, the mean of slim's weights" in printed
    assert re.search(rf"^KD .* {factor} ", printed, re.M)
    assert re.search(rf"^SLIM .* {factor} \(mean\) ", printed, re.M)


def test_every_model_continues_a_held_out_prompt(first, settings, tmp_path):
    """By the same draws, so that the models' texts differ by the models alone."""
    output_dir, results, printed = first
    prompt = shipped_prompts()[0]
    teacher, tokenizer = load_teacher(settings.teacher)
    models = {"teacher": teacher, "before": drop_layers(teacher, settings.layers).eval()}
    models |= {method: load_model(output_dir / "students" / method) for method in results["students"]}
    texts = {"teacher": results["teacher_text"], "before": results["before"]["shown"]}
    texts |= {method: student["shown"] for method, student in results["students"].items()}
    for name, model in models.items():
        path = tmp_path / f"{name}.jsonl"
        sizes = {"max_new_tokens": settings.shown_tokens, "temperature": 0.8, "top_k": 40, "num_documents": 1}
        generate_documents(model, tokenizer, [prompt], path, **sizes)
        assert texts[name] == json.loads(path.read_text())["text"], name
    assert len(set(texts.values())) >= 2
    assert f'"{prompt}", continued' in printed


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
    assert len(stores["train"]) + len(stores["heldout"]) == len(lines)
    assert settings.tokens <= sum(len(line["input_ids"]) for line in lines) < settings.tokens + 60
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
    assert printed.count("reused from an earlier run") == 6
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps

    slower, printed = run(output_dir, dataclasses.replace(settings, learning_rate=1e-4))
    assert printed.count("reused from an earlier run") == 3
    for method in ("sft", "kd", "slim"):
        folder = output_dir / "students" / method
        assert f"student {method}: {folder} was made with other settings (" in printed
    assert "(learning_rate), so it is made again" in printed
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
        f"{settings.teacher} loses all but 1 of its layers",
        f"loading the teacher {settings.teacher}",
        "text: the teacher writes 800 tokens",
        "tokens",
    ]
    steps += ["store: the top 5% of the teacher's logits of", "tokens ", "before: the teacher's 1 kept layers"]
    steps += ["student sft: 3 epochs over", "steps", "student slim:", "student kd:", "finished in"]
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
    assert (given.student, given.layers) == (settings.teacher, list(settings.layers))
    options = {("lr_scheduler_type", "cosine"), ("warmup_steps", 0.1), ("bf16", False), ("use_cpu", True)}
    assert options <= set(given.option)
    assert main(words[words.index("slimkernels") + 1 :]) == 0
    assert "eval_perplexity" in capsys.readouterr().out
    assert (output_dir / "students" / "healed-with-rest" / "tokenizer.json").exists()


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
def test_tables_fit_80_columns(scale):
    """At the sizes of the default run, and with perplexities that differ by orders of magnitude."""
    before = {"perplexity": 6407.1 * scale, "kl_ghost": 6.6, "teacher_perplexity": 5.74, "shown": "Once re\x1b[2J" * 30}
    curve = [
        before | {"tokens_seen": 0},
        {"perplexity": 734.61 * scale, "kl_ghost": 14.618, "tokens_seen": 102_580},
    ]
    student = {"curve": curve, "train_tokens_per_second": 12_398.9, "kd_weight": 0.731, "shown": "Once upon " * 20}
    results = {
        "heldout": {"documents": 1032, "rows": 103_857},
        "before": before,
        "students": dict.fromkeys(("sft", "kd", "slim"), student),
        "prompt": "Once",
        "teacher_text": "Once" + "x" * 200,
    }
    output = io.StringIO()
    console = Console(file=output, width=80)
    for table in (results_table, curve_table, texts_table):
        console.print(table(results))
    text = output.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "\x1b" not in text
    start, end = {1: ("6,407", "734.6"), 1000: ("6.4e+06", "734,610"), 1e5: ("6.4e+08", "7.3e+07")}[scale]
    rows = [("before", start, "6.600", "-", "0"), ("teacher", "5.7", "0.000")]
    for method, weight in (("SFT", "-"), ("KD", "0.73"), ("SLIM", "0.73 (mean)")):
        rows.append((method, end, "14.618", weight, "102,580", "12,399"))
    rows.append(("102,580", *[f"{end}, 14.62"] * 3))
    for row in rows:
        assert re.search("^ *" + " +".join(map(re.escape, row)) + " *$", text, re.M), (row, text)


def test_speed_decides_the_number_of_tokens(first, settings, tmp_path):
    """The measurement is part of the folder: the same command reuses it, and with it everything else."""
    timed = dataclasses.replace(settings, tokens=None, seconds=0.001, epochs=1, evaluations=1)
    results, printed = run(tmp_path, timed)
    assert results["settings"]["tokens"] == LEAST_TOKENS
    assert set(results["speed"]) == {"writes", "scores", "trains"}
    assert all(math.isfinite(rate) and rate > 0 for rate in results["speed"].values())
    assert f"time for {LEAST_TOKENS:,} tokens" in printed
    lines = (tmp_path / "text" / "documents.jsonl").read_text().splitlines()
    assert LEAST_TOKENS <= sum(len(json.loads(line)["input_ids"]) for line in lines) < LEAST_TOKENS + 60
    again, printed = run(tmp_path, timed)
    assert again == results
    assert printed.count("reused from an earlier run") == 7


def test_speed_of_slower_machines_leaves_fewer_tokens():
    work = {"trained": 5.0, "measured": 2.0}
    speed = Speed(writes=500.0, scores=1500.0, trains=1000.0)
    # 1 / 500 + 3 / 1500 + 5 / 1000 seconds for each token.
    assert speed.tokens_in(91.0, **work) == 10_000
    assert Speed(*(rate / 2 for rate in speed)).tokens_in(91.0, **work) == 5_000
    assert speed.tokens_in(94.0, **work) == 10_000
    assert speed.tokens_in(1.0, **work) == LEAST_TOKENS
    assert speed.tokens_in(1e6, **work) == MOST_TOKENS


def test_demo_leaves_other_peoples_folders_alone(tmp_path, settings):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "novel.txt").write_text("chapter one")
    with pytest.raises(ValueError, match="holds files that the demo did not write"):
        run(tmp_path, settings)
    assert (tmp_path / "text" / "novel.txt").read_text() == "chapter one"
    with pytest.raises(ValueError, match="give quick or settings, got both"):
        run_demo(tmp_path, quick=True, settings=settings)


def test_students_are_the_layers_that_were_asked_for(first, settings):
    output_dir, results, _ = first
    model = AutoModelForCausalLM.from_pretrained(output_dir / "students" / "slim")
    assert model.config.num_hidden_layers == len(settings.layers)
    assert results["students"]["slim"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.dtype == torch.float32
