"""Draws sparse targets from the logits of a model's head, and holds the defaults that capture and training share."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.models.head import LanguageModelHead
from slimkernels.ops.mixed_targets import mixed_targets
from slimkernels.ops.sample_targets import sample_targets
from slimkernels.sparse_logits import SparseLogits

DEFAULT_TOP_FRACTION = 0.05
DEFAULT_ROUNDS = 50
# 256 rows of 128256 float32 logits are 131 MB.
CHUNK_ROWS = 256


def draw_targets(
    head: LanguageModelHead,
    hidden: Tensor,
    target: Tensor,
    rounds: int,
    seed: Tensor,
    position: Tensor,
    *,
    top_k: int = 0,
    require_finite: bool = False,
) -> SparseLogits:
    """Draws with ``sample_targets`` or ``mixed_targets`` from the logits of ``CHUNK_ROWS`` hidden states at a time.

    Args:
        head: The teacher's head.
        hidden: (N, D) hidden states.
        target: (N,) int64 labels.
        rounds: Draws of every row.
        seed: (N,) int64, used as given, so that the draws do not depend on the chunks.
        position: (N,) int64; with the seed it decides the noise of a row.
        top_k: Largest logits kept exactly by ``mixed_targets``; 0 uses ``sample_targets``.
        require_finite: Whether to check the logits, which waits for the device.

    Returns:
        SparseLogits (N, K) on the device of ``hidden``.

    Raises:
        FloatingPointError: A row is not finite, with ``require_finite``.
    """
    parts = []
    # Without any row, a chunk of none has the shape of the result.
    for start in range(0, max(len(hidden), 1), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = head.logits(hidden[rows])
        if require_finite:
            check_finite(logits.amax(-1), logits.dtype)
        if top_k:
            part = mixed_targets(logits, top_k, rounds, seed[rows], position=position[rows], target=target[rows])
        else:
            part = sample_targets(logits, rounds, seed[rows], position=position[rows], target=target[rows])
        parts.append(part)
    return SparseLogits.cat(parts)


def check_finite(row_values: Tensor, dtype: torch.dtype) -> None:
    """Checks a teacher's logits by a value of each row that is not finite where a logit is not; waits for the device.

    Args:
        row_values: (N, ...) maxima or log-sum-exps of the rows.
        dtype: Dtype that the logits were computed in.

    Raises:
        FloatingPointError: A row is not finite.
    """
    if not torch.isfinite(row_values).all():
        raise FloatingPointError(f"the teacher's logits are not finite in {dtype}: load it in float32 or bfloat16")
