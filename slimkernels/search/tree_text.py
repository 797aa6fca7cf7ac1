"""A growing tree in a terminal: ``render_tree`` for ``rich``, ``progress_line`` as plain text."""

from __future__ import annotations

from collections import Counter

from rich.text import Text
from rich.tree import Tree as RichTree

from slimkernels.search.pruning import PruningScore
from slimkernels.search.tree import ROOT, Status, Tree

_STYLES = {Status.OPEN: "bold", Status.FINISHED: "green", Status.ENDED: "yellow", Status.EXPANDED: ""}


def count_statuses(tree: Tree) -> dict[str, int]:
    """Returns the number of nodes below the root by their status, in lower case, for those that there are."""
    counts = Counter(tree.status[1:].tolist())
    return {status.name.lower(): counts[status] for status in Status if counts[status]}


def progress_line(index: int, tree: Tree) -> str:
    """Returns one line with the depth of a question's tree and its number of nodes by status.

    Args:
        index: Index of the question, from 0; the line counts from 1.
        tree: Tree of the question.
    """
    named = ", ".join(f"{count} {name}" for name, count in count_statuses(tree).items())
    return f"question {index + 1}, depth {int(tree.depth.max())}: {named}"


def render_tree(title: str, tree: Tree, max_lines: int, score: PruningScore) -> RichTree:
    """Returns the best hypotheses with the steps before them, as many as fit.

    Args:
        title: Title of the drawing.
        tree: Tree of any size.
        max_lines: Largest number of lines, at least 3.
        score: Score of a branch, which stands before its last step.
    """
    hypotheses = [node for node in tree.hypotheses() if node != ROOT]
    shown: set[int] = set()
    for leaf in score.ranked(tree, hypotheses):
        branch = set(tree.branch(leaf)) - shown
        if shown and len(shown) + len(branch) > max_lines - 2:
            break
        shown |= branch
    rendered = RichTree(_one_line(title, "bold"))
    rendered_nodes = {ROOT: rendered}
    for node in sorted(shown):
        label = Text(f"{score(tree, [node])[0]:.2f} ", style="cyan")
        label.append_text(_one_line(tree.steps[node], _STYLES[Status(tree.status[node])]))
        rendered_nodes[node] = rendered_nodes[int(tree.parent[node])].add(label)
    if len(tree) - 1 > len(shown):
        rendered.add(Text(f"and {len(tree) - 1 - len(shown)} more nodes", style="dim"))
    return rendered


def _one_line(text: str, style: str) -> Text:
    return Text(" ".join(text.split()), style=style, no_wrap=True, overflow="ellipsis")
