"""Finds the barriers of the emulated kernel of sample_logits that can be removed unnoticed; run in its own process.

python cuda_removed_barriers_sample_logits.py LIBRARY WHICH: writes a JSON list of the number of barriers of a launch,
and of the indices of those whose removal changed no result and caused no fault or crash, in any order of the threads
that was tried.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import torch
from support.emulated_sample_logits import EmulatedSampleLogits, Launch
from support.helpers import assert_same_bits
from test_cuda_sample_logits import run

SEEDS = range(40)
CASES = (
    ({}, {"temperature": 0.8, "top_p": 0.8, "min_p": 0.0001}),
    ({"blocks": 2}, {"temperature": 0.9}),
    ({"blocks": 4}, {"temperature": 0.8, "top_k": 200, "top_p": 0.9}),
    ({"blocks": 2, "list_capacity": 0}, {"temperature": 0.9, "top_k": 300, "top_p": 0.95}),
)


def unnoticed(kernel: EmulatedSampleLogits, launched: dict, options: dict) -> tuple[int, list[int]]:
    # float32, so that a key has several digits. The last kept logits are among 400 that differ in the last digit only,
    # and the largest logit is in the last block.
    logits = 3.0 * torch.randn(1, 8203)
    logits[0, torch.randperm(8203)[:400]] = 9.0 + torch.randint(64, (400,)) * 2.0**-20
    logits[0, 8000] = 14.0

    def draw(launch: Launch):
        return run(kernel, launch, logits, 4, seed=11, **options)

    expected = draw(Launch(**launched))
    barriers = kernel.barriers_of_last_row()

    def is_same(launch: Launch) -> bool:
        """Returns whether the results are correct, from a child process, because a thread may write anywhere."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert_same_bits(draw(launch), expected)
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1] == 0

    def is_noticed(barrier: int) -> bool:
        return any(not is_same(Launch(**launched, seed=seed, skipped_barrier=barrier)) for seed in SEEDS)

    return barriers, [barrier for barrier in range(barriers) if not is_noticed(barrier)]


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the crashes are meant
    json.dump(unnoticed(EmulatedSampleLogits(Path(sys.argv[1])), *CASES[int(sys.argv[2])]), sys.stdout)
