"""Tasks read from files as their authors publish them, prompts, and scores."""

from __future__ import annotations

import pytest
from support.evaluation import make_data, make_record

from slimkernels.evaluate.choices import load_choices
from slimkernels.evaluate.heldout import load_heldout
from slimkernels.evaluate.scoring import count_dropped, vote
from slimkernels.evaluate.tasks import TASKS, load_task


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def test_gsm8k(data):
    task = load_task("gsm8k", data)
    assert {sample.reference for sample in task.samples} == {str(2000 * n) for n in range(1, 8)}
    assert (task.available, task.source, task.kind) == (7, "gsm8k/test.jsonl", "number")
    prompt = task.prompt(task.samples[0], 2)
    assert prompt.count("\nA: ") == 2
    assert prompt.endswith(f"\n\nQ: {task.samples[0].question}\nA:")
    assert task.prompt(task.samples[0], 0) == f"Q: {task.samples[0].question}\nA:"


def test_other_tasks(data):
    sample = next(sample for sample in load_task("commonsenseqa", data).samples if sample.id == "c1")
    assert sample.question == "Where is 1?\n(A) bank\n(B) mall\n(C) river"
    assert (sample.reference, sample.choices) == ("B", ("bank", "mall", "river"))
    by_id = {sample.id: sample.reference for sample in load_task("strategyqa", data).samples}
    assert by_id == {"s0": "yes", "s1": "no", "s2": "yes", "s3": "no"}
    instructed = load_task("self_instruct", data)
    assert instructed.samples[0].question == "Translate.\n\nthe cat"
    assert instructed.prompt(instructed.samples[0], 3) == "Translate.\n\nthe cat\n"


def test_a_larger_number_of_samples_extends_a_smaller_one(data):
    every = load_task("gsm8k", data).samples
    for number in (1, 3, 6):
        assert load_task("gsm8k", data, number).samples == every[:number]
    assert [sample.id for sample in every] != sorted(sample.id for sample in every)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_samples_is_at_least_one(number, data):
    for load in (lambda: load_task("gsm8k", data, number), lambda: load_heldout(data, number)):
        with pytest.raises(ValueError, match=f"num_samples must be at least 1, .*got {number}"):
            load()
    with pytest.raises(ValueError, match=f"num_samples must be at least 1, .*got {number}"):
        load_choices(["arc_easy"], data, number)


def test_missing_data_names_what_was_looked_for(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder not found: .*no; gsm8k needs gsm8k/test\.jsonl or .* in it"):
        load_task("gsm8k", tmp_path / "no")
    with pytest.raises(FileNotFoundError) as error:
        load_task("dolly", data)
    for name in TASKS["dolly"][1]:
        assert str(data / name) in str(error.value)
    with pytest.raises(ValueError, match=r"task must be one of gsm8k, .*, got 'sums'"):
        load_task("sums", data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": "#### many"}', r"line 2: not a sample of gsm8k \('many' is not an answer"),
        ('{"question": "q"}', "line 2: not a sample of gsm8k"),
        ("{", "must hold JSON"),
        ("[]", "line 2: not a sample of gsm8k"),
        ('{"question": 5, "answer": "#### 1"}', "line 2: not a sample of gsm8k"),
    ],
)
def test_a_bad_row_is_named(line, message, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        load_task("gsm8k", tmp_path)


def test_two_samples_of_one_id_are_refused(tmp_path):
    (tmp_path / "strategyqa").mkdir()
    row = '{"qid": "a", "question": "q", "answer": true}'
    (tmp_path / "strategyqa" / "dev.json").write_text(f"[{row}, {row}]")
    with pytest.raises(ValueError, match=r"row 2: not a sample of strategyqa .*has the same id 'a'"):
        load_task("strategyqa", tmp_path)


def test_scores_are_strict_and_flexible():
    record = make_record(0, "So it is 1,000.", "1000")
    assert record.answers == {"flexible": "1000", "strict": None}
    assert record.scores == {"flexible": 1.0, "strict": 0.0}
    assert make_record(0, "The answer is 7.", "1000").scores == {"flexible": 0.0, "strict": 0.0}
    letters = make_record(0, "A", "A", task="commonsenseqa", choices=("bank", "mall"))
    assert vote(letters, "It is the mall.") == "B"


def test_rouge_l_and_the_letters_that_it_drops():
    pytest.importorskip("rouge_score", reason="Rouge-L needs the package rouge-score")
    # The longest common subsequence has 3 of 3 and 3 of 4 words.
    assert make_record(0, "the cats sat", "the cat sat down", task="dolly").scores == {"rouge_l": pytest.approx(6 / 7)}
    assert make_record(0, "", "the cat", task="dolly").answers == {"rouge_l": None}
    assert count_dropped("schöne Straße 猫") == 3
