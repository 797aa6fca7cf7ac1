"""Attention of branches to their prompt, stored once, and to their own tokens, stored once for all that share them.

A row attends to its prompt, to the tokens of the branch that it continues in pieces, and to its new tokens; each gives
a partial softmax, and the partial results are merged in the row's own order. Pieces are cut by the row's own length
alone, so that nothing of a row's sums depends on what else is in the batch. The split is that of flash-decoding (Dao et
al. 2023); one product of keys with all rows that share them is Hydragen's (Juravsky et al. 2024, arXiv 2402.05099).
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

from slimkernels.search.engines.branch_cache import Prompt, Steps, TokenPool, to_device

CHUNK = 32  # tokens in a piece of a branch
SIBLINGS = 8  # rows that attend to a piece together
ROWS = 16  # batches are padded to a multiple of this many rows: see ``TransformersEngine``
_NAME = "slimkernels_branches"


class Pass(Protocol):
    """What one forward of the model does with queries, keys and values."""

    layers_seen: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Query (B, H * G, T, d), key and value (B, H, T, d) to (B, T, H * G, d)."""
        ...


_PASS: contextvars.ContextVar[Pass] = contextvars.ContextVar("slimkernels_branch_pass")


class PromptPass:
    """Encodes one prompt, and keeps its keys and values."""

    def __init__(self, prompt: Prompt) -> None:
        self.layers_seen = 0
        self._prompt = prompt

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Causal attention."""
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
    """Softmax sums over some of the keys: of exp(score - top) * value, top, and of exp(score - top)."""

    weighted: Tensor  # (n, m, d), or of rows (R, H, G, d)
    top: Tensor  # (n, m, 1), or (R, H, G, 1)
    total: Tensor  # (n, m, 1), or (R, H, G, 1)


class DecodePass:
    """Reads one new token in each row, and keeps its keys and values."""

    def __init__(
        self, pool: TokenPool, prompts: Sequence[Prompt], steps: Steps, rows: np.ndarray, device: torch.device
    ) -> None:
        """``prompts`` of each of ``rows``, and their slots in ``steps``, of which the last is the new token's."""
        self.layers_seen = 0
        self._pool = pool
        self._num_rows = len(rows)
        self._groups = [
            _Group(prompt, to_device(_padded(np.array(members, np.int64)), device), len(members))
            for prompt, members in _by_prompt(prompts)
        ]
        self._inherited = _Chunks.of(steps.siblings(rows, SIBLINGS), len(rows), device)
        new = steps.new(rows)
        first, last = int(new[0, 0]), int(new[-1, -1])
        self._newest = slice(int(new[-1, 0]), last + 1)
        # Slots are given out in order. They follow each other unless a row of the batch has ended.
        self._new = slice(first, last + 1) if last - first + 1 == new.size else to_device(new.reshape(-1), device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Every row to its prompt, to the tokens of its branch, and to the new ones."""
        self.layers_seen += 1
        num_rows, heads = self._num_rows, key.shape[1]
        self._pool.write(layer, self._newest, key[:num_rows, :, 0], value[:num_rows, :, 0])
        accumulate = torch.promote_types(query.dtype, torch.float32)
        queries = query[:num_rows, :, 0].unflatten(1, (heads, -1)).to(accumulate)  # (R, H, G, d)
        sums = self._to_prompts(layer, queries, scale)
        if self._inherited is not None:
            parts = self._to_inherited(self._inherited, layer, queries, scale)
            for chunk in self._inherited.of_rows.T.unbind():
                sums = _merged(sums, _Partial(*(part.index_select(0, chunk) for part in parts)))
        sums = _merged(sums, self._to_new(layer, queries, scale))
        attended = query.new_zeros(query.shape[0], query.shape[1], sums.weighted.shape[-1])
        attended[:num_rows] = (sums.weighted / sums.total).flatten(1, 2)
        return attended[:, None]

    def _to_prompts(self, layer: int, queries: Tensor, scale: float) -> _Partial:
        num_rows, heads, groups, _ = queries.shape
        value_size = self._groups[0].prompt.values[layer].shape[2]
        partial = _Partial(*(queries.new_empty(num_rows, heads, groups, size) for size in (value_size, 1, 1)))
        for group in self._groups:
            rows = group.rows[: group.num_rows]
            keys, values = (tensor[layer].to(queries.dtype) for tensor in (group.prompt.keys, group.prompt.values))
            # All rows of a prompt in one product for each head, (rows * G, d) x (d, L).
            own = queries.index_select(0, group.rows).transpose(0, 1).flatten(1, 2)
            for field, part in zip(partial, _attend(own, keys, values, None, scale), strict=True):
                part = part.unflatten(1, (-1, groups))[:, : group.num_rows]
                field.index_copy_(0, rows, part.transpose(0, 1))
        return partial

    def _to_inherited(self, chunks: _Chunks, layer: int, queries: Tensor, scale: float) -> _Partial:
        """Of all siblings with all chunks, (n * SIBLINGS + 1, H, G, d); the last is that of nothing."""
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

    def _to_new(self, layer: int, queries: Tensor, scale: float) -> _Partial:
        num_rows, heads, groups, _ = queries.shape
        keys, values = (
            # (t, R * H, d) in memory, seen as (R * H, t, d).
            tensor.to(queries.dtype).view(-1, num_rows * heads, tensor.shape[-1]).transpose(0, 1)
            for tensor in (_taken(layers[layer], self._new) for layers in (self._pool.keys, self._pool.values))
        )
        parts = _attend(queries.reshape(num_rows * heads, groups, -1), keys, values, None, scale)
        return _Partial(*(part.view(num_rows, heads, groups, -1) for part in parts))


@dataclasses.dataclass
class _Group:
    prompt: Prompt
    rows: Tensor  # padded to a multiple of ROWS by repeating one of them
    num_rows: int


@dataclasses.dataclass
class _Chunks:
    """The tokens that rows took over from their branches, in pieces; siblings attend to a piece together."""

    first_slots: Tensor  # (n, CHUNK)
    empty: Tensor  # (n, CHUNK), True behind a branch's end
    rows: Tensor  # (n * SIBLINGS,) that attend to each, filled up by repeating one of them
    of_rows: Tensor  # (R, most chunks of a row), the places of its own sums in their order, n * SIBLINGS for none

    @staticmethod
    def of(siblings: list[tuple[np.ndarray, np.ndarray]], num_rows: int, device: torch.device) -> _Chunks | None:
        """Of rows and the slots they inherited; None where no row has any."""
        siblings = [(members, slots) for members, slots in siblings if len(slots)]
        if not siblings:
            return None
        first_slots, empty, rows, num_chunks = [], [], [], 0
        of_rows = np.full((num_rows, max(-(-len(slots) // CHUNK) for _, slots in siblings)), -1, np.int64)
        for members, slots in siblings:
            # What is behind the end is masked, and must be finite.
            padded = np.append(slots, np.full(-len(slots) % CHUNK, slots[0])).reshape(-1, CHUNK)
            first_slots.append(padded)
            empty.append((np.arange(padded.size) >= len(slots)).reshape(padded.shape))
            rows.append(np.tile(np.append(members, np.full(SIBLINGS - len(members), members[0])), len(padded)))
            chunks = num_chunks + np.arange(len(padded))
            of_rows[members, : len(padded)] = chunks * SIBLINGS + np.arange(len(members))[:, None]
            num_chunks += len(padded)
        of_rows[of_rows < 0] = num_chunks * SIBLINGS
        return _Chunks(
            to_device(np.concatenate(first_slots), device),
            to_device(np.concatenate(empty), device),
            to_device(np.concatenate(rows), device),
            to_device(of_rows, device),
        )

    def slots(self, heads: int) -> Tensor:
        """(n * H * CHUNK,) in a layer's keys (slots * H, d)."""
        return (self.first_slots[:, None] * heads + torch.arange(heads, device=self.empty.device)[:, None]).flatten()


def _merged(one: _Partial, other: _Partial) -> _Partial:
    top = torch.maximum(one.top, other.top)
    one_share, other_share = (one.top - top).exp_(), (other.top - top).exp_()
    return _Partial(
        (one.weighted * one_share).add_(other.weighted * other_share),
        top,
        (one.total * one_share).add_(other.total * other_share),
    )


def _taken(layer: Tensor, slots: slice | Tensor) -> Tensor:
    return layer[slots] if isinstance(slots, slice) else layer.index_select(0, slots)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, empty: Tensor | None, scale: float) -> _Partial:
    """Queries (n * H, m, d), keys and values (n * H, t, d); ``empty`` (n, t) masks keys, the same for all H heads."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    if empty is not None:
        scores.unflatten(0, (len(empty), -1)).masked_fill_(empty[:, None, None], -math.inf)
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    return _Partial(torch.bmm(weights, values), top, weights.sum(-1, keepdim=True))


def _by_prompt(prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
    members: dict[int, tuple[Prompt, list[int]]] = {}
    for row, prompt in enumerate(prompts):
        members.setdefault(id(prompt), (prompt, []))[1].append(row)
    return list(members.values())


def _padded(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([rows, np.full(-len(rows) % ROWS, rows[0])])


@contextlib.contextmanager
def branch_attention(model: PreTrainedModel) -> Iterator[None]:
    """Lets the model attend by ``running`` passes inside, and as before outside."""
    before = cast(str, model.config._attn_implementation)
    AttentionInterface.register(_NAME, _attention)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def running(current: Pass) -> Iterator[None]:
    """Sends the queries, keys and values of forwards inside to a pass."""
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
                f"model must use plain softmax attention, got one with {name}: search with a server that runs it"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _PASS.get().attend(cast(int, module.layer_idx), query, key, value, scale).contiguous(), None
