"""Selects the logits of a teacher that a capture keeps: the largest, draws from all of them, or both."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.sparse_targets import DEFAULT_ROUNDS, DEFAULT_TOP_FRACTION, draw_targets
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.ops.sample_targets import DRAW_VERSION
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Store
from slimkernels.store.errors import NotAStoreError, SettingsMismatchError
from slimkernels.store.hidden import HIDDEN_BITS

SELECTS = ("top_k", "sample", "mixed")
# Quantising the logarithm of a share of draws would bias it, and there are few of them to store.
_DEFAULT_CODECS = {"top_k": "affine8", "sample": "float32", "mixed": "float32"}


class Selection(NamedTuple):
    """The rule by which entries are kept; ``resolve_selection`` makes it.

    Attributes:
        select: "top_k" | "sample" | "mixed".
        top_k: K, the number of largest logits kept of every row; 0 for "sample".
        top_p: Probability in (0, 1] that the kept logits of a row reach together: of the K largest the fewest that do,
            or all K where these hold less. None keeps all K; always None with draws.
        rounds: Number of draws of every row; 0 for "top_k".
        seed: Seed of the draws.
        temperatures: Temperatures of the kept lse.
        description: Description of the selection in the store.
    """

    select: str
    top_k: int
    top_p: float | None
    rounds: int
    seed: int
    temperatures: tuple[float, ...]
    description: dict[str, Any]

    def __call__(
        self,
        head: LanguageModelHead,
        hidden: Tensor,
        target: Tensor,
        documents: Sequence[tuple[Sequence[int], Tensor]],
    ) -> SparseLogits:
        """Returns the kept entries of the rows of consecutive documents.

        Args:
            head: The teacher's head.
            hidden: (N, D) hidden states that predict the labels of each document.
            target: (N,) int64, the labels.
            documents: The token ids and the (R,) int64 positions of the labels of each document.

        Returns:
            SparseLogits (N, K) on the CPU.

        Raises:
            FloatingPointError: The selection draws, and the logits are not finite.
        """
        if self.select == "top_k":
            kept = linear_topk_logits(
                top_k=self.top_k, target=target, temperatures=self.temperatures, **head.arguments(hidden)
            ).to("cpu")
            return kept if self.top_p is None else cut_top_p(kept, self.top_p)
        # The noise of a row depends on its document and its position there, and so not on the batch.
        seed = torch.cat([torch.full((len(labels),), document_seed(self.seed, ids)) for ids, labels in documents])
        position = torch.cat([labels for _, labels in documents])
        seed, position = seed.to(hidden.device), position.to(hidden.device)
        drawn = draw_targets(head, hidden, target, self.rounds, seed, position, top_k=self.top_k, require_finite=True)
        return drawn.to("cpu")


def cut_top_p(kept: SparseLogits, top_p: float) -> SparseLogits:
    """Keeps the fewest entries of every row whose probabilities at temperature 1, exp(logit - lse), reach ``top_p``.

    A row whose entries hold less than that together keeps them all. Of equally likely entries those with lower ids are
    kept. The others are added to ``rest_lse``, at each temperature. The result (N, K') is as wide as its widest row.
    """
    logits = kept.logits.double().masked_fill(kept.ids < 0, -torch.inf)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    mass = (logits.gather(-1, order) - kept.lse[:, :1].double()).exp().cumsum(-1)
    # An entry stays if the sum before it is below top_p; the first one always stays.
    stays = torch.zeros_like(order, dtype=torch.bool)
    stays.scatter_(-1, order, torch.nn.functional.pad(mass[:, :-1] < top_p, (1, 0), value=True))
    stays &= kept.ids >= 0
    rest_lse = kept.rest_lse
    if rest_lse is not None:
        cut = logits.masked_fill(stays, -torch.inf)
        cut_lse = torch.stack([(cut / temperature).logsumexp(-1) for temperature in kept.temperatures], -1)
        rest_lse = torch.logaddexp(rest_lse.double(), cut_lse).to(rest_lse.dtype)
    width = int(stays.sum(-1).max()) if len(order) else kept.top_k
    # Moves the entries that stay to the front; the stable sort keeps the ids ascending.
    places = (~stays).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
    gone = ~stays.gather(-1, places)
    return dataclasses.replace(
        kept,
        ids=kept.ids.gather(-1, places).masked_fill(gone, -1),
        logits=kept.logits.gather(-1, places).masked_fill(gone, 0.0),
        rest_lse=rest_lse,
    )


def resolve_selection(
    select: str,
    vocab_size: int,
    *,
    temperatures: Sequence[float],
    top_k: int | None = None,
    top_fraction: float | None = None,
    top_p: float | None = None,
    rounds: int | None = None,
    seed: int = 0,
) -> Selection:
    """Checks the arguments of ``capture`` for the selection, and fills in defaults.

    Raises:
        ValueError: ``select`` is unknown, a number is out of range, or does not apply to ``select``.
    """
    _checks.check_one_of(select, "select", SELECTS)
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
    description = {"kind": select, "top_k": top_k, "rounds": rounds, "seed": seed, "draw_version": DRAW_VERSION}
    return Selection(select, top_k, None, rounds, seed, temperatures, description)


def check_selection(select: str, codec: str | None = None, **options: Any) -> None:
    """Checks the arguments of ``capture`` for the selection without a vocabulary, so before a teacher is loaded.

    Args:
        select: Kind of selection.
        codec: Codec of the store, None for the default.
        **options: Further arguments of ``resolve_selection``.

    Raises:
        ValueError: One is out of range in every vocabulary, or does not apply to ``select`` or ``codec``.
    """
    # Ids are int32.
    selection = resolve_selection(select, 2**31 - 1, **options)
    if codec in HIDDEN_BITS:
        check_keeps_hidden(selection, codec)


def check_draw_version(selection: Selection, store_path: str | os.PathLike[str]) -> None:
    """Checks that a store of draws, if there is one, was begun with draws of this version.

    Its rows can be read and trained on whatever their version. Only continuing it would mix two definitions, so that
    the same corpus and seed would give neither the draws of the one nor those of the other.

    Raises:
        SettingsMismatchError: The store's draws are of another version.
    """
    if selection.select == "top_k":
        return
    try:
        stored = Store(store_path).settings.selection
    except NotAStoreError:
        return
    # Release 0.1.0 did not write a version.
    version = stored.get("draw_version", 1)
    if stored.get("kind") in ("sample", "mixed") and version != DRAW_VERSION:
        raise SettingsMismatchError(
            f"{os.fspath(store_path)} holds draws of version {version}, but this release draws version "
            f"{DRAW_VERSION}, other ids of the same seed: capture into a new directory, and train on both stores "
            "together, or continue this one with the release that began it"
        )


def check_keeps_hidden(selection: Selection, codec: str) -> None:
    """Checks that readers can make the selection from hidden states.

    Raises:
        ValueError: It is none of the largest logits alone.
    """
    if selection.select != "top_k":
        raise ValueError(f"select must be 'top_k' with codec={codec!r}, got {selection.select!r}")
    if selection.top_p is not None:
        raise ValueError(f"top_p must be None with codec={codec!r}, got {selection.top_p}")


def default_codec(select: str) -> str:
    """Returns the default codec of the store.

    Raises:
        ValueError: ``select`` is unknown.
    """
    _checks.check_one_of(select, "select", SELECTS)
    return _DEFAULT_CODECS[select]


def document_seed(seed: int, input_ids: Sequence[int]) -> int:
    """Returns the int64 seed of the draws of one document: BLAKE2b-64 of the capture's seed and the token ids."""
    content = torch.tensor([seed, *input_ids]).numpy().astype("<i8").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)
