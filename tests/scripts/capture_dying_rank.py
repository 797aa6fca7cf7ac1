"""`torchrun capture_dying_rank.py ARGUMENTS` is `torchrun -m slimkernels ARGUMENTS` whose rank 1 dies by SIGKILL.

It dies when it has written its second shard, in the first life of the ranks; torchrun then ends the others, and with
--max-restarts 1 starts all of them once more.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys

from slimkernels.cli import main
from slimkernels.store import StoreWriter


def die_after(shards: int) -> None:
    flush, count = StoreWriter.flush, itertools.count(1)

    def flush_and_die(writer: StoreWriter) -> None:
        writes_a_shard = bool(writer._pending)
        flush(writer)
        if writes_a_shard and next(count) == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    StoreWriter.flush = flush_and_die


if __name__ == "__main__":
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        die_after(2)
    sys.exit(main(sys.argv[1:]))
