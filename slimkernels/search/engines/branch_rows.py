"""``Rows``: the steps of one generation, drawn token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from slimkernels.ops.sample_logits import sample_logits
from slimkernels.search.engine import Step, StepEnd, StepRequest
from slimkernels.search.engines.branch_cache import Branch, Steps

if TYPE_CHECKING:
    from slimkernels.search.engines.transformers import TransformersEngine

TAIL = 8  # tokens before a step that are decoded with it, for tokenizers whose text depends on what is before


class Rows:
    """The requests of one generation: a row each, of which those go on whose step has not ended.

    Args:
        engine: Whose branches are continued.
        requests: The rows.
        step_end: Whether a step is complete.
        embed: Whether steps get embeddings.
        replayed: The tokens of every row where they were drawn before, and are only read again.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        requests: Sequence[StepRequest],
        step_end: StepEnd,
        embed: bool,
        replayed: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._engine, self._requests, self._step_end, self._replayed = engine, requests, step_end, replayed
        self._parents = [engine.fork(request.branch) for request in requests]
        room = max((request.max_tokens for request in requests), default=0)
        self._slots = Steps(self._parents, room)
        self._tokens: list[list[int]] = [[] for _ in requests]
        self._texts = [""] * len(requests)
        self._ends = [""] * len(requests)
        self._sums = np.zeros((2, len(requests)))  # of log-probabilities and entropies
        self._before = {id(parent): engine.decode(parent.tail) for parent in self._parents}
        self._hidden = (
            torch.stack([cast(Tensor, parent.hidden) for parent in self._parents]).zero_()
            if embed and requests
            else None
        )
        device = engine.device
        self._seeds = torch.tensor([request.seed for request in requests], device=device)
        self._positions = torch.tensor([parent.length for parent in self._parents], device=device)
        self._temperatures, self._top_ps = (
            torch.tensor([getattr(request, name) for request in requests], dtype=torch.float32, device=device)
            for name in ("temperature", "top_p")
        )
        self._top_ks = torch.tensor([request.top_k for request in requests], device=device)

    def generate(self) -> None:
        """Makes the steps; where that fails, frees the rows."""
        try:
            self._generate()
        except BaseException:
            for row in range(len(self._requests)):
                self._engine.release(self._slots.of(row))
            raise

    def _generate(self) -> None:
        """A token in every row that goes on, until none does."""
        live = np.arange(len(self._requests))
        if not len(live):
            return
        logits = torch.stack([cast(Tensor, parent.logits) for parent in self._parents])
        while True:
            self._draw(live, logits)
            live = np.array([row for row in live if not self._ends[row]], np.int64)
            if not len(live):
                break
            logits, hidden = self._engine.read(
                [self._parents[row] for row in live], self._slots, live, [self._tokens[row][-1] for row in live]
            )
            if self._hidden is not None:
                self._hidden[live] += hidden
        self._engine.note_memory(self._parents, self._slots)

    def steps(self) -> list[Step]:
        """The generated steps, as branches of the engine."""
        return [self._step(row) for row in range(len(self._requests))]

    def _draw(self, live: np.ndarray, logits: Tensor) -> None:
        if self._replayed is not None:
            for row in live:
                self._tokens[row].append(self._replayed[row][len(self._tokens[row])])
                self._ends[row] = "step" if len(self._tokens[row]) == len(self._replayed[row]) else ""
            return
        index = torch.from_numpy(live).to(logits.device)
        sampled = sample_logits(
            logits,
            seed=self._seeds[index],
            position=self._positions[index],
            temperature=self._temperatures[index],
            top_k=self._top_ks[index],
            top_p=self._top_ps[index],
        )
        self._positions[index] += 1
        tokens = sampled.token.tolist()
        if -1 in tokens:
            text = self._texts[live[tokens.index(-1)]]
            raise FloatingPointError(f"the model gave logits that are NaN or all -inf, after the text {text!r}")
        self._sums[:, live] += torch.stack([sampled.logprob, sampled.entropy]).double().cpu().numpy()
        for row, token in zip(live, tokens, strict=True):
            self._tokens[row].append(token)
            self._ends[row] = self._end(row, token)

    def _end(self, row: int, token: int) -> str:
        engine, parent, tokens = self._engine, self._parents[row], self._tokens[row]
        before = self._before[id(parent)]
        self._texts[row] = engine.decode([*parent.tail, *tokens])[len(before.rstrip("\ufffd")) :]
        if token in engine.eos_token_ids:
            return "end_of_text"
        if self._step_end(self._texts[row]):
            return "step"
        if parent.length + len(tokens) >= engine.context_length:
            return "context"
        return "length" if len(tokens) >= self._requests[row].max_tokens else ""

    def _step(self, row: int) -> Step:
        parent, tokens = self._parents[row], self._tokens[row]
        tail = [*parent.tail, *tokens][-TAIL:]
        branch = Branch(parent.prompt, self._slots.of(row), parent.length + len(tokens), tail, tokens[-1])
        logprob, entropy = self._sums[:, row].tolist()
        return Step(
            branch=self._engine.add(branch),
            token_ids=tokens,
            text=self._texts[row],
            sum_logprob=logprob,
            end=self._ends[row],  # type: ignore[arg-type]
            sum_entropy=entropy,
            embedding=self._embedding(row),
        )

    def _embedding(self, row: int) -> np.ndarray | None:
        if self._hidden is None:
            return None
        parent, num_read = self._parents[row], len(self._tokens[row]) - 1
        mean = self._hidden[row] / num_read if num_read else cast(Tensor, parent.hidden)
        return (mean - cast(Tensor, parent.prompt.mean_hidden)).cpu().numpy()
