"""The comparison of methods: its search, its resumption with a tiny teacher, and its tables by hand."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import pytest
from support.teachers import save_teacher
from transformers import AutoModelForCausalLM

from bench import records
from bench.claims import advice, claims, healed_sentence, weight_sentence
from bench.machine import one_at_a_time
from bench.reproduce import methods, methods_corpus, methods_plan, methods_training
from bench.reproduce.methods import Comparison
from bench.reproduce.methods_corpus import DEVELOPMENT, TEST, Corpus, Text
from bench.reproduce.methods_plan import (
    METHODS,
    STUDENTS,
    SUPPORTS,
    Method,
    Rows,
    Student,
    Unit,
    chosen,
    options_for_test,
    trials,
    tuning_units,
)
from bench.reproduce.methods_results import Results, methods_block
from slimkernels.durable import FileInUseError, lock_file
from slimkernels.store.errors import StoreLockedError

TINY = Student(passes=2, learning_rate=1e-2, hidden_size=16, num_layers=1, num_heads=2)


def fields_of(options: list[dict]) -> list[tuple]:
    return [(one["learning_rate"], one.get("kd_weight"), one.get("rest")) for one in options]


def test_methods_search_moves_one_option_at_a_time():
    method = Method("", {"method": "kd", "rest": "renorm"}, values={"rest": ("ghost",)})

    # The best options are a learning rate of 4, a weight of 3 and the rest "ghost".
    def loss(options):
        return (
            abs(math.log(options["learning_rate"] / 4.1))
            + abs(math.log(options["kd_weight"] / 3))
            - (options["rest"] == "ghost")
        )

    assert fields_of(list(itertools.islice(trials(method, 1.0, loss), 8))) == [
        (1.0, 1.0, "renorm"),
        (1.0, 3.0, "renorm"),
        (2.0, 3.0, "renorm"),
        (2.0, 3.0, "ghost"),
        (2.83, 3.0, "ghost"),
        # The second round. A weight of 9 does not help, and neither does one of 1.
        (2.83, 9.0, "ghost"),
        (2.83, 1.0, "ghost"),
        (5.66, 3.0, "ghost"),
    ]
    # A method without a weight has fewer moves; a constant loss ends its search.
    ended = list(trials(Method("", {"method": "sft"}, weighs=False), 1.0, lambda _: 0.0))
    assert [one["learning_rate"] for one in ended] == [1.0, 2.0, 0.5, 1.41, 0.707]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    teacher = save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")
    return Text(teacher=str(teacher), dtype="float32", prompts=24, heldout_every=8, max_new_tokens=10)


@pytest.fixture
def comparison(tmp_path, text, monkeypatch) -> Comparison:
    monkeypatch.setitem(STUDENTS, "random", TINY)
    monkeypatch.setitem(STUDENTS, "half", Student(layers=(0,), passes=2, learning_rate=1e-2))
    # The lock of benchmarks, which one that runs on this machine may hold.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    english = tmp_path / "english.txt"
    english.write_text(f"= A heading =\n{'A house stood by the river for many years. ' * 6}\n")
    return Comparison(tmp_path / "rows.jsonl", tmp_path / "work", text, english)


def test_methods_are_tuned_and_tested_once(comparison, monkeypatch):
    read, trained = [], []
    heldout, run_unit = comparison.corpus.heldout, methods.run_unit
    monkeypatch.setattr(comparison.corpus, "heldout", lambda part: read.append(part) or heldout(part))
    monkeypatch.setattr(methods, "run_unit", lambda unit, *args: trained.append(unit.name) or run_unit(unit, *args))
    monkeypatch.setattr(methods_plan, "TRIALS", 2)
    monkeypatch.setitem(methods_plan.BUDGETS, 60, ("slim", "kd_mean"))
    names = ["kd_mean", "slim"]
    assert comparison.tune("half", names, labels=60, most=1) == 1
    # A kill in the middle of a line.
    with comparison.out.open("a") as file:
        file.write('{"op": "tri')
    for _ in range(2):
        comparison.tune("half", names, labels=60)
    assert set(read) == {DEVELOPMENT}
    assert comparison.tune("half", names, labels=60) == 0
    assert comparison.test("half", names, [60], [1, 2], most=3) == 3
    assert comparison.test("half", names, [60], [1, 2]) == 1
    assert comparison.test("half", names, [60], [1, 2]) == 0
    assert TEST in read
    assert len(trained) == len(set(trained)) == 2 + 1 + 4

    rows = records.read(comparison.out)
    assert [row["op"] for row in rows] == ["trial", "trial", "choice", "trial", "choice", *["test"] * 4]
    slim, mean = (row for row in rows if row["op"] == "choice")
    best = min(rows[:2], key=lambda row: row["loss"])
    assert slim["options"] == best["options"]
    assert mean["options"]["kd_weight"] == pytest.approx(best["options"]["kd_weight"] * best["mean_weight"], rel=1e-3)
    assert (mean["options"]["token_weight"], mean["options"]["method"]) == ("none", "kd")
    for row in rows[-4:]:
        assert row["options"] == (slim if row["method"] == "slim" else mean)["options"]
        assert sum(document[0] for document in row["per_document"]) == row["heldout_labels"]
        assert sum(document[1] for document in row["per_document"]) / row["heldout_labels"] == pytest.approx(
            row["loss"], abs=1e-3
        )
        assert {"commit", "device", "transformers", "date", "alone", "seconds", "kl", "tokens"} <= set(row)
        # One paragraph, cut off, of which the first token is no label.
        assert (row["english"]["file"], row["english"]["heldout_labels"]) == ("english.txt", 9)
    assert len({row["loss"] for row in rows[-4:]}) == 4

    # Students are saved, and trained once more where they were not.
    comparison.students = comparison.out.parent / "students"
    assert comparison.test("half", ["slim"], [60], [1]) == 1
    assert comparison.test("half", ["slim"], [60], [1]) == 0
    again = records.read(comparison.out)[-1]
    assert again["loss"] == next(row["loss"] for row in rows if row["op"] == "test" and row["method"] == "slim")
    student = AutoModelForCausalLM.from_pretrained(comparison.students / "half-60-slim-1")
    measured = methods_training.measure(student, comparison.corpus.heldout(TEST))
    assert measured["loss"] == pytest.approx(again["loss"], rel=1e-6)


def test_methods_wait_for_a_store_that_another_run_writes(comparison, monkeypatch):
    corpus, attempts = comparison.corpus, []
    capture = methods_corpus.capture

    def locked_once(*args, **options):
        attempts.append(args)
        if len(attempts) == 1:
            raise StoreLockedError("held by another writer") from FileInUseError()
        capture(*args, **options)

    monkeypatch.setattr(methods_corpus, "capture", locked_once)
    monkeypatch.setattr(methods_corpus, "_LOCKED_S", 0.0)
    documents = corpus._heldout(DEVELOPMENT)
    assert len(corpus.heldout(DEVELOPMENT)) == len(documents)
    assert len(attempts) == 2


def test_methods_on_another_machine_learn_from_the_same_text(comparison, tmp_path, monkeypatch):
    documents = tmp_path / "documents"
    first, second = (Corpus(tmp_path / name, comparison.corpus.text, documents) for name in ("first", "second"))
    digest = first.digest(1, 60, TEST)
    assert sorted(path.name for path in documents.glob("*.jsonl")) == ["test.jsonl", "training-1.jsonl"]
    # A machine that would write another text.
    monkeypatch.setattr(methods_corpus, "generate_documents", lambda *_, **__: pytest.fail("written again"))
    # Another run has begun a line.
    with (documents / "training-1.jsonl").open("a") as file:
        file.write('{"prompt": "An')
    assert second.digest(1, 60, TEST) == digest
    assert len(second.training(1, 60, "top")) == len(second._learned(1, 60))


@pytest.mark.parametrize("name", ["sampled", "dense_kd", "gkd", "taid", "top_5_ghost", "all", "hidden"])
def test_methods_train_from_every_kind_of_teacher(comparison, name):
    method = (METHODS | SUPPORTS)[name]
    options = (
        METHODS[method.follows or name].options
        | method.options
        | {"learning_rate": 1e-2}
        | ({"max_new_tokens": 4} if name == "gkd" else {"kd_weight": 2.0})
    )
    unit = Unit("trial", "random", name, 60, 0, options)
    row = methods_training.run_unit(unit, comparison.corpus)
    assert row["perplexity"] < 400
    assert (
        row["loss_options"].items()
        >= {"ce_weight": 0.0 if name == "gkd" else 1.0, "kd_weight": 1.0 if name == "gkd" else 2.0}.items()
    )
    assert row["steps"] == 2 * math.ceil(row["documents"] / TINY.batch_size)


def test_methods_half_student_has_the_teachers_layers(comparison):
    half = methods_training.start(Student(layers=(1,)), comparison.corpus, seed=0)
    whole = comparison.corpus.teacher[0].state_dict()
    assert half.state_dict()["model.layers.0.mlp.up_proj.weight"].equal(whole["model.layers.1.mlp.up_proj.weight"])


def test_methods_seconds_count_where_the_machine_was_free(monkeypatch):
    # Processor seconds of all processes and of this one.
    for readings, alone in (([(100, 10), (120, 30)], True), ([(100, 10), (120, 20)], False), ([None, None], None)):
        monkeypatch.setattr(methods_training, "_processor_seconds", iter(readings).__next__)
        clock = methods_training.Clock()
        clock.stop()
        assert clock.alone is alone


def test_methods_benchmarks_take_turns(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with one_at_a_time():
        (path,) = tmp_path.iterdir()
        with path.open("ab") as other, pytest.raises(FileInUseError):
            lock_file(other, path)
    with path.open("ab") as other:
        lock_file(other, path)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("table --out missing.jsonl", "--out must be a file with rows, got missing.jsonl, which has none: run `tune`"),
        ("table --out .", "--out must be a JSONL file of rows: .*Is a directory"),
        ("table --out words.jsonl", "words.jsonl, line 2, must be a JSON object, got 'not one': remove the line"),
        ("table --out other.jsonl", "got other.jsonl, in which one has no settings"),
        ("test --out missing.jsonl --runs -1", "--runs: must be a whole number of at least 1, got '-1'"),
        ("test --out missing.jsonl --seeds 0 1", r"--seeds must not have 0, which chose the options, got \[0, 1\]"),
    ],
)
def test_methods_command_names_what_is_wrong(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("words.jsonl").write_text("{}\nnot one\n")
    Path("other.jsonl").write_text('{"op": "trial", "student": "half"}\n')
    monkeypatch.setattr("sys.argv", ["methods", *command.split()])
    with pytest.raises(SystemExit, match="2"):
        methods.main()
    assert re.search(said, capsys.readouterr().err)


def row_of(op: str, name: str, loss: float, seed: int = 0, labels: int = 25_000, counts=(1, 3), **fields) -> dict:
    """Makes a row of documents of 1 and 3 labels, whose KL is half of its loss."""
    unit = {"op": op, "student": "random", "method": name, "labels": labels, "seed": seed}
    row = unit | {"options": {"method": name, "learning_rate": 0.5}, "loss": loss, "perplexity": math.exp(loss)}
    row |= {
        "text": "one",
        "kl": loss / 2,
        "mean_weight": None,
        "seconds": 10.0,
        "alone": True,
        "heldout_labels": 4,
        "parameters": 7,
    }
    row |= {"teacher_perplexity": 5.0, "device": "d", "commit": "abc", "date": "2026-01-02T03"}
    settings = {"teacher": "t"}, {"layers": None, "num_layers": 2, "passes": 1, "batch_size": 4}
    row["settings"] = dict(zip(("text", "student"), settings, strict=True))
    row["per_document"] = [[count, count * loss, count * loss / 2] for count in counts]
    return row | fields


def rows_tested(losses: dict[str, float], **fields) -> list[dict]:
    rows = []
    for name, loss in losses.items():
        rows.append(row_of("choice", name, loss, trials=2))
        rows += [row_of("test", name, loss + 0.1 * (seed - 2), seed, **fields) for seed in (1, 2, 3)]
    return rows


def test_methods_choice_reads_no_test_row():
    options = [{"method": "kd", "learning_rate": rate} for rate in (0.5, 1.0)]
    units = [Unit("trial", "random", "kd", 25_000, 0, one) for one in options]
    losses = (2.0, 3.0)
    rows = [row_of("trial", "kd", loss, options=one) for loss, one in zip(losses, options, strict=True)]
    rows += [row_of("test", "kd", 0.1, seed, options=options[1]) for seed in (0, 1)]
    found = Rows(rows, rows[0]["settings"])
    assert chosen(found, units)["options"] == options[0]
    # Rows of other settings do not count.
    assert Rows(rows, {"text": 1}).of(units[0]) is None
    # Nor do rows of another text: of the one that is asked for, or else of the newest.
    assert Rows(rows, found.settings, lambda unit: "two").of(units[0]) is None
    newer = row_of("trial", "kd", 1.0, options=options[1], text="two")
    both = Rows([*rows, newer], found.settings)
    assert (both.of(units[0]), both.of(units[1])) == (None, newer)
    assert Rows([*rows, newer], found.settings, lambda unit: "one").of(units[1])["loss"] == 3.0
    with pytest.raises(ValueError, match="must be finished first: trial, random, jsd"):
        list(tuning_units(found, "random", "jsd", labels=25_000, seed=0))


def test_methods_differences_by_hand():
    rows = rows_tested({"kd": 2.0, "slim": 1.9, "sft": 2.5})
    # SLIM is worse on the second document: its differences are -0.1 on 1 label and +0.3 on each of 3 labels.
    for row in rows:
        if (row["op"], row["method"]) == ("test", "slim"):
            row["per_document"][1][1] += 3 * 0.4
    found = Results(rows, "random").differences(25_000)
    assert set(found) == {"slim", "sft"}
    slim = found["slim"].documents
    assert slim.value == pytest.approx((-0.1 + 3 * 0.3) / 4)
    # The resamples of two documents: twice the first, twice the second, or both.
    assert slim[1:3] == pytest.approx((-0.1, 0.3))
    assert found["sft"].documents[:3] == pytest.approx((0.5, 0.5, 0.5))
    assert found["sft"].seeds == pytest.approx((0.5, 0.5, 0.5))


def test_methods_differences_are_shown_by_seeds_too():
    counts = (1, 3, 1, 1, 1, 1)
    rows = rows_tested({"kd": 2.0, "slim": 1.9, "sft": 2.5}, counts=counts)
    for row in rows:
        if (row["op"], row["method"]) == ("test", "slim"):
            # Seed 1 differs by -0.4, the others by 0.05: every document by -0.1.
            row["loss"] += (0.0, -0.3, 0.15, 0.15)[row["seed"]]
            row["per_document"] = [[count, count * row["loss"], 0.0] for count in counts]
    found = Results(rows, "random").differences(25_000)
    assert found["slim"].documents[:3] == pytest.approx((-0.1, -0.1, -0.1))
    # t = 4.303 at two degrees of freedom, and a standard deviation of 0.15 sqrt(3).
    assert found["slim"].seeds == pytest.approx((-0.1, -0.1 - 4.303 * 0.15, -0.1 + 4.303 * 0.15))
    # Six documents that agree: 2 of 64 assignments of signs, times 2 by Holm.
    assert found["slim"].documents.p_value == found["sft"].documents.p_value == pytest.approx(2 * 2 / 64)
    alone = {name: change._replace(documents=change.documents._replace(p_value=0.04)) for name, change in found.items()}
    assert {name: change.is_shown for name, change in alone.items()} == {"slim": False, "sft": True}


def test_methods_students_of_different_texts_are_not_compared():
    old = rows_tested({"kd": 2.0, "slim": 1.9})
    # Another machine has begun to test on another text, whose held-out documents have other lengths.
    other = {"counts": (2, 2), "text": "two"}
    new = [row_of("test", name, 3.0, seed, **other) for name, seed in (("kd", 1), ("slim", 1), ("kd", 2))]
    assert Results(old + new, "random").tested("kd", 25_000).by_seed("perplexity") == pytest.approx((1.9, 2.0, 2.1))
    assert Results(old + new, "random").progress(25_000)[0] == 6
    # It has finished as many methods.
    new += [row_of("test", name, 3.0, seed, **other) for name, seed in (("slim", 2), ("kd", 3), ("slim", 3))]
    assert Results(old + new, "random").tested("slim", 25_000).by_seed("perplexity") == [3.0] * 3
    # The choices were made on two texts.
    trials = [row_of("trial", name, loss) for name, loss in (("kd", 2.0), ("slim", 1.9))]
    trials.append(row_of("trial", "sft", 2.5, text="two"))
    assert "Text 1: SFT on the teacher's text. Text 2: KD; SLIM." in methods_block(old + trials)


def test_methods_supports_follow_the_choice_of_kd():
    rows = rows_tested({"kd": 2.0})
    kd = rows[0]["options"]
    found = Rows(rows, rows[0]["settings"])
    assert options_for_test(found, "random", "top_5_ghost") == kd | {"rest": "ghost"}
    assert options_for_test(found, "random", "all") == kd
    assert options_for_test(found, "half", "all") is None
    rows += [
        row_of("test", name, loss, seed, options=kd | SUPPORTS[name].options)
        for name, loss in (("all", 1.0), ("top_5_ghost", 1.1))
        for seed in (1, 2, 3)
    ]
    lines = methods_block(rows).splitlines()
    assert "| all, from the teacher itself | 2.72 |  |  |  | 0.500 |  | 10 |" in lines
    ghost = "| top 5, with the rest as one more entry | 3.00 | +10.5 [+10.5, +10.5] | [+10.5, +10.5] | 0.5000 | 0.550 |"
    assert any(line.startswith(ghost) for line in lines)


def test_methods_that_are_the_same_share_their_trainings():
    options = {"method": "kd", "rest": "renorm", "learning_rate": 0.5}
    rows = [row_of("test", "kd", 2.0, seed, options=options) for seed in (1, 2, 3)]
    rows.append(row_of("choice", "kd", 2.0, options=options, trials=2))
    found = Rows(rows, rows[0]["settings"])
    names = ["kd", "top_renorm", "top_ghost", "all"]
    units = list(methods_plan.test_units(found, "random", names, [25_000], [1]))
    assert [unit.method for unit in units] == ["kd", "kd", "top_ghost", "all"]
    assert "| 5 %, renormalised | 7.39 |" in methods_block(rows)


def test_methods_holm_by_hand():
    rows = rows_tested({"kd": 2.0, "slim": 1.8, "jsd": 2.1, "sft": 2.5}, counts=(1, 3, 1, 1, 1))
    for row in rows:
        if (row["op"], row["method"]) == ("test", "jsd"):
            row["per_document"][1][1] -= 3 * 0.2
    found = Results(rows, "random").differences(25_000)
    # All documents of SLIM and SFT differ in the same direction, as in 2 of the 32 assignments of signs. JSD's sums of
    # 0.1, -0.3, 0.1, 0.1 and 0.1 add up to 0.1, which every assignment reaches. Holm: times 3, times 2, and at most 1.
    assert {name: one.documents.p_value for name, one in found.items()} == pytest.approx(
        {"slim": 3 * 2 / 32, "sft": 3 * 2 / 32, "jsd": 1.0}
    )


def test_methods_block_by_hand():
    rows = [row_of("trial", "kd", 1.5 + rate, options={"method": "kd", "learning_rate": rate}) for rate in (0.5, 1.0)]
    rows += rows_tested({"slim": 1.9}, english={"loss": math.log(3)}) + rows_tested({"kd": 2.0, "kd_mean": 2.0})
    block = methods_block(rows)
    lines = block.splitlines()
    change = "-9.5 [-9.5, -9.5] | [-9.5, -9.5] | 1.0000"
    assert f"| SLIM | 6.69 | {change} | 0.950 | -0.050 [-0.050, -0.050] | 3.00 | 10 |" in lines
    assert "| KD | 7.39 |  |  |  | 1.000 |  |  | 10 |" in lines
    total = 3 * len(METHODS)
    left = f"9 of {total} with 25,000 labels, 0 of 18 with 100,000 labels, 0 of 9 with 400,000 labels"
    assert f"Not finished: of the test's trainings, {left} were run." in lines
    assert "| KD | learning_rate 0.5 | 7.39 | 1.000 | 2 of 6 |" in lines
    assert "With 25,000 labels. No effect of the adaptive weight is shown, compared with KD" in block
    # Without a seed of SLIM's nothing is said of it.
    rows = [row for row in rows if (row["op"], row["method"], row["seed"]) != ("test", "slim", 3)]
    rows.append(row_of("trial", "slim", 1.9))
    block = methods_block(rows)
    assert "The adaptive weight" not in block
    assert "| SLIM |" not in block.partition("<details>")[0]
    assert f"trainings, 8 of {total} with" in block


def test_claims_are_judged_by_their_intervals():
    def rows(**losses: float) -> list[dict]:
        return rows_tested(losses, counts=(1, 3, 2, 1, 4, 2, 1, 1))

    def verdicts(found: list[dict]) -> list[str]:
        return [claim.verdict for claim in claims(found, [])]

    assert set(verdicts([])) == {"not measured"}
    # Eight documents that all agree are enough for p = 2 / 256 times the three comparisons.
    found = rows(slim=2.0, sft=2.5, kd=1.9, kd_mean=2.0)
    assert verdicts(found)[:3] == ["shown", "contradicted", "not shown"]
    (_, claim, measured, _, _), *_ = claims(found, [])
    assert claim == "the teacher's logits help beyond its text"
    assert measured.endswith(": -39.3 % [-39.3, -39.3], over seeds [-39.3, -39.3]")
    assert weight_sentence([]) == healed_sentence(found) == ""
    assert weight_sentence(found).startswith("Does the adaptive weight help? No: SLIM to tuned KD, +10.5 %")
    logits, weight, options = advice(found).splitlines()
    assert logits.startswith("- Learn from the teacher's logits, not from its text alone. KD to SFT")
    assert weight.startswith('- Use `method="kd"`: the adaptive weight of `method="slim"` makes the student worse.')
    assert options.endswith("chosen for KD: for a new student of random weights, learning_rate 0.5.")
    healed = healed_sentence([row | {"student": "half"} for row in found])
    assert (
        "end at 82 % higher perplexity without such logits than with them (95 % interval over 3 seeds: 82 to 82 %;"
        in healed
    )
    # A kind of student that does not agree takes the verdict away.
    other = [row | {"student": "half"} for row in rows(slim=2.0, sft=2.0)]
    assert verdicts(found + other)[0] == "not shown"

    kd = found[0]["options"] | {"method": "kd"}
    counts = [document[0] for document in found[-1]["per_document"]]
    supports = [row_of("test", "all", 2.0 + 0.1 * (seed - 2), seed, counts=counts, options=kd) for seed in (1, 2, 3)]
    for loss, verdict in ((2.01, "shown"), (2.03, "contradicted")):
        assert verdicts(rows(kd=loss) + supports)[3] == verdict
