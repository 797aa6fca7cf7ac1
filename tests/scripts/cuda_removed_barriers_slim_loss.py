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
from support.helpers import assert_same_bits
from test_cuda_slim_loss import run

from slimkernels import reference

SEEDS = range(40)
CASES = (
    ({}, {}),
    ({"blocks": 2}, {"rest": "ghost", "divergence": "jsd", "teacher_blend": 0.5, "statistics": True}),
    ({"blocks": 4, "staged": False}, {"rest": "ghost", "temperature": 2.0}),
)


def unnoticed(kernel: EmulatedSlimLoss, launched: dict, options: dict) -> tuple[int, list[int]]:
    # Every value occurs about twenty times, and S has every other one of the 860 largest, so that the overlap depends
    # on the K-th largest and on its ties. The label is the student's first choice, or off S.
    logits = 3.0 * torch.randn(200)[torch.randint(200, (1, 4099))]
    boost = torch.zeros(1, 4099).index_fill(1, logits.topk(860).indices[0].sort().values[::2], 50.0)
    target = logits.argmax(-1) if options.get("statistics") else (boost[0, 2300:] == 0).nonzero()[0] + 2300
    temperatures = (1.0, options.get("temperature", 1.0))
    teacher = reference.topk_logits(torch.randn(1, 4099) + boost, 430, target=target, temperatures=temperatures)
    problem = logits, target, teacher
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
    torch.manual_seed(0)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the crashes are meant
    json.dump(unnoticed(EmulatedSlimLoss(Path(sys.argv[1])), *CASES[int(sys.argv[2])]), sys.stdout)
