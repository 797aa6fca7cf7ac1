"""``Tree``: the reasoning steps of one question as a struct of arrays."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROOT = 0  # index of the root, which stands for the prompt
NO_PARENT = -1  # ``parent`` of the root


class Status(enum.IntEnum):
    """The state of a node. ``Tree.reasons`` tells why a node ended."""

    OPEN = 0  # a leaf that may still get children
    EXPANDED = 1  # a node with children
    FINISHED = 2  # a hypothesis that came to its own end
    ENDED = 3  # a hypothesis that a limit ended
    PRUNED = 4  # a hypothesis with a lower score than those kept
    CUT = 5  # a step that failed its checks at every attempt
    MERGED = 6  # a step that another child of its parent stands for


_NODE = np.dtype(
    [
        ("parent", np.int32),
        ("depth", np.int32),
        ("ordinal", np.int32),
        ("attempts", np.int32),
        ("num_tokens", np.int32),
        ("sum_logprob", np.float64),
        ("step_score", np.float64),
        ("weight", np.float64),
        ("merged_into", np.int32),
        ("first_token", np.int64),  # the step's range in the flat array of token ids
        ("end_token", np.int64),
        ("status", np.int8),
    ]
)
_ARRAYS = tuple(name for name in _NODE.names or () if name not in ("first_token", "end_token"))


class Tree:
    """A growing tree of M nodes, numbered in the order in which they were added; a node follows its parent.

    The arrays are views that become stale when ``add`` enlarges the tree.

    Attributes:
        parent: (M,) int32, index of the parent; ``NO_PARENT`` for the root.
        depth: (M,) int32, number of steps from the root; 0 for the root.
        ordinal: (M,) int32, rank among the parent's children, counted before any is cut or pruned; 0 for the root.
        attempts: (M,) int32, number of times that the step was generated; 0 for the root.
        num_tokens: (M,) int32, generated tokens from the root to the node.
        sum_logprob: (M,) float64, sum of these tokens' log-probabilities under the model, in nats.
        step_score: (M,) float64, score of the node's own step by ``score_steps``; NaN for a step without one.
        weight: (M,) float64, number of drawn branches that the node stands for: its parent's, and those of the siblings
            that were merged into it; 1 without merging.
        merged_into: (M,) int32, the sibling into which a node was merged; ``NO_PARENT`` for all others.
        status: (M,) int8, a ``Status``.
        steps: M strings, text of each step; "" for the root.
        replaces: M integers, how many characters at the end of the parent's text each step replaces; mostly 0.
        reasons: M strings, why the node ended; "" for a node that is open or expanded.
    """

    def __init__(self) -> None:
        self._nodes = np.zeros(64, _NODE)
        self._tokens = np.zeros(1024, np.int64)
        self._num_tokens = 0
        self.steps: list[str] = [""]
        self.replaces: list[int] = [0]
        self.reasons: list[str] = [""]
        self._nodes[ROOT]["parent"] = NO_PARENT
        self._nodes[ROOT]["merged_into"] = NO_PARENT
        self._nodes[ROOT]["step_score"], self._nodes[ROOT]["weight"] = np.nan, 1

    def __len__(self) -> int:
        return len(self.steps)

    def __getattr__(self, name: str) -> np.ndarray:
        if name in _ARRAYS:
            return self._nodes[name][: len(self)]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def add(
        self,
        parent: int,
        ordinal: int,
        token_ids: Sequence[int],
        text: str,
        sum_logprob: float,
        *,
        attempts: int = 1,
        replaces: int = 0,
    ) -> int:
        """Adds an open node.

        Args:
            parent: Node that it continues.
            ordinal: Rank among the parent's children, from 0.
            token_ids: Token ids of the step.
            text: Text of the step.
            sum_logprob: Sum of the log-probabilities of the step's tokens, in nats.
            attempts: Number of times that the step was generated.
            replaces: Number of characters at the end of the parent's text that ``text`` replaces.

        Returns:
            The index of the new node.
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
            np.nan,
            above["weight"],
            NO_PARENT,
            self._num_tokens,
            end,
            Status.OPEN,
        )
        self._num_tokens = end
        self.steps.append(text)
        self.replaces.append(replaces)
        self.reasons.append("")
        return node

    def mark(self, node: int, status: Status, reason: str = "") -> None:
        """Sets the status of a node and the reason for it."""
        self._nodes[node]["status"] = status
        self.reasons[node] = reason

    def set_step_score(self, node: int, score: float) -> None:
        """Sets the score of the node's own step."""
        self._nodes[node]["step_score"] = score

    def merge(self, node: int, into: int) -> None:
        """Merges a node into a sibling, which gets its weight.

        Raises:
            ValueError: The other node is no earlier child of the same parent.
        """
        if not 0 <= into < node or self.parent[into] != self.parent[node]:
            raise ValueError(f"node {node} must be merged into an earlier child of its parent, got {into}")
        self._nodes[into]["weight"] += self._nodes[node]["weight"]
        self._nodes[node]["merged_into"] = into

    def record(self, node: int) -> dict[str, Any]:
        """Returns a node as JSON values; ``sum_logprob`` is that of the branch, as in the array."""
        record: dict[str, Any] = {
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
        if self.replaces[node]:
            record["replaces"] = self.replaces[node]
        if not np.isnan(self.step_score[node]):
            record["step_score"] = float(self.step_score[node])
        if self.merged_into[node] != NO_PARENT:
            record["merged_into"] = int(self.merged_into[node])
        return record

    def restore(self, record: Mapping[str, Any]) -> None:
        """Adds the node that ``record`` described.

        Raises:
            KeyError, TypeError, ValueError: The record is malformed, or is not that of the next node.
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
            replaces=record.get("replaces", 0),
        )
        # Set rather than summed up again, so that it is bit-equal.
        self._nodes[node]["sum_logprob"] = record["sum_logprob"]
        self.set_step_score(node, record.get("step_score", np.nan))
        if "merged_into" in record:
            self.merge(node, record["merged_into"])
        self.mark(node, Status[record["status"].upper()], record["reason"])

    def with_status(self, *statuses: Status) -> list[int]:
        """Returns the nodes that have one of the statuses, in ascending order."""
        return np.flatnonzero(np.isin(self.status, statuses)).tolist()

    def hypotheses(self) -> list[int]:
        """Returns the nodes that may be selected: open leaves, finished branches, and those that a limit ended."""
        return self.with_status(Status.OPEN, Status.FINISHED, Status.ENDED)

    def partial_branches(self) -> list[int]:
        """Returns the ends of the branches that remain of a tree without hypotheses, in ascending order.

        These are the nodes all of whose children were cut; if the first steps were cut already, the cut ones with text.
        """
        passed = set(self.with_status(Status.EXPANDED, Status.PRUNED)) - {ROOT}
        ends = passed - {int(self.parent[node]) for node in passed}
        return sorted(ends) or [node for node in self.with_status(Status.CUT) if self.steps[node].strip()]

    def count_reasons(self) -> dict[str, int]:
        """Returns how many nodes ended for each reason."""
        return dict(Counter(reason for reason in self.reasons if reason))

    def branch(self, node: int) -> list[int]:
        """Returns the nodes from the root's child down to ``node``; an empty list for the root."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = int(self._nodes[node]["parent"])
        return nodes[::-1]

    def path(self, node: int) -> tuple[int, ...]:
        """Returns the ordinals of the branch, which identify the node whatever else is in the tree."""
        return tuple(int(self._nodes[step]["ordinal"]) for step in self.branch(node))

    def text(self, node: int) -> str:
        """Returns the text generated from the root to ``node``, which is that of its ``token_ids``."""
        return "".join(self.step_texts(node))

    def step_texts(self, node: int) -> list[str]:
        """Returns the texts of the steps from the root to ``node``, without what later steps replace of them."""
        texts: list[str] = []
        for step in self.branch(node):
            left = self.replaces[step]
            for place in range(len(texts) - 1, -1, -1):
                kept = max(0, len(texts[place]) - left)
                left -= len(texts[place]) - kept
                texts[place] = texts[place][:kept]
            texts.append(self.steps[step])
        return texts

    def step_token_ids(self, node: int) -> list[int]:
        """Returns the token ids of the node's own step."""
        return self._tokens[self._nodes[node]["first_token"] : self._nodes[node]["end_token"]].tolist()

    def token_ids(self, node: int) -> list[int]:
        """Returns the token ids generated from the root to ``node``."""
        return [token for step in self.branch(node) for token in self.step_token_ids(step)]

    def scores(self, nodes: Sequence[int] | np.ndarray, length_penalty: float) -> np.ndarray:
        """Returns sum_logprob / num_tokens^length_penalty of each node (n,), as ``PruningScore`` does by default."""
        index = np.asarray(nodes, np.int64)
        return self.sum_logprob[index] / np.maximum(self.num_tokens[index], 1) ** float(length_penalty)

    def branch_step_scores(self, node: int) -> list[float]:
        """Returns the scores of the steps from the root to ``node`` that have one."""
        scores = self._nodes["step_score"][self.branch(node)]
        return scores[~np.isnan(scores)].tolist()
