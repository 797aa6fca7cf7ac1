"""``Tree``: the reasoning steps of one question, as arrays."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROOT = 0  # the prompt
NO_PARENT = -1


class Status(enum.IntEnum):
    """What a node is; ``reasons`` says why it ended."""

    OPEN = 0  # a leaf that may still branch
    EXPANDED = 1  # has branched
    FINISHED = 2  # a hypothesis with an end
    ENDED = 3  # a hypothesis that a limit ended
    PRUNED = 4  # a worse hypothesis than those kept
    CUT = 5  # failed its checks at every attempt


_FIELDS = np.dtype(
    [
        ("parent", np.int32),  # NO_PARENT for the root
        ("depth", np.int32),  # 0 for the root
        ("ordinal", np.int32),  # which child of its parent, counted before anything is cut or pruned
        ("attempts", np.int32),  # how often it was generated
        ("num_tokens", np.int32),  # generated tokens from the root to here
        ("sum_logprob", np.float64),  # of those tokens under the model, in nats
        ("first_token", np.int64),  # where its own begin in the tree's flat array
        ("last_token", np.int64),
        ("status", np.int8),
    ]
)


class Tree:
    """Nodes 0 (the root: the prompt), 1, 2, ... in the order in which they were added.

    Every field of a node is an entry of an array of the same length: ``parent``, ``depth``, ``ordinal``, ``attempts``,
    ``num_tokens``, ``sum_logprob`` and ``status`` are numpy arrays (M,), views that an ``add`` may outdate; ``steps``
    and ``reasons`` are lists of M strings. ``reasons[node]`` is empty while a node lives and has no other end than its
    children.
    """

    def __init__(self) -> None:
        self._nodes = np.zeros(64, _FIELDS)
        self._tokens = np.zeros(1024, np.int64)
        self._num_tokens = 0
        self.steps: list[str] = [""]
        self.reasons: list[str] = [""]
        self._nodes[ROOT]["parent"] = NO_PARENT

    def __len__(self) -> int:
        return len(self.steps)

    def __getattr__(self, name: str) -> np.ndarray:
        if name in ("parent", "depth", "ordinal", "attempts", "num_tokens", "sum_logprob", "status"):
            return self._nodes[name][: len(self)]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def add(
        self, parent: int, ordinal: int, token_ids: Sequence[int], text: str, sum_logprob: float, *, attempts: int = 1
    ) -> int:
        """Adds one open step.

        Args:
            parent: The node that it continues.
            ordinal: Which of the parent's children it is, from 0.
            token_ids: Of the step alone.
            text: Of the step alone.
            sum_logprob: Of the step's tokens, in nats.
            attempts: How often the step was generated until this.

        Returns:
            The node.
        """
        node = len(self)
        if node == len(self._nodes):
            self._nodes = np.concatenate([self._nodes, np.zeros_like(self._nodes)])
        end = self._num_tokens + len(token_ids)
        while end > len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
        self._tokens[self._num_tokens : end] = token_ids
        above = self._nodes[parent]
        self._nodes[node] = (
            parent,
            above["depth"] + 1,
            ordinal,
            attempts,
            above["num_tokens"] + len(token_ids),
            above["sum_logprob"] + sum_logprob,
            self._num_tokens,
            end,
            Status.OPEN,
        )
        self._num_tokens = end
        self.steps.append(text)
        self.reasons.append("")
        return node

    def mark(self, node: int, status: Status, reason: str = "") -> None:
        """Changes what a node is, and says why."""
        self._nodes[node]["status"] = status
        self.reasons[node] = reason

    def record(self, node: int) -> dict[str, Any]:
        """A node as JSON values; ``sum_logprob`` is that of the branch, as in the array."""
        return {
            "node": node,
            "parent": int(self.parent[node]),
            "ordinal": int(self.ordinal[node]),
            "attempts": int(self.attempts[node]),
            "token_ids": self.step_token_ids(node),
            "text": self.steps[node],
            "sum_logprob": float(self.sum_logprob[node]),
            "status": Status(self.status[node]).name.lower(),
            "reason": self.reasons[node],
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """Adds the node that ``record`` gave, as it was.

        Raises:
            KeyError, TypeError, ValueError: No record, or not that of the next node.
        """
        if record["node"] != len(self) or not 0 <= record["parent"] < len(self):
            raise ValueError(f"the next node must be {len(self)}, with a parent before it, got {record['node']}")
        node = self.add(
            record["parent"],
            record["ordinal"],
            record["token_ids"],
            record["text"],
            0.0,
            attempts=record["attempts"],
        )
        self._nodes[node]["sum_logprob"] = record["sum_logprob"]
        self.mark(node, Status[record["status"].upper()], record["reason"])

    def with_status(self, status: Status) -> list[int]:
        """The nodes of one status, rising."""
        return np.flatnonzero(self.status == status).tolist()

    def branch(self, node: int) -> list[int]:
        """The nodes from the root's child down to ``node``; of the root, none."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = int(self._nodes[node]["parent"])
        return nodes[::-1]

    def path(self, node: int) -> tuple[int, ...]:
        """The ordinals of the branch: the node's name, whatever else is in the tree."""
        return tuple(int(self._nodes[step]["ordinal"]) for step in self.branch(node))

    def text(self, node: int) -> str:
        """Everything generated from the root to ``node``."""
        return "".join(self.steps[step] for step in self.branch(node))

    def step_token_ids(self, node: int) -> list[int]:
        """The tokens of the node's own step."""
        return self._tokens[self._nodes[node]["first_token"] : self._nodes[node]["last_token"]].tolist()

    def token_ids(self, node: int) -> list[int]:
        """The tokens generated from the root to ``node``."""
        return [token for step in self.branch(node) for token in self.step_token_ids(step)]

    def scores(self, nodes: Sequence[int] | np.ndarray, length_penalty: float) -> np.ndarray:
        """sum_logprob / num_tokens^length_penalty of each node (n,); what pruning keeps is the largest."""
        index = np.asarray(nodes, np.int64)
        return self.sum_logprob[index] / np.maximum(self.num_tokens[index], 1) ** float(length_penalty)

    def best(self, nodes: Sequence[int], count: int, length_penalty: float) -> list[int]:
        """The ``count`` nodes of the largest scores, falling; ties go to the lower node."""
        order = np.lexsort((np.asarray(nodes, np.int64), -self.scores(nodes, length_penalty)))
        return [nodes[index] for index in order[:count]]
