"""The message of an error of the command line, a sentence that names options and packages, and its exit code."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping

EXIT_FAILED = 1
EXIT_USAGE = 2
# The extra of this package that installs a package, by the name under which it is imported.
EXTRAS = {
    **dict.fromkeys(("transformers", "accelerate", "datasets", "gguf", "rich"), "train"),
    "matplotlib": "demo",
    **dict.fromkeys(("pyarrow", "yaml"), "exchange"),
    **dict.fromkeys(("trl", "peft"), "trl"),
    "httpx2": "server",
    "rouge_score": "evaluate",
    "lm_eval": "harness",
    "triton": "gpu",
}
_PATH_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    BlockingIOError,
)


def exit_code(error: Exception) -> int | None:
    """Returns the exit code for an error whose message tells the user what to do, None for a defect of this program."""
    if _is_store_error(error):
        errors = sys.modules["slimkernels.store.errors"]
        usage = (errors.NotAStoreError, errors.SettingsMismatchError, errors.StoreLockedError)
        return EXIT_USAGE if isinstance(error, usage) else EXIT_FAILED
    if isinstance(error, (ValueError, ImportError, *_PATH_ERRORS)):
        return EXIT_USAGE
    # The input was good, but the run failed: the loss became NaN, or the disk is full.
    return EXIT_FAILED if isinstance(error, (FloatingPointError, OSError)) else None


def sentence_of(error: Exception, args: argparse.Namespace) -> str:
    """Returns the message of an error in one line, with the command's options in place of the names of the API."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        package = error.name.partition(".")[0]
        wanted = f"'slimkernels[{EXTRAS[package]}]'" if package in EXTRAS else package
        return f"the package {package} is not installed: pip install {wanted}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        # The system's own message is "[Errno 2] No such file or directory: 'x'".
        missing = isinstance(error, FileNotFoundError)
        return f"there is no file {error.filename}" if missing else f"{error.filename}: {error.strerror}"
    message = " ".join(str(error).split())
    # A store's error is about what the store records, by the names that `store info` prints.
    if _is_store_error(error) or not isinstance(error, (ValueError, FloatingPointError)):
        return message
    choices = {str(choice) for action in args.parser._actions for choice in action.choices or ()}
    return with_flags(message, flags_of(args.parser) | args.api_names, choices)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Returns the flag of every option of a command, by the name of its attribute, which is mostly that of the API."""
    # The first of several, since an earlier name of an option is added after it.
    return {action.dest: action.option_strings[-1] for action in reversed(parser._actions) if action.option_strings}


def with_flags(message: str, flags: Mapping[str, str], choices: Collection[str] = ()) -> str:
    """Replaces the names of the API in a message by what a command calls them.

    Only a word that can be nothing else counts as a name: one with an underscore, one that is followed by "=", or one
    that a clause begins with, as in "seed must be". Text in quotes and paths stay as they are.

    Args:
        message: Message of an error.
        flags: Replacements by name; an empty one keeps the name.
        choices: Values that the command accepts by name, of which the API writes some with underscores.
    """

    def chosen(match: re.Match[str], flag: str) -> str:
        dashed = match[1].replace("_", "-")
        return f"{flag} {dashed if dashed in choices else match[1]}"

    for name, flag in flags.items():
        if not flag:
            continue
        if "_" not in name:
            message = re.sub(rf"(^|[:;,] ){name}(?= must )", rf"\1{flag}", message)
        else:
            message = re.sub(rf"(?<![\w/.'\"-]){name}(?![\w/'\"=(-]|\.\w)", flag, message)
        # A value: select='top_k' is --select top-k.
        message = re.sub(rf"(?<![\w/.'\"-]){name}='(\w+)'", lambda match, flag=flag: chosen(match, flag), message)
        # A value of --option NAME=VALUE stays behind its equals sign.
        message = re.sub(rf"(?<![\w/.'\"-]){name}=(?=[\w(])", f"{flag}=" if " " in flag else f"{flag} ", message)
        message = message.replace(f"{flag} ({flag})", flag)
    return re.sub(r"(--[\w-]+) must be None\b", r"\1 must be omitted", message)


@contextlib.contextmanager
def named(flags: Mapping[str, str]) -> Iterator[None]:
    """Names options in the errors of a part of a command, where they are not those of the whole command."""
    try:
        yield
    except ValueError as error:
        message = with_flags(str(error), flags)
        if message == str(error):
            raise
        raise ValueError(message) from error


def _is_store_error(error: Exception) -> bool:
    # A store's error exists only once its module is loaded. Loading it here would load torch for a mistyped option.
    errors = sys.modules.get("slimkernels.store.errors")
    return errors is not None and isinstance(error, errors.StoreError)
