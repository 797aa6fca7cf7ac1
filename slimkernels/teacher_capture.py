"""``capture``: what the teacher says about every token of every document, straight from hidden states to a store."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimkernels._checks import resolve_temperatures, resolve_top_k
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import StoreWriter
from slimkernels.student import LanguageModelHead
from slimkernels.teacher_checks import tokenizer_fingerprint, weights_fingerprint

DEFAULT_TOP_FRACTION = 0.05
# A batch ends before a document that is this much longer than its shortest one: bounds the padding.
_MAX_LENGTH_RATIO = 1.25
_CHECKED_TOKENS = 16


class CaptureReport(NamedTuple):
    """What one call of ``capture`` did.

    Attributes:
        documents: Documents added to the store.
        tokens: Tokens in them.
        skipped: Documents passed over: in the store already, or without a label (fewer than 2 tokens).
    """

    documents: int
    tokens: int
    skipped: int


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Sequence[int]],
    store_path: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    top_fraction: float | None = None,
    top_p: float | None = None,
    temperatures: Sequence[float] = (1.0,),
    codec: str = "affine8",
    batch_tokens: int = 4096,
    window: int = 512,
    shard_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CaptureReport:
    """Adds every document to a store, with the teacher's kept logits of every token but the first.

    Equivalent to, for each document::

        logits = model(ids[None]).logits[0, :-1]
        writer.add(ids, torch.arange(1, len(ids)), topk_logits(logits, top_k, top_fraction, target=ids[1:]))

    but the (N, V) logits of a batch never exist: O(batch_tokens * K) memory beside the model's.

    Documents are sorted by length within windows of consecutive ones and run in right-padded batches. Windows and
    batches depend on the documents alone, so a call that was killed is continued by the same call and gives the
    same store, bit for bit; documents that are in the store are skipped. A window's documents are stored longest
    first.

    Args:
        model: A causal language model whose head is one linear layer; a final softcap or scale is taken from its
            configuration, and checked against the model's own logits.
        tokenizer: Its tokenizer; its fingerprint goes into the store.
        documents: Token id lists, as from ``read_documents``.
        store_path: A new directory, or a store made with the same settings.
        top_k: K, the entries kept of every row.
        top_fraction: K as a share of the vocabulary. By default, without ``top_k``, 0.05.
        top_p: In (0, 1]: of every row's K entries, keeps only the fewest that hold this much of the teacher's
            probability at temperature 1, so that rows differ in length. A row whose K entries hold less keeps them all.
        temperatures: At which the log-sum-exp of the whole row is kept; 1.0 is always the first.
        codec: Of the store: "affine8", "affine6", "bfloat16" or "float32".
        batch_tokens: Tokens of a batch, padding included; a longer document is a batch of its own.
        window: Documents that are sorted together.
        shard_rows: As in ``StoreWriter``.
        progress: Called as progress(documents, tokens) after each batch, with what is done so far, skipped documents
            included.

    Returns:
        CaptureReport.

    Raises:
        ValueError: An argument out of range, a token id outside the teacher's vocabulary, a document longer than
            the teacher can read, no document at all, or a teacher whose logits this cannot compute.
        SettingsMismatchError: The store was made with another teacher, tokenizer, selection or codec.
        FloatingPointError: The teacher's logits are not finite.
    """
    for name, value in (("batch_tokens", batch_tokens), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if top_k is None and top_fraction is None:
        top_fraction = DEFAULT_TOP_FRACTION
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    teacher = _Teacher(model, tokenizer, top_k, top_fraction, top_p, resolve_temperatures(temperatures))
    added = tokens = skipped = done_tokens = 0
    with StoreWriter(
        store_path,
        vocab_size=teacher.head.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        teacher=teacher.description,
        selection=teacher.selection,
        temperatures=teacher.temperatures,
        codec=codec,
        shard_rows=shard_rows,
    ) as writer:
        for batch in _batches(teacher.checked(documents), window, batch_tokens):
            # A batch is computed whole or not at all: rounding must not depend on where a capture was killed.
            missing = [ids not in writer for ids in batch]
            if any(missing):
                rows = teacher(batch)
                for ids, sparse in zip(batch, rows, strict=True):
                    # A document can be in the batch twice.
                    if ids in writer:
                        skipped += 1
                        continue
                    writer.add(ids, torch.arange(1, len(ids)), sparse)
                    added += 1
                    tokens += len(ids)
            else:
                skipped += len(batch)
            done_tokens += sum(map(len, batch))
            if progress is not None:
                progress(added + skipped, done_tokens)
    if not added and not skipped:
        raise ValueError("documents must hold at least one document of 2 tokens, got none")
    return CaptureReport(added, tokens, skipped + teacher.short)


class _Teacher:
    """Turns batches of documents into kept logits."""

    def __init__(self, model, tokenizer, top_k, top_fraction, top_p, temperatures) -> None:
        self.model = model
        self.head = LanguageModelHead.of(model)
        self.top_k = resolve_top_k(top_k, top_fraction, self.head.vocab_size)
        kind, value = ("top_fraction", top_fraction) if top_k is None else ("top_k", top_k)
        self.top_p = top_p
        self.selection = {"kind": kind, "value": value, "top_k": self.top_k}
        if top_p is not None:
            self.selection["top_p"] = top_p
        self.temperatures = temperatures
        self.max_length = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.short = 0
        self._is_checked = False
        # Many models have more rows than their tokenizer has tokens; the other way round is a wrong pair.
        if len(tokenizer) > self.head.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(tokenizer)} tokens, but the teacher {self.head.vocab_size}: load the "
                "tokenizer that belongs to the teacher"
            )

    @property
    def description(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "name": str(self.model.name_or_path),
            "revision": getattr(config, "_commit_hash", None),
            "model_type": config.model_type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(self.model),
        }

    def checked(self, documents: Iterable[Sequence[int]]) -> Iterator[list[int]]:
        """The documents that have a label, each within the teacher's vocabulary and length."""
        for number, document in enumerate(documents, 1):
            ids = list(document)
            if len(ids) < 2:
                self.short += 1
                continue
            if min(ids) < 0 or max(ids) >= self.head.vocab_size:
                raise ValueError(
                    f"token ids must lie in [0, {self.head.vocab_size}), the teacher's vocabulary, got {min(ids)} to "
                    f"{max(ids)} in document {number}"
                )
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"document {number} has {len(ids)} tokens, but the teacher reads {self.max_length}: split it, as "
                    f"read_documents does with max_length={self.max_length}"
                )
            yield ids

    @torch.inference_mode()
    def __call__(self, batch: list[list[int]]) -> list[SparseLogits]:
        """The kept logits (T_i - 1, K) of each document, on the CPU."""
        device = self.model.device
        lengths = [len(ids) for ids in batch]
        padded = torch.zeros((len(batch), max(lengths)), dtype=torch.int64)
        for row, ids in zip(padded, batch, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        padded = padded.to(device)
        if not self._is_checked:
            self._check_head(padded[:1, : min(lengths[0], _CHECKED_TOKENS)])
        # Without a mask: padding is at the right, where no causal model looks.
        hidden = self._hidden(padded)
        has_label = torch.arange(1, max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        kept = linear_topk_logits(
            hidden[:, :-1][has_label],
            self.head.weight,
            self.top_k,
            bias=self.head.bias,
            target=padded[:, 1:][has_label],
            temperatures=self.temperatures,
            softcap=self.head.softcap,
            logit_scale=self.head.logit_scale,
        ).to("cpu")
        if not torch.isfinite(kept.lse).all():
            raise FloatingPointError(
                f"the teacher's logits are not finite in {self.model.dtype}: load it in float32 or bfloat16"
            )
        if self.top_p is not None:
            kept = cut_top_p(kept, self.top_p)
        ends = list(itertools.accumulate(length - 1 for length in lengths))
        return [kept[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]

    def _hidden(self, ids: Tensor) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        try:
            return self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            self.model.train(was_training)

    def _check_head(self, ids: Tensor) -> None:
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        actual = self.head.logits(self._hidden(ids)).float()
        error, scale = (actual - expected).abs().max(), expected.abs().max().clamp(min=1.0)
        # Written so that NaN passes on to the check of the logits.
        if error > (1e-4 if self.model.dtype == torch.float32 else 5e-2) * scale:
            raise ValueError(
                f"the logits of {type(self.model).__name__} are not softcap(logit_scale * (hidden @ weight.T + bias)) "
                f"of its decoder's last hidden state (they differ by {float(error):.3g}): pass the model's own logits "
                "to slimkernels.topk_logits and its result to slimkernels.store.StoreWriter"
            )
        self._is_checked = True


def cut_top_p(kept: SparseLogits, top_p: float) -> SparseLogits:
    """The fewest entries of every row whose probabilities, exp(logit - lse) at temperature 1, add up to ``top_p``.

    Among equally likely ones the lower ids are kept. Rows (N, K) stay as wide as the widest of them needs.
    """
    logits = kept.logits.double().masked_fill(kept.ids < 0, -torch.inf)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = (logits.gather(-1, order) - kept.lse[:, :1].double()).exp().cumsum(-1)
    # An entry stays while those before it fall short, the first in any case.
    stays = torch.zeros_like(order, dtype=torch.bool)
    stays.scatter_(-1, order, torch.nn.functional.pad(mass[:, :-1] < top_p, (1, 0), value=True))
    stays &= kept.ids >= 0
    width = int(stays.sum(-1).max()) if len(order) else kept.top_k
    # Those that stay first, both parts in their old order, which is that of the ids.
    places = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
    gone = ~stays.gather(-1, places)
    return dataclasses.replace(
        kept,
        ids=kept.ids.gather(-1, places).masked_fill(gone, -1),
        logits=kept.logits.gather(-1, places).masked_fill(gone, 0.0),
    )


def _batches(documents: Iterator[list[int]], window: int, batch_tokens: int) -> Iterator[list[list[int]]]:
    """Batches of documents of similar length, at most ``batch_tokens`` with padding."""
    while documents_of_window := list(itertools.islice(documents, window)):
        batch: list[list[int]] = []
        # Longest first, so that a batch that does not fit in memory fails early.
        for ids in sorted(documents_of_window, key=len, reverse=True):
            longest = len(batch[0]) if batch else 0
            if batch and ((len(batch) + 1) * longest > batch_tokens or longest > _MAX_LENGTH_RATIO * len(ids)):
                yield batch
                batch = []
            batch.append(ids)
        yield batch
