"""The command line. Parsing and help load only the standard library; a command loads what it needs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from slimkernels.cli.errors import EXIT_FAILED, exit_code, sentence_of
from slimkernels.cli.parser import make_parser

_EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Returns:
        0, or 1 for a failed run, a damaged store or a faulty installation, 2 for bad input, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted; everything reported as written is kept", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        code = exit_code(error)
        if code is None or args.traceback:
            raise
        return _fail(sentence_of(error, args), code)
    return 0 if code is None else code


def _fail(message: str, code: int) -> int:
    print(f"slimkernels: {message}", file=sys.stderr)
    return code
