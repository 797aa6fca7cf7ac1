"""Files in the layout of neulab/gemini-benchmark: both scoring rules by hand-made rows, and bad rows."""

from __future__ import annotations

import json

import pytest

from slimkernels.evaluate.published_outputs import (
    after_answer_colon,
    after_the_answer_is,
    comparable,
    last_number,
    read_outputs,
)
from slimkernels.evaluate.report import describe_outputs, write_report

TEXTS = [  # text, after "The answer is", after "Answer:", last number
    ("2 + 3 = 5. The answer is 5.", "5", "5", "5"),
    ("It costs $4 - $3 = $1. So $1.", None, "1", "1"),
    ("The answer is 6 or 7. The answer is 8 of 9.", "8", "9", "9"),
    ("The answer is 3.\n\nQ: And 4?\nA: The answer is 9.", "3", "3", "3"),
    ("Answer: 1,250 of 3", None, "1250", "3"),
    ("from 10-12", None, "-12", "-12"),
    ("the answer is -.5", None, "-.5", "-.5"),
    ("The answer is unclear.", None, None, None),
    ("", None, None, None),
]


@pytest.mark.parametrize(("text", "strict", "colon", "last"), TEXTS)
def test_rules(text, strict, colon, last):
    assert (after_the_answer_is(text), after_answer_colon(text), last_number(text)) == (strict, colon, last)


def write(folder, rows, published=None):
    folder.mkdir(parents=True)
    lines = []
    for index, (text, answer) in enumerate(rows):
        row = {"qid": index, "prompt": f"Q: {index}\nA:", "question": f"{index}?\n", "generated_text": text}
        row["answer"] = answer
        if published is not None:
            row |= dict(zip(("is_correct", "is_correct_last"), published[index], strict=True))
            row |= {"predict": "1", "predict_last": "1"}
        lines.append(json.dumps(row) + "\n")
    (folder / "output.jsonl").write_text("".join(lines))
    return folder / "output.jsonl"


ROWS = [("The answer is 10.", "10.0"), ("So $1.", "1"), ("The answer is 5 of 6.", "5"), ("57 days.", "1,745")]


def accuracy(outputs, metric):
    return sum(record.scores[metric] for record in outputs.records) / len(outputs.records)


def test_strict_and_last_number_accuracy(tmp_path):
    outputs = read_outputs(write(tmp_path / "svamp" / "gpt", ROWS))
    assert (accuracy(outputs, "strict"), accuracy(outputs, "last_number")) == (0.5, 0.5)
    assert [record.scores["strict"] for record in outputs.records] == [1, 0, 1, 0]
    assert [record.scores["last_number"] for record in outputs.records] == [1, 1, 0, 0]
    record = outputs.records[2]
    assert (record.model, record.task, record.answers["last_number"]) == ("gpt", "svamp (outputs)", "6")
    assert outputs.agreement == {"strict": (0, 0), "last_number": (0, 0)}


def test_published_columns_tell_which_scoring_made_them(tmp_path):
    first = read_outputs(write(tmp_path / "a" / "m", ROWS, [(1, 1), (0, 1), (1, 0), (0, 0)]))
    assert "The answer is" in first.strict_rule
    assert first.agreement == {"strict": (4, 4), "last_number": (4, 4)}
    # Here "So $1." counts as right although no answer is announced, and "5 of 6" as wrong.
    second = read_outputs(write(tmp_path / "b" / "m", ROWS, [(1, 1), (1, 1), (0, 0), (0, 0)]))
    assert "Answer:" in second.strict_rule
    assert second.agreement == {"strict": (4, 4), "last_number": (4, 4)}
    assert accuracy(second, "strict") == 0.5
    wrong = read_outputs(write(tmp_path / "c" / "m", ROWS, [(1, 0), (0, 1), (1, 0), (0, 0)]))
    assert wrong.agreement == {"strict": (4, 4), "last_number": (3, 4)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"qid": 1}', "line 2, must have the fields qid, .* has no prompt, question, generated_text, answer"),
        ("[1]", "line 2, must have"),
        ("{", "line 2, must be a JSON object"),
        ('{"qid": 1, "prompt": "", "question": "", "generated_text": null, "answer": "1"}', "must be strings"),
        ('{"qid": 1, "prompt": "", "question": "", "generated_text": "", "answer": "x"}', "must be a number, got 'x'"),
    ],
)
def test_bad_rows(line, message, tmp_path):
    path = write(tmp_path / "a" / "m", ROWS[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_outputs(path)
    with pytest.raises(FileNotFoundError, match="outputs not found"):
        read_outputs(tmp_path / "none.jsonl")


def test_headline_compares_the_common_rule_where_strict_follows_two(tmp_path):
    rows = [("The answer is 10.", "10"), ("So $1.", "1"), ("It is 5 or 6.", "6")]
    # "strict" is by "The answer is" in the first file, and the last number without "Answer:" in the second.
    paths = [
        write(tmp_path / "svamp" / "one", rows, [(1, 1), (0, 1), (0, 1)]),
        write(tmp_path / "svamp" / "two", rows, [(1, 1), (1, 1), (1, 1)]),
    ]
    files = {str(path): read_outputs(path) for path in paths}
    assert len({outputs.strict_rule for outputs in files.values()}) == 2
    records = comparable(list(files.values()))
    assert [list(record.scores) for record in records] == 3 * [["last_number", 'strict by "The answer is"']] + 3 * [
        ["last_number", 'strict by "Answer:"']
    ]
    page = write_report(records, tmp_path / "out", describe_outputs(files)).read_text()
    assert "<strong>svamp (outputs), last number</strong>: No difference shown between" in page
    assert "follow another rule, so the last number is compared" in page
    alike = [read_outputs(paths[0])]
    assert comparable(alike) == alike[0].records
