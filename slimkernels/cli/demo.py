"""``slimkernels demo``: half of a model's layers learn back from the whole model, three ways."""

from __future__ import annotations

import argparse
from typing import Any

from slimkernels.cli.options import add_command, positive_int

_EXAMPLES = """\
examples:
  slimkernels demo --out demo-output
  slimkernels demo --quick --out demo-quick
  with twice the text, or the same as on another machine:
    slimkernels demo --tokens 30000 --out demo-30000
Estimated time on two idle CPU cores: about four minutes, since a measurement decides how many tokens there is time for;
with --quick less than one. A stopped run is continued by the same command, which reuses the finished phases.
"""


def add_parser(commands: Any) -> None:
    """Adds the command ``demo``."""
    summary = "take half of a real model's layers, and heal them three ways with the whole model's logits"
    parser = add_command(commands, "demo", run, summary, _EXAMPLES)
    add = parser.add_argument
    add("--out", default="demo-output", metavar="DIR", help="folder for all results (default: %(default)s)")
    add("--quick", action="store_true", help="run with much smaller sizes, which only show that everything works")
    add(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="number of tokens that the teacher writes (default: as many as four minutes have room for, by a "
        "measurement of ten seconds)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed for the teacher's text and the order of the documents (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs the demonstration."""
    if not args.quick and args.tokens is None:
        print("estimated time: about four minutes on two idle CPU cores")
    print("loading torch and transformers", flush=True)
    from slimkernels.demo import run_demo

    run_demo(args.out, quick=args.quick, seed=args.seed, tokens=args.tokens)
