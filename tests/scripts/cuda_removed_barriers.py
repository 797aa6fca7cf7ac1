"""Finds the barriers of the emulated kernel of topk_logits that can be removed unnoticed; run in its own process.

python cuda_removed_barriers.py LIBRARY: writes a JSON list with, for every launch, the number of its barriers and the
indices of those whose removal changed no result and caused no fault or crash, whatever was selected and in any order of
the threads that was tried.
"""

from __future__ import annotations

import json
import os
import resource
import sys

import torch
from support.emulated_cuda import EmulatedKernel, Launch
from support.helpers import assert_same_bits, sparse_fields
from torch import Tensor

TOP_KS = (40, 100, 170, 310)
SEEDS = range(40)
LAUNCHES = (
    Launch(),
    Launch(blocks=2),
    Launch(blocks=4, staged=False),
    Launch(blocks=2, list_capacity=0),
)


def unnoticed(kernel: EmulatedKernel, launch: Launch) -> tuple[int, list[int]]:
    # Every value occurs about twenty times, so there are ties at the K-th largest, and values differ in every digit.
    rows = torch.randn(200)[torch.randint(200, (1, 4099))]
    # The last keeps all that equal its K-th largest, so that the largest of the others is searched for.
    top_ks = (*TOP_KS, int((rows >= rows.unique()[-30]).sum()))
    expected = {top_k: sparse_fields(kernel.topk_logits(rows, top_k, launch)) for top_k in top_ks}
    barriers = kernel.barriers_of_last_row()

    def is_noticed(barrier: int) -> bool:
        launches = (launch._replace(seed=seed, skipped_barrier=barrier) for seed in SEEDS)
        return any(not is_same(kernel, rows, without, expected) for without in launches)

    return barriers, [barrier for barrier in range(barriers) if not is_noticed(barrier)]


def is_same(kernel: EmulatedKernel, rows: Tensor, launch: Launch, expected: dict[int, list[Tensor]]) -> bool:
    """Returns whether the results are correct, from a child process, because a thread may write anywhere."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for top_k, fields in expected.items():
                assert_same_bits(sparse_fields(kernel.topk_logits(rows, top_k, launch)), fields)
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the crashes are meant
    emulated = EmulatedKernel(sys.argv[1])
    json.dump([unnoticed(emulated, launch) for launch in LAUNCHES], sys.stdout)
