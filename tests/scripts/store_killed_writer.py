"""Kills writers: `python store_killed_writer.py DIR DOCUMENTS SEED KILLS` prints one JSON line per writer.

Every writer resumes a store in DIR, writes the documents that are missing and dies by SIGKILL a random moment after a
random flush; the last ones are left alone. It reports the number of stored documents after every flush, which is what
must survive. One process forks them all, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from support.store_cases import SETTINGS, Case, random_case

from slimkernels.store import StoreWriter


def documents(count: int) -> list[Case]:
    """Makes the same documents in every process."""
    generator = torch.Generator().manual_seed(7)
    return [random_case(12, 8, generator, ragged=i % 3 == 0) for i in range(count)]


def write(path: Path, cases: list[Case], report: int) -> None:
    with StoreWriter(path, **SETTINGS) as writer:
        missing = [case for case in cases if case.input_ids not in writer]
        for i, case in enumerate(missing):
            writer.add(*case)
            if i % 3 == 2:
                writer.flush()
                os.write(report, f"{len(writer)}\n".encode())
    os.write(report, f"{len(cases)}\n".encode())


def run_writer(path: Path, cases: list[Case], kill_after: tuple[int, float] | None) -> int:
    """Forks a writer, kills it some seconds after some flushes, and returns the number it last reported written."""
    read, report = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(path, cases, report)
            code = 0
        finally:
            os._exit(code)
    os.close(report)
    reported = [0]
    with os.fdopen(read) as file:
        if kill_after is not None:
            flushes, seconds = kill_after
            for _ in range(flushes):
                reported += [int(line) for line in [file.readline()] if line]
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        reported += [int(line) for line in file]
    _, status = os.waitpid(child, 0)
    if not (os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0):
        raise SystemExit(f"the writer failed by itself: {status}")
    return reported[-1]


def main(path: Path, count: int, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    choose = random.Random(seed)
    cases = documents(count)
    for trial in range(kills):
        # Every store sees two kills, so that the second writer finds the leftovers of the first.
        store = path / f"store-{trial // 2}"
        reported = run_writer(store, cases, (choose.randint(0, 8), choose.random() * 0.01))
        os.write(1, (json.dumps({"store": store.name, "reported": reported}) + "\n").encode())
        # The test checks the store before the next writer repairs it.
        sys.stdin.readline()
    for number in range((kills + 1) // 2):
        run_writer(path / f"store-{number}", cases, None)
    os.write(1, b"{}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
