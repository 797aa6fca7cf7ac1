"""The keys and values of branches: prompts once, and every generated token once, however many branches share it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

_GROWTH = 1.25
_LEAST_SLOTS = 64


@dataclasses.dataclass(eq=False)
class Prompt:
    """An encoded prompt.

    Attributes:
        token_ids: Its tokens.
        keys: Of each layer (H, L, d), H key-value heads.
        values: The same.
        mean_hidden: (D,) float32, the embedding layer's hidden states averaged over the prompt.
    """

    token_ids: list[int]
    keys: list[Tensor] = dataclasses.field(default_factory=list)
    values: list[Tensor] = dataclasses.field(default_factory=list)
    mean_hidden: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclasses.dataclass(eq=False)
class Branch:
    """A prompt and the tokens after it; the last of them may not have been read by the model yet."""

    prompt: Prompt
    slots: np.ndarray  # of the tokens read after the prompt
    length: int  # tokens, prompt included
    tail: list[int]  # the last few of them
    unread: int | None  # the last, where the model has not read it
    logits: Tensor | None = None  # (V,) after the last, where it has
    hidden: Tensor | None = None  # (D,) float32 there


class TokenPool:
    """Keys and values of generated tokens: a slot each in every layer, counted, and reused when no branch has it.

    A branch is the list of its tokens' slots. To fork it is to count its slots once more.

    Attributes:
        keys: Of each layer (H, slots, d).
        values: The same.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._counts = np.zeros(0, np.int64)
        self._free = np.zeros(0, np.int64)  # a stack
        self._num_free = 0

    def like(self, prompt: Prompt) -> None:
        """Takes number of layers, shapes, dtype and device from a prompt."""
        if not self.keys:
            self.keys = [keys.new_empty(keys.shape[0], 0, keys.shape[2]) for keys in prompt.keys]
            self.values = [values.new_empty(values.shape[0], 0, values.shape[2]) for values in prompt.values]

    @property
    def num_used(self) -> int:
        """Slots that a branch has."""
        return len(self._counts) - self._num_free

    @property
    def num_bytes(self) -> int:
        """Of all slots, used or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @staticmethod
    def capacity(num_used: int) -> int:
        """The most slots that a pool has of which so many were used at once."""
        return max(int(num_used * _GROWTH), _LEAST_SLOTS)

    def allocate(self, count: int) -> np.ndarray:
        """``count`` slots (count,) int64, each counted once."""
        if count > self._num_free:
            self._grow(count - self._num_free)
        self._num_free -= count
        slots = self._free[self._num_free : self._num_free + count].copy()
        self._counts[slots] = 1
        return slots

    def share(self, slots: np.ndarray) -> None:
        """Counts a branch's slots once more."""
        self._counts[slots] += 1

    def release(self, slots: np.ndarray) -> None:
        """Counts a branch's slots once less, and frees those that no branch has any more."""
        self._counts[slots] -= 1
        freed = slots[self._counts[slots] == 0]
        self._free[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Sets keys and values (H, n, d) of slots (n,)."""
        self.keys[layer].index_copy_(1, slots, keys)
        self.values[layer].index_copy_(1, slots, values)

    def _grow(self, missing: int) -> None:
        before = len(self._counts)
        after = max(before + missing, int(before * _GROWTH), _LEAST_SLOTS)
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                layers[layer] = old.new_empty(old.shape[0], after, old.shape[2])
                layers[layer][:, :before] = old
        self._counts = np.concatenate([self._counts, np.zeros(after - before, np.int64)])
        free = np.empty(after, np.int64)
        new = after - before
        free[:new] = np.arange(after - 1, before - 1, -1)
        free[new : new + self._num_free] = self._free[: self._num_free]
        self._free, self._num_free = free, new + self._num_free


class SlotTable:
    """The slots of the rows of a batch, padded, so that a token can be added to all rows at once."""

    def __init__(self, slots: list[np.ndarray], room: int, chunk: int) -> None:
        self._chunk = chunk
        self.lengths = np.array([len(row) for row in slots], np.int64)
        width = -(-(int(self.lengths.max(initial=0)) + room) // chunk) * chunk
        self._slots = np.zeros((len(slots), width), np.int64)
        for row, own in enumerate(slots):
            self._slots[row, : len(own)] = own

    def append(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Adds a slot to each of the rows."""
        self._slots[rows, self.lengths[rows]] = slots
        self.lengths[rows] += 1

    def of(self, row: int) -> np.ndarray:
        """The slots of one row."""
        return self._slots[row, : self.lengths[row]].copy()

    def chunks(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The slots of the rows in pieces of the chunk length, counted from each row's first.

        Returns:
            slots (n, chunk), 0 behind a row's end; empty (n, chunk), True there; row (n,), the place in ``rows`` whose
            chunk it is; table (rows, most chunks of a row), the chunks of each row in order, n where it has no more.
        """
        lengths = self.lengths[rows]
        most = int(-(-lengths.max(initial=0) // self._chunk))
        starts = np.arange(most) * self._chunk
        has = starts[None] < lengths[:, None]  # (rows, most)
        row, index = np.nonzero(has)
        slots = self._slots[rows[row][:, None], starts[index][:, None] + np.arange(self._chunk)]
        empty = starts[index][:, None] + np.arange(self._chunk) >= lengths[row][:, None]
        slots[empty] = 0
        table = np.full(has.shape, len(row), np.int64)
        table[row, index] = np.arange(len(row))
        return slots, empty, row, table


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the array on a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
