"""Lists the cases timed on a GPU: the ops at the shapes of one training step, in bfloat16."""

from __future__ import annotations

import torch

from bench.ops.case import Case, five_per_cent
from bench.ops.cases import cross_entropy_case, sample_case, slim_loss_case, sweep_cases, topk_case, topk_slim_loss_case
from bench.ops.linear_cases import linear_cross_entropy_case, linear_slim_loss_case, linear_topk_case


def cuda_cases(shrink: int = 1) -> list[Case]:
    """Returns every case, slow ones last; tests use ``shrink``, which divides N, D and V."""
    dtype = torch.bfloat16
    rows, vocab = 4096 // shrink, 128256 // shrink
    kept = five_per_cent(vocab)
    head = (rows, 4096 // shrink, vocab)
    cases = []
    for num_rows, vocab_size in ((8192, 32000), (4096, 128256), (2048, 262144)):
        sizes = (num_rows // shrink, vocab_size // shrink)
        cases.append(topk_case(*sizes, five_per_cent(sizes[1]), dtype))
    cases += [
        slim_loss_case(rows, vocab, kept, dtype, quick=True),
        topk_slim_loss_case(rows, vocab, kept, dtype),
        cross_entropy_case(rows, vocab, dtype),
        sample_case(256 // shrink, vocab, 50 // min(shrink, 16), dtype),
    ]
    for case, top_k in ((topk_case, 1600), (slim_loss_case, 1600)):
        cases += sweep_cases(case, 1024 // shrink, vocab, top_k // min(shrink, 16))
    return [
        *cases,
        linear_topk_case(*head, dtype),
        linear_slim_loss_case(*head, dtype, compiled=True),
        linear_cross_entropy_case(*head, dtype),
    ]
