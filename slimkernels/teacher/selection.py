"""Which of a teacher's logits a capture keeps: the largest, draws from all of them, or both."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.sparse_targets import DEFAULT_ROUNDS, DEFAULT_TOP_FRACTION, draw_targets
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.sparse_logits import SparseLogits

SELECTS = ("top_k", "sample", "mixed")
# Quantising the logarithm of a share would bias it; there are few of them.
_DEFAULT_CODECS = {"top_k": "affine8", "sample": "float32", "mixed": "float32"}


class Selection(NamedTuple):
    """A way to choose, with its numbers; ``resolve_selection`` makes it.

    Attributes:
        select: "top_k" | "sample" | "mixed".
        top_k: K, the largest logits kept of every row; 0 for "sample".
        top_p: What the entries kept of those must hold together; None for "sample" and "mixed".
        rounds: Draws of every row; 0 for "top_k".
        seed: Of the draws.
        temperatures: Of the kept lse.
        description: What a store says of it.
    """

    select: str
    top_k: int
    top_p: float | None
    rounds: int
    seed: int
    temperatures: tuple[float, ...]
    description: dict[str, Any]

    def __call__(
        self, head: LanguageModelHead, hidden: Tensor, target: Tensor, documents: Sequence[Sequence[int]]
    ) -> SparseLogits:
        """What is kept of the rows of documents, which follow one another.

        Args:
            head: The teacher's.
            hidden: (N, D), the hidden states of all but the last token of each document.
            target: (N,) int64, all but the first.
            documents: Their token ids.

        Returns:
            SparseLogits (N, K) on the CPU.

        Raises:
            FloatingPointError: Draws were asked for from logits that are not finite.
        """
        if self.select == "top_k":
            kept = linear_topk_logits(
                top_k=self.top_k, target=target, temperatures=self.temperatures, **head.arguments(hidden)
            ).to("cpu")
            return kept if self.top_p is None else cut_top_p(kept, self.top_p)
        # A row's noise depends on its document and its place in it, and so on no batch.
        seed = torch.cat([torch.full((len(ids) - 1,), document_seed(self.seed, ids)) for ids in documents])
        position = torch.cat([torch.arange(1, len(ids)) for ids in documents])
        seed, position = seed.to(hidden.device), position.to(hidden.device)
        drawn = draw_targets(head, hidden, target, self.rounds, seed, position, top_k=self.top_k, require_finite=True)
        return drawn.to("cpu")


def cut_top_p(kept: SparseLogits, top_p: float) -> SparseLogits:
    """The fewest entries of every row whose probabilities, exp(logit - lse) at temperature 1, add up to ``top_p``.

    Among equally likely ones the lower ids are kept. Rows (N, K) stay as wide as the widest of them needs.
    """
    logits = kept.logits.double().masked_fill(kept.ids < 0, -torch.inf)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = (logits.gather(-1, order) - kept.lse[:, :1].double()).exp().cumsum(-1)
    # An entry stays while those before it fall short, the first in any case.
    stays = torch.zeros_like(order, dtype=torch.bool)
    stays.scatter_(-1, order, torch.nn.functional.pad(mass[:, :-1] < top_p, (1, 0), value=True))
    stays &= kept.ids >= 0
    width = int(stays.sum(-1).max()) if len(order) else kept.top_k
    # Those that stay first, both parts in their old order, which is that of the ids.
    places = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
    gone = ~stays.gather(-1, places)
    return dataclasses.replace(
        kept,
        ids=kept.ids.gather(-1, places).masked_fill(gone, -1),
        logits=kept.logits.gather(-1, places).masked_fill(gone, 0.0),
    )


def resolve_selection(
    select: str,
    vocab_size: int,
    *,
    top_k: int | None,
    top_fraction: float | None,
    top_p: float | None,
    rounds: int | None,
    seed: int,
    temperatures: Sequence[float],
) -> Selection:
    """Checks the arguments of ``capture`` that choose, and fills in what was left out.

    Raises:
        ValueError: An unknown ``select``, a number out of range, or one that ``select`` has no use for.
    """
    _checks.is_one_of(select, "select", SELECTS)
    temperatures = _checks.resolve_temperatures(temperatures)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if select != "top_k" and top_p is not None:
        raise ValueError(f"top_p must be None with select={select!r}, whose draws would be biased by it, got {top_p}")
    if select == "top_k" and rounds is not None:
        raise ValueError(f"rounds must be None with select='top_k', which draws nothing, got {rounds}")
    if select != "top_k" and temperatures != (1.0,):
        raise ValueError(
            f"temperatures must be (1.0,) with select={select!r}, whose rows are shares of draws at temperature 1, "
            f"got {temperatures}"
        )
    if select == "sample":
        if (top_k, top_fraction) != (None, None):
            raise ValueError(
                f"top_k and top_fraction must be None with select='sample', got {top_k} and {top_fraction}: use "
                "select='mixed' to keep the largest logits too"
            )
        top_k = 0
    else:
        if top_k is None and top_fraction is None:
            top_fraction = DEFAULT_TOP_FRACTION
        kind, value = ("top_fraction", top_fraction) if top_k is None else ("top_k", top_k)
        top_k = _checks.resolve_top_k(top_k, top_fraction, vocab_size)
    if select == "top_k":
        description = {"kind": kind, "value": value, "top_k": top_k}
        if top_p is not None:
            description["top_p"] = top_p
        return Selection(select, top_k, top_p, 0, 0, temperatures, description)
    rounds = DEFAULT_ROUNDS if rounds is None else rounds
    if type(rounds) is not int or not 1 <= rounds < 2**31:
        raise ValueError(f"rounds must be an integer of at least 1 and below 2**31, got {rounds!r}")
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed!r}")
    description = {"kind": select, "top_k": top_k, "rounds": rounds, "seed": seed}
    return Selection(select, top_k, None, rounds, seed, temperatures, description)


def default_codec(select: str) -> str:
    """The store's codec where none is asked for."""
    return _DEFAULT_CODECS[select]


def document_seed(seed: int, input_ids: Sequence[int]) -> int:
    """An int64 that names the draws of one document: BLAKE2b-64 of the capture's seed and the token ids."""
    content = torch.tensor([seed, *input_ids]).numpy().astype("<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
