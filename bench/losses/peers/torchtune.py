"""torchtune's losses of knowledge distillation."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from bench.losses.judge import Batch, Loss

CHUNKS = 8
MEAN = "in float32; mean over the labels that are not ignored"


def losses() -> list[Loss]:
    """Returns torchtune's losses."""
    from bench.losses.peers import import_without_parents

    root = Path(str(importlib.metadata.distribution("torchtune").locate_file("")))
    # The package's __init__ needs torchao.
    kd = import_without_parents("torchtune.modules.loss.kd_losses", root)
    forward = {"divergence": "soft_ce"}
    reverse = {"divergence": "reverse_kl", "rest": "renorm_both"}
    named_forward = f"forward KL without the teacher's entropy, over the vocabulary, {MEAN}"
    named_reverse = f"reverse KL over the vocabulary, {MEAN}"
    return [
        Loss("ForwardKLLoss", named_forward, _whole(kd.ForwardKLLoss()), forward, takes_temperature=False),
        Loss("ReverseKLLoss", named_reverse, _whole(kd.ReverseKLLoss()), reverse, takes_temperature=False),
        Loss(
            "ForwardKLWithChunkedOutputLoss",
            named_forward,
            _chunked(kd.ForwardKLWithChunkedOutputLoss(CHUNKS)),
            forward,
            options=f"num_output_chunks={CHUNKS}",
            takes_temperature=False,
        ),
        Loss(
            "ReverseKLWithChunkedOutputLoss",
            named_reverse,
            _chunked(kd.ReverseKLWithChunkedOutputLoss(CHUNKS)),
            reverse,
            options=f"num_output_chunks={CHUNKS}",
            takes_temperature=False,
        ),
    ]


def _whole(loss: Callable) -> Callable[[Batch], Tensor]:
    return lambda batch: loss(batch.student, batch.teacher, batch.target)


def _chunked(loss: Callable) -> Callable[[Batch], Tensor]:
    return lambda batch: loss(
        batch.student[None].chunk(CHUNKS, dim=1), batch.teacher[None].chunk(CHUNKS, dim=1), batch.target[None]
    )
