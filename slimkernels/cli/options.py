"""The parser of a command, and the argument types and options that several commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from slimkernels.cli.terminal import warn_deprecated

DTYPES = ("float32", "bfloat16", "float16")
CODECS = ("affine8", "affine6", "bfloat16", "float32")
HIDDEN_CODECS = ("hidden8", "hidden16")


def positive_int(text: str) -> int:
    """Parses a whole number of at least 1 that fits in 64 bits."""
    # Python refuses to parse thousands of digits.
    if text.isdecimal() and (len(text) > 100 or int(text) >= 2**63):
        raise argparse.ArgumentTypeError(f"must be below 2^63, got {text!r}")
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


# Options that are arguments of a function or fields of a configuration: by their names there, the flag, the keywords of
# add_argument, and the help. One that is not given is None, so that the default is that of the function.
FieldOptions = Mapping[str, tuple[str, dict[str, Any], str]]

# Fields that limit the requests to a server.
SERVER_FIELDS: FieldOptions = {
    "key_env": (
        "--key-env",
        {"metavar": "NAME"},
        "environment variable with the key (default: OPENAI_API_KEY, if set)",
    ),
    "concurrency": (
        "--concurrency",
        {"type": positive_int, "metavar": "N"},
        "requests at the same time (default: 8)",
    ),
    "max_retries": ("--max-retries", {"type": int, "metavar": "N"}, "retries of a failed request (default: 6)"),
    "requests_per_minute": (
        "--requests-per-minute",
        {"type": float, "metavar": "N"},
        "highest rate, retries included (default: no limit)",
    ),
    "token_budget": (
        "--token-budget",
        {"type": positive_int, "metavar": "N"},
        "tokens that the server may read and generate, retries included (default: no limit)",
    ),
}


class Parser(argparse.ArgumentParser):
    """A parser that keeps the line breaks of its examples and accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    epilog: str = "",
    api_names: Mapping[str, str] | None = None,
) -> Parser:
    """Adds a command to ``commands``, the result of ``add_subparsers``.

    Args:
        commands: Subparsers of the program, or of a command that consists of commands.
        name: Word by which the command is called.
        run: Function that executes the command and returns its exit code, None for 0; it becomes the parsed attribute
            ``run``.
        summary: Description of the command, a verb phrase without a full stop.
        epilog: Examples and explanations, printed below the options.
        api_names: Options by the names that they have in the errors of the functions which the command calls, where
            these are not the names of its attributes; an empty text keeps a name, which means something else there.

    Returns:
        The parser of the command, without arguments. It sets ``command`` to the command's words, as in "store info",
        and ``parser`` to itself.
    """
    parser = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=epilog)
    command = parser.prog.removeprefix("slimkernels ")
    parser.set_defaults(command=command, run=run, parser=parser, api_names=dict(api_names or {}))
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


def add_fields(group: argparse._ActionsContainer, options: FieldOptions, names: Iterable[str] | None = None) -> None:
    """Adds options that are fields, or those of them that are named."""
    for name in options if names is None else names:
        flag, keywords, text = options[name]
        group.add_argument(flag, dest=name, help=text, **keywords)


def given_fields(args: argparse.Namespace, options: FieldOptions) -> dict[str, Any]:
    """Returns the values of the options that were given, by the names of their fields."""
    return {name: getattr(args, name) for name in options if getattr(args, name) is not None}


def refuse(args: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """Refuses options that would have no effect.

    Args:
        args: Parsed arguments.
        names: Attributes of the options, those of other commands among them, which are passed over.
        where: Words that say what makes them useless, as in "with --text".

    Raises:
        ValueError: One of them was given; the message names its flag.
    """
    for action in args.parser._actions:
        if action.dest in names and getattr(args, action.dest) != args.parser.get_default(action.dest):
            raise ValueError(f"{action.option_strings[0]} has no meaning {where}: omit it")


class _OldName(argparse.Action):
    """An option that does what another one does, and warns that its name is old."""

    def __init__(self, *args: Any, present: argparse.Action, advice: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.present, self.advice = present, advice

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        warn_deprecated(f"{option_string} is now {self.advice}")
        self.present(parser, namespace, self.const if self.nargs == 0 else values, self.present.option_strings[0])


def add_old_name(parser: Parser, old: str, present: str, const: Any = None) -> None:
    """Lets an option be given by the name that it had in the last release, which the help does not show.

    Args:
        parser: Parser that has the option already.
        old: Name that the option had.
        present: Name of the option now.
        const: Value of the option for which the old one stood, if that took none.
    """
    action = parser._option_string_actions[present]
    # argparse has no public way to add an option that is like another one.
    like = {"nargs": 0, "const": const} if const is not None else {"nargs": action.nargs, "type": action.type}
    advice = present if const is None else f"{present} {const}"
    parser.add_argument(
        old,
        dest=action.dest,
        action=_OldName,
        present=action,
        advice=advice,
        default=action.default,
        choices=None if const is not None else action.choices,
        help=argparse.SUPPRESS,
        **like,
    )


def key_value(text: str) -> tuple[str, Any]:
    """Parses NAME=VALUE; a VALUE that is not JSON is taken as text."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
