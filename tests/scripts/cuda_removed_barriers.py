"""Finds the barriers of an emulated kernel that can be removed unnoticed; run in its own process.

python cuda_removed_barriers.py OP LIBRARY CASE...: writes a JSON list with, for every case, the number of its barriers
and the indices of those whose removal changed no result and caused no fault or crash, in any order of the threads that
was tried.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import test_cuda_sample_logits
import test_cuda_slim_loss
import torch
from support.emulated_cuda import EmulatedKernel, Launch
from support.emulated_sample_logits import EmulatedSampleLogits
from support.emulated_slim_loss import EmulatedSlimLoss
from support.emulated_topk_logits import EmulatedTopkLogits
from support.helpers import assert_same_bits, sparse_fields
from torch import Tensor

from slimkernels import reference

SEEDS = range(40)
Results = Callable[[Launch], Sequence[Tensor]]  # what a kernel computes with a launch

TOPK_LOGITS = (
    Launch(),
    Launch(blocks=2),
    Launch(blocks=4, staged=False),
    Launch(blocks=2, list_capacity=0),
)
SLIM_LOSS = (
    (Launch(), {}),
    (Launch(blocks=2), {"rest": "ghost", "divergence": "jsd", "teacher_blend": 0.5, "statistics": True}),
    (Launch(blocks=4, staged=False), {"rest": "ghost", "temperature": 2.0}),
)
SAMPLE_LOGITS = (
    (Launch(), {"temperature": 0.8, "top_p": 0.8, "min_p": 0.0001}),
    (Launch(blocks=2), {"temperature": 0.9}),
    (Launch(blocks=4), {"temperature": 0.8, "top_k": 200, "top_p": 0.9}),
    (Launch(blocks=2, list_capacity=0), {"temperature": 0.9, "top_k": 300, "top_p": 0.95}),
)


def topk_logits_case(kernel: EmulatedTopkLogits, which: int) -> tuple[Launch, Results]:
    # Every value occurs about twenty times, so there are ties at the K-th largest, and values differ in every digit.
    rows = torch.randn(200)[torch.randint(200, (1, 4099))]
    # The last keeps all that equal its K-th largest, so that the largest of the others is searched for.
    top_ks = (40, 100, 170, 310, int((rows >= rows.unique()[-30]).sum()))

    def results(launch: Launch) -> list[Tensor]:
        return [field for top_k in top_ks for field in sparse_fields(kernel.topk_logits(rows, top_k, launch))]

    return TOPK_LOGITS[which], results


def slim_loss_case(kernel: EmulatedSlimLoss, which: int) -> tuple[Launch, Results]:
    launch, options = SLIM_LOSS[which]
    # Every value occurs about twenty times, and S has every other one of the 860 largest, so that the overlap depends
    # on the K-th largest and on its ties. The label is the student's first choice, or off S.
    logits = 3.0 * torch.randn(200)[torch.randint(200, (1, 4099))]
    boost = torch.zeros(1, 4099).index_fill(1, logits.topk(860).indices[0].sort().values[::2], 50.0)
    target = logits.argmax(-1) if options.get("statistics") else (boost[0, 2300:] == 0).nonzero()[0] + 2300
    temperatures = (1.0, options.get("temperature", 1.0))
    teacher = reference.topk_logits(torch.randn(1, 4099) + boost, 430, target=target, temperatures=temperatures)

    def results(launch: Launch) -> list[Tensor]:
        fields, gradient = test_cuda_slim_loss.run(kernel, launch, logits, target, teacher, **options)
        return [*fields, gradient]

    return launch, results


def sample_logits_case(kernel: EmulatedSampleLogits, which: int) -> tuple[Launch, Results]:
    launch, options = SAMPLE_LOGITS[which]
    # float32, so that a key has several digits. The last kept logits are among 400 that differ in the last digit only,
    # and the largest logit is in the last block.
    logits = 3.0 * torch.randn(1, 8203)
    logits[0, torch.randperm(8203)[:400]] = 9.0 + torch.randint(64, (400,)) * 2.0**-20
    logits[0, 8000] = 14.0
    return launch, lambda launch: test_cuda_sample_logits.run(kernel, launch, logits, 4, seed=11, **options)


def unnoticed(kernel: EmulatedKernel, launch: Launch, results: Results) -> tuple[int, list[int]]:
    expected = results(launch)
    barriers = kernel.barriers_of_last_row()

    def is_same(launch: Launch) -> bool:
        """Returns whether the results are correct, from a child process, because a thread may write anywhere."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert_same_bits(results(launch), expected)
                status = 0
            finally:
                os._exit(status)
        return os.waitpid(child, 0)[1] == 0

    def is_noticed(barrier: int) -> bool:
        return any(not is_same(launch._replace(seed=seed, skipped_barrier=barrier)) for seed in SEEDS)

    return barriers, [barrier for barrier in range(barriers) if not is_noticed(barrier)]


KERNELS = {
    "topk_logits": (EmulatedTopkLogits, topk_logits_case),
    "slim_loss": (EmulatedSlimLoss, slim_loss_case),
    "sample_logits": (EmulatedSampleLogits, sample_logits_case),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the crashes are meant
    op, library, *cases = sys.argv[1:]
    emulated, case_of = KERNELS[op]
    emulated = emulated(Path(library))
    json.dump([unnoticed(emulated, *case_of(emulated, int(which))) for which in cases], sys.stdout)
