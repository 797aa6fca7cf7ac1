"""Finds the barriers of the emulated kernel of slim_loss that can be removed unnoticed; run in its own process.

python cuda_removed_barriers_slim_loss.py LIBRARY WHICH: writes a JSON list of the number of barriers of a launch, and
of the indices of those whose removal changed no result and caused no fault or crash, in any order of the threads that
was tried.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch
from support.emulated_slim_loss import EmulatedSlimLoss, Launch
from support.helpers import assert_same_bits, random_problem
from test_cuda_slim_loss import run

SEEDS = range(40)
CASES = (
    ({}, {}),
    ({"blocks": 2}, {"rest": "ghost", "divergence": "jsd", "teacher_blend": 0.5, "statistics": True}),
    ({"blocks": 4, "staged": False}, {"rest": "ghost", "temperature": 2.0}),
)


def unnoticed(kernel: EmulatedSlimLoss, launched: dict, options: dict) -> tuple[int, list[int]]:
    problem = random_problem(1, 4099, 205, temperature=options.get("temperature", 1.0), ignored=())
    expected = run(kernel, Launch(**launched), *problem, **options)
    barriers = kernel.barriers_of_last_row()

    def is_same(launch: Launch) -> bool:
        """Returns whether the results are correct, from a child process, because a thread may write anywhere."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert_same_bits(run(kernel, launch, *problem, **options), expected)
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1] == 0

    def is_noticed(barrier: int) -> bool:
        return any(not is_same(Launch(**launched, seed=seed, skipped_barrier=barrier)) for seed in SEEDS)

    return barriers, [barrier for barrier in range(barriers) if not is_noticed(barrier)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the crashes are meant
    json.dump(unnoticed(EmulatedSlimLoss(Path(sys.argv[1])), *CASES[int(sys.argv[2])]), sys.stdout)
