"""The command line. Parsing and help load only the standard library; a command loads what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from slimkernels.cli.parser import make_parser

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
_PATH_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    BlockingIOError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Returns:
        0, or 1 for a failed run or a damaged store, 2 for bad input, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted; everything reported as written is kept", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED
    except Exception as error:
        code = _exit_code(error)
        if code is None or args.traceback:
            raise
        return _fail(_sentence(error), code)
    return 0


def _exit_code(error: Exception) -> int | None:
    """Returns the exit code for an error whose message tells the user what to do, None for a defect of this program."""
    # A store's error exists only once its module is loaded. Loading it here would load torch for a mistyped option.
    errors = sys.modules.get("slimkernels.store.errors")
    if errors is not None and isinstance(error, errors.StoreError):
        usage = (errors.NotAStoreError, errors.SettingsMismatchError, errors.StoreLockedError)
        return _EXIT_USAGE if isinstance(error, usage) else _EXIT_FAILED
    if isinstance(error, (ValueError, ImportError, *_PATH_ERRORS)):
        return _EXIT_USAGE
    # The input was good, but the run failed: the loss became NaN, or the disk is full.
    return _EXIT_FAILED if isinstance(error, (FloatingPointError, OSError)) else None


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed: pip install 'slimkernels[demo]'"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        # The system's own message is "[Errno 2] No such file or directory: 'x'".
        missing = isinstance(error, FileNotFoundError)
        return f"there is no file {error.filename}" if missing else f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _fail(message: str, code: int) -> int:
    print(f"slimkernels: {message}", file=sys.stderr)
    return code
