"""TRL's divergences: of GKDTrainer, of DistillationTrainer, and of its trainer with a teacher on a server."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.experimental.server_distillation import ServerDistillationTrainer
from trl.kernels import chunked_divergence
from trl.trainer import distillation_trainer

from bench.losses.judge import Batch, Loss

# TRL's beta, and ours: its 0 and 1 are the two KLs.
BETAS = {
    0.0: {"divergence": "forward_kl"},
    1.0: {"divergence": "reverse_kl", "rest": "renorm_both"},
    0.3: {"divergence": "jsd", "beta": 0.3, "rest": "renorm_both"},
}


def losses() -> list[Loss]:
    """Returns TRL's losses; the Triton kernels are among them where Triton's interpreter is on."""
    found = [
        Loss(
            "GKDTrainer.generalized_jsd_loss",
            "over the vocabulary, in the dtype of the logits; mean over the labels that are not -100",
            _gkd(beta),
            ours,
            options=f"beta={beta:g}",
        )
        for beta, ours in BETAS.items()
    ]
    backends = {"torch": False} | ({"Triton": True} if os.environ.get("TRITON_INTERPRET") == "1" else {})
    found += [
        Loss(
            "DistillationTrainer's chunked loss",
            "over the vocabulary, from hidden states, in float32; mean over the mask",
            _chunked(beta, use_triton),
            ours,
            options=f"beta={beta:g}, {backend}",
            is_linear=True,
        )
        for backend, use_triton in backends.items()
        for beta, ours in BETAS.items()
    ]
    found += [
        Loss(
            "ServerDistillationTrainer, beta=0",
            "forward KL over the ids that a server returned, in float32; mean over the labels that are not -100; "
            + ("the mass outside is one more outcome" if add_tail else "both sides renormalised on the ids with mass"),
            _server(add_tail),
            {"divergence": "forward_kl", "rest": "ghost" if add_tail else "renorm_both"},
            options=f"loss_add_tail={add_tail}",
            top_k=True,
        )
        for add_tail in (True, False)
    ]
    return found


def _gkd(beta: float) -> Callable[[Batch], Tensor]:
    return lambda batch: GKDTrainer.generalized_jsd_loss(
        batch.student, batch.teacher, labels=batch.target, beta=beta, temperature=batch.temperature
    )


def _chunked(beta: float, use_triton: bool) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        def choose(device) -> bool:
            return use_triton

        head = batch.head()
        with (
            mock.patch.object(chunked_divergence, "_use_triton", choose),
            mock.patch.object(distillation_trainer, "_use_triton", choose),
        ):
            loss, _, _ = distillation_trainer._chunked_divergence_loss(
                batch.student[None],
                batch.teacher[None],
                head,
                head,
                batch.labelled()[None],
                beta,
                temperature=batch.temperature,
            )
            # The backend of the backward pass is chosen when it runs, so it runs in here.
            return _with_gradient(loss, batch.student)

    return call


def _with_gradient(loss: Tensor, student: Tensor) -> Tensor:
    """Returns the value of a loss as a function of the student whose gradient was computed now."""
    [gradient] = torch.autograd.grad(loss, student)

    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx, student, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, upstream):
            return gradient * upstream, None

    return Known.apply(student, loss.detach())


def _server(add_tail: bool) -> Callable[[Batch], Tensor]:
    trainer = SimpleNamespace(
        loss_add_tail=add_tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
    )

    def call(batch: Batch) -> Tensor:
        answer = {
            "topk_logprobs": batch.teacher_logprobs(renormalised=False)[None],
            "topk_token_ids": batch.ids[None],
        }
        student = (batch.student.float() / batch.temperature).log_softmax(-1)[None]
        return ServerDistillationTrainer._compute_server_forward_kl_loss(trainer, answer, student, batch.target[None])

    return call
