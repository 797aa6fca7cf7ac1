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
from pathlib import Path

import teachers
import torch
from test_capture import make_documents

from slimkernels.store import StoreWriter
from slimkernels.teacher import capture

NUM_PARTS = 2
OPTIONS = {"top_k": 17, "batch_tokens": 120, "window": 8, "shard_rows": 60, "num_parts": NUM_PARTS}


def documents() -> list[list[int]]:
    """The same in every process."""
    return make_documents(80, seed=5)


def start(model, tokenizer, path: Path, rank: int, num_ranks: int) -> tuple[int, int]:
    """Forks a rank; its process, and a pipe that gets the hashes of what it has written, after every shard."""
    read, report = os.pipe()
    child = os.fork()
    if child:
        os.close(report)
        return child, read
    code = 1
    try:
        flush = StoreWriter.flush

        def flush_and_report(writer: StoreWriter) -> None:
            pending = [entry.digest.hex() for entry in writer._pending]
            flush(writer)
            os.write(report, "".join(digest + "\n" for digest in pending).encode())

        StoreWriter.flush = flush_and_report
        capture(model, tokenizer, documents(), path, rank=rank, num_ranks=num_ranks, **OPTIONS)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def end(child: int, read: int, may_be_killed: bool) -> list[str]:
    """Waits for a rank; the hashes that it reported."""
    with os.fdopen(read) as file:
        reported = file.read().split()
    _, status = os.waitpid(child, 0)
    if (os.WIFSIGNALED(status) and may_be_killed) or (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0):
        return reported
    raise SystemExit(f"a rank failed by itself: {status}")


def main(path: Path, seed: int, kills: int) -> None:
    torch.set_num_threads(1)
    model, tokenizer = teachers.make_teacher(), teachers.make_tokenizer()
    choose = random.Random(seed)
    begun = time.monotonic()
    for child, read in [start(model, tokenizer, path / "whole", rank, 2) for rank in range(2)]:
        end(child, read, may_be_killed=False)
    # Moments are spread over the time that a capture takes here.
    longest = time.monotonic() - begun
    done, number = 0, 0
    while done < kills:
        store = path / f"store-{number // 2}"
        ranks = [start(model, tokenizer, store, rank, 2) for rank in range(2)]
        dying = choose.choice(([0], [1], [0, 1]))
        for rank in dying:
            time.sleep(choose.random() * longest / len(dying))
            os.kill(ranks[rank][0], signal.SIGKILL)
        reported = [end(*ranks[rank], may_be_killed=rank in dying) for rank in range(2)]
        done, number = done + len(dying), number + 1
        os.write(1, (json.dumps({"store": store.name, "reported": [*itertools.chain(*reported)]}) + "\n").encode())
        # The test looks at the store before the next ranks repair it.
        sys.stdin.readline()
    for index in range((number + 1) // 2):
        num_ranks = index % 3 + 1
        ranks = [start(model, tokenizer, path / f"store-{index}", rank, num_ranks) for rank in range(num_ranks)]
        for child, read in ranks:
            end(child, read, may_be_killed=False)
    os.write(1, b"{}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
