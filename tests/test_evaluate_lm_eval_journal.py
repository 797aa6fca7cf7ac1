"""The journal of lm-eval's log-likelihoods: the same forward passes and digits as without it, and no pass twice."""

from __future__ import annotations

import json
import random

import pytest
from support.teachers import make_teacher, make_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'slimkernels[harness]'")

from lm_eval.models.huggingface import HFLM

from slimkernels.evaluate.lm_eval.journal import BatchJournal, JournalledLM
from slimkernels.evaluate.lm_eval.tasks import evaluate_multiple_choice

# lm-eval and its dependencies warn; no warning is about this package's calls.
pytestmark = pytest.mark.filterwarnings("ignore")

TASKS = ["arc_easy", "mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2"]
WORDS = ["rain", "stone", "water", "milk", "a", "the", "wet", "hard", "old", "red", "fish", "sand", "and", "sleeps"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Writes choices of many lengths and of one token (MMLU), equal prompts in two tasks, and equal questions."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(4)

    def text(most):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    for name in ("arc", "mmlu/test", "truthfulqa"):
        (folder / name).mkdir(parents=True)
    rows = [{"query": text(9), "choices": [text(5) for _ in range(4)], "gold": 1} for _ in range(9)]
    (folder / "arc/arc_easy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3]]))
    lines = [f"{text(9)},{text(2)},{text(2)},{text(2)},{text(2)},B" for _ in range(7)]
    (folder / "mmlu/test/anatomy_test.csv").write_text("\n".join([*lines, lines[0]]) + "\n")
    lines = ["Type,Question,Best Answer,Correct Answers,Incorrect Answers"]
    lines += [f"x,{text(6)}?,{(best := text(3))},{best}; Yes,No; {text(4)}" for _ in range(2)]
    (folder / "truthfulqa/TruthfulQA.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def requests():
    """Makes requests of few different tokens, some of them too long for ``make_model``.

    Some are equal, some are equal sequences with another boundary, and some differ only in the last token.
    """
    draw, found = random.Random(0), []
    for index in range(120):
        tokens = draw.choices((5, 6), k=draw.choice((2, 3, 4, 6, 19)))
        cut = draw.randint(1, len(tokens) - 1) if len(tokens) < 10 else 8
        found.append((("", str(index)), tokens[:cut], tokens[cut:]))
    return found


def make_model(seed=0):
    return make_teacher(seed, max_position_embeddings=16)


def ask_lm_eval(model, requests, batch_size=4):
    return HFLM(model, tokenizer=make_tokenizer(), batch_size=batch_size)._loglikelihood_tokens(requests, True)


def ask(model, requests, path, batch_size=4, identity="model"):
    with BatchJournal(path, [identity]) as journal:
        ours = JournalledLM(model, tokenizer=make_tokenizer(), batch_size=batch_size, journal=journal)
        return ours._loglikelihood_tokens(requests, True)


class StoppedError(Exception):
    pass


@pytest.fixture
def forwards(monkeypatch):
    """Records every input of the model as lists; the forward pass of index ``forwards.stop_at`` raises."""
    original = HFLM._model_call

    class Forwards(list):
        stop_at = None

        def taken(self):
            taken = self[:]
            self.clear()
            return taken

    seen = Forwards()

    def call(self, inputs, **options):
        if len(seen) == seen.stop_at:
            raise StoppedError
        seen.append(inputs.tolist())
        return original(self, inputs, **options)

    monkeypatch.setattr(HFLM, "_model_call", call)
    return seen


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_batches_and_digits_of_tasks_are_lm_evals(data, forwards, tmp_path, batch_size):
    model, tokenizer = make_teacher(max_position_embeddings=1024), make_tokenizer()
    expected = evaluate_multiple_choice(model, tokenizer, TASKS, data=data, batch_size=batch_size)
    asked = forwards.taken()
    assert len(expected.samples) == 10 + 8 + 2 + 2
    # Letters after one prompt share a sequence.
    assert sum(map(len, asked)) <= sum(len(sample.choices) for sample in expected.samples) - 8 * 3
    with BatchJournal(tmp_path / "journal", ["model"]) as journal:
        ours = evaluate_multiple_choice(model, tokenizer, TASKS, data=data, batch_size=batch_size, journal=journal)
    assert ours == expected
    assert forwards == asked


def test_requests_of_any_kind_are_answered_as_by_lm_eval(requests, forwards, tmp_path):
    expected = ask_lm_eval(make_model(), requests)
    asked = forwards.taken()
    assert len(asked) < len(requests) / 4
    assert ask(make_model(), requests, tmp_path / "journal") == expected
    assert forwards.taken() == asked
    assert ask(make_model(), requests, tmp_path / "journal") == expected
    assert not forwards


def test_a_stopped_model_resumes_at_the_unfinished_batch(requests, forwards, tmp_path):
    expected = ask_lm_eval(make_model(), requests)
    asked, path, kept = forwards.taken(), tmp_path / "journal", 0
    for forwards.stop_at in (1, 4, 2):
        with pytest.raises(StoppedError):
            ask(make_model(), requests, path)
        assert forwards.taken() == asked[kept:][: forwards.stop_at]
        # The last line is cut off, as by a kill while it is written: only its batch is computed again.
        path.write_bytes(path.read_bytes()[:-7])
        kept += forwards.stop_at - 1
    forwards.stop_at = None
    assert ask(make_model(), requests, path) == expected
    assert forwards == asked[kept:]


def test_answers_of_another_model_or_batch_are_not_taken(requests, forwards, tmp_path):
    path, other = tmp_path / "journal", make_model(seed=5)
    ask(make_model(), requests, path)
    asked = forwards.taken()
    assert ask(other, requests, path, identity="other") == ask_lm_eval(other, requests)
    assert forwards.taken() == asked * 2
    for batch_size, some in ((3, requests), (4, requests[1:])):
        expected = ask_lm_eval(make_model(), some, batch_size)
        new = [batch for batch in forwards.taken() if batch not in asked]
        assert new
        assert ask(make_model(), some, path, batch_size) == expected
        assert [batch for batch in forwards.taken() if batch not in asked] == new


def test_the_time_of_batches_from_the_journal_is_known(requests, tmp_path):
    ask(make_model(), requests, tmp_path / "journal")
    written = sum(json.loads(line)["seconds"] for line in (tmp_path / "journal").read_text().splitlines())
    with BatchJournal(tmp_path / "journal", ["model"]) as journal:
        assert journal.seconds == 0
        JournalledLM(make_model(), tokenizer=make_tokenizer(), batch_size=4, journal=journal)._loglikelihood_tokens(
            requests, True
        )
        assert journal.seconds == pytest.approx(written)


def test_answers_that_are_no_numbers_come_back_as_they_were(tmp_path):
    request, given = (("a", "b"), [1], [2]), [(float("-inf"), False), (float("nan"), True), (-0.1 - 0.2, False)]
    for ask in (lambda: given, pytest.fail):
        with BatchJournal(tmp_path / "journal", ["model"]) as journal:
            assert repr(journal.answers([request], ask)) == repr(given)


def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine\n")
    with pytest.raises(ValueError, match="must be new, or begin with"):
        BatchJournal(path, ["model"])
    assert path.read_text() == "mine\n"
