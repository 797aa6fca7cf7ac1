"""The students' answers to multiple-choice questions: what is asked, and the table by hand."""

from __future__ import annotations

import importlib.util
import json

import pytest
from support.teachers import make_teacher, make_tokenizer

from bench.claims import claims
from bench.reproduce.downstream import ask, models
from bench.reproduce.downstream_table import downstream_table


def row_of(method: str, task: str, right: str, student: str | None = "half", seed: int = 1, labels: int = 60) -> dict:
    row = {"student": student, "method": method, "labels": labels, "seed": seed, "task": task, "right": right}
    return (
        row
        | {"guessing": 0.25, "num_samples": len(right), "limit": 4, "lm_eval": "1", "device": "d"}
        | {
            "commit": "abc",
            "date": "2026-01-02T03",
        }
    )


def test_downstream_finds_saved_students(tmp_path):
    (tmp_path / "half-60-kd_mean-2").mkdir()
    (tmp_path / "half-60-kd-2.tmp").mkdir()
    teacher, before, (fields, folder) = models(tmp_path, "name")
    assert (teacher[0]["method"], before[0]["method"]) == ("teacher", "before")
    assert fields == {"student": "half", "method": "kd_mean", "labels": 60, "seed": 2, "teacher": "name"}
    assert folder == tmp_path / "half-60-kd_mean-2"
    (tmp_path / "half-60-nope-2").mkdir()
    with pytest.raises(ValueError, match=r"named KIND-LABELS-METHOD-SEED, .*got .*half-60-nope-2"):
        list(models(tmp_path, "name"))


def test_downstream_table_by_hand():
    rows = [row_of("teacher", task, "1110", None, 0, 0) for task in ("a", "b")]
    for seed, right in ((1, "1100"), (2, "1000")):
        rows += [row_of("kd", "a", right, seed=seed), row_of("kd", "b", "0000", seed=seed)]
        rows += [row_of("sft", task, "0000", seed=seed) for task in ("a", "b")]
    # A model that was not asked every task is left out, and so are rows of another limit.
    rows += [row_of("slim", "b", "1111")]
    rows += [row_of("top_5_ghost", task, "0000") for task in ("a", "b")]
    rows.insert(0, row_of("sft", "a", "1111") | {"limit": 3})
    lines = downstream_table(rows).splitlines()
    assert lines[0] == "| | a (4) | b (4) | all questions | minus SFT |"
    assert lines[2].startswith("| the teacher | 75.0 [25.0, 100.0] | 75.0 [25.0, 100.0] | 75.0 [")
    # The mean over seeds of each question: 1, 0.5, 0, 0; two of eight differ, in one direction.
    kd = next(line for line in lines if "KD" in line)
    assert any("layers, top 5, with the rest as one more entry, 60 labels" in line for line in lines)
    assert kd.startswith("| half of the teacher's layers, KD, 60 labels | 37.5 [0.0, ")
    assert "| +18.8 [+0.0, +" in kd
    # Holm: the p-value of 0.5 times the two methods that are compared.
    assert kd.endswith("p 1.00 |")
    assert "| guessing | 25.0 | 25.0 | 25.0 |  |" in lines
    assert not any("SLIM" in line for line in lines)


def test_downstream_claim_is_judged_by_its_interval():
    def verdict(slim: str, kd: str) -> tuple[str, str]:
        rows = [row_of(method, "a", right) for method, right in (("slim", slim), ("kd", kd))]
        found = next(claim for claim in claims([], [], rows) if "downstream" in claim.claim)
        return found.verdict, found.measured

    shown, measured = verdict("1" * 20, "0" * 20)
    assert (shown, measured.partition(": ")[2]) == ("shown", "+100.0 [+100.0, +100.0]")
    assert verdict("0" * 20, "1" * 20)[0] == "contradicted"
    assert verdict("01" * 10, "10" * 10)[0] == "not shown"
    assert claims([], [])[-4].verdict == "not measured"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_downstream_asks_a_real_model(tmp_path):
    (tmp_path / "arc").mkdir()
    questions = [
        {"query": f"Question: What is {index}?\nAnswer:", "choices": ["a house", "a river", "a cat"], "gold": index % 3}
        for index in range(5)
    ]
    (tmp_path / "arc/arc_easy.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    found = ask(make_teacher(), make_tokenizer(), "arc_easy", tmp_path, limit=4)
    assert len(found["right"]) == found["num_samples"] == 4
    assert found["accuracy"] == found["right"].count("1") / 4
    assert found["guessing"] == pytest.approx(1 / 3)
