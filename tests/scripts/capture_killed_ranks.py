"""Kills captures: `python capture_killed_ranks.py DIR SEED KILLS` prints one JSON line per round.

A round is two ranks that capture into one store; one or both die by SIGKILL at a random moment, and those that are left
must end by themselves. What the parts reported written before the kill is in the line. After every second round the
next one begins a new store, so that a round meets what another has left. At the end every store is completed, by one,
two or three ranks. All are forks of one process, so that torch is imported once.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from support import teachers
from test_capture import make_documents

from slimkernels.store import StoreWriter
from slimkernels.teacher import capture

NUM_PARTS = 2
OPTIONS = {"top_k": 17, "batch_tokens": 120, "window": 8, "shard_rows": 60, "num_parts": NUM_PARTS}


def documents() -> list[list[int]]:
    """Makes the same documents in every process."""
    return make_documents(80, seed=5)


class Rank:
    """A forked rank, which reports the hashes of the documents it has written, a line for every shard."""

    def __init__(self, model, tokenizer, path: Path, rank: int, num_ranks: int) -> None:
        read, write = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            self._capture(write, model, tokenizer, documents(), path, rank=rank, num_ranks=num_ranks)
        os.close(write)
        self.report = os.fdopen(read)
        self.reported: list[str] = []
        self.is_killed = False

    @staticmethod
    def _capture(report: int, *arguments, **options) -> None:
        flush = StoreWriter.flush

        def flush_and_report(writer: StoreWriter) -> None:
            pending = [entry.digest.hex() for entry in writer._pending]
            flush(writer)
            if pending:
                os.write(report, (" ".join(pending) + "\n").encode())

        code = 1
        try:
            StoreWriter.flush = flush_and_report
            capture(*arguments, **options, **OPTIONS)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def kill(self, shards: int, seconds: float) -> None:
        """Kills the rank some seconds after it has reported some shards."""
        for _ in range(shards):
            self.reported += self.report.readline().split()
        time.sleep(seconds)
        os.kill(self.process, signal.SIGKILL)
        self.is_killed = True

    def end(self) -> list[str]:
        """Waits for the rank and returns everything it reported."""
        self.reported += self.report.read().split()
        _, status = os.waitpid(self.process, 0)
        if not (os.WIFSIGNALED(status) and self.is_killed) and status != 0:
            raise SystemExit(f"a rank failed by itself: {status}")
        self.report.close()
        return self.reported


def main(path: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    model, tokenizer = teachers.make_teacher(), teachers.make_tokenizer()
    choose = random.Random(seed)

    def run(store: str, num_ranks: int, dying: Sequence[int] = ()) -> list[str]:
        ranks = [Rank(model, tokenizer, path / store, rank, num_ranks) for rank in range(num_ranks)]
        for rank in dying:
            ranks[rank].kill(choose.randint(0, 6), choose.random() * 0.02)
        return [*itertools.chain(*(rank.end() for rank in ranks))]

    run("whole", 2)
    done, number = 0, 0
    while done < kills:
        store, dying = f"store-{number // 2}", choose.choice(([0], [1], [0, 1]))
        reported = run(store, 2, dying)
        done, number = done + len(dying), number + 1
        os.write(1, (json.dumps({"store": store, "reported": reported}) + "\n").encode())
        # The test looks at the store before the next ranks repair it.
        sys.stdin.readline()
    for index in range((number + 1) // 2):
        run(f"store-{index}", index % 3 + 1)
    os.write(1, b"{}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
