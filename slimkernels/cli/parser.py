"""The parser of the whole command line, made from the modules of the commands."""

from __future__ import annotations

from slimkernels.cli import capture, compare, decode, demo, doctor, evaluate, store, train, tree
from slimkernels.cli.options import Parser

_EXAMPLES = """\
examples:
  slimkernels demo --out demo-output
  slimkernels capture --teacher smollm2-135m-instruct --prompts --tokens 100000 --out runs/store
  slimkernels train --store runs/store --method kd --out runs/student
  slimkernels eval --store runs/held-out --model runs/student runs/other-student
  slimkernels decode --model runs/student "Why is the sky blue?"
  slimkernels store info runs/store
  slimkernels store verify runs/store --complete corpus.jsonl --tokenizer ./my-model
  slimkernels doctor
"""


def make_parser() -> Parser:
    """Returns the parser of every command; parsed arguments hold ``run``, the function that executes the command."""
    from slimkernels import __version__

    parser = Parser(
        prog="slimkernels",
        description="Distil a teacher's largest logits into a student, and search with a language model.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"slimkernels {__version__}", help="print the version")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    for module in (demo, capture, train, evaluate, compare, decode, tree, store, doctor):
        module.add_parser(commands)
    return parser
