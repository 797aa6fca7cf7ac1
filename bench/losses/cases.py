"""Rows of logits and labels on which losses are compared, ordinary ones and hostile ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROWS, VOCAB, TOP_K = 24, 512, 26
IGNORED = -100


class Case(NamedTuple):
    """Logits of a student and a teacher (N, V) in float64, labels (N,), and the temperature of the divergence.

    Attributes:
        says: Description of the rows, as a part of a sentence.
    """

    name: str
    says: str
    student: Tensor
    teacher: Tensor
    target: Tensor
    temperature: float = 1.0

    def is_finite(self) -> bool:
        """Returns whether no logit is -inf."""
        return bool(self.student.isfinite().all() and self.teacher.isfinite().all())


def all_cases() -> list[Case]:
    """Returns every case; the same on every call."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, ROWS, VOCAB, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCAB, (ROWS,), generator=generator)
    some_ignored = target.clone()
    some_ignored[::3] = IGNORED
    noise = torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64)
    peaked = teacher.clone()
    peaked[torch.arange(ROWS), target] += 40
    padded = torch.zeros(VOCAB, dtype=torch.bool)
    padded[-VOCAB // 8 :] = True
    few = teacher.clone()
    few[::2] = few[::2].masked_fill(few[::2] < few[::2].topk(TOP_K // 2).values[:, -1:], -math.inf)
    target_in = target % (VOCAB - VOCAB // 8)
    return [
        Case("plain", "normal logits", student, teacher, target),
        Case("temperature", "temperature 2", student, teacher, target, temperature=2.0),
        Case("ignored", "a third of the labels ignored", student, teacher, some_ignored),
        Case("all ignored", "every label ignored", student, teacher, torch.full_like(target, IGNORED)),
        Case("long tail", "a teacher with most of its mass outside the kept ids", student, 0.2 * teacher, target),
        Case("peaked", "a teacher that is certain, with about 1e-13 outside the kept ids", student, peaked, target),
        Case("label outside", "labels at the teacher's least likely id", student, teacher, teacher.argmin(-1)),
        Case("nearly equal", "a student within 0.001 of the teacher's logits", teacher + 1e-3 * noise, teacher, target),
        Case("large", "logits of the order of 100", 30 * student, 30 * teacher, target),
        Case("few finite", "half of the teacher's rows with fewer finite logits than kept ids", student, few, target),
        Case(
            "padded vocabulary",
            "the last eighth of both rows' logits -inf",
            student.masked_fill(padded, -math.inf),
            teacher.masked_fill(padded, -math.inf),
            target_in,
        ),
    ]
