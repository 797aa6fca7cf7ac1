"""The keys and values of branches: prompts once, and every generated token once, however many branches share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    """Keys and values of generated tokens: a slot each in every layer, counted, so that branches can share it.

    A branch is the list of its tokens' slots. To fork it is to count its slots once more. Slots are given out in
    order: those of a token in all rows of a batch follow each other, and those of the next token follow them.

    Attributes:
        keys: Of each layer (slots, H, d).
        values: The same.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._counts = np.zeros(0, np.int64)
        self._end = 0  # behind the last slot that was given out

    def like(self, prompt: Prompt) -> None:
        """Takes number of layers, shapes, dtype and device from a prompt."""
        if not self.keys:
            self.keys = [keys.new_empty(0, keys.shape[0], keys.shape[2]) for keys in prompt.keys]
            self.values = [values.new_empty(0, values.shape[0], values.shape[2]) for values in prompt.values]

    @property
    def num_used(self) -> int:
        """Slots that a branch has."""
        return int(np.count_nonzero(self._counts))

    @property
    def num_bytes(self) -> int:
        """Of all slots, used or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @staticmethod
    def capacity(num_used: int) -> int:
        """The most slots that a pool has of which so many were used at once."""
        return max(int(num_used * _GROWTH), _LEAST_SLOTS)

    def allocate(self, count: int) -> np.ndarray:
        """``count`` slots (count,) int64 in a row, each counted once."""
        start, self._end = self._end, self._end + count
        if self._end > len(self._counts):
            self._grow(self._end)
        self._counts[start : self._end] = 1
        return np.arange(start, self._end)

    def share(self, slots: np.ndarray) -> None:
        """Counts a branch's slots once more."""
        self._counts[slots] += 1

    def release(self, slots: np.ndarray) -> None:
        """Counts a branch's slots once less."""
        self._counts[slots] -= 1

    def compact(self) -> np.ndarray:
        """Moves slots that a branch has to the front, in their order; the new number of every old slot."""
        used = np.flatnonzero(self._counts)
        if len(used) < self._end:
            for layers in (self.keys, self.values):
                for layer in layers:
                    layer[: len(used)] = layer.index_select(0, to_device(used, layer.device))
        numbers = np.full(len(self._counts), -1, np.int64)
        numbers[used] = np.arange(len(used))
        self._counts[: len(used)] = self._counts[used]
        self._counts[len(used) :] = 0
        self._end = len(used)
        return numbers

    def write(self, layer: int, slots: slice, keys: Tensor, values: Tensor) -> None:
        """Sets keys and values (n, H, d) of slots in a row."""
        self.keys[layer][slots] = keys
        self.values[layer][slots] = values

    def _grow(self, least: int) -> None:
        before = len(self._counts)
        after = max(least, int(before * _GROWTH), _LEAST_SLOTS)
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                layers[layer] = old.new_empty(after, *old.shape[1:])
                layers[layer][:before] = old
        self._counts = np.concatenate([self._counts, np.zeros(after - before, np.int64)])


class Steps:
    """The slots of the rows of a batch: those that a row took over from its branch, and those of its new step.

    Rows advance together: a row that goes on has as many new tokens as any other that does.
    """

    def __init__(self, branches: Sequence[Branch], room: int) -> None:
        """``room`` for new tokens in each row."""
        self.inherited = [branch.slots for branch in branches]
        self._branches = branches
        self._new = np.zeros((room, len(branches)), np.int64)
        self._num_new = np.zeros(len(branches), np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Slots of each row."""
        return self._num_new + [len(slots) for slots in self.inherited]

    def append(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Adds a slot to each of the rows."""
        self._new[self._num_new[rows], rows] = slots
        self._num_new[rows] += 1

    def of(self, row: int) -> np.ndarray:
        """The slots of one row."""
        return np.concatenate([self.inherited[row], self._new[: self._num_new[row], row]])

    def new(self, rows: np.ndarray) -> np.ndarray:
        """The slots (t, rows) of the new tokens of rows that go on."""
        return self._new[: self._num_new[rows[0]], rows]

    def siblings(self, rows: np.ndarray, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The places in ``rows`` of up to ``most`` rows that continue one branch, with the slots they inherited."""
        members: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            members.setdefault(id(self._branches[row]), []).append(place)
        return [
            (np.array(places[first : first + most]), self.inherited[rows[places[0]]])
            for places in members.values()
            for first in range(0, len(places), most)
        ]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of the array on a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
