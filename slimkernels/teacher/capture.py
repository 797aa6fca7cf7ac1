"""``capture``: computes the teacher's logits of every token of every document and writes the kept ones into a store."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.models.evaluation import context_length, evaluation_mode
from slimkernels.models.fingerprints import weights_fingerprint
from slimkernels.models.head import DECODED, LanguageModelHead, check_logits, decoded
from slimkernels.models.sparse_targets import check_finite
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import RankWriter
from slimkernels.store.hidden import HIDDEN_BITS
from slimkernels.teacher.added_documents import AddedDocuments, CaptureReport
from slimkernels.teacher.ranks import TeacherProcesses
from slimkernels.teacher.selection import check_draw_version, check_keeps_hidden, default_codec, resolve_selection
from slimkernels.teacher.tokenized_document import TokenizedDocument
from slimkernels.teacher.vocabulary import captured_vocabulary

# Longest document of a batch over its shortest one; bounds the padding.
_MAX_LENGTH_RATIO = 1.25
_CHECKED_TOKENS = 16


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    documents: Iterable[Sequence[int]],
    store_path: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    top_fraction: float | None = None,
    top_p: float | None = None,
    select: str = "top_k",
    rounds: int | None = None,
    seed: int = 0,
    temperatures: Sequence[float] = (1.0,),
    codec: str | None = None,
    batch_tokens: int = 4096,
    window: int = 512,
    shard_rows: int | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    num_parts: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CaptureReport:
    """Adds documents to a store, with the teacher's kept logits of every token but the first.

    Equivalent to, for each document, with V the number of ids of the tokenizer::

        logits = model(ids[None]).logits[0, :-1, :V]
        writer.add(ids, torch.arange(1, len(ids)), topk_logits(logits, top_k, top_fraction, target=ids[1:]))

    but the (N, V) logits of a batch never exist; with draws, those of a few hundred rows do. The memory in addition to
    the model's is O(batch_tokens * K).

    Documents are sorted by length within windows of consecutive documents and run in right-padded batches. Windows and
    batches depend only on the documents, so after a kill the same call continues and gives the same store, bit for
    bit; documents that are in the store are skipped. The documents of a window are stored longest first.

    Several processes fill one store together if each calls this with the same documents and its own ``rank``. Windows
    and batches are then formed within each part of the store (``RankWriter``), so they depend on the documents and on
    ``num_parts``, but not on ``num_ranks``. Ranks do not wait for each other: one that died can be started again, alone
    or with the others, and ``num_ranks`` may change. Every rank reads all documents.

    A teacher whose parameters are split over several processes (DTensors, from ``load_teacher`` with
    ``tensor_parallel``) is one rank: all of its processes make the same call, and the first of them writes.

    Args:
        model: A causal language model whose head is one linear layer; a final softcap or scale is taken from its
            configuration, and checked against the model's own logits.
        tokenizer: Tokenizer of the model; its fingerprint goes into the store, and only its ids count. With None the
            store has no fingerprint, and every row of the head counts.
        documents: Token id lists, as from ``read_documents``. A ``TokenizedDocument`` has rows for its labels only, and
            the store keeps the length of its prompt. With ``teacher_ids``, its rows are those of its labels in what the
            teacher reads, and the store, which holds the document alone, keeps their hash.
        store_path: New directory, or a store made with the same settings.
        top_k: K, the number of entries to keep of every row.
        top_fraction: K as a share of the vocabulary; 0.05 if neither this nor ``top_k`` is given.
        top_p: Probability in (0, 1]. Of the K entries of a row it keeps the fewest that hold this much of the teacher's
            probability at temperature 1, so rows differ in length. A row whose K entries hold less keeps them all.
        select: Kind of selection. "top_k" keeps the largest logits, "sample" the ids of ``rounds`` draws from
            ``sample_targets``, and "mixed" both, from ``mixed_targets``. The draws are unbiased teachers, for rest
            "zero" or "renorm" at temperature 1.
        rounds: Number of draws of every row, 50 by default.
        seed: Seed of the draws, which depend on it and on the document only.
        temperatures: Temperatures at which the log-sum-exp of the whole row is kept; 1.0 is always the first, and with
            draws the only one.
        codec: Codec of the store: "affine8", "affine6", "bfloat16" or "float32". The default is "affine8", and
            "float32" with draws, which keeps their shares to seven digits. "hidden16" and "hidden8" keep the hidden
            states that the head is given, and the head, from which readers make the K largest logits.
        batch_tokens: Tokens of a batch, padding included; a longer document is a batch of its own.
        window: Number of documents that are sorted together.
        shard_rows: Rows at which a shard is full, the same as in ``StoreWriter``; a kill loses an unfinished shard.
        rank: Rank of this process among those that fill the store together.
        num_ranks: Number of ranks.
        num_parts: Number of parts of a new store. None makes one per rank, and takes the number of an existing store.
        progress: Called as progress(documents, tokens) after each batch, with the totals so far, skipped documents
            included.

    Returns:
        CaptureReport of this rank.

    Raises:
        ValueError: An argument is out of range, a token id is outside the teacher's vocabulary, a document is longer
            than the teacher can read, there is no document, or the logits of this kind of teacher cannot be computed.
        SettingsMismatchError: The store was made with another teacher, tokenizer, selection, codec, number of parts or
            version of the draws.
        TeacherContextError: A document is in the store, or comes again, with other ``teacher_ids``.
        StoreLockedError: Another process writes to the store, or to a part of this rank.
        FloatingPointError: The teacher's logits are not finite.
    """
    for name, value in (("batch_tokens", batch_tokens), ("window", window)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    teacher = _Teacher(
        model,
        tokenizer,
        store_path,
        select=select,
        top_k=top_k,
        top_fraction=top_fraction,
        top_p=top_p,
        rounds=rounds,
        seed=seed,
        temperatures=temperatures,
        codec=default_codec(select) if codec is None else codec,
    )
    if not teacher.processes.is_first:
        teacher.follow()
        return CaptureReport(0, 0, 0)
    with RankWriter(
        store_path,
        rank=rank,
        num_ranks=num_ranks,
        num_parts=num_parts,
        vocab_size=teacher.vocabulary.size,
        tokenizer_fingerprint=teacher.vocabulary.fingerprint,
        teacher=teacher.description,
        selection=teacher.selection.description,
        temperatures=teacher.selection.temperatures,
        shard_rows=shard_rows,
        **teacher.encoding,
    ) as writer:
        added = AddedDocuments(writer, progress)
        for batch in _batches(teacher.checked(documents), window, batch_tokens, writer.part_of):
            # A batch is computed as a whole, so that rounding does not depend on where a capture was killed.
            is_missing = any(not writer.has(ids, ids.teacher_ids) for ids in batch)
            for ids, rows in zip(batch, teacher(batch) if is_missing else [None] * len(batch), strict=True):
                added.add(ids, rows)
            added.show_progress()
    if not teacher.labelled:
        raise ValueError("documents must hold at least one document of 2 tokens, got none")
    teacher.dismiss()
    # Documents without a label belong to no part, so the first rank counts them.
    return added.report(without_label=teacher.short if rank == 0 else 0)


class _Teacher:
    """Turns batches of documents into kept logits."""

    def __init__(self, model, tokenizer, store_path, *, select, codec, **options) -> None:
        self.model = model
        self.processes = TeacherProcesses.of(model)
        self._whole_head = LanguageModelHead.of(model).gathered()
        self.vocabulary = captured_vocabulary(tokenizer, self._whole_head.vocab_size, store_path)
        self.head = self._whole_head.first_rows(self.vocabulary.size)
        self.selection = resolve_selection(select, self.vocabulary.size, **options)
        check_draw_version(self.selection, store_path)
        self.keeps_hidden = codec in HIDDEN_BITS
        self.encoding: dict[str, Any] = {"codec": codec}
        if self.keeps_hidden:
            check_keeps_hidden(self.selection, codec)
            self.encoding |= {"head": self.head.weights(), "top_k": self.selection.top_k}
        self.max_length = context_length(model.config)
        self.short = self.labelled = 0
        # Computed here, because all processes of the teacher must take part.
        self.description = describe(model, self.head.weight.shape[1])
        self._is_checked = False

    def checked(self, documents: Iterable[Sequence[int]]) -> Iterator[TokenizedDocument]:
        """Yields the documents that have a label, after checking their token ids and lengths."""
        for number, document in enumerate(documents, 1):
            ids = TokenizedDocument.of(document)
            if not ids.labels:
                self.short += 1
                continue
            self.vocabulary.check(ids, number)
            if ids.teacher_ids is not None:
                self.vocabulary.check(ids.teacher_ids, number, "the teacher's prefix of document")
            self._check_length(ids, number)
            self.labelled += 1
            yield ids

    def _check_length(self, ids: TokenizedDocument, number: int) -> None:
        if self.max_length is None or len(ids.read_ids) <= self.max_length:
            return
        if ids.shift <= 0:
            raise ValueError(
                f"document {number} has {len(ids)} tokens, but the teacher reads {self.max_length}: split it, as "
                f"read_documents does with max_length={self.max_length}"
            )
        left = self.max_length - ids.shift
        split = f", or split the document, as read_documents does with max_length={left}" if left >= 2 else ""
        raise ValueError(
            f"document {number} has {len(ids)} tokens and {ids.shift} more in the teacher's prefix, but the teacher "
            f"reads {self.max_length}: shorten the prefix{split}"
        )

    def __call__(self, batch: list[TokenizedDocument]) -> list[SparseLogits] | list[Tensor]:
        """Returns the kept logits (R_i, K), or the hidden states (R_i, D), of each document's labels, on the CPU."""
        self.processes.share(batch)
        return self._kept(batch)

    def follow(self) -> None:
        """Computes every batch of the teacher's first process along with it, until ``dismiss`` is called there."""
        while (batch := self.processes.share(None)) is not None:
            self._kept(batch)

    def dismiss(self) -> None:
        """Ends ``follow`` in the other processes of the teacher."""
        self.processes.share(None)

    @torch.inference_mode()
    def _kept(self, batch: list[TokenizedDocument]) -> list[Any]:
        device = self.model.device
        lengths = [len(ids.read_ids) for ids in batch]
        padded = torch.zeros((len(batch), max(lengths)), dtype=torch.int64)
        for row, ids in zip(padded, batch, strict=True):
            row[: len(ids.read_ids)] = torch.tensor(ids.read_ids)
        padded = padded.to(device)
        if not self._is_checked:
            self._check_head(padded[:1, : min(lengths[0], _CHECKED_TOKENS)])
        # No mask is needed, because a causal model does not see the padding to the right of a token.
        hidden = self._hidden(padded)
        labels = [torch.tensor(ids.labels) for ids in batch]
        document = torch.repeat_interleave(torch.tensor([len(of_one) for of_one in labels])).to(device)
        position = torch.cat([of_one + ids.shift for of_one, ids in zip(labels, batch, strict=True)]).to(device)
        hidden = hidden[document, position - 1]
        if self.keeps_hidden:
            check_finite(hidden.amax(-1), self.model.dtype)
            kept = hidden.to("cpu")
        else:
            kept = self.selection(self.head, hidden, padded[document, position], list(zip(batch, labels, strict=True)))
            check_finite(kept.lse, self.model.dtype)
        ends = list(itertools.accumulate(map(len, labels)))
        return [kept[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]

    def _hidden(self, ids: Tensor) -> Tensor:
        with evaluation_mode(self.model):
            return self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def _check_head(self, ids: Tensor) -> None:
        hidden, logits = decoded(self.model, ids)
        # Logits that are not finite raise an error of their own when rows are selected.
        if torch.isfinite(logits).all():
            advice = (
                ": pass the model's own logits to slimkernels.topk_logits and its result to "
                "slimkernels.store.StoreWriter"
            )
            check_logits(self.model, self._whole_head, hidden, logits, hidden_name=DECODED, advice=advice)
        self._is_checked = True


def describe(model: PreTrainedModel, hidden_size: int) -> dict[str, Any]:
    """Returns the description of a teacher whose head reads hidden states of this size, for its store."""
    return {
        "name": str(model.name_or_path),
        "revision": getattr(model.config, "_commit_hash", None),
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(model),
        "hidden_size": hidden_size,
    }


def _batches(
    documents: Iterable[TokenizedDocument],
    window: int,
    batch_tokens: int,
    part_of: Callable[[TokenizedDocument], int | None] = lambda ids: 0,
) -> Iterator[list[TokenizedDocument]]:
    """Yields batches of documents of one part and of similar length, without the documents of other ranks."""
    windows: dict[int, list[TokenizedDocument]] = {}
    for ids in documents:
        part = part_of(ids)
        if part is None:
            continue
        waiting = windows.setdefault(part, [])
        waiting.append(ids)
        if len(waiting) == window:
            yield from _batches_of_window(windows.pop(part), batch_tokens)
    for _, waiting in sorted(windows.items()):
        yield from _batches_of_window(waiting, batch_tokens)


def _batches_of_window(documents: list[TokenizedDocument], batch_tokens: int) -> Iterator[list[TokenizedDocument]]:
    """Yields batches of at most ``batch_tokens`` with padding; a longer document is a batch of its own."""
    batch: list[TokenizedDocument] = []
    # Longest first, so that a batch that does not fit in memory fails early.
    for ids in sorted(documents, key=lambda ids: len(ids.read_ids), reverse=True):
        longest = len(batch[0].read_ids) if batch else 0
        if batch and ((len(batch) + 1) * longest > batch_tokens or longest > _MAX_LENGTH_RATIO * len(ids.read_ids)):
            yield batch
            batch = []
        batch.append(ids)
    yield batch
