"""A report's blocks and outputs as one HTML page that needs no other files, no network, and no script to be read."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence

from slimkernels.evaluate.judge import Rating, ratings_of
from slimkernels.evaluate.records import Record
from slimkernels.evaluate.report.blocks import AllOutputs, Block, Cell, Charts, Heading, Items, Paragraph, Table
from slimkernels.evaluate.score_units import metric as written
from slimkernels.evaluate.scoring import vote
from slimkernels.evaluate.summary import Arm, Records

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --page: #fff; --soft: #f3f4f6; --rule: #d0d4da; --faint: #5b626c;
  --good: #12703c; --bad: #b3261e;
  --c0: #0b62c4; --c1: #b3470d; --c2: #14764a; --c3: #8a2fa3; --c4: #7a6500; --c5: #a8174f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --page: #15181c; --soft: #1f242a; --rule: #3b424b;
  --faint: #a4adb8; --good: #5fce8e; --bad: #ff8a80;
  --c0: #6fb1ff; --c1: #ff9a5c; --c2: #5fce8e; --c3: #d59bea; --c4: #dcc25a; --c5: #ff87b0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h3 { margin-bottom: .3rem; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--rule); } nav + h2 { margin-top: 1.2rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .9rem; } nav a { color: var(--c0); }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { background: var(--soft); } td.number { white-space: nowrap; }
td:first-child { min-width: 9rem; } td:first-child, th:first-child { position: sticky; left: 0; }
td:first-child { background: var(--page); } td.best { font-weight: 700; } td.second { font-style: italic; }
td.warning { color: var(--bad); font-weight: 700; }
.charts { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
svg { width: 100%; max-width: 34rem; height: auto; display: block; } li { margin: .4rem 0; padding: 0; }
svg text { font: 14px system-ui, sans-serif; fill: var(--ink); } svg .small { font-size: 12px; fill: var(--faint); }
.grid { stroke: var(--rule); fill: none; } .whisker, .line { fill: none; stroke-width: 2; }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); } .s3 { stroke: var(--c3); }
.s4 { stroke: var(--c4); } .s5 { stroke: var(--c5); }
.marker.s0 { fill: var(--c0); } .marker.s1 { fill: var(--c1); } .marker.s2 { fill: var(--c2); }
.marker.s3 { fill: var(--c3); } .marker.s4 { fill: var(--c4); } .marker.s5 { fill: var(--c5); }
figure { margin: 1rem 0; } figcaption, .note { color: var(--faint); font-size: .9rem; }
#filter { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center;
  padding: .6rem; background: var(--soft); border: 1px solid var(--rule); border-radius: .4rem; }
#filter[hidden] { display: none; }
#filter input[type=search], #filter select { font: inherit; padding: .3rem; max-width: 100%; }
.sample { border: 1px solid var(--rule); border-radius: .4rem; padding: .6rem .8rem; margin: .8rem 0; }
.sample h3 { margin: 0; font-size: 1rem; } .outputs { display: grid; gap: .6rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.output { background: var(--soft); border-radius: .3rem; padding: .5rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0; font: .85rem/1.4 ui-monospace, monospace; }
.right { color: var(--good); } .wrong { color: var(--bad); }
@media (max-width: 40rem) { body { padding: .8rem; } h1 { font-size: 1.35rem; } h2 { font-size: 1.2rem; }
  th, td { padding: .3rem .4rem; } td:first-child { min-width: 6rem; }
  th:first-child, td:first-child { max-width: 8.5rem; overflow-wrap: break-word; }
  nav { flex-wrap: nowrap; overflow-x: auto; white-space: nowrap; padding-bottom: .4rem; }
  .charts { grid-template-columns: none; grid-auto-flow: column; grid-auto-columns: minmax(88%, 1fr);
  overflow-x: auto; }
  figcaption { overflow-wrap: break-word; } ul { padding-left: 1.1rem; } #filter { position: static; } }
"""

# The script only searches and filters samples. Without it, all samples are shown.
_SCRIPT = """
const form = document.getElementById("filter"), samples = [...document.querySelectorAll(".sample")];
const shown = document.getElementById("shown");
function filter() {
  const words = form.words.value.toLowerCase(), task = form.task.value, which = form.which.value;
  let count = 0;
  for (const sample of samples) {
    const fits = (!task || sample.dataset.task === task) && (!which || sample.dataset.kind.split(" ").includes(which))
      && (!words || sample.textContent.toLowerCase().includes(words));
    sample.hidden = !fits;
    count += fits;
  }
  shown.textContent = count + " of " + samples.length;
}
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
filter();
"""


def to_html(title: str, blocks: Sequence[Block], records: Records) -> str:
    """Writes the whole page, with a line of links to its sections, and all outputs where the blocks place them."""
    sections = [block.text for block in blocks if isinstance(block, Heading) and block.level == 2]
    body = [f"<h1>{_text(title)}</h1>", _links(sections)]
    for block in blocks:
        if isinstance(block, AllOutputs):
            body.append(_outputs(records))
        elif isinstance(block, Heading) and block.level == 2:
            body.append(f'<h2 id="section-{sections.index(block.text)}">{_text(block.text)}</h2>')
        else:
            body.append(_block(block))
    # The policy forbids all requests, so that even a flaw in the escaping could load nothing.
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script>\n</body></html>\n"
    )


def _links(sections: Sequence[str]) -> str:
    links = (f'<a href="#section-{index}">{_text(text)}</a>' for index, text in enumerate(sections))
    return f"<nav>{' '.join(links)}</nav>"


def _block(block: Heading | Paragraph | Items | Table | Charts) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_text(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_text(block.text)}</p>"
    if isinstance(block, Table):
        head = "".join(f'<th scope="col">{_text(name)}</th>' for name in block.head)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in block.rows)
        return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    if isinstance(block, Items):
        entries = (f"<li><strong>{_text(subject)}</strong>: {_text(said)}</li>" for subject, said in block.entries)
        return f"<ul>{''.join(entries)}</ul>"
    charts = (f"<figure><figcaption>{_text(chart.caption)}</figcaption>{chart.svg}</figure>" for chart in block.charts)
    return f'<div class="charts">{"".join(charts)}</div>'


def _cell(cell: Cell | str) -> str:
    text, mark = (cell, "") if isinstance(cell, str) else cell
    # Cells of the class "number" do not wrap, so that a number stays on one line with its interval.
    classes = " ".join(filter(None, (mark, "number" if text[:1] in "+-0123456789" else "")))
    return f'<td class="{classes}">{_text(text)}</td>' if classes else f"<td>{_text(text)}</td>"


def _outputs(records: Records) -> str:
    # The box ends the stay of the filter at the top of the window.
    parts = ['<div id="outputs">', _filter(records)]
    for task in records.tasks:
        metric = records.metrics(task)[0]
        by_sample: dict[str, list[Record]] = {}
        for arm in records.arms:
            for record in records.of(arm, task):
                by_sample.setdefault(record.sample, []).append(record)
        parts += [_sample(task, metric, own) for own in by_sample.values()]
    return "\n".join([*parts, "</div>"])


def _filter(records: Records) -> str:
    tasks = "".join(f'<option value="{_text(task)}">{_text(task)}</option>' for task in records.tasks)
    kinds = (("", "all"), ("differ", "where scores differ"), ("wrong", "all wrong"), ("silent", "answer not found"))
    which = "".join(f'<option value="{value}">{name}</option>' for value, name in kinds)
    return (
        '<form id="filter" hidden><label>Search <input type="search" name="words"></label>'
        f'<label>Task <select name="task"><option value="">all</option>{tasks}</select></label>'
        f'<label>Show <select name="which">{which}</select></label><span class="note" id="shown"></span></form>'
    )


def _sample(task: str, metric: str, records: Sequence[Record]) -> str:
    scores = [record.scores[metric] for record in records if metric in record.scores]
    kinds = [
        name
        for name, holds in (
            ("differ", len(set(scores)) > 1),
            ("wrong", bool(scores) and max(scores) == 0),
            ("silent", any(record.answers.get(metric, "") is None for record in records)),
        )
        if holds
    ]
    first = records[0]
    return (
        f'<section class="sample" data-task="{_text(task)}" data-kind="{" ".join(kinds)}">'
        f"<h3>{_text(task)}, sample {_text(first.sample)}</h3><pre>{_text(first.question)}</pre>"
        + (f'<p class="note">Reference: {_text(first.reference)}</p>' if first.labels is None else "")
        + f'<div class="outputs">{"".join(_output(record, metric) for record in records)}</div></section>'
    )


def _output(record: Record, metric: str) -> str:
    arm = str(Arm(record.model, record.decoder))
    name = arm if record.seed is None else f"{arm}, seed {record.seed}"
    if record.labels is not None:
        return _measured(name, record)
    score = record.scores[metric]
    if score in (0, 1):
        word, kind = ("right", "right") if score == 1 else ("wrong", "wrong")
    else:
        word, kind = f"{written(metric).text(score)} {written(metric).unit}", "note"
    answers = ", ".join(
        f"{other.replace('_', ' ')}: {'none' if answer is None else answer}"
        for other, answer in record.answers.items()
        if answer != record.output.strip()
    )
    facts = [answers] if answers else []
    if record.tokens is not None:
        facts.append(f"{record.tokens} tokens")
    votes = Counter(vote(record, candidate["text"]) for candidate in record.candidates)
    if len(record.candidates) > 1 and set(votes) != {None}:
        facts.append(
            "votes: " + ", ".join(f"{answer or 'none'} \u00d7{count}" for answer, count in votes.most_common())
        )
    output = _text(record.output) if record.output.strip() else '<span class="wrong">no output</span>'
    judged = "".join(_judged(judge, rating) for judge, rating in ratings_of(record).items())
    return (
        f'<div class="output"><strong>{_text(name)}</strong> <span class="{kind}">{word}</span>'
        f'<pre>{output}</pre><div class="note">{_text("; ".join(facts))}</div>{judged}</div>'
    )


def _judged(judge: str, rating: Rating) -> str:
    """Shows a judge's rating of an output with its reasons, or the reason why there is no rating."""
    if rating.error is not None:
        return f'<div class="wrong">{_text(judge)}: not rated, {_text(rating.error)}</div>'
    return f'<div class="note">{_text(judge)}: {rating.value:g} of 10. {_text(rating.said)}</div>'


def _measured(name: str, record: Record) -> str:
    """Shows a model's scores on a document."""
    facts = [f"{other} {written(other).text(score)} {written(other).unit}" for other, score in record.scores.items()]
    facts.append(f"{record.labels} labels")
    return f'<div class="output"><strong>{_text(name)}</strong> <div class="note">{_text("; ".join(facts))}</div></div>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
