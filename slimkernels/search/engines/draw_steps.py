"""``draw_steps``: draws the steps of a search, token by token; ``replay_steps`` reads steps that were drawn before.

The steps of a call grow together, one row each and one forward of the model per token. A row leaves the batch when its
step ends.
"""

from __future__ import annotations

import dataclasses
import os.path
from collections.abc import Callable, Collection, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from slimkernels.ops.sample_logits import sample_logits
from slimkernels.search.engine import Step, StepEnd, StepRequest
from slimkernels.search.engines.branch_cache import Branch, RowSlots
from slimkernels.search.engines.branch_model import BranchModel

# Gives every live row (n,) its next token, from the logits (n, V), and notes which of the steps end with it.
NextTokens = Callable[[np.ndarray, Tensor], None]


@torch.inference_mode()
def draw_steps(
    model: BranchModel,
    requests: Sequence[StepRequest],
    step_end: StepEnd,
    *,
    eos_token_ids: Collection[int],
    special_ends: Collection[str] = (),
    embed: bool,
) -> list[Step]:
    """Draws one step for each request. Arguments are those of ``TransformersEngine`` and its ``extend``.

    Raises:
        FloatingPointError: The model returned NaN, or no logit above -inf.
    """
    max_tokens = max((request.max_tokens for request in requests), default=0)
    with model.attending():
        rows = _Rows(model, [request.branch for request in requests], max_tokens, embed)
        rows.grow(_Sampler(rows, requests, step_end, eos_token_ids, special_ends).draw)
    return rows.steps()


@torch.inference_mode()
def replay_steps(model: BranchModel, steps: Sequence[Step], *, embed: bool) -> list[Step]:
    """Reads the given steps through the same forwards as ``draw_steps``. See ``Engine.replay``."""
    max_tokens = max((len(step.token_ids) for step in steps), default=0)

    def take_next(live: np.ndarray, _: Tensor) -> None:
        for row in live:
            token_ids, tokens = steps[row].token_ids, rows.tokens[row]
            tokens.append(token_ids[len(tokens)])
            rows.ends[row] = "step" if len(tokens) == len(token_ids) else ""

    with model.attending():
        rows = _Rows(model, [step.branch for step in steps], max_tokens, embed)
        rows.grow(take_next)
    return [
        dataclasses.replace(step, branch=read.branch, embedding=read.embedding)
        for step, read in zip(steps, rows.steps(), strict=True)
    ]


class _Rows:
    """The steps of one call while they grow: one row for each, which is live until its step ends.

    Args:
        model: Language model with the branches.
        numbers: Number of the branch that each row continues.
        max_tokens: Largest number of tokens of a step.
        embed: Whether to compute embeddings of the steps.

    Attributes:
        parents: Branch that each row continues.
        tokens: Token ids of each step so far.
        texts: Text of each step so far.
        replaces: Number of characters of the branch's text that each step's text replaces, as in ``Step.replaces``.
        ends: Reason why each step ended, as in ``Step.end``; empty while a row is live.
        sums: (2, R) float64, sums of log-probabilities and of entropies over each step's tokens.
    """

    def __init__(self, model: BranchModel, numbers: Sequence[int], max_tokens: int, embed: bool) -> None:
        self.model = model
        self.parents = model.fork(numbers)
        self.tokens: list[list[int]] = [[] for _ in numbers]
        self.texts = [""] * len(numbers)
        self.replaces = [0] * len(numbers)
        self.ends = [""] * len(numbers)
        self.sums = np.zeros((2, len(numbers)))
        self._slots = RowSlots(self.parents, max_tokens)
        # Sums of the embedding layer's hidden states (R, D) over the tokens that were read.
        self._hidden_sums = (
            torch.stack([cast(Tensor, parent.hidden) for parent in self.parents]).zero_() if embed and numbers else None
        )

    def grow(self, next_tokens: NextTokens) -> None:
        """Grows all steps to their ends. On an error, frees the rows."""
        try:
            self._grow(next_tokens)
        except BaseException:
            for row in range(len(self.parents)):
                self.model.release(self._slots.of(row))
            raise

    def _grow(self, next_tokens: NextTokens) -> None:
        live = np.arange(len(self.parents))
        if not len(live):
            return
        logits = torch.stack([cast(Tensor, parent.logits) for parent in self.parents])
        while True:
            next_tokens(live, logits)
            live = np.array([row for row in live if not self.ends[row]], np.int64)
            if not len(live):
                break
            logits, hidden = self.model.read(
                [self.parents[row] for row in live], self._slots, live, [self.tokens[row][-1] for row in live]
            )
            if self._hidden_sums is not None:
                self._hidden_sums[live] += hidden
        self.model.record_peak(self.parents, self._slots)

    def steps(self) -> list[Step]:
        """Adds the grown steps to the model as branches. Returns them."""
        return [self._step(row) for row in range(len(self.parents))]

    def _step(self, row: int) -> Step:
        parent, tokens = self.parents[row], self.tokens[row]
        tail = self.model.tail([*parent.tail, *tokens])
        branch = Branch(parent.prompt, self._slots.of(row), parent.length + len(tokens), tail, tokens[-1])
        logprob, entropy = self.sums[:, row].tolist()
        return Step(
            branch=self.model.add(branch),
            token_ids=tokens,
            text=self.texts[row],
            sum_logprob=logprob,
            end=self.ends[row],  # type: ignore[arg-type]
            sum_entropy=entropy,
            embedding=self._embedding(row),
            replaces=self.replaces[row],
        )

    def _embedding(self, row: int) -> np.ndarray | None:
        if self._hidden_sums is None:
            return None
        parent, num_read = self.parents[row], len(self.tokens[row]) - 1
        mean = self._hidden_sums[row] / num_read if num_read else cast(Tensor, parent.hidden)
        return (mean - cast(Tensor, parent.prompt.mean_hidden)).cpu().numpy()


class _Sampler:
    """Draws the next tokens of rows, each with the seed, position and options of its request.

    Args:
        rows: Rows to draw for.
        requests: Request of each row.
        step_end: Function that tells from the text of a step whether the step is complete.
        eos_token_ids: Tokens that end a text.
        special_ends: Texts with special tokens in them that end a text.
    """

    def __init__(
        self,
        rows: _Rows,
        requests: Sequence[StepRequest],
        step_end: StepEnd,
        eos_token_ids: Collection[int],
        special_ends: Collection[str],
    ) -> None:
        self._rows, self._requests, self._step_end, self._eos_token_ids = rows, requests, step_end, eos_token_ids
        self._special_ends = special_ends
        self._tail_texts = {id(parent): rows.model.decode(parent.tail) for parent in rows.parents}
        device = rows.model.device
        self._seeds = torch.tensor([request.seed for request in requests], device=device)
        self._positions = torch.tensor([parent.length for parent in rows.parents], device=device)
        self._temperatures, self._top_ps = (
            torch.tensor([getattr(request, name) for request in requests], dtype=torch.float32, device=device)
            for name in ("temperature", "top_p")
        )
        self._top_ks = torch.tensor([request.top_k for request in requests], device=device)

    def draw(self, live: np.ndarray, logits: Tensor) -> None:
        """Draws one token for each live row (n,) from its logits (n, V)."""
        rows = self._rows
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
            text = rows.texts[live[tokens.index(-1)]]
            raise FloatingPointError(f"the model gave logits that are NaN or all -inf, after the text {text!r}")
        rows.sums[:, live] += torch.stack([sampled.logprob, sampled.entropy]).double().cpu().numpy()
        for row, token in zip(live, tokens, strict=True):
            rows.tokens[row].append(token)
            rows.texts[row], rows.replaces[row] = self._text(row)
            rows.ends[row] = self._end(row)

    def _text(self, row: int) -> tuple[str, int]:
        """Returns what a step's tokens add to the text before, and how many characters of that they replace."""
        parent = self._rows.parents[row]
        text, before = self._rows.model.decode([*parent.tail, *self._rows.tokens[row]]), self._tail_texts[id(parent)]
        # A character whose bytes the step completes is still U+FFFD in the text before it.
        kept = len(before) if text.startswith(before) else len(os.path.commonprefix([text, before]))  # noqa: RUF071 -- texts, not paths
        return text[kept:], len(before) - kept

    def _end(self, row: int) -> str:
        """Returns why the step ends with its last token, as in ``Step.end``; empty if it does not end."""
        tokens = self._rows.tokens[row]
        if tokens[-1] in self._eos_token_ids or self._ends_specially(row):
            return "end_of_text"
        if self._step_end(self._rows.texts[row]):
            return "step"
        if self._rows.parents[row].length + len(tokens) >= self._rows.model.context_length:
            return "context"
        return "length" if len(tokens) >= self._requests[row].max_tokens else ""

    def _ends_specially(self, row: int) -> bool:
        """Returns whether a text with special tokens that ends a branch is complete with the step's last token."""
        if not self._special_ends:
            return False
        parent, model = self._rows.parents[row], self._rows.model
        # A text that begins in the prompt does not count.
        num_before = min(parent.length - len(parent.prompt.token_ids), len(parent.tail))
        tokens = [*parent.tail[len(parent.tail) - num_before :], *self._rows.tokens[row]]
        text, before = (model.decode(token_ids, special=True) for token_ids in (tokens, tokens[:-1]))
        return any(text.count(end) > before.count(end) for end in self._special_ends)
