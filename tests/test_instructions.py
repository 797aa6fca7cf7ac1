"""The experiment on following instructions: its data, plan and tables by hand, and a whole run with a tiny teacher."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math

import pytest
from support import served, teachers

from bench import records
from bench.claims import claims
from bench.reproduce import instructions as reproduce_instructions
from bench.reproduce import instructions_plan
from bench.reproduce.instructions import Settings
from bench.reproduce.instructions_data import Example, documents, read_examples, spread, without
from bench.reproduce.instructions_judge import PairJudge, agrees, preference, serve
from bench.reproduce.instructions_plan import METHODS, TEST_SEEDS, Rows, Unit, chosen, trials
from bench.reproduce.instructions_table import instructions_table
from bench.reproduce.methods_plan import Student
from slimkernels.evaluate.scoring import rouge_l

ALPACA = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Response:\n"
needs_httpx2 = pytest.mark.skipif(importlib.util.find_spec("httpx2") is None, reason="needs the extra server")
needs_rouge = pytest.mark.skipif(importlib.util.find_spec("rouge_score") is None, reason="needs rouge-score")
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def has_minillm() -> bool:
    with contextlib.suppress(ImportError):
        import slimkernels.trainer.minillm  # noqa: F401

        return True
    return False


def write(path, *rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": ALPACA.format("Add 1 and 2."), "response": " 3\n"}, Example("Add 1 and 2.", "3")),
        ({"prompt": ALPACA.format("Add.\n\n### Input:\n1 and 2"), "answer": "3"}, Example("Add.\n\n1 and 2", "3")),
        ({"prompt": "Add 1 and 2.", "answer": "3"}, Example("Add 1 and 2.", "3")),
        ({"instruction": "Add.", "context": "1 and 2", "response": "3"}, Example("Add.\n\n1 and 2", "3")),
        ({"instruction": "Add.", "input": "", "output": "3"}, Example("Add.", "3")),
        ({"instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}]}, Example("Add.\n\n1, 2", "3")),
        ({"prompt": "No answer", "response": " "}, None),
    ],
)
def test_instructions_layouts(tmp_path, record, expected):
    write(tmp_path / "data.jsonl", record)
    assert read_examples(tmp_path / "data.jsonl") == ([] if expected is None else [expected])


def test_instructions_of_turns_have_references_in_the_same_folder(tmp_path):
    write(tmp_path / "question.jsonl", *({"question_id": n, "turns": [f"Question {n}", "More"]} for n in (1, 2)))
    write(tmp_path / "reference_judge.jsonl", {"question_id": 2, "choices": [{"turns": ["Two", "Other"]}]})
    assert read_examples(tmp_path / "question.jsonl") == [Example("Question 2", "Two")]


def test_instructions_of_another_layout_are_named(tmp_path):
    write(tmp_path / "data.jsonl", {"prompt": "a", "answer": "b"}, {"text": "c"})
    with pytest.raises(ValueError, match=r"data.jsonl, record 2: unknown layout with fields \['text'\]"):
        read_examples(tmp_path / "data.jsonl")


def test_instructions_held_out_are_not_trained_on():
    training = [Example("Add  one", "2"), Example("ADD ONE", "3"), Example("Other", "4"), Example("other", "5")]
    assert without(training, [Example("add one", "x")]) == [Example("Other", "4")]


def make_tokenizer():
    tokenizer = teachers.make_tokenizer()
    tokenizer.chat_template = "<|start|>{{ messages[0].content }}:"
    return tokenizer


def test_instructions_documents_end_in_the_response_and_the_end_of_text():
    tokenizer = make_tokenizer()
    [document] = documents(tokenizer, [Example("Say hi", "Hello")])
    assert tokenizer.decode(document[: document.prompt_length]) == "<|start|>Say hi:"
    assert tokenizer.decode([document[position] for position in document.labels]) == "Hello" + teachers.END


def test_instructions_are_spread_over_a_file():
    assert [spread(range(6), count) for count in (3, 4, 9)] == [[0, 2, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4, 5]]


@needs_rouge
def test_instructions_rouge_by_hand():
    # The cases are 3 of 6 and of 3 words, stemming, no word that the tokenizer keeps, and a broken order.
    references = ["the cat sat on the mat", "cats running", "日本", "one two three four"]
    responses = ["the cat sat", "cat runs", "日本", "four three two one"]
    assert list(map(rouge_l, responses, references)) == pytest.approx([2 / 3, 1, 0, 0.25])


class Judge(served._Server):
    """A server that prefers the longer response, and response A where they are equally long."""

    def reply(self, path, body):
        said = body["messages"][0]["content"].split("[Response A]\n")[1]
        a, b = said.split("\n\nWhich response")[0].split("\n\n[Response B]\n")
        of_a = 0.75 if len(a) >= len(b) else 0.25
        top = [{"token": " A", "logprob": math.log(0.8 * of_a)}, {"token": "B", "logprob": math.log(0.8 * (1 - of_a))}]
        top.append({"token": "The", "logprob": math.log(0.2)})
        reply = {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}
        return 200, {"Content-Type": "application/json"}, json.dumps(reply)


@needs_httpx2
def test_instructions_judge_sees_both_orders():
    with Judge() as server, PairJudge(server.url, "j", "digest") as judge:
        verdicts = [judge.compare("Say it.", *pair) for pair in (("long", "so"), ("so", "long"), ("so", "it"))]
    assert verdicts == [pytest.approx((0.75, 0.75)), pytest.approx((0.25, 0.25)), pytest.approx((0.75, 0.25))]
    assert [(preference(verdict), agrees(verdict)) for verdict in verdicts] == [(1, True), (0, True), (0.5, False)]
    assert (preference((0.75, 0.5)), agrees((0.75, 0.5))) == (1, False)


IDENTITY = {"settings": dataclasses.asdict(Settings(labels=100)), "data": "a"}
RATE = {"learning_rate": 0.5}


def row_of(op, method, value=0.0, student="half", **changed):
    row = {"op": op, "method": method, "student": student, "budget": "labels", "labels": 100, "seed": 1}
    row |= {"options": RATE, "labels_per_step": 10.0, "trials": 3, "processor_seconds": 10.0, "steps": 5}
    row |= {"labels_learned": 100, "documents": 9, "labels_stored": 99, "device": "cpu", "threads": 1, "commit": "c"}
    row |= {"date": "2026-01-01T", "non_ascii": {"response": 1, "reference": 3}}
    values = list(value) if isinstance(value, tuple) else [value] * 8
    row |= {"rouge_l": sum(values) / 8, "scores": {"a": values[:5], "b": values[5:]}}
    return IDENTITY | row | changed


def rows_tested(**values):
    """Rows of three seeds; MiniLLM takes four times as long as the other methods."""
    rows = [row_of("choice", method) for method in METHODS]
    for (method, value), seed in itertools.product(values.items(), TEST_SEEDS):
        seconds = 40.0 if method == "minillm" else 10.0
        rows.append(row_of("test", method, value, seed=seed, processor_seconds=seconds))
    return rows


def test_instructions_budget_of_seconds_follows_from_that_of_labels():
    def missing(rows):
        return [Rows(rows, IDENTITY).missing("half", method, 1, 100) for method in ("sft", "minillm")]

    unit = Unit("test", "half", "minillm", "labels", 100, 1, RATE)
    sft = dataclasses.replace(unit, method="sft")
    assert missing([]) == [None, None]
    assert missing(rows_tested()) == [sft, unit]
    # Until SLIM's time is known.
    assert missing(rows_tested(sft=1, minillm=1)) == [None, None]
    rows = rows_tested(sft=1, minillm=1, slim=1)
    # SFT takes SLIM's time, so that it needs no other student.
    assert missing(rows) == [None, dataclasses.replace(unit, budget="seconds", labels=25)]
    assert Rows(rows, IDENTITY).tested("half", "sft", "seconds", 1)["budget"] == "labels"
    assert Rows(rows, IDENTITY).tested("half", "minillm", "seconds", 1) is None
    rows.append(row_of("test", "minillm", 2.0, budget="seconds", labels=25))
    assert missing(rows) == [None, None]
    assert Rows(rows, IDENTITY).tested("half", "minillm", "seconds", 1) == rows[-1]
    assert Rows(rows, IDENTITY | {"data": "b"}).tested("half", "sft", "labels", 1) is None
    rows.append(row_of("choice", "sft", options={"learning_rate": 0.25}))
    assert Rows(rows, IDENTITY).tested("half", "sft", "labels", 1) is None


def test_instructions_choose_the_highest_rouge():
    assert Rows([], IDENTITY).choice("minillm") is None
    rows = [row_of("trial", "kd", value, options={"learning_rate": value}) for value in (0.25, 0.75, 0.5)]
    assert [unit.options["learning_rate"] for unit in trials("minillm", 100)] == [1e-4, 2e-5]
    assert chosen(rows) | {"options": 0} == {
        "op": "choice",
        "student": "half",
        "method": "kd",
        "options": 0,
        "rouge_l": 0.75,
        "labels_per_step": 10.0,
        "trials": 3,
    }
    assert chosen(rows)["options"] == {"learning_rate": 0.75}


def test_instructions_table_and_claims_by_hand():
    assert {claim.verdict for claim in claims([], []) if "instructions" in claim.claim} == {"not measured"}
    spread_out = (5, 5, 5, 5, 5, 9, 9, 9)
    rows = [row_of("test", "kd", 99.0, data="of another run")]
    rows += rows_tested(sft=3.0, slim=spread_out, kd=spread_out, minillm=tuple(value - 2 for value in spread_out))
    rows.append(row_of("bound", "teacher", 20.0, student=None, budget=None, seed=None))
    rows.append(row_of("bound", "start", 2.0, budget=None, seed=None))
    lines = instructions_table(rows).splitlines()
    change = "SLIM minus it | over seeds | p |"
    assert lines[0] == f"| 15 layers | a (5) | b (3) | all | {change} all, as much time | {change}"
    assert lines[2].startswith("| the teacher | 20.0 [20.0, 20.0] | 20.0 [20.0, 20.0] | 20.0 [20.0, 20.0] |  |  |  |")
    # All eight prompts agree: p = 2 / 256, times the five comparisons.
    minillm = "7.5 [5.5, 9.5]"
    assert lines[6].startswith("| MiniLLM | 3.0 [3.0, 3.0] | 7.0 [7.0, 7.0] | 4.5 [3.")
    assert lines[6].endswith("| +2.0 [+2.0, +2.0] | [+2.0, +2.0] | 0.039 |  |  |  |  |"), minillm
    assert lines[7].startswith("| what all methods start from | 2.0 ")
    assert "Not finished: 9 of 48 of the test's students are there." not in lines
    assert any(line.startswith("Not finished: ") for line in lines)
    found = "by Rouge-L SLIM is better than SFT on the responses and MiniLLM, and not shown to differ from KD."
    assert f"- 15 layers, as many labels: {found}" in lines
    assert "MiniLLM 40 s for 5 steps and 100 labels" in lines[-1]
    verdicts = {claim.claim.split(" than ")[1]: claim for claim in claims([], rows) if "instructions" in claim.claim}
    assert {name: claim.verdict for name, claim in verdicts.items()} == {
        "SFT on the responses": "shown",
        "KD": "not shown",
        "MiniLLM": "shown",
    }
    measured = "Rouge-L, SLIM minus MiniLLM; 15 layers, as many labels: +2.0 [+2.0, +2.0], over seeds [+2.0, +2.0]"
    assert verdicts["MiniLLM"].measured == measured
    # A budget in which MiniLLM is better takes the verdict away.
    rows += [row_of("test", "minillm", 9.0, seed=seed, budget="seconds", labels=25) for seed in TEST_SEEDS]
    assert [claim.verdict for claim in claims([], rows) if claim.claim.endswith("MiniLLM")] == ["not shown"]


def test_instructions_judge_table_by_hand():
    rows = rows_tested(sft=3.0, slim=5.0)
    judge = {"model": "j", "sha256": "d", "prompt": "p"}
    verdicts = {"a": [[0.9, 0.8]] * 3, "b": [[0.9, 0.1]]}
    judged = {"op": "judged", "judge": judge, "examples": 3, "verdicts": verdicts}
    rows += [row_of("judged", "sft", seed=seed) | judged | {"ours": "slim"} for seed in TEST_SEEDS]
    rows.append(row_of("judged", "start", seed=None, budget=None) | judged | {"ours": "teacher"})
    text = instructions_table(rows)
    # Three pairs are SLIM's in both orders; in one both orders name the response that is shown first.
    assert "| SLIM or SFT on the responses; 15 layers, as many labels | 88 [62, 100] | [88, 88] | 0.250 | 75 |" in text
    assert "In 75 % of the pairs it names the same response in both orders (a coin in 50 %)" in text
    assert "prefers the teacher in 88 %, and the same in both orders in 75 %." in text


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    words = ("one", "two", "café", "four", "five", "six", "seven")
    rows = [{"prompt": f"Say {word}", "response": f"{word} it is"} for word in words]
    teachers.save_teacher(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    held_out = {"prompt": "Say ten", "response": "ten"}, {"prompt": rows[0]["prompt"], "response": "een"}
    arguments = ["--train", write(folder / "train.jsonl", *rows), "--eval", write(folder / "mine/e.jsonl", *held_out)]
    sizes = {"teacher": folder / "teacher", "labels": 30, "development-examples": 2, "max-length": 40}
    sizes |= {"max-new-tokens": 4}
    return arguments + [str(part) for name, size in sizes.items() for part in (f"--{name}", size)]


@needs_rouge
@needs_httpx2
def test_instructions_experiment_resumes(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setitem(instructions_plan.STUDENTS, "half", Student(layers=(0,), batch_size=2))
    for name, method in METHODS.items():
        monkeypatch.setitem(instructions_plan.METHODS, name, method._replace(learning_rates=(1e-3, 1e-4)))
    methods = ["sft", "slim", *(["minillm"] if has_minillm() else [])]
    out = tmp_path / "out.jsonl"
    more = ["--work", str(tmp_path / "work"), "--out", str(out), "--beside"]

    def run(command, *arguments) -> list[dict]:
        reproduce_instructions.main([command, *data, *more, *arguments])
        return records.read(out)

    rows = run("tune", "--methods", *methods)
    assert [row["op"] for row in rows] == ["trial", "trial", "choice"] * len(methods)
    assert all(row["documents"] == 4 for row in rows)
    test = ["test", "--students", "half", "--seeds", "1", "--methods"]
    before = run(*test, "slim", "kd")
    assert "kd is left out: its learning rate is not chosen yet" in capsys.readouterr().out
    rows = run(*test, *methods)
    assert rows[: len(before)] == before
    tested = [(row["method"], row["budget"]) for row in rows if row["op"] == "test"]
    assert {("slim", "labels"), ("sft", "labels")} <= set(tested)
    assert len(set(tested)) == len(tested)
    assert ("slim", "seconds") not in tested
    for row in rows:
        if row["op"] == "test" and row["method"] != "minillm":
            assert row["labels"] <= row["labels_learned"] < row["labels"] + 40
            assert row["steps"] == math.ceil(row["documents_learned"] / 2)
    assert [row["method"] for row in rows if row["op"] == "bound"] == ["teacher", "before", "start"]
    assert all(row["non_ascii"]["reference"] == 0 and row["versions"]["rouge-score"] for row in rows if "scores" in row)
    assert run(*test, *methods) == rows
    assert instructions_table(rows).count("\n| ") == 3
    with Judge() as server:
        monkeypatch.setattr(reproduce_instructions, "serve", lambda gguf, python: contextlib.nullcontext(server.url))
        (tmp_path / "judge.gguf").write_bytes(b"weights")
        judge = ["judge", "--students", "half", "--seeds", "1", "--judge", str(tmp_path / "judge.gguf")]
        judged = run(*judge)[len(rows) :]
        assert run(*judge) == rows + judged
    assert [(row["ours"], row["method"]) for row in judged][:2] == [("teacher", "start"), ("slim", "sft")]
    assert all([len(pairs) for pairs in row["verdicts"].values()] == [2] for row in judged)
    assert judged[0]["judge"]["model"] == "judge"


def test_instructions_server_that_does_not_start_is_named(tmp_path):
    expected = pytest.raises(RuntimeError, match=r"must serve .*none.gguf through xllamacpp, but did not answer")
    with expected, serve(tmp_path / "none.gguf", "/bin/false"):
        pass


def test_instructions_arguments_that_contradict_each_other(tmp_path, data, capsys):
    command = ["test", *data, "--work", str(tmp_path), "--out", str(tmp_path / "out.jsonl")]
    same = ["--eval", "x/a/e.jsonl", "y/a/f.jsonl"]
    for more, message in ((["--seeds", "0"], "must not have 0, which chose"), (same, "which must differ")):
        with pytest.raises(SystemExit):
            reproduce_instructions.parse([*command, *more])
        assert message in capsys.readouterr().err
