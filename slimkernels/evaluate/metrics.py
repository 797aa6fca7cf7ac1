"""Held-out perplexity and divergence to the teacher, from a store, without the teacher or dense logits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from slimkernels.head_loss import loss_of_batch
from slimkernels.student import LanguageModelHead, SlimCollator, teacher_rows

if TYPE_CHECKING:
    from slimkernels.store import Document, PackedDocument


@torch.no_grad()
def evaluate_store(
    model: PreTrainedModel,
    store: Sequence[Document | PackedDocument],
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Measures a student on every label of a store: exp of the mean of -log s_y, and the mean KL to the teacher.

    ``kl_ghost`` is the forward KL, in nats per token at temperature 1, between teacher and student over K + 1
    outcomes: the K kept ids, and one bucket for all others that holds the teacher's remaining mass. It never
    exceeds the KL over the whole vocabulary, and it is 0 only where the two agree on all K + 1 outcomes.

    The (N, V) logits never exist; peak extra memory is that of ``linear_slim_loss``'s forward.

    Args:
        model: A causal language model; evaluated in eval mode on its own device, its mode restored.
        store: A ``StoreDataset`` or ``Store``, or any sequence of their documents.
        batch_size: Documents per step; changes nothing but the speed and the memory.
        on_batch: Called after each batch with the number of documents done.

    Returns:
        ``perplexity``; ``loss``, its logarithm; ``kl_ghost``; ``teacher_perplexity``, of the teacher on the same
        labels (only where the store has their logits); ``teacher_mass`` and ``student_mass``, the mean
        probability of the kept ids; ``tokens``, the number of labels; ``tokens_per_second``.

    Raises:
        ValueError: ``store`` holds no label, or its ids do not fit the student's vocabulary.
    """
    head = LanguageModelHead.of(model)
    collator = SlimCollator(vocab_size=head.vocab_size)
    device = head.weight.device
    was_training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64)
    num_tokens = done = 0
    has_teacher_labels = True
    start = time.perf_counter()
    try:
        for first in range(0, len(store), batch_size):
            documents = [store[index] for index in range(first, min(first + batch_size, len(store)))]
            batch = collator(documents)
            teacher, target = teacher_rows(batch["teacher"].to(device)), batch["target"].to(device)
            batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "rows")}
            options = {"rest": "ghost", "token_weight": "none", "reduction": "none"}
            result = loss_of_batch(model, batch | {"target": target}, teacher=teacher, **options)
            terms = [result.ce, result.kd, result.teacher_mass, result.student_mass]
            if teacher.target_logit is None:
                has_teacher_labels = False
                terms.append(torch.zeros_like(result.ce))
            else:
                terms.append(teacher.lse_at(1.0) - teacher.target_logit)
            sums += torch.stack([term.double().sum() for term in terms]).cpu()
            num_tokens += len(target)
            done += len(documents)
            if on_batch is not None:
                on_batch(done)
    finally:
        model.train(was_training)
    if not num_tokens:
        raise ValueError("store must hold at least one label to evaluate on, got none")
    seconds = time.perf_counter() - start
    ce, kl, teacher_mass, student_mass, teacher_ce = (sums / num_tokens).tolist()
    metrics = {
        "perplexity": _exp(ce),
        "loss": ce,
        "kl_ghost": kl,
        "teacher_mass": teacher_mass,
        "student_mass": student_mass,
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
    }
    if has_teacher_labels:
        metrics["teacher_perplexity"] = _exp(teacher_ce)
    return metrics


def _exp(value: float) -> float:
    """exp, infinite where it overflows: the perplexity of a diverged student is reported, not raised."""
    return math.exp(value) if value < 700 else math.inf
