"""The parser of a command, and the argument types and options that several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its examples and accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str, epilog: str = ""
) -> Parser:
    """Adds a command to ``commands``, the result of ``add_subparsers``.

    Args:
        commands: Subparsers of the program, or of a command that consists of commands.
        name: Word by which the command is called.
        run: Function that executes the command; it becomes the parsed attribute ``run``.
        summary: Description of the command, a verb phrase without a full stop.
        epilog: Examples and explanations, printed below the options.

    Returns:
        The parser of the command, without arguments. It sets ``command`` to the command's words, as in "store info".
    """
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    parser.set_defaults(command=parser.prog.removeprefix("slimkernels "), run=run)
    return parser


def add_corpus_options(group: argparse._ActionsContainer) -> None:
    """Adds the options that say how a file of documents is read."""
    add = group.add_argument
    add("--text-field", default="text", metavar="NAME", help="field with the text or token ids (default: %(default)s)")
    add(
        "--max-length",
        type=positive_int,
        default=1024,
        metavar="N",
        help="longest document in tokens; longer texts are split (default: %(default)s)",
    )


def add_model_options(group: argparse._ActionsContainer, model: str) -> None:
    """Adds the options that say which files of ``model``, as in "the teacher", are loaded, and in which dtype."""
    add = group.add_argument
    add("--gguf-file", metavar="NAME", help=f".gguf file inside the folder or repository of {model}")
    add("--revision", metavar="REV", help=f"branch, tag or commit of {model} on the hub")
    add("--dtype", choices=DTYPES, default="float32", help=f"dtype of the weights of {model} (default: %(default)s)")


def positive_int(text: str) -> int:
    """Parses a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def key_value(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE; a VALUE that is not JSON is taken as text."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
