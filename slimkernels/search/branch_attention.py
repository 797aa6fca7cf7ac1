"""Attention of branches to their prompt, stored once, and to their own tokens, stored once for all that share them.

A row attends to its prompt and to its own tokens in pieces; each piece gives a partial softmax, and the partial results
are merged in the row's own order. Pieces are cut by the row's own length alone, so that nothing of a row's sums depends
on what else is in the batch. The split is that of flash-decoding (Dao et al. 2023); one product of a prompt's keys with
all its rows is Hydragen's (Juravsky et al. 2024, arXiv 2402.05099).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from slimkernels.search.branch_cache import Prompt, SlotTable, TokenPool, to_device

CHUNK = 32  # tokens in a piece of a row's own
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

    weighted: Tensor  # (H, n, G, d)
    top: Tensor  # (H, n, G, 1)
    total: Tensor  # (H, n, G, 1)


class DecodePass:
    """Reads one new token in each row, and keeps its keys and values."""

    def __init__(
        self, pool: TokenPool, prompts: Sequence[Prompt], table: SlotTable, rows: np.ndarray, device: torch.device
    ) -> None:
        """``prompts`` of each of ``rows``, and their slots in ``table``, whose last is that of the new token."""
        self.layers_seen = 0
        self._pool = pool
        self._num_rows = len(rows)
        slots, empty, row, of_rows = table.chunks(rows)
        self._slots = to_device(slots.reshape(-1), device)
        self._empty = to_device(empty, device)
        self._row_of_chunk = to_device(row, device)
        self._chunks_of_row = to_device(of_rows, device)
        newest = np.array([table.of(row)[-1] for row in rows], np.int64)
        self._newest = to_device(newest, device)
        self._groups = [
            _Group(prompt, to_device(_padded(np.array(members, np.int64)), device), len(members))
            for prompt, members in _by_prompt(prompts)
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Every row to its prompt, to its own tokens, and to the new one."""
        self.layers_seen += 1
        num_rows, heads = self._num_rows, key.shape[1]
        own_key, own_value = (tensor[:num_rows, :, 0].transpose(0, 1) for tensor in (key, value))
        self._pool.write(layer, self._newest, own_key, own_value)
        accumulate = torch.promote_types(query.dtype, torch.float32)
        queries = query[:num_rows, :, 0].unflatten(1, (heads, -1)).transpose(0, 1).to(accumulate)  # (H, R, G, d)
        attended = query.new_zeros(query.shape[0], query.shape[1], query.shape[3])
        merged = self._merge(self._to_prompts(layer, queries, scale), self._to_own(layer, queries, scale))
        attended[:num_rows] = merged.transpose(0, 1).flatten(1, 2).to(query.dtype)
        return attended[:, None]

    def _to_prompts(self, layer: int, queries: Tensor, scale: float) -> _Partial:
        heads, num_rows, groups, _ = queries.shape
        value_size = self._groups[0].prompt.values[layer].shape[2]
        partial = _Partial(
            queries.new_empty(heads, num_rows, groups, value_size),
            queries.new_empty(heads, num_rows, groups, 1),
            queries.new_empty(heads, num_rows, groups, 1),
        )
        for group in self._groups:
            rows = group.rows[: group.num_rows]
            keys, values = (tensor[layer].to(queries.dtype) for tensor in (group.prompt.keys, group.prompt.values))
            # All rows of a prompt in one product for each head, (rows * G, d) x (d, L).
            own = queries.index_select(1, group.rows).flatten(1, 2)
            for field, part in zip(partial, _attend(own, keys, values, None, scale), strict=True):
                part = part.unflatten(1, (-1, groups))[:, : group.num_rows]
                field.index_copy_(1, rows, part)
        return partial

    def _to_own(self, layer: int, queries: Tensor, scale: float) -> _Partial:
        heads, _, groups, _ = queries.shape
        num_chunks = len(self._row_of_chunk)
        own = queries.index_select(1, self._row_of_chunk).flatten(0, 1)  # (H * n, G, d)
        keys, values = (
            tensor[layer].index_select(1, self._slots).to(queries.dtype).view(heads * num_chunks, CHUNK, -1)
            for tensor in (self._pool.keys, self._pool.values)
        )
        # A row without a value in a slot is masked; the slot's value is finite, as every slot has been written.
        parts = _attend(own, keys, values, self._empty, scale)
        return _Partial(*(part.view(heads, num_chunks, groups, -1) for part in parts))

    def _merge(self, partial: _Partial, own: _Partial) -> Tensor:
        """(H, R, G, d): the partial sums of every row, its prompt's first, then its chunks' from its first token on."""
        # One more chunk that holds nothing, for rows that have fewer chunks than others: it adds exact zeros.
        nothing = (0.0, -math.inf, 0.0)
        own = _Partial(
            *(
                torch.cat([part, part.new_full((part.shape[0], 1, *part.shape[2:]), value)], 1)
                for part, value in zip(own, nothing, strict=True)
            )
        )
        weighted, top, total = partial
        for chunks in self._chunks_of_row.T.unbind():
            new = _Partial(*(part.index_select(1, chunks) for part in own))
            higher = torch.maximum(top, new.top)
            old_share, new_share = (top - higher).exp(), (new.top - higher).exp()
            weighted = weighted * old_share + new.weighted * new_share
            total = total * old_share + new.total * new_share
            top = higher
        return weighted / total


@dataclasses.dataclass
class _Group:
    prompt: Prompt
    rows: Tensor  # padded to a multiple of ROWS by repeating one of them
    num_rows: int


def _attend(queries: Tensor, keys: Tensor, values: Tensor, empty: Tensor | None, scale: float) -> _Partial:
    """Queries (n, m, d), keys and values (n, t, d); ``empty`` (n / H, t) masks keys, the same for all H heads."""
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    if empty is not None:
        scores.unflatten(0, (-1, len(empty))).masked_fill_(empty[None, :, None], -math.inf)
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
    before = model.config._attn_implementation
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
    return _PASS.get().attend(module.layer_idx, query, key, value, scale).contiguous(), None
