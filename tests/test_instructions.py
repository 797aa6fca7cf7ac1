"""The instruction-following experiment: its data and its table by hand, and a whole run with a tiny teacher."""

from __future__ import annotations

import contextlib
import importlib.util
import json

import pytest
from support import served, teachers

from bench import records
from bench.reproduce import instructions as reproduce_instructions
from bench.reproduce.instructions_data import Example, documents, read_examples, without
from bench.reproduce.instructions_table import instructions_table
from slimkernels.evaluate.scoring import rouge_l
from slimkernels.store import Store

ALPACA = "Below is an instruction.\n\n### Instruction:\n{}\n\n### Response:\n"
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
    examples = [Example("Say hi", "Hello"), Example("Say it all", "word " * 50)]
    [(ids, prompt_length)] = documents(tokenizer, examples, 40)
    assert tokenizer.decode(ids[:prompt_length]) == "<|start|>Say hi:"
    assert tokenizer.decode(ids[prompt_length:]) == "Hello" + teachers.END


@needs_rouge
def test_instructions_rouge_by_hand():
    # The cases are 3 of 6 and of 3 words, stemming, no word that the tokenizer keeps, and a broken order.
    references = ["the cat sat on the mat", "cats running", "日本", "one two three four"]
    responses = ["the cat sat", "cat runs", "日本", "four three two one"]
    assert list(map(rouge_l, responses, references)) == pytest.approx([2 / 3, 1, 0, 0.25])


class Judge(served._Server):
    """A server that rates a response by its number of words, and gives no rating to one of four words."""

    def reply(self, path, body):
        response = body["messages"][0]["content"].split("[Response]\n")[1].split()
        rating = f"Out of [[10]] it is worth [[{len(response)}]]" if len(response) != 4 else "No rating."
        said = {"choices": [{"message": {"content": rating}}]}
        return 200, {"Content-Type": "application/json"}, json.dumps(said)


def result(method, values, seed=0, **changed):
    said = {"settings": dict.fromkeys(("max_new_tokens", "layers", "warm_up_steps", "steps", "batch_size"), 2)}
    said["settings"] |= {"teacher": "t", "minillm_steps": 1, "temperature": 0.0, "top_fraction": 0.05}
    said |= {
        "data": "a",
        "documents": 9,
        "labels": 99,
        "left_out": 0,
        "device": "cpu",
        "threads": 1,
        "date": "2026-01-01T",
    }
    said |= {"method": method, "seed": seed, "non_ascii": {"response": 1, "reference": 3}, "cpu_seconds": 30.0}
    return said | {"scores": {name: {"values": list(part)} for name, part in values.items()}} | changed


def test_instructions_table_by_hand():
    rows = [
        result("sft", {"a": [90, 90], "b": [0]}, data="of another run"),
        result("sft", {"a": [50, 50], "b": [9]}),
        result("sft", {"a": [10, 20], "b": [6]}),
        result("slim", {"a": [11, 21], "b": [7]}),
        result("slim", {"a": [15, 25], "b": [11]}, seed=1),
        result("dropped", {"a": [0, 0], "b": [0]}),
    ]
    lines = instructions_table(rows).splitlines()
    assert lines[0] == "| | a (2) | b (1) | all | minus SFT |"
    assert lines[2].startswith("| SFT: responses only | 15.0 [10.0, 20.0] | 6.0 [6.0, 6.0] | 12.0 [6.0,")
    # The mean over seeds gains 3 on every prompt, so the paired interval has no width.
    assert lines[3].startswith("| SLIM: adaptive weight | 18.0 [13.0, 23.0] | 9.0 [9.0, 9.0] | 15.0 ")
    assert lines[3].endswith("| +3.0 [+3.0, +3.0] |")
    assert lines[4].endswith("| 0.0 [0.0, 0.0] |  |")
    assert "Processor minutes of training: sft 0.5, slim 0.5. 2 seeds" in lines[-1]
    assert "in at most 3 of a model's 3 responses or of the references" in lines[-1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"Say {word}", "response": f"{word} it is"} for word in ("one", "two", "café", "four", "five")]
    teachers.save_teacher(folder / "teacher")
    make_tokenizer().save_pretrained(folder / "teacher")
    held_out = {"prompt": "Say ten", "response": "ten"}, {"prompt": rows[0]["prompt"], "response": "een"}
    arguments = ["--train", write(folder / "train.jsonl", *rows), "--eval", write(folder / "mine/e.jsonl", *held_out)]
    sizes = {"teacher": folder / "teacher", "layers": 1, "warm_up_steps": 2, "steps": 3, "minillm_steps": 2}
    sizes |= {"batch_size": 2, "max_length": 40, "max_new_tokens": 4, "bf16": 0}
    return arguments + [str(part) for name, size in sizes.items() for part in (f"--{name.replace('_', '-')}", size)]


@needs_rouge
def test_instructions_benchmark_resumes(tmp_path, data, capsys):
    pytest.importorskip("httpx2", reason="needs the extra server")
    methods = ["sft", "slim", *(["minillm"] if has_minillm() else [])]
    out, work = tmp_path / "out.jsonl", tmp_path / "work"
    command = [*data, "--work", str(work), "--out", str(out)]
    reproduce_instructions.main([*command, "--methods", "sft"])
    before = out.read_bytes()
    reproduce_instructions.main([*command, "--methods", *methods])
    assert "sft 0: already in" in capsys.readouterr().out
    rows = records.read(out)
    assert out.read_bytes().startswith(before)
    assert [row["method"] for row in rows] == ["teacher", "dropped", "warmed_up", *methods]
    assert all(row["data"] == rows[0]["data"] and row["documents"] == 4 and row["left_out"] == 1 for row in rows)
    assert all(row["non_ascii"]["reference"] == 0 and row["versions"]["rouge-score"] for row in rows)
    weights = {
        path.parent.parent.name: path.read_bytes() for path in (work / "students").glob("*/model/model.safetensors")
    }
    assert len(set(weights.values())) == 1 + len(methods)
    document = Store(work / "store" / "rows")[0]
    assert make_tokenizer().decode(document.input_ids[: document.positions[0]]).endswith(":")
    assert instructions_table(rows).count("\n") == 4 + 1 + len(methods) + 1
    with Judge() as server:
        reproduce_instructions.main([*command, "--methods", "sft", "--judge", server.url, "--judge-model", "j"])
    assert len(server.seen) == 4 * 2
    new = records.read(out)[len(rows) :]
    assert [row["method"] for row in new] == ["teacher", "dropped", "warmed_up", "sft"]
    assert new[3]["scores"] == rows[3]["scores"]
    assert new[3]["train_seconds"] == rows[3]["train_seconds"]
    assert new[0]["judge"]["ratings"]["mine"].keys() == {"rating", "unrated"}


def test_instructions_arguments_that_contradict_each_other(tmp_path, data, capsys):
    command = [*data, "--work", str(tmp_path), "--out", str(tmp_path / "out.jsonl")]
    same = ["--eval", "x/a/e.jsonl", "y/a/f.jsonl"]
    for more, message in ((["--judge", "http://localhost"], "must be given together"), (same, "which must differ")):
        with pytest.raises(SystemExit):
            reproduce_instructions.parse([*command, *more])
        assert message in capsys.readouterr().err
