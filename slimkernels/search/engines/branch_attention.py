"""Attention of branches to their prompt and their own tokens, each stored once for all branches that share it.

A row attends to three sets of keys: its prompt, the tokens of the branch that it continues (in chunks), and its new
tokens. Each yields a partial softmax; these are merged in an order that depends on the row alone. Chunk boundaries
depend only on the row's own length, so no sum depends on the other rows of the batch. The split is that of
flash-decoding (Dao et al. 2023); multiplying shared keys with all rows that share them in one product is Hydragen's
(Juravsky et al. 2024, arXiv 2402.05099).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from slimkernels.search.engines.branch_cache import Prompt, RowSlots, TokenPool, to_device

CHUNK = 32  # tokens of a branch that rows attend to at once
SIBLINGS = 8  # rows that attend to a chunk together
ROWS = 16  # batches are padded to a multiple of this many rows: see ``TransformersEngine``
_NAME = "slimkernels_branches"


class Pass(Protocol):
    """The attention of one forward of the model.

    H is the number of key-value heads, G the number of query heads for each of them.

    Attributes:
        layers_seen: Number of layers whose attention has run.
    """

    layers_seen: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Returns (B, T, H * G, d) from query (B, H * G, T, d), key and value (B, H, T, d)."""
        ...


_PASS: contextvars.ContextVar[Pass] = contextvars.ContextVar("slimkernels_branch_pass")


class PromptPass:
    """Causal attention over one prompt, whose keys and values are stored in it."""

    def __init__(self, prompt: Prompt) -> None:
        self.layers_seen = 0
        self._prompt = prompt

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Computes causal attention."""
        self.layers_seen += 1
        self._prompt.keys.append(key[0].clone(memory_format=torch.contiguous_format))
        self._prompt.values.append(value[0].clone(memory_format=torch.contiguous_format))
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=scale
        )
        return attended.transpose(1, 2)


class _Partial(NamedTuple):
    """The softmax over a subset of the keys, before normalisation.

    Attributes:
        weighted: Sum of exp(score - top) * value, (n, m, d), or (R, H, G, d) per row.
        top: Largest score, (n, m, 1) or (R, H, G, 1).
        total: Sum of exp(score - top), (n, m, 1) or (R, H, G, 1).
    """

    weighted: Tensor
    top: Tensor
    total: Tensor


class DecodePass:
    """Attention of one new token in each row, whose keys and values are stored in the pool.

    Args:
        pool: Keys and values of the generated tokens.
        prompts: Prompt of each of ``rows``.
        slots: Slots of all rows; the last of each of ``rows`` is that of its new token.
        rows: (R,) int64, rows that read a token.
        device: Device of the model.
    """

    def __init__(
        self, pool: TokenPool, prompts: Sequence[Prompt], slots: RowSlots, rows: np.ndarray, device: torch.device
    ) -> None:
        self.layers_seen = 0
        self._pool = pool
        self._num_rows = len(rows)
        self._groups = [
            _Group(prompt, to_device(_padded(np.array(members, np.int64)), device), len(members))
            for prompt, members in _by_prompt(prompts)
        ]
        self._inherited = _Chunks.of(slots.siblings(rows, SIBLINGS), len(rows), device)
        new = slots.new(rows)
        first, last = int(new[0, 0]), int(new[-1, -1])
        self._newest = slice(int(new[-1, 0]), last + 1)
        # Slots are handed out consecutively, so they form one range unless a row of the batch has ended, or was read in
        # another forward.
        new = new.reshape(-1)
        self._new = slice(first, last + 1) if (np.diff(new) == 1).all() else to_device(new, device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Computes the attention of every row to its prompt, its branch's tokens and its new tokens."""
        self.layers_seen += 1
        num_rows, heads = self._num_rows, key.shape[1]
        self._pool.write(layer, self._newest, key[:num_rows, :, 0], value[:num_rows, :, 0])
        accumulate = torch.promote_types(query.dtype, torch.float32)
        queries = query[:num_rows, :, 0].unflatten(1, (heads, -1)).to(accumulate)  # (R, H, G, d)
        sums = self._attend_prompts(layer, queries, scale)
        if self._inherited is not None:
            parts = self._attend_inherited(self._inherited, layer, queries, scale)
            for chunk in self._inherited.of_rows.T.unbind():
                sums = _merge(sums, _Partial(*(part.index_select(0, chunk) for part in parts)))
        sums = _merge(sums, self._attend_new(layer, queries, scale))
        attended = query.new_zeros(query.shape[0], query.shape[1], sums.weighted.shape[-1])
        attended[:num_rows] = (sums.weighted / sums.total).flatten(1, 2)
        return attended[:, None]

    def _attend_prompts(self, layer: int, queries: Tensor, scale: float) -> _Partial:
        num_rows, heads, groups, _ = queries.shape
        value_size = self._groups[0].prompt.values[layer].shape[2]
        partial = _Partial(*(queries.new_empty(num_rows, heads, groups, size) for size in (value_size, 1, 1)))
        for group in self._groups:
            rows = group.rows[: group.num_rows]
            keys, values = (tensor[layer].to(queries.dtype) for tensor in (group.prompt.keys, group.prompt.values))
            # One product per head covers all rows of a prompt: (rows * G, d) x (d, L).
            own = queries.index_select(0, group.rows).transpose(0, 1).flatten(1, 2)
            for field, part in zip(partial, _attend(own, keys, values, None, scale), strict=True):
                part = part.unflatten(1, (-1, groups))[:, : group.num_rows]
                field.index_copy_(0, rows, part.transpose(0, 1))
        return partial

    def _attend_inherited(self, chunks: _Chunks, layer: int, queries: Tensor, scale: float) -> _Partial:
        """Attends every group of siblings to its chunks: (n * SIBLINGS + 1, H, G, d), the last for "no chunk"."""
        num_chunks, (_, heads, groups, size) = len(chunks.empty), queries.shape
        own = queries.index_select(0, chunks.rows).view(num_chunks, SIBLINGS, heads, groups, size)
        keys, values = (
            tensor[layer].flatten(0, 1).index_select(0, chunks.slots(heads)).to(queries.dtype)
            for tensor in (self._pool.keys, self._pool.values)
        )
        parts = _attend(
            own.transpose(1, 2).reshape(num_chunks * heads, SIBLINGS * groups, size),
            keys.view(num_chunks * heads, CHUNK, -1),
            values.view(num_chunks * heads, CHUNK, -1),
            chunks.empty,
            scale,
        )
        found = []
        for part, nothing in zip(parts, (0.0, -math.inf, 0.0), strict=True):
            of_rows = part.new_full((num_chunks * SIBLINGS + 1, heads, groups, part.shape[-1]), nothing)
            by_sibling = part.view(num_chunks, heads, SIBLINGS, groups, -1).transpose(1, 2)
            of_rows[:-1].view(by_sibling.shape).copy_(by_sibling)
            found.append(of_rows)
        return _Partial(*found)

    def _attend_new(self, layer: int, queries: Tensor, scale: float) -> _Partial:
        num_rows, heads, groups, _ = queries.shape
        keys, values = (
            # The memory layout is (t, R * H, d), viewed as (R * H, t, d).
            tensor.to(queries.dtype).view(-1, num_rows * heads, tensor.shape[-1]).transpose(0, 1)
            for tensor in (_take(layers[layer], self._new) for layers in (self._pool.keys, self._pool.values))
        )
        parts = _attend(queries.reshape(num_rows * heads, groups, -1), keys, values, None, scale)
        return _Partial(*(part.view(num_rows, heads, groups, -1) for part in parts))


@dataclasses.dataclass
class _Group:
    """The rows that share a prompt.

    Attributes:
        prompt: The shared prompt.
        rows: Indices of the rows, padded to a multiple of ROWS by repeating the first.
        num_rows: Number of rows without the padding.
    """

    prompt: Prompt
    rows: Tensor
    num_rows: int


@dataclasses.dataclass
class _Chunks:
    """The tokens that rows inherited from their branches, in n chunks; siblings attend to a chunk together.

    Attributes:
        chunk_slots: (n, CHUNK), pool slots of each chunk.
        empty: (n, CHUNK), True past the end of a branch.
        rows: (n * SIBLINGS,), rows that attend to each chunk, padded by repeating the first.
        of_rows: (R, largest number of chunks of a row), where each row's partial sums are, in order; n * SIBLINGS
            where a row has fewer chunks.
    """

    chunk_slots: Tensor
    empty: Tensor
    rows: Tensor
    of_rows: Tensor

    @staticmethod
    def of(siblings: list[tuple[np.ndarray, np.ndarray]], num_rows: int, device: torch.device) -> _Chunks | None:
        """Cuts the slots that groups of rows inherited into chunks. Returns None if no row inherited any."""
        siblings = [(members, slots) for members, slots in siblings if len(slots)]
        if not siblings:
            return None
        chunk_slots, empty, rows, num_chunks = [], [], [], 0
        of_rows = np.full((num_rows, max(-(-len(slots) // CHUNK) for _, slots in siblings)), -1, np.int64)
        for members, slots in siblings:
            # Padding is masked, but must refer to finite keys and values, so it repeats a slot in use.
            padded = np.append(slots, np.full(-len(slots) % CHUNK, slots[0])).reshape(-1, CHUNK)
            chunk_slots.append(padded)
            empty.append((np.arange(padded.size) >= len(slots)).reshape(padded.shape))
            rows.append(np.tile(np.append(members, np.full(SIBLINGS - len(members), members[0])), len(padded)))
            chunks = num_chunks + np.arange(len(padded))
            of_rows[members, : len(padded)] = chunks * SIBLINGS + np.arange(len(members))[:, None]
            num_chunks += len(padded)
        of_rows[of_rows < 0] = num_chunks * SIBLINGS
        return _Chunks(
            to_device(np.concatenate(chunk_slots), device),
            to_device(np.concatenate(empty), device),
            to_device(np.concatenate(rows), device),
            to_device(of_rows, device),
        )

    def slots(self, heads: int) -> Tensor:
        """Returns the rows (n * H * CHUNK,) to take from a layer's keys viewed as (slots * H, d)."""
        return (self.chunk_slots[:, None] * heads + torch.arange(heads, device=self.empty.device)[:, None]).flatten()


def _merge(one: _Partial, other: _Partial) -> _Partial:
    """Returns the partial softmax over the keys of both."""
    top = torch.maximum(one.top, other.top)
    one_share, other_share = (one.top - top).exp_(), (other.top - top).exp_()
    return _Partial(
        (one.weighted * one_share).add_(other.weighted * other_share),
        top,
        (one.total * one_share).add_(other.total * other_share),
    )


def _take(layer: Tensor, slots: slice | Tensor) -> Tensor:
    return layer[slots] if isinstance(slots, slice) else layer.index_select(0, slots)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, empty: Tensor | None, scale: float) -> _Partial:
    """Computes a partial softmax.

    Args:
        queries: (n * H, m, d).
        keys: (n * H, t, d).
        values: (n * H, t, d).
        empty: (n, t), True for keys to mask in all H heads; None masks nothing.
        scale: Factor of the scores.
    """
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    if empty is not None:
        scores.unflatten(0, (len(empty), -1)).masked_fill_(empty[:, None, None], -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return _Partial(torch.bmm(weights, values), top, weights.sum(-1, keepdim=True))


def _by_prompt(prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
    """Groups row indices by the prompt that the rows share."""
    members: dict[int, tuple[Prompt, list[int]]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(id(prompt), (prompt, []))[1].append(row)
    return list(members.values())


def _padded(rows: np.ndarray) -> np.ndarray:
    """Pads rows to a multiple of ROWS by repeating the first."""
    return np.concatenate([rows, np.full(-len(rows) % ROWS, rows[0])])


@contextlib.contextmanager
def installed(model: PreTrainedModel) -> Iterator[None]:
    """Makes the model use the attention of the ``running`` pass inside the context, and its own outside."""
    before = cast(str, model.config._attn_implementation)
    AttentionInterface.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def running(current: Pass) -> Iterator[None]:
    """Routes the queries, keys and values of forwards inside the context to a pass."""
    token = _PASS.set(current)
    try:
        yield
    finally:
        _PASS.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ValueError(
                f"model must use plain softmax attention, got one with {name}: serve the model and use ServerEngine"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _PASS.get().attend(cast(int, module.layer_idx), query, key, value, scale).contiguous(), None
