"""A growing tree in a terminal: ``draw`` for ``rich``, ``line`` where there is none."""

from __future__ import annotations

from collections import Counter

from rich.text import Text
from rich.tree import Tree as Drawing

from slimkernels.search.tree import ROOT, Status, Tree

_STYLES = {Status.OPEN: "bold", Status.FINISHED: "green", Status.ENDED: "yellow", Status.EXPANDED: ""}


def line(index: int, tree: Tree) -> str:
    """One line: how far the tree of a question, counted from 0, has come."""
    counts = Counter(tree.status[1:].tolist())
    named = ", ".join(f"{counts[status]} {status.name.lower()}" for status in Status if counts[status])
    return f"question {index + 1}, depth {int(tree.depth.max())}: {named}"


def draw(title: str, tree: Tree, lines: int) -> Drawing:
    """The hypotheses and what led to them, the better first, in at most so many lines.

    Args:
        title: Of the tree.
        tree: Of any size.
        lines: At least 3.
    """
    kept = [node for status in (Status.OPEN, Status.FINISHED, Status.ENDED) for node in tree.with_status(status)]
    shown: set[int] = set()
    for leaf in tree.best([node for node in kept if node != ROOT], len(kept), 1.0):
        branch = set(tree.branch(leaf)) - shown
        if shown and len(shown) + len(branch) > lines - 2:
            break
        shown |= branch
    drawing = Drawing(_one_line(title, "bold"))
    places = {ROOT: drawing}
    for node in sorted(shown):
        label = Text(f"{tree.scores([node], 1.0)[0]:.2f} ", style="cyan")
        label.append_text(_one_line(tree.steps[node], _STYLES[Status(tree.status[node])]))
        places[node] = places[int(tree.parent[node])].add(label)
    if len(tree) - 1 > len(shown):
        drawing.add(Text(f"and {len(tree) - 1 - len(shown)} more nodes", style="dim"))
    return drawing


def _one_line(text: str, style: str) -> Text:
    return Text(" ".join(text.split()), style=style, no_wrap=True, overflow="ellipsis")
