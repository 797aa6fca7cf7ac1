"""A student's perplexity and divergence from the teacher on a held-out store, without teacher or dense logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from slimkernels.models.batch import SlimCollator, teacher_rows
from slimkernels.models.evaluation import evaluation_mode
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.head_loss import loss_of_batch
from slimkernels.models.perplexity import perplexity
from slimkernels.store import Document, PackedDocument


class DocumentMetrics(NamedTuple):
    """Sums over the labels of one document; ``evaluate_store`` returns their means over a store.

    Attributes:
        labels: Number of labels.
        loss: Sum of the student's cross-entropy, -log s_y, in nats.
        kl_ghost: Sum of the divergence from the teacher, in nats.
        teacher_mass: Sum of the teacher's probability of the kept ids.
        student_mass: Sum of the student's probability of the kept ids.
        teacher_loss: Sum of the teacher's cross-entropy, in nats, over the labels whose logit the store has; None where
            it has none.
        teacher_labels: Number of labels in ``teacher_loss``.
    """

    labels: int
    loss: float
    kl_ghost: float
    teacher_mass: float
    student_mass: float
    teacher_loss: float | None
    teacher_labels: int


def evaluate_store(
    model: PreTrainedModel,
    store: Sequence[Document | PackedDocument],
    *,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Computes a student's perplexity, exp(mean(-log s_y)), and its mean KL from the teacher over a store's labels.

    ``kl_ghost`` is the forward KL, in nats per token at temperature 1, between teacher and student over K + 1
    outcomes: the K kept ids, and one bucket for all others that holds the teacher's remaining mass. It never
    exceeds the KL over the whole vocabulary, and it is 0 only where the two agree on all K + 1 outcomes.

    The (N, V) logits never exist; peak extra memory is that of ``linear_slim_loss``'s forward.

    Args:
        model: A causal language model; it runs in evaluation mode on its own device, and its mode is restored.
        store: A ``StoreDataset`` or ``Store``, or any sequence of their documents.
        batch_size: Documents per step; affects only speed and memory.
        on_batch: Function called after each batch with the number of documents done.

    Returns:
        ``perplexity``; ``loss``, its logarithm; ``kl_ghost``; ``teacher_perplexity``, the teacher's on those of the
        labels whose logit the store has; ``teacher_tokens``, their number, if it is not all labels; ``teacher_mass``
        and ``student_mass``, the mean probability of the kept ids; ``tokens``, the number of labels;
        ``tokens_per_second``.

    Raises:
        ValueError: ``store`` holds no label, its ids do not fit the student's vocabulary, or ``batch_size`` is below 1.
    """
    start = time.perf_counter()
    found: list[DocumentMetrics] = []
    for metrics in evaluate_documents(model, store, batch_size=batch_size):
        found.append(metrics)
        if on_batch is not None and (len(found) % batch_size == 0 or len(found) == len(store)):
            on_batch(len(found))
    num_tokens = sum(metrics.labels for metrics in found)
    if not num_tokens:
        raise ValueError("store must hold at least one label to evaluate on, got none")
    seconds = time.perf_counter() - start
    loss = sum(metrics.loss for metrics in found) / num_tokens
    result = {
        "perplexity": perplexity(loss),
        "loss": loss,
        "kl_ghost": sum(metrics.kl_ghost for metrics in found) / num_tokens,
        "teacher_mass": sum(metrics.teacher_mass for metrics in found) / num_tokens,
        "student_mass": sum(metrics.student_mass for metrics in found) / num_tokens,
        "tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
    }
    num_known = sum(metrics.teacher_labels for metrics in found)
    if num_known:
        result["teacher_perplexity"] = perplexity(sum(metrics.teacher_loss or 0.0 for metrics in found) / num_known)
    if num_known != num_tokens:
        result["teacher_tokens"] = num_known
    return result


def evaluate_documents(
    model: PreTrainedModel, documents: Sequence[Document | PackedDocument], *, batch_size: int = 8
) -> Iterator[DocumentMetrics]:
    """Yields what ``evaluate_store`` measures for each document, in order, computed ``batch_size`` at a time.

    The model is in evaluation mode while a batch is computed, and in its own mode between batches.

    Raises:
        ValueError: Ids of the documents do not fit the student's vocabulary, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    head = LanguageModelHead.of(model)
    collator, device = SlimCollator(vocab_size=head.vocab_size), head.weight.device
    for first in range(0, len(documents), batch_size):
        batch = [documents[index] for index in range(first, min(first + batch_size, len(documents)))]
        with evaluation_mode(model):
            found = _evaluate_batch(model, collator(batch), [len(document.positions) for document in batch], device)
        yield from found


@torch.no_grad()
def _evaluate_batch(
    model: PreTrainedModel, batch: dict[str, Any], counts: list[int], device: torch.device
) -> list[DocumentMetrics]:
    teacher, target = teacher_rows(batch["teacher"].to(device)), batch["target"].to(device)
    batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "rows")} | {"target": target}
    result = loss_of_batch(model, batch, teacher=teacher, rest="ghost", token_weight="none", reduction="none")
    terms = [result.ce, result.kd, result.teacher_mass, result.student_mass]
    if teacher.target_logit is not None:
        # A label's logit is NaN if it is unknown, and -inf if it was not kept.
        is_known = teacher.target_logit.isfinite()
        terms += [torch.where(is_known, teacher.lse_at(1.0) - teacher.target_logit, 0.0), is_known]
    rows = torch.stack([term.double() for term in terms], -1).cpu()  # (N, 4 or 6)
    sums = [part.sum(0).tolist() for part in rows.split(counts)]
    return [
        DocumentMetrics(count, loss, kl, teacher_mass, student_mass, *_known(known))
        for count, (loss, kl, teacher_mass, student_mass, *known) in zip(counts, sums, strict=True)
    ]


def _known(sums: list[float]) -> tuple[float | None, int]:
    """Returns the teacher's loss, None where no label is known, and the number of labels that are."""
    loss, count = sums or (0.0, 0.0)
    return (loss if count else None), int(count)
