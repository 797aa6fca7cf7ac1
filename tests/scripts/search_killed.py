"""Kills searches: `python search_killed.py PATH` traces two to PATH.toy and PATH.tiny, and prints a line per process.

One process forks the searches, so that torch is imported once. Each fork dies by SIGKILL at the next moment of a list:
half-way through the bytes of an append, or before the n-th generation. A search that is complete earlier just exits.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch
from test_search_trace import QUESTIONS, TINY_QUESTIONS, finder, tiny_finder

from slimkernels.durable import Journal

# The append or generation in which each process dies, counted from its start.
TOY = [("append", 0), ("append", 1), ("append", 0), ("extend", 2), ("append", 2), ("extend", 1), ("append", 1)] * 2
TINY = [("extend", 2), ("append", 1), ("extend", 1)]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(engine, kind: str, count: int) -> None:
    """Lets the process die in its append or generation number ``count``, from 0."""
    calls = iter(range(1 << 30))
    if kind == "extend":
        extend = engine.extend
        engine.extend = lambda *args, **options: die() if next(calls) == count else extend(*args, **options)
        return
    append = Journal.append

    def torn_append(journal, lines):
        if next(calls) == count:
            append(journal, lines[: len(lines) // 2])
            die()
        append(journal, lines)

    Journal.append = torn_append


def search(make_finder, questions, path: str, moment) -> int:
    process = os.fork()
    if process == 0:
        path_finder = make_finder()
        arm(path_finder.engine, *moment)
        path_finder.solve(questions, trace=path)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    torch.set_num_threads(1)
    for make_finder, questions, name, moments in (
        (finder, QUESTIONS, "toy", TOY),
        (tiny_finder, TINY_QUESTIONS, "tiny", TINY),
    ):
        path = f"{sys.argv[1]}.{name}"
        for moment in moments:
            code = search(make_finder, questions, path, moment)
            sys.stdout.write(json.dumps({"signal": -code, "bytes": os.path.getsize(path)}) + "\n")


if __name__ == "__main__":
    main()
