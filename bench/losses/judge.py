"""Compares the value and the gradient of a loss with those of the reference in float64 on the same rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import slimkernels as sk
from bench.losses.cases import IGNORED, TOP_K, VOCAB, Case
from slimkernels import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest error of a loss that agrees with float64: some hundred roundings of float32, a few of bfloat16.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# Errors are relative, but never to less than this part of a nat, or of the largest gradient of a mean over rows: where
# teacher and student nearly agree, or a divergence is saturated, a relative error of almost nothing says little.
FLOOR = 1e-3


class Batch(NamedTuple):
    """Arguments of a loss: logits (N, V) in the dtype under test, labels (N,), the teacher's kept ids (N, K).

    ``student`` requires a gradient. A loss that takes hidden states gets the logits as hidden states of width V and the
    identity as the head, so that all losses see the same logits to the bit and their gradients have one shape.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor
    ids: Tensor
    temperature: float

    def head(self) -> Tensor:
        """Returns the identity (V, V)."""
        return torch.eye(self.student.shape[-1], dtype=self.student.dtype)

    def labelled(self) -> Tensor:
        """Returns which rows have a label (N,)."""
        return self.target != IGNORED

    def teacher_logprobs(self, renormalised: bool) -> Tensor:
        """Returns the teacher's float32 log-probabilities of the kept ids at the temperature (N, K)."""
        scaled = self.teacher.float() / self.temperature
        kept = scaled.gather(-1, self.ids)
        return kept - torch.logsumexp(kept if renormalised else scaled, -1, keepdim=True)


@dataclass(frozen=True)
class Loss:
    """A loss of a peer, under some of its options, and the options of ours that compute the same.

    Attributes:
        name: The peer's function or class.
        call: Returns the loss, a scalar, from a batch.
        ours: Options of ``slim_loss`` under which it computes the same, besides those of ``OURS``.
        top_k: Whether the teacher is its kept ids rather than the whole row.
        is_linear: Whether it takes hidden states and a head; ours is then ``linear_slim_loss``.
        takes_temperature: Whether it has a temperature; without one it is not run at others than 1.
        squares_temperature: Whether its divergence is multiplied by the squared temperature, as ours is.
        says: Description: divergence, support, the mass outside it, normalisation, masking of labels.
    """

    name: str
    says: str
    call: Callable[[Batch], Tensor]
    ours: dict
    options: str = ""
    top_k: bool = False
    is_linear: bool = False
    takes_temperature: bool = True
    squares_temperature: bool = False


@dataclass(frozen=True)
class Peer:
    """A package with losses; ``version`` is None for one that is not installed, which then has no losses."""

    name: str
    version: str | None
    losses: list[Loss] = field(default_factory=list)


class Answer(NamedTuple):
    """A loss and its gradient (N, V)."""

    value: Tensor
    gradient: Tensor


# A divergence alone. Losses that are a cross entropy say so in their options.
OURS = {"ce_weight": 0.0, "token_weight": "none"}


def applies(loss: Loss, case: Case) -> bool:
    """Returns whether a loss can be run on a case; a product of -inf and 0 keeps linear losses from -inf logits."""
    return (loss.takes_temperature or case.temperature == 1) and (case.is_finite() or not loss.is_linear)


def compare(loss: Loss, case: Case, dtype: str) -> dict:
    """Returns the fields of the row of a loss on a case in a dtype: the errors of the peer's and of ours."""
    student, teacher = case.student.to(DTYPES[dtype]), case.teacher.to(DTYPES[dtype])
    # The judge sees the rounded rows, so that rounding the inputs is nobody's error.
    exact = reference.topk_logits(
        teacher.double(), TOP_K if loss.top_k else VOCAB, target=case.target, temperatures=(1.0, case.temperature)
    )
    ids = reference.topk_logits(teacher.double(), TOP_K).ids.long()
    options = OURS | {"temperature": case.temperature} | loss.ours
    factor = 1.0 if loss.squares_temperature else case.temperature**-2

    def judged(logits: Tensor) -> Tensor:
        return factor * reference.slim_loss(logits, case.target, exact, **options).loss

    def ours(logits: Tensor) -> Tensor:
        rows = sk.topk_logits(teacher, exact.top_k, target=case.target, temperatures=exact.temperatures)
        if not loss.is_linear:
            return factor * sk.slim_loss(logits, case.target, rows, **options).loss
        head = torch.eye(VOCAB, dtype=logits.dtype)
        return factor * sk.linear_slim_loss(logits, head, case.target, rows, **options).loss

    def theirs(logits: Tensor) -> Tensor:
        return loss.call(Batch(logits, teacher, case.target, ids, case.temperature))

    judge = answer(judged, student.double())
    row: dict = {"judge": shown(judge.value), "ours": errors(answer(ours, student), judge)}
    try:
        found = answer(theirs, student)
    except Exception as error:  # whatever a peer raises on a row is what there is to report
        return row | {"raised": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return row | {"value": shown(found.value), "theirs": errors(found, judge)}


def answer(function: Callable[[Tensor], Tensor], logits: Tensor) -> Answer:
    """Calls a loss on logits (N, V) and returns it with their gradient, in float64."""
    leaf = logits.clone().requires_grad_()
    # A loss may write over its input, which must then not be a leaf.
    value = function(leaf.clone())
    if not value.requires_grad:
        return Answer(value.double(), torch.zeros_like(leaf, dtype=torch.float64))
    [gradient] = torch.autograd.grad(value, leaf)
    return Answer(value.detach().double(), gradient.double())


def errors(found: Answer, judge: Answer) -> dict:
    """Returns the errors of value and gradient, see ``FLOOR``; None for one that is not finite.

    ``nats`` is the absolute error of the value. ``scale`` is the factor by which the gradient is multiplied, in the
    least-squares sense, and ``direction`` the error that is left when it is divided out.
    """
    nats = torch.where(found.value == judge.value, 0.0, (found.value - judge.value).abs())
    unit = judge.gradient.abs().max().clamp(min=FLOOR / len(judge.gradient))
    scale = (found.gradient * judge.gradient).sum() / judge.gradient.square().sum()
    return {
        "value": _finite(nats / judge.value.abs().clamp(min=FLOOR)),
        "gradient": _finite((found.gradient - judge.gradient).abs().max() / unit),
        "nats": _finite(nats),
        "scale": _finite(scale),
        "direction": _finite((found.gradient / scale - judge.gradient).abs().max() / unit),
    }


def shown(value: Tensor) -> float | str:
    """Returns a number for JSON, or the name of what is not finite."""
    return float(value) if value.isfinite() else str(float(value))


def agrees(errors_of: dict, dtype: str) -> bool:
    """Returns whether value and gradient are within the tolerance of the dtype."""
    return all(errors_of[part] is not None and errors_of[part] <= TOLERANCES[dtype] for part in ("value", "gradient"))


def _finite(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
