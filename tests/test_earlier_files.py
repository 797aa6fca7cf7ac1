"""Files that version 0.1.0 wrote before its modules were moved into rooms are read and continued.

``tests/data/earlier`` holds a demonstration with a tiny teacher (which is not there any more), its stores, a trace of a
search, a side-by-side run and a training checkpoint.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.teachers import save_teacher
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM

from slimkernels.demo import DemoSettings, run_demo
from slimkernels.evaluate import evaluate_store
from slimkernels.evaluate.decoders import DecoderSettings
from slimkernels.evaluate.models import find_models
from slimkernels.evaluate.records import read_records
from slimkernels.evaluate.runner import Plan, load_run, rescore, run
from slimkernels.evaluate.tasks import load_task
from slimkernels.models.load import load_teacher
from slimkernels.search import PathFinder, PathFinderConfig, RepetitionCheck, TransformersEngine, read_trace
from slimkernels.store import Store, StoreDataset, StoreWriter, collate_documents, verify
from slimkernels.trainer import SlimConfig, SlimTrainer, make_student

pytestmark = pytest.mark.cpu_kernels
METHODS = ("sft", "kd", "slim")
EARLIER = Path(__file__).parent / "data" / "earlier"


@pytest.fixture
def earlier(tmp_path, monkeypatch) -> Path:
    """A copy of the files, as the working directory: they name each other by relative paths."""
    folder = tmp_path / "earlier"
    shutil.copytree(EARLIER, folder)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_demonstration_in_its_folder_is_made_again_and_says_so(earlier, tmp_path):
    """It trained other students, so none of its phases serves the demonstration of today."""
    teacher = save_teacher(tmp_path / "teacher")
    sizes = {"prompts": 4, "heldout_every": 2, "tokens": 200, "max_new_tokens": 8, "epochs": 1, "evaluations": 1}
    settings = DemoSettings(str(teacher), "float32", layers=(0,), **sizes)
    output = io.StringIO()
    results = run_demo("demo", settings=settings, console=Console(file=output, width=80))
    printed = output.getvalue()
    for name, folder in (("text", "text"), ("store", "store"), *((f"student {m}", f"students/{m}") for m in METHODS)):
        assert f"{name}: demo/{folder} was made with other settings (" in printed, name
    assert printed.count("so it is made again") == 5
    assert "reused" not in printed
    assert json.loads(Path("demo/results.json").read_text()) == results
    model = AutoModelForCausalLM.from_pretrained("demo/students/kd")
    assert evaluate_store(model, Store("demo/store/heldout"), batch_size=16)["perplexity"] == pytest.approx(
        results["students"]["kd"]["curve"][-1]["perplexity"], rel=1e-5
    )


def test_store_is_read_verified_and_appended_to(earlier):
    path, heldout = earlier / "demo/store/train", Store("demo/store/heldout")
    verify(path)
    # Checkpoints hold these.
    assert Store(path).fingerprint == "b43a4319a4796167ca6873ceb0577c56"
    assert heldout.fingerprint == "451de34d0e8fa475c33a28b3175d68f2"
    results = json.loads((earlier / "demo/results.json").read_text())
    for method, student in results["students"].items():
        model = AutoModelForCausalLM.from_pretrained(f"demo/students/{method}")
        metrics = evaluate_store(model, heldout)
        for name in ("perplexity", "kl_ghost", "teacher_perplexity", "teacher_mass", "tokens"):
            assert metrics[name] == pytest.approx(student["curve"][-1][name], rel=1e-4), (method, name)
    documents = list(Store(path))
    assert all(document.teacher.rest_lse is None for document in documents)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["version"] == 1
    settings = ("vocab_size", "tokenizer_fingerprint", "teacher", "selection", "temperatures", "codec")
    with StoreWriter(path, **{name: manifest[name] for name in settings}) as writer:
        assert documents[0].input_ids in writer
        other = documents[0].input_ids.flip(0)
        teacher = dataclasses.replace(documents[0].teacher, rest_lse=torch.zeros_like(documents[0].teacher.lse))
        writer.add(other, documents[0].positions, teacher)
    verify(path)
    again = Store(path)
    assert len(again) == len(documents) + 1
    assert again[len(documents)].input_ids.tolist() == other.tolist()
    # It is continued in its own version, so that the release that made it still reads it.
    assert again.manifest["version"] == 1
    assert all(document.teacher.rest_lse is None for document in again)
    assert {*again.manifest["shards"][-1]} == {*manifest["shards"][0]}


def test_store_and_a_new_one_are_trained_on_together(earlier, tmp_path):
    earlier_store = Store("demo/store/train")
    settings = dataclasses.asdict(earlier_store.settings)
    document = earlier_store[0]
    rest_lse = torch.full_like(document.teacher.lse, -3.0)
    with StoreWriter(tmp_path / "new", **settings) as writer:
        writer.add(
            document.input_ids.flip(0), document.positions, dataclasses.replace(document.teacher, rest_lse=rest_lse)
        )
    both = ConcatDataset([StoreDataset(earlier_store), StoreDataset(tmp_path / "new")])
    teacher = collate_documents([both[0], both[len(both) - 1]])["teacher"]
    rows = len(document.positions)
    assert teacher.rest_lse[:rows].isnan().all()
    assert teacher.rest_lse[rows:].eq(-3.0).all()


def test_trace_is_read_and_continued(earlier):
    expected = json.loads((earlier / "trace_results.json").read_text())
    assert [len(traced.progress.tree) > 3 for traced in read_trace("trace.jsonl").questions] == [True, True]
    config = PathFinderConfig(branching_factor=3, beam=2, max_depth=2, max_step_tokens=4, seed=1)

    def solve(path: str):
        engine = TransformersEngine(*load_teacher("model"))
        finder = PathFinder(engine, config, checks=[RepetitionCheck(0.99)])
        return finder.solve(["ab c", "what is d?"], trace=path)

    before = Path("trace.jsonl").read_bytes()
    assert [[r.answer, r.text, r.num_tokens] for r in solve("trace.jsonl")] == expected
    assert Path("trace.jsonl").read_bytes() == before
    lines = before.splitlines(keepends=True)
    Path("cut.jsonl").write_bytes(b"".join(lines[:-2]))
    assert len(solve("cut.jsonl")) == 2
    assert Path("cut.jsonl").read_bytes().startswith(b"".join(lines[:-2]))


def test_side_by_side_run_is_reported_rescored_and_not_made_again(earlier, monkeypatch):
    written = read_records("run/records.jsonl")
    described, records = load_run("run")
    assert described["unfinished"] == []
    assert sorted(record.key for record in records) == sorted(record.key for record in written)
    assert {r.key: (r.answers, r.scores) for r in rescore("run")[1]} == {r.key: (r.answers, r.scores) for r in written}
    plan = Plan(
        find_models(["model"]),
        tasks=[load_task(name, Path("data"), 2) for name in ("gsm8k", "commonsenseqa")],
        decoders=["greedy", "self-consistency"],
        seeds=[0],
        shots=0,
        batch_questions=2,
        settings=DecoderSettings(max_steps=2, max_step_tokens=5, num_chains=2, branching_factor=2, beam=2),
    )
    monkeypatch.setattr("slimkernels.models.load.load_teacher", lambda *_, **__: pytest.fail("a model was loaded"))
    assert {r.key: r.output for r in run(plan, "run")} == {r.key: r.output for r in written}


def test_training_continues_from_a_checkpoint(earlier):
    store = Store("demo/store/train")
    args = SlimConfig(
        output_dir="training",
        method="slim",
        # The default when the checkpoint was written.
        kd_weight=1.0,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        logging_steps=1,
    )
    student = make_student(vocab_size=store.vocab_size, hidden_size=8, num_layers=1, num_heads=2)
    trainer = SlimTrainer(model=student, args=args, train_dataset=store)
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]
