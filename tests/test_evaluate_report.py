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
from slimkernels.evaluate.report.blocks import mark_best
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
    assert '<td class="best number">100.0 [75.8, 100.0]</td>' in page
    assert '<td class="second number">91.7 [64.6, 98.5]</td>' in page
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
    assert not names & {"src", "onclick", "onload", "srcset"}
    assert all(re.fullmatch(r"#section-\d", value) for _, name, value in parsed.attributes if name == "href")
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


DESCRIBED = {"models": [{"model": "good", "identity": "abc123"}]}
SECTIONS = ["Overall", "Which differences are real", "Slices", "Outputs side by side", "Scores in detail"]
BELOW = ["All differences", "What was run", "Outputs from elsewhere, scored again"]


def test_a_report_begins_with_the_scores_and_ends_with_what_was_run(records, tmp_path):
    described = DESCRIBED | {"outputs": [{"explained": "Scored again.", "published": []}]}
    page = write_report(records, tmp_path, described).read_text()
    text = (tmp_path / "report.md").read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == SECTIONS + BELOW
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == SECTIONS + BELOW
    assert re.findall('<a href="#(.*?)">', page) == re.findall('<h2 id="(.*?)">', page)
    # Only headings and links stand before the scores, then one chart, and the list of real differences.
    first, differences, rest = page.partition("<body>")[2].split("<h2 ")[1:4]
    assert re.match(r"[^>]*>Overall</h2>\s*<div class=\"scroll\"><table>", first)
    assert first.count("<table>") == first.count("<svg") == 1
    assert "<p>" not in page.partition("<body>")[2].partition("<table>")[0]
    assert "| model · decoder | gsm8k, flexible % |" in text.partition("## Which")[0]
    assert "| good · greedy | **100.0 \\[75.8, 100.0\\]** |" in text.partition("## Which")[0]
    assert differences.count("<li>") == 1
    assert "<table>" not in differences
    assert "Slices" in rest
    # The filter of the outputs stays at the top of the window as long as there are outputs.
    assert re.search(r'<div id="outputs">\s*<form .*</section>\s*</div>\s*<h2 id="section-4">', page, re.DOTALL)
    assert page.index("The answer is 11.") < page.index("Scores: gsm8k") < page.index("abc123")


@pytest.mark.parametrize(
    ("cells", "values", "marks"),
    [
        (["1.0 [0, 2]", "2.0 [1, 3]", "3.0 [2, 4]"], [1.0, 2.0, 3.0], ["", "second", "best"]),
        (["3.0 [2, 4]", "3.0 [1, 9]", "1.0 [0, 2]"], [3.0, 3.0, 1.0], ["best", "best", "second"]),
        (["3.0", "2.0", "2.0"], [3.0, 2.0, 2.0], ["best", "second", "second"]),
        # A reader sees no difference between values that are printed alike.
        (["3.0", "3.0", "2.0"], [3.01, 2.99, 2.0], ["best", "best", "second"]),
        (["3.0", "3.0"], [3.01, 2.99], ["", ""]),
        (["3.0", "unknown"], [3.0, None], ["", ""]),
        (["2.0", "unknown", "1.0"], [2.0, None, 1.0], ["best", "", "second"]),
    ],
)
def test_equal_values_have_equal_marks(cells, values, marks):
    assert [cell.mark for cell in mark_best(cells, values)] == marks
    swapped = {"best": "second", "second": "best", "": ""}
    if len({text for text, value in zip(cells, values, strict=True) if value is not None}) == 2:
        lower = [cell.mark for cell in mark_best(cells, values, lower_is_better=True)]
        assert lower == [swapped[mark] for mark in marks]


def markdown(records, folder: Path) -> str:
    write_report(records, folder)
    return (folder / "report.md").read_text().replace("\\", "")


def test_one_model_has_scores_without_marks_and_no_differences(tmp_path):
    text = markdown([make_record(n, "The answer is 1.", model="only") for n in range(3)], tmp_path)
    assert "| only · greedy | 100.0 [43.9, 100.0] |\n| samples | 3 |" in text
    assert "There is only one model and decoder, so nothing is compared." in text
    assert "Bold marks" not in text
    assert "## All differences" not in text
    assert "## What was run" not in text  # nothing is known of the run
    apart = [make_record(n, "The answer is 1.", model=f"m{n}") for n in range(2)]
    assert "No two models or decoders share a sample, so nothing is compared." in markdown(apart, tmp_path)


def test_tasks_go_down_the_page_if_they_are_more_than_models(tmp_path):
    tasks = ("gsm8k", "svamp", "asdiv")
    records = [
        make_record(n, f"The answer is {int(model == 'a' or n)}.", model=model, task=task, kind="number")
        for model in "ab"
        for task in tasks
        for n in range(2)
    ]
    text = markdown(records, tmp_path)
    assert "| task, score | a · greedy | b · greedy | samples |" in text
    assert text.count("flexible % | **100.0 [34.2, 100.0]** | *50.0 [9.5, 90.5]* | 2 |") == 3
    # What is said of several tasks is said once.
    nothing = "- **gsm8k, flexible; svamp, flexible; asdiv, flexible**: No difference shown between a · greedy and b"
    assert nothing in text


def test_many_differences_are_a_short_list_and_a_long_table(tmp_path):
    records = [
        make_record(n, f"The answer is {int(n < 4 * k)}.", model=f"m{k}", question=f"q{n}")
        for k in range(7)
        for n in range(24)
    ]
    page = write_report(records, tmp_path).read_text()
    shown = [entry for entry in compare(Records(records)) if entry.metric == "flexible" and entry.difference.is_shown]
    listed = page.partition("<ul>")[2].partition("</ul>")[0]
    assert len(shown) > 6
    assert listed.count("points [") == 6
    assert "m6 · greedy is higher than m0 · greedy by 100.0 points" in listed
    assert f"Smaller real differences, in the table of all: {len(shown) - 6}." in listed
    assert f"No difference shown for the other {21 - len(shown)} of 21 pairs." in listed
    assert page.partition("All differences</h2>")[2].count("<tr>") == 1 + 2 * 21


def test_the_page_has_nothing_wider_than_a_phone(records, tmp_path):
    long = "runs/experiments/a-name-that-is-far-too-long-for-a-line-of-the-chart"
    page = write_report(
        [*records, *(make_record(n, "1", model=long) for n in range(2))], tmp_path, DESCRIBED
    ).read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count('<div class="scroll"><table>') > 5
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", style)
    assert "@media (max-width: 40rem)" in style
    wide = [
        rule for rule in re.findall(r"(?<![-\w])((?:min-)?width: *[\d.]+(?:rem|px|em))", style)
        if float(re.search(r"[\d.]+", rule)[0]) * (1 if rule.endswith("px") else 16) > 360
    ]  # fmt: skip
    assert wide == []
    assert not [
        name for tag, name, _ in Page(page).attributes if tag in ("table", "svg", "td", "div") and name == "width"
    ]
    # Names longer than the chart keep their end.
    assert f"\u2026{long[-40:]} · greedy</text>" in page


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth,
document.getElementById("shown").textContent, document.querySelector("table").getBoundingClientRect().top,
document.querySelector("svg").getBoundingClientRect().width].join(), "*");</script></body>"""
FRAMES = """<script>addEventListener("message", event => document.body.append(`[${event.data}]`));</script><body>
<iframe src="report.html" width="360" height="800"></iframe>
<iframe src="report.html" width="1280" height="800"></iframe>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to draw the page")
def test_page_is_drawn_by_a_browser_and_its_filter_works(records, tmp_path):
    page = write_report(records, tmp_path)
    page.write_text(page.read_text().replace("</body>", PROBE))
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "shot.png"
    # Frames, because a window cannot be as narrow as a phone.
    flags += ["--virtual-time-budget=5000", f"--screenshot={shot}", "--dump-dom"]
    drawn = subprocess.run(
        [CHROMIUM, *flags, frames.resolve().as_uri()], capture_output=True, text=True, timeout=900, check=True
    )
    found = {int(width): said.split(",") for width, said in re.findall(r"\[(\d+),(.*?)\]", drawn.stdout)}
    assert set(found) == {360, 1280}, drawn.stderr[-500:]
    for width, (scroll_width, shown, top, chart) in found.items():
        # Only the boxes of tables and charts scroll sideways.
        assert int(scroll_width) <= width
        assert shown == "12 of 12"
        # The first table is seen without scrolling.
        assert float(top) < 200
        assert 250 < float(chart) <= 544
    assert shot.read_bytes()[:4] == b"\x89PNG"
