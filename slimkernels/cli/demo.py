"""``slimkernels demo``: a teacher writes text, and one small student learns from it three ways."""

from __future__ import annotations

import argparse
from typing import Any

from slimkernels.cli.options import add_command

_EXAMPLES = """\
examples:
  slimkernels demo --out demo-output
  slimkernels demo --quick --out demo-quick
Estimated time on two idle CPU cores: five to ten minutes, with --quick about one. A stopped run is continued by the
same command, which reuses the finished phases.
"""


def add_parser(commands: Any) -> None:
    """Adds the command ``demo``."""
    summary = "train one student three ways on the text and logits of a real teacher"
    parser = add_command(commands, "demo", run, summary, _EXAMPLES)
    add = parser.add_argument
    add("--out", default="demo-output", metavar="DIR", help="folder for all results (default: %(default)s)")
    add("--quick", action="store_true", help="run with much smaller sizes, which only show that everything works")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed for the teacher's text and the student's weights (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the demonstration."""
    if not args.quick:
        print("estimated time: five to ten minutes on two idle CPU cores")
    print("loading torch and transformers", flush=True)
    from slimkernels.demo import run_demo

    run_demo(args.out, quick=args.quick, seed=args.seed)
