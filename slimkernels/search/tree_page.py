"""``tree_page``: the trees of a trace as one HTML page, readable without a network, a server or scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from slimkernels.search.pruning import PruningScore
from slimkernels.search.trace import TraceContent, TracedQuestion
from slimkernels.search.tree import ROOT, Status, Tree


def tree_page(content: TraceContent, indices: Sequence[int] | None = None) -> str:
    """Renders the trees of a trace as an HTML page, in which all text of the trace is escaped.

    Args:
        content: Content of a trace, which may still be growing.
        indices: Indices of the questions to show; None shows all.
    """
    config: Mapping[str, Any] = content.header["config"]
    shown = range(len(content.questions)) if indices is None else indices
    sections = [_question(index, content.questions[index], config, place == 0) for place, index in enumerate(shown)]
    settings = {"engine": content.header["engine"], "checks": content.header["checks"], "config": config}
    return _PAGE.format(
        style=_STYLE,
        script=_SCRIPT,
        count=f"{len(shown)} question" + ("s" if len(shown) != 1 else ""),
        meaning=_meaning(PruningScore.of_header(config)),
        sections="\n".join(sections),
        settings=escape(json.dumps(settings, indent=2, ensure_ascii=False)),
    )


def _meaning(score: PruningScore) -> str:
    """Returns the sentence that explains the scores of the page."""
    logprob = "the sum of a branch's log-probabilities, in nats, divided by its number of tokens to the power of "
    reduced = "score of a branch's last step" if score.reduction == "last" else f"{score.reduction} of the step scores"
    parts = [(1 - score.weight, f"{logprob}length_penalty"), (score.weight, f"the {reduced}")]
    shares = [(share, text) for share, text in parts if share > 0]
    return f"A score is {' plus '.join(text if share == 1 else f'{share:g} times {text}' for share, text in shares)}."


def _question(index: int, traced: TracedQuestion, config: Mapping[str, Any], is_open: bool) -> str:
    """Renders one question; ``is_open`` shows its tree without a click."""
    tree, result = traced.progress.tree, traced.result
    scores = {}
    if result is None:
        outcome, answer = "in progress", '<p class="answer">The search is not complete.</p>'
    else:
        outcome = "finished" if result["finished"] else "unfinished"
        scores = dict(zip(result["candidates"], result["scores"], strict=True))
        found = result["answer"] if result["answer"] is not None else result["text"].strip()
        answer = f'<p class="answer"><b>Answer</b> {escape(found)}</p>' if found else '<p class="answer">No answer.</p>'
    chosen = result["node"] if result is not None else None
    branch = set() if chosen is None else set(tree.branch(chosen))
    facts = [
        outcome,
        f"{len(tree) - 1} nodes",
        f"depth {int(tree.depth.max())}",
        f"{traced.progress.num_tokens} tokens",
        f"{traced.progress.seconds:.1f} s",
        *(f"{count} {escape(reason)}" for reason, count in sorted(tree.count_reasons().items())),
    ]
    context = traced.question.context or ""
    prompt = traced.question.prompt
    title = context or (prompt if isinstance(prompt, str) else f"{len(prompt)} tokens")
    return (
        f'<details class="question"{" open" if is_open else ""}><summary><h2>{index + 1}. {escape(title.strip())}</h2>'
        f"{answer}<p class=facts>{' &middot; '.join(facts)}</p></summary>\n"
        f"{_nodes(tree, branch, chosen, scores, PruningScore.of_header(config))}</details>"
    )


def _nodes(tree: Tree, branch: set[int], chosen: int | None, selected: Mapping[int, float], score: PruningScore) -> str:
    """Renders the tree as nested lists. Iterative, because a branch may be deeper than Python's stack.

    Args:
        tree: Tree of the question.
        branch: Nodes of the chosen branch.
        chosen: Last node of the chosen branch, or None.
        selected: The selector's score of each candidate.
        score: Pruning score of a branch.
    """
    children: list[list[int]] = [[] for _ in range(len(tree))]
    for node in range(1, len(tree)):
        children[int(tree.parent[node])].append(node)
    scores = score(tree, np.arange(len(tree)))
    parts: list[str] = []
    todo: list[int | str] = [ROOT]  # nodes to render, and closing tags to write after their children
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            parts.append(item)
            continue
        if item != ROOT:
            parts.append(_node(tree, item, float(scores[item]), item in branch, item == chosen, selected.get(item)))
        if children[item]:
            parts.append("<ol>\n")
        closing_tag = "</ol>\n" if children[item] else ""
        todo.append(closing_tag + ("</li>\n" if item != ROOT else ""))
        todo += children[item][::-1]
    return "".join(parts)


def _node(tree: Tree, node: int, score: float, on_branch: bool, is_chosen: bool, selected: float | None) -> str:
    status = Status(tree.status[node]).name.lower()
    reason = tree.reasons[node]
    label = "chosen" if is_chosen else reason or status
    count = len(tree.step_token_ids(node))
    facts = [] if np.isnan(score) else [f"score {score:.3f}"]
    if not np.isnan(tree.step_score[node]):
        facts.append(f"step score {tree.step_score[node]:.3g}")
    facts.append(f"{count} token" + ("s" if count != 1 else ""))
    if selected is not None:
        facts.append(f"selector {selected:.3g}")
    if tree.weight[node] != tree.weight[tree.parent[node]]:
        facts.append(f"stands for {tree.weight[node]:g} branches")
    if status == "merged":
        facts.append(f"into child {tree.ordinal[tree.merged_into[node]] + 1} of its parent")
    if tree.attempts[node] > 1:
        facts.append(f"{int(tree.attempts[node])} attempts")
    text = escape(tree.steps[node].strip()) or "<i>no text</i>"
    classes = f"{status} branch" if on_branch else status
    return (
        f'<li class="{classes}"><div class="step">{text}</div><div class="facts">'
        f'<span class="label">{escape(label)}</span> {" &middot; ".join(facts)}</div>\n'
    )


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src \
'unsafe-inline'">
<title>Search trees</title>
<style>{style}</style>
</head>
<body>
<header><h1>Search trees</h1><p class="facts">{count}. {meaning} The chosen branch is framed.</p>
<p class="tools" hidden><label><input type="checkbox" id="only"> show only the chosen branch</label>
<label><input type="checkbox" id="kept"> hide steps that were cut, pruned or merged</label></p></header>
<main>
{sections}
</main>
<footer><details><summary>Settings</summary><pre>{settings}</pre></details></footer>
<script>{script}</script>
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --dim: #5d636b; --line: #c9ced6; --good: #106b35;
  --bad: #a3261c; --warn: #7a5200; --choice: #1257b8; --panel: #f3f5f8; }
@media (prefers-color-scheme: dark) { :root { --back: #14171a; --text: #e4e7eb; --dim: #9aa3ad; --line: #3b424b;
  --good: #6fd598; --bad: #f2938b; --warn: #e6bd63; --choice: #86b6ff; --panel: #1e2328; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.25rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 0; display: inline; white-space: pre-wrap; }
.facts { color: var(--dim); font-size: .82rem; margin: .15rem 0; }
.answer { margin: .3rem 0; white-space: pre-wrap; }
.question { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; margin: .8rem 0;
  background: var(--panel); }
summary { cursor: pointer; }
ol { list-style: none; margin: .3rem 0 0; padding: 0 0 0 .55rem; border-left: 2px solid var(--line); }
ol ol ol ol ol ol ol ol ol ol ol ol ol { padding-left: 0; }
li { margin: .35rem 0; }
.step { white-space: pre-wrap; padding: .2rem .45rem; border-radius: .3rem; background: var(--back);
  border: 1px solid transparent; }
li.branch > .step { border-color: var(--choice); box-shadow: inset 3px 0 var(--choice); }
li.cut > .step, li.pruned > .step, li.merged > .step { color: var(--dim); }
.label { font-weight: 600; color: var(--dim); }
.finished > .facts .label { color: var(--good); }
.cut > .facts .label { color: var(--bad); }
.ended > .facts .label { color: var(--warn); }
li.branch > .facts .label { color: var(--choice); }
.only li:not(.branch), .kept li.cut, .kept li.pruned, .kept li.merged { display: none; }
pre { white-space: pre-wrap; font-size: .8rem; }
label { margin-right: 1rem; }
"""
# Toggles classes of the page's body; without scripts everything is shown.
_SCRIPT = """
document.querySelector(".tools").hidden = false;
for (const name of ["only", "kept"])
  document.getElementById(name).onchange = event => document.body.classList.toggle(name, event.target.checked);
"""
