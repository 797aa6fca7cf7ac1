"""``slimkernels tree``: a page that shows the search trees of a trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from slimkernels.cli.options import add_command

_EXAMPLES = """\
examples:
  slimkernels tree trace.jsonl -o tree.html
  slimkernels tree trace.jsonl --question 3 -o third.html
The page needs neither a network nor a server. It shows the text and the score of every node, and why a branch ended.
"""


def add_parser(commands: Any) -> None:
    """Adds the command ``tree``."""
    parser = add_command(commands, "tree", run, "write a page that shows the search trees of a trace", _EXAMPLES)
    add = parser.add_argument
    add("trace", metavar="TRACE", help="file written by decode --trace; the search may still be running")
    add("-o", "--out", metavar="FILE", help="page to write (default: TRACE with the ending .html)")
    add("--question", type=int, metavar="N", help="number of the only question to show, from 1 (default: show all)")


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    from slimkernels.search.trace import read_trace
    from slimkernels.search.tree_page import tree_page

    content = read_trace(args.trace)
    number = args.question
    if number is not None and not 1 <= number <= len(content.questions):
        raise ValueError(
            f"--question must be in [1, {len(content.questions)}], the questions of the trace, got {number}"
        )
    out = Path(args.trace).with_suffix(".html") if args.out is None else Path(args.out)
    page = tree_page(content, None if number is None else [number - 1])
    out.write_text(page, encoding="utf-8", errors="replace")
    print(f"wrote {out}")
