"""Keys and values of branches: each prompt and each generated token is stored once for all branches that share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GROWTH = 1.25
_MIN_SLOTS = 64


@dataclasses.dataclass(eq=False)
class Prompt:
    """An encoded prompt.

    Attributes:
        token_ids: L token ids.
        keys: One tensor (H, L, d) per layer, H key-value heads.
        values: One tensor (H, L, d) per layer.
        mean_hidden: (D,) float32, mean over the prompt of the embedding layer's hidden states.
    """

    token_ids: list[int]
    keys: list[Tensor] = dataclasses.field(default_factory=list)
    values: list[Tensor] = dataclasses.field(default_factory=list)
    mean_hidden: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclasses.dataclass(eq=False)
class Branch:
    """A prompt and the tokens generated after it. The model may not have read the last token yet.

    Attributes:
        prompt: The prompt, shared with other branches.
        slots: (n,) int64, pool slots of the generated tokens that the model has read, in order.
        length: Number of tokens, prompt included.
        tail: Last few token ids of the branch, with which the next step is decoded.
        unread: Last token id if the model has not read it, else None.
        logits: (V,) after the last token, once the model has read it.
        hidden: (D,) float32, the embedding layer's hidden state at the last token, once the model has read it.
    """

    prompt: Prompt
    slots: np.ndarray
    length: int
    tail: list[int]
    unread: int | None
    logits: Tensor | None = None
    hidden: Tensor | None = None


class TokenPool:
    """Keys and values of generated tokens, in reference-counted slots that branches share.

    A token has one slot, which is the same in every layer. A branch lists the slots of its tokens; forking it
    increments their reference counts. Slots are handed out consecutively: first those of one token for every row of a
    batch, then those of the next token.

    Attributes:
        keys: One tensor (slots, H, d) per layer.
        values: One tensor (slots, H, d) per layer.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._counts = np.zeros(0, np.int64)  # reference count of every slot
        self._end = 0  # first slot that has not been handed out

    def match(self, prompt: Prompt) -> None:
        """Adopts the prompt's number of layers, shapes, dtype and device, unless the pool has its own already."""
        if not self.keys:
            self.keys = [keys.new_empty(0, keys.shape[0], keys.shape[2]) for keys in prompt.keys]
            self.values = [values.new_empty(0, values.shape[0], values.shape[2]) for values in prompt.values]

    @property
    def num_used(self) -> int:
        """Number of slots that at least one branch uses."""
        return int(np.count_nonzero(self._counts))

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, used or not."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @staticmethod
    def max_slots(num_used: int) -> int:
        """Returns the largest size of a pool in which at most ``num_used`` slots were in use at any time."""
        return max(int(num_used * _GROWTH), _MIN_SLOTS)

    def allocate(self, count: int) -> np.ndarray:
        """Returns ``count`` consecutive free slots (count,) int64, each with a reference count of 1."""
        start, self._end = self._end, self._end + count
        if self._end > len(self._counts):
            self._grow(self._end)
        self._counts[start : self._end] = 1
        return np.arange(start, self._end)

    def share(self, slots: np.ndarray) -> None:
        """Increments the reference counts of a branch's slots."""
        self._counts[slots] += 1

    def release(self, slots: np.ndarray) -> None:
        """Decrements the reference counts of a branch's slots."""
        self._counts[slots] -= 1

    def compact(self) -> np.ndarray:
        """Moves the used slots to the front in their order. Returns the new index of every old slot, -1 for unused."""
        used = np.flatnonzero(self._counts)
        if len(used) < self._end:
            for layers in (self.keys, self.values):
                for layer in layers:
                    layer[: len(used)] = layer.index_select(0, to_device(used, layer.device))
        new_slots = np.full(len(self._counts), -1, np.int64)
        new_slots[used] = np.arange(len(used))
        self._counts[: len(used)] = self._counts[used]
        self._counts[len(used) :] = 0
        self._end = len(used)
        return new_slots

    def write(self, layer: int, slots: slice, keys: Tensor, values: Tensor) -> None:
        """Stores the keys and values (n, H, d) of n consecutive slots in a layer."""
        self.keys[layer][slots] = keys
        self.values[layer][slots] = values

    def _grow(self, min_slots: int) -> None:
        before = len(self._counts)
        after = max(min_slots, int(before * _GROWTH), _MIN_SLOTS)
        for layers in (self.keys, self.values):
            for layer, old in enumerate(layers):
                layers[layer] = old.new_empty(after, *old.shape[1:])
                layers[layer][:before] = old
        self._counts = np.concatenate([self._counts, np.zeros(after - before, np.int64)])


class RowSlots:
    """The pool slots of a batch's rows: those inherited from the branch a row continues, and those of its new tokens.

    Rows advance together, so all rows that are still growing have the same number of new tokens.

    Args:
        branches: Branch that each row continues.
        max_new_tokens: Largest number of new tokens in a row.

    Attributes:
        inherited: Slots of each row's branch, one (n,) int64 array per row.
    """

    def __init__(self, branches: Sequence[Branch], max_new_tokens: int) -> None:
        self.inherited = [branch.slots for branch in branches]
        self._branches = branches
        self._new = np.zeros((max_new_tokens, len(branches)), np.int64)
        self._num_new = np.zeros(len(branches), np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """Number of slots in each row (R,)."""
        return self._num_new + [len(slots) for slots in self.inherited]

    def append(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Adds one slot to each of the rows."""
        self._new[self._num_new[rows], rows] = slots
        self._num_new[rows] += 1

    def of(self, row: int) -> np.ndarray:
        """Returns all slots of one row in order."""
        return np.concatenate([self.inherited[row], self._new[: self._num_new[row], row]])

    def new(self, rows: np.ndarray) -> np.ndarray:
        """Returns the slots (t, rows) of the t new tokens of rows that are still growing."""
        return self._new[: self._num_new[rows[0]], rows]

    def siblings(self, rows: np.ndarray, max_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Groups rows that continue the same branch.

        Returns:
            Pairs of up to ``max_size`` indices into ``rows``, and the slots that these rows inherited.
        """
        members: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            members.setdefault(id(self._branches[row]), []).append(index)
        return [
            (np.array(indices[first : first + max_size]), self.inherited[rows[indices[0]]])
            for indices in members.values()
            for first in range(0, len(indices), max_size)
        ]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to a tensor on a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
