"""The report: numbers by hand, texts that a reader must find on the page, and no active content from outputs."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.evaluation import make_record
from test_evaluate_published_outputs import ROWS, write

from slimkernels.evaluate.published_outputs import read_outputs
from slimkernels.evaluate.records import read_records
from slimkernels.evaluate.report import describe_outputs, write_report
from slimkernels.evaluate.score_units import metric
from slimkernels.evaluate.summary import (
    Arm,
    Budget,
    Records,
    budgets,
    compare,
    count_steps,
    overall,
    score_within,
    slices,
)

VOID = {"meta", "input", "br", "path", "circle", "rect"}
HOSTILE = "<script>alert(1)</script>\"'&|*_"


def chain(answer, spent, logprob=-1.0):
    return {"text": f"The answer is {answer}.", "tokens": 10, "spent": spent, "score": 0.0, "sum_logprob": logprob}


def make_records():
    """Makes records of twelve questions: "good" has all right, "bad" one in four, "mid" all but the last, by votes."""
    records = []
    for n in range(12):
        right, wrong = f"a\nThe answer is {n}.", "b\nThe answer is 99."
        spent = {"tokens": 40, "seconds": 2.0, "output_tokens": 10, "finished": True}
        fields = {"reference": str(n), "question": "word " * (n + 1)} | spent
        records.append(make_record(n, right, model="good", **fields))
        records.append(make_record(n, right if n % 4 == 0 else wrong, model="bad", **fields))
        chains = tuple(chain(answer, 10 * (k + 1)) for k, answer in enumerate([99, n, n, n]))
        output = wrong if n == 11 else right
        records.append(
            make_record(n, output, model="mid", decoder="self-consistency", seed=3, candidates=chains, **fields)
        )
    return records


@pytest.fixture(scope="module")
def records():
    return make_records()


def test_overall(records):
    found = overall(Records(records), Arm("bad", "greedy"), "gsm8k", [Budget("tokens", 40)])
    assert (found.samples, found.seeds, found.tokens, found.seconds, found.finished) == (12, (), 40, 2, 1)
    assert found.scores["flexible"][:1] == (0.25,)
    assert found.scores["flexible"][1:] == pytest.approx((0.0889, 0.5323), abs=1e-4)  # Wilson's, 3 of 12
    assert found.extracted == {"flexible": 1.0, "strict": 1.0}


def test_scores_of_several_seeds_are_averaged_before_samples_are_compared():
    seeds = [make_record(0, f"The answer is {n}.", decoder="pathfinder", seed=n) for n in (1, 2)]
    other = [make_record(0, "The answer is 1.")]
    assert Records(seeds).scores(Arm("m", "pathfinder"), "gsm8k", "strict") == {"0": 0.5}
    (found,) = [entry for entry in compare(Records(seeds + other)) if entry.metric == "strict"]
    assert (found.difference.value, found.difference.num_samples) == (0.5, 1)


def test_compare_pairs_samples_and_adjusts_for_all_comparisons(records):
    found = {(c.metric, c.a.model, c.b.model): c.difference for c in compare(Records(records))}
    assert len(found) == 6
    # 9 samples against 0: 2 / 2^9, times six comparisons.
    assert found["strict", "good", "bad"].p_value == pytest.approx(6 * 2 / 2**9)
    assert found["strict", "good", "bad"].is_shown
    assert found["strict", "good", "bad"].value < 0
    assert not found["strict", "good", "mid"].is_shown
    # Only samples that both have are compared.
    part = compare(Records([record for record in records if record.model == "good" or record.order < 3]))
    assert {comparison.difference.num_samples for comparison in part} == {3}


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    assert metric("strict").signed(-0.0001) == "+0.0"
    assert metric("loss").signed(-0.0125) == "-0.013"


def test_a_smaller_budget_has_fewer_chains():
    record = make_record(
        0, "The answer is 1.", decoder="self-consistency", seed=0, tokens=40, seconds=4.0,
        candidates=(chain(2, 10, -0.5), chain(1, 20, -2.0), chain(1, 30, -3.0), chain(2, 40, -9.0)),
    )  # fmt: skip
    # One chain: 2; two: a tie, the likelier is 2; three: two votes for 1; four: a tie again.
    assert [score_within(record, Budget("tokens", limit)) for limit in (9, 10, 20, 30, 40)] == [0, 0, 0, 1, 0]
    assert [score_within(record, Budget("seconds", limit)) for limit in (2.0, 3.0)] == [0, 1]
    scored = make_record(
        0, "The answer is 1.", decoder="pathfinder", tokens=20, seconds=1.0,
        candidates=(chain(2, 10) | {"score": 0.5}, chain(1, 20) | {"score": 0.7}),
    )  # fmt: skip
    assert [score_within(scored, Budget("tokens", limit)) for limit in (5, 10, 20)] == [0, 0, 1]
    assert score_within(make_record(0, "The answer is 1."), Budget("tokens", 5)) is None


def test_budgets_are_the_least_that_a_searching_decoder_spends(records):
    assert budgets(Records(records), "gsm8k") == [Budget("tokens", 40), Budget("seconds", 2)]
    assert budgets(Records([record for record in records if record.model == "mid"]), "gsm8k") == []


def test_slices(records):
    found = slices(Records(records), "gsm8k", "question length (words)")
    assert [part.label for part in found] == ["1 to 4", "5 to 8", "9 to 12"]
    assert [part.counts for part in found] == [[4, 4, 4]] * 3
    assert [part.scores for part in found] == [[1, 0.25, 1], [1, 0.25, 1], [1, 0.25, 0.75]]
    assert sum(sum(part.counts) for part in slices(Records(records), "gsm8k", "reasoning steps")) == 36
    assert [count_steps(text) for text in ("", "a", "a\n\nb\n", "A. B? C.", "a\nQ: b\nc")] == [0, 1, 2, 3, 1]


class Page(HTMLParser):
    """Checks that every element is closed, and collects texts and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_tells_what_was_run_and_whether_a_difference_is_real(records, tmp_path):
    described = {
        "models": [{"model": "good", "identity": "abc123"}],
        "decoders": [{"decoder": "greedy", "settings": {"max_steps": 6}}],
        "tasks": [{"task": "gsm8k", "samples": 12, "available": 1319, "file": "gsm8k/test.jsonl", "hash": "f00d"}],
        "seeds": [3],
        "shots": 2,
        "versions": {"torch": "2.13"},
    }
    page = write_report(records, tmp_path / "report", described).read_text()
    for text in (page, (tmp_path / "report" / "report.md").read_text().replace("\\", "")):
        for said in (
            "12 of 1319", "abc123", "f00d", "max_steps 6", "torch 2.13", "Sampling seeds: 3",
            "good · greedy is higher than bad · greedy by 75.0 points",
            "No difference shown between good · greedy and mid · self-consistency.", "no difference shown",
            "% within 40 tokens", "% within 2 s", "1 to 4", "25.0 [8.9, 53.2]",
        ):  # fmt: skip
            assert said in text, said
    assert '<td class="best number">100.0</td>' in page
    assert '<td class="second number">91.7</td>' in page
    assert "| **100.0** | 25.0 | *91.7* | 12 |" in (tmp_path / "report" / "report.md").read_text()
    assert page.count("<svg") == 2
    assert "votes: 5 \u00d73, 99 \u00d71" in page
    assert read_records(tmp_path / "report" / "records.jsonl") == records


def test_nothing_on_the_page_is_live(tmp_path):
    hostile = [
        make_record(HOSTILE, HOSTILE, model=f"{HOSTILE}{n}", question=HOSTILE, seed=n, decoder="pathfinder")
        for n in range(2)
    ]
    page = write_report(hostile, tmp_path).read_text()
    parsed = Page(page)
    assert parsed.scripts == 1
    assert "alert(1)</script>" not in page
    assert "default-src 'none'" in page
    names = {name for _, name, _ in parsed.attributes}
    assert not names & {"href", "src", "onclick", "onload", "srcset"}
    assert not re.search(r"https?://|url\(|@import", page)
    assert "<script>" not in (tmp_path / "report.md").read_text().replace("\\<script\\>", "")


def test_a_model_that_answers_nothing_is_marked(tmp_path):
    silent = [make_record(n, " ", model="silent") for n in range(2)] + [make_record(0, "The answer is 1.")]
    page = write_report(silent, tmp_path).read_text()
    assert "All outputs are empty: silent · greedy." in page
    assert '<td class="warning number">100.0</td>' in page
    assert "no output" in page
    with pytest.raises(ValueError, match="records must be at least one"):
        write_report([], tmp_path)


def test_report_of_published_outputs(tmp_path):
    path = write(tmp_path / "svamp" / "gpt", ROWS, [(1, 1), (0, 1), (1, 0), (0, 0)])
    outputs = read_outputs(path)
    page = write_report(outputs.records, tmp_path / "out", describe_outputs({str(path): outputs})).read_text()
    assert '<td>strict (is_correct)</td><td class="number">50.00</td><td class="number">50.00</td>' in page
    assert "4 of 4" in page
    assert "There is only one model and decoder" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to draw the page")
def test_page_is_drawn_by_a_browser_and_its_filter_works(records, tmp_path):
    page = write_report(records, tmp_path).resolve()
    # The page fits the width of a phone if only the boxes of tables scroll sideways.
    probe = "<script>document.title = [document.documentElement.scrollWidth, innerWidth, "
    probe += "document.getElementById('shown').textContent].join();</script></body>"
    Path(page).write_text(page.read_text().replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size, shot = "--window-size=500,900", tmp_path / "shot.png"
    drawn = subprocess.run(
        [CHROMIUM, *flags, size, f"--screenshot={shot}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(\d+),(\d+),(.*?)</title>", drawn.stdout)
    assert title is not None, drawn.stderr[-500:]
    assert int(title[1]) <= int(title[2])
    assert title[3] == "12 of 12"
    assert shot.read_bytes()[:4] == b"\x89PNG"
