"""axolotl's losses of its KD plugin, on the teacher's largest log-probabilities."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.losses.cases import IGNORED
from bench.losses.judge import Batch, Loss


def losses() -> list[Loss]:
    """Returns axolotl's losses."""
    # Imports no package above the modules, which would need the whole trainer.
    from bench.losses.peers import import_without_parents

    root = Path(str(importlib.metadata.distribution("axolotl").locate_file("")))
    forward_kl = import_without_parents("axolotl.integrations.kd.topk_logprob.forward_kl", root)
    fused = import_without_parents("axolotl.integrations.kd.kernels.liger", root)
    mask = "masked entries of the teacher are left out, labels are not read; divides by the number of items given"
    found = [
        Loss(
            "topk_logprob.forward_kl.loss",
            "forward KL over the kept ids, in float32, of a teacher that the caller renormalises on them and a student "
            "that keeps its whole softmax; " + mask,
            _forward_kl(forward_kl.loss),
            {"divergence": "forward_kl", "rest": "renorm"},
            top_k=True,
        ),
        Loss(
            "topk_logprob.forward_kl.ChunkedTopKKDLoss",
            "the same in eight chunks of the tokens",
            _chunked(forward_kl.ChunkedTopKKDLoss),
            {"divergence": "forward_kl", "rest": "renorm"},
            options="num_output_chunks=8",
            top_k=True,
        ),
    ]
    betas = {
        0.0: {"divergence": "forward_kl", "rest": "renorm_both"},
        1.0: {"divergence": "reverse_kl", "rest": "renorm_both"},
        0.3: {"divergence": "jsd", "beta": 0.3, "rest": "renorm_both"},
    }
    found += [
        Loss(
            "LigerFusedLinearKLTopKLogprobLoss",
            "over the kept ids, both sides renormalised on them, from hidden states, in float32; "
            "masked entries of the teacher are left out; a sum, which the trainer divides by the number of labels",
            _fused(fused.LigerFusedLinearKLTopKLogprobLoss, beta, normalize_topk=True),
            ours,
            options=f"beta={beta:g}, compiled=False",
            top_k=True,
            is_linear=True,
            squares_temperature=True,
        )
        for beta, ours in betas.items()
    ]
    found.append(
        Loss(
            "LigerFusedLinearKLTopKLogprobLoss",
            "forward KL over the kept ids of a teacher renormalised on them and a student that keeps its whole softmax",
            _fused(fused.LigerFusedLinearKLTopKLogprobLoss, 0.0, normalize_topk=False),
            {"divergence": "forward_kl", "rest": "renorm"},
            options="beta=0, normalize_topk=False, compiled=False",
            top_k=True,
            is_linear=True,
            squares_temperature=True,
        )
    )
    return found


def _teacher(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the kept ids, their log-probabilities and the mask (1, N, K), as the plugin's collator makes them."""
    mask = batch.labelled()[:, None].expand_as(batch.ids).int()
    return batch.ids[None], batch.teacher_logprobs(renormalised=True)[None], mask[None]


def _forward_kl(loss: Callable) -> Callable[[Batch], Tensor]:
    return lambda batch: loss(
        batch.student[None],
        *_teacher(batch),
        num_items_in_batch=int(batch.labelled().sum()),
        kd_temperature=batch.temperature,
    )


def _chunked(module: Callable) -> Callable[[Batch], Tensor]:
    return lambda batch: module(num_output_chunks=8, kd_temperature=batch.temperature)(
        batch.student[None], *_teacher(batch), num_items_in_batch=int(batch.labelled().sum())
    )


def _fused(module: Callable, beta: float, normalize_topk: bool) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        loss = module(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            temperature=batch.temperature,
            beta=beta,
            ignore_index=IGNORED,
            compiled=False,
            compute_ce_loss=False,
            normalize_topk=normalize_topk,
        )
        # The loss shifts the labels to the next token itself.
        labels = torch.nn.functional.pad(batch.target, (1, 0), value=IGNORED)[None, :-1]
        total = loss(batch.head(), batch.student[None], *_teacher(batch), labels)
        return total / max(int(batch.labelled().sum()), 1)

    return call
