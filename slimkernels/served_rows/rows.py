"""Turns a server's answer into a document of a store: token ids, and rows whose kept and remaining mass is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from slimkernels.served_rows.api import Answer, Position, Request, ServerApi
from slimkernels.served_rows.tokens import ServerToken, TokenMap
from slimkernels.serving.client import ServerRequestError
from slimkernels.sparse_logits import SparseLogits, rest_of_logprobs

# Servers write -9999 or the lowest float for an unknown log-probability; no float32 softmax reaches so low.
_LEAST_LOGPROB = -1000.0
# The store allows the same margin for rounding.
_MAX_MASS = 1.0 + 1e-3
# With fewer entries than this, a few special tokens would look like a wrong tokenizer.
_JUDGED_ENTRIES = 500


class UnmappedTokensError(ValueError):
    """Too many of the server's tokens have no id in the tokenizer."""


class ServedDocument(NamedTuple):
    """The arguments of ``StoreWriter.add``."""

    input_ids: list[int]
    positions: list[int]
    teacher: SparseLogits


class DroppedAnswer(NamedTuple):
    """An answer that makes no document.

    Attributes:
        reason: Clause that says why.
    """

    reason: str


class AnswerReader:
    """Turns answers into documents, or says why they make none, and counts the entries without an id.

    Args:
        server: The server that answered.
        tokens: Map from the server's tokens to ids.
        max_unmapped_fraction: Largest share of entries without an id that ``check_unmapped`` allows.
    """

    def __init__(self, server: ServerApi, tokens: TokenMap, max_unmapped_fraction: float) -> None:
        self._url, self._model, self._top_logprobs = server.client.url, server.model, server.top_logprobs
        self._max_unmapped_fraction = max_unmapped_fraction
        self.tokens = tokens

    def scored(self, request: Request, answer: Answer) -> ServedDocument | DroppedAnswer:
        """Returns the scored document, with a row for every label.

        Raises:
            ServerRequestError: The server read other tokens, or its numbers are not log-probabilities.
        """
        self._check_prompt(request, answer)
        ids = request.prompt_ids
        for place, position in enumerate(answer.positions, 1):
            if not self.tokens.may_be(position.chosen, ids[place]):
                raise ServerRequestError(
                    f"{self._url} scored {position.chosen.text!r} where the document has token {ids[place]} at "
                    f"{place}: it did not read the tokens that it was sent, or put others in front"
                )
        labels = range(1, len(ids)) if request.labels is None else request.labels
        return self._document(ids, labels, [answer.positions[label - 1] for label in labels])

    def generated(self, request: Request, answer: Answer) -> ServedDocument | DroppedAnswer:
        """Returns the prompt and its continuation, with a row for every reported token of the continuation.

        An answer makes no document if nothing was generated, one of its tokens has no known id, tokens are missing, or
        no row has an entry. Servers may count the end of text, which they do not list.

        Raises:
            ServerRequestError: The server read other tokens, or its numbers are not log-probabilities.
        """
        self._check_prompt(request, answer)
        reported = [position.chosen for position in answer.positions]
        if not reported:
            reason = "" if answer.finish_reason is None else f" (finish reason {answer.finish_reason!r})"
            return DroppedAnswer(f"an answer is empty{reason}")
        generated, places = list(answer.token_ids or ()), []
        if answer.token_ids is not None:
            places = list(self.tokens.split(generated, reported))
            # llama.cpp reports no token of a last character that the length limit cut in two.
            generated = generated[: places[-1] + 1] if places else []
            is_known = len(places) == len(reported)
        else:
            for token in reported:
                pieces = self.tokens.pieces_of(token)
                if pieces is None:
                    return self._dropped(answer, token)
                generated += pieces
                places.append(len(generated) - 1)
            is_known = _agree(self.tokens.text_of(generated), answer.text)
        ids = request.prompt_ids + generated
        if not is_known or max(ids) >= self.tokens.vocab_size:
            return self._dropped(answer, ServerToken(answer.text[:40], 0.0))
        counted = answer.generated_tokens
        with_end = len(generated) + (answer.token_ids is None and answer.finish_reason != "length")
        if answer.token_ids is None and counted is not None and not len(generated) <= counted <= with_end:
            return DroppedAnswer(f"the server counts {counted} generated tokens, but lists {len(generated)}")
        return self._document(ids, [len(request.prompt_ids) + place for place in places], answer.positions)

    def check_unmapped(self, *, is_last: bool = False) -> None:
        """Checks the share of entries without an id, once there are enough entries or at the end.

        Raises:
            UnmappedTokensError: The share is above ``max_unmapped_fraction``.
        """
        seen, unmapped = self.tokens.seen, self.tokens.unmapped
        if (seen >= _JUDGED_ENTRIES or is_last) and unmapped > self._max_unmapped_fraction * seen:
            raise UnmappedTokensError(
                f"{unmapped} of the {seen} entries of {self._url} have no id in the tokenizer, more than "
                f"max_unmapped_fraction={self._max_unmapped_fraction:g} allows, among them "
                f"{', '.join(self.tokens.examples)}: give the tokenizer of the model {self._model!r}, or a "
                "server that names tokens by id or bytes"
            )

    def _dropped(self, answer: Answer, token: ServerToken) -> DroppedAnswer:
        """Counts all entries of an answer as lost because of one token."""
        lost = sum(1 + len(position.top) for position in answer.positions)
        self.tokens.seen += lost
        self.tokens.count_unmapped(token, lost)
        return DroppedAnswer(f"the tokens of {token.text!r} have no known ids in the tokenizer")

    def _document(
        self, ids: list[int], places: Sequence[int], positions: Sequence[Position]
    ) -> ServedDocument | DroppedAnswer:
        """Returns the document of token ids and the rows at some of its places."""
        kept_places, teacher = self._rows(places, positions)
        if not kept_places:
            return DroppedAnswer("no entry of an answer has an id in the tokenizer")
        return ServedDocument(ids, kept_places, teacher)

    def _rows(self, places: Sequence[int], positions: Sequence[Position]) -> tuple[list[int], SparseLogits]:
        """Returns the rows that have at least one entry, and their positions in the document.

        Everything that a row does not keep counts to its ``rest_lse``: tokens that the server did not print, entries
        without an id, and entries beyond the ``top_logprobs`` most probable ones.
        """
        top_logprobs = self._top_logprobs
        kept_places, rows, target_logits = [], [], []
        for place, position in zip(places, positions, strict=True):
            row = self._row(position)
            if row:
                kept_places.append(place)
                rows.append(row)
                known = position.chosen.logprob > _LEAST_LOGPROB
                target_logits.append(position.chosen.logprob if known else math.nan)
        ids = torch.full((len(rows), top_logprobs), -1, dtype=torch.int32)
        # In float64, as printed.
        logprobs = torch.full((len(rows), top_logprobs), -math.inf, dtype=torch.float64)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor([token for token, _ in row], dtype=torch.int32)
            logprobs[number, : len(row)] = torch.tensor([logprob for _, logprob in row], dtype=torch.float64)
        teacher = SparseLogits(
            ids=ids,
            logits=logprobs.masked_fill(ids < 0, 0.0).float(),
            lse=torch.zeros((len(rows), 1)),
            target_logit=torch.tensor(target_logits),
            rest_lse=rest_of_logprobs(logprobs)[:, None].float(),
        )
        return kept_places, teacher

    def _row(self, position: Position) -> list[tuple[int, float]]:
        """Returns the ``top_logprobs`` most probable entries that have an id, as (id, logprob) sorted by id."""
        kept: dict[int, float] = {}
        for token in position.top:
            if not token.logprob > _LEAST_LOGPROB:
                continue
            found = self.tokens.id_of(token)
            if found is None:
                continue
            # Two of the server's tokens have the same name: keeps the more probable one.
            if found in kept:
                self.tokens.count_unmapped(token)
            kept[found] = max(token.logprob, kept.get(found, -math.inf))
        mass = math.fsum(map(math.exp, kept.values())) if max(kept.values(), default=0.0) < 1.0 else math.inf
        if mass > _MAX_MASS:
            raise ServerRequestError(
                f"{self._url} gave entries with a probability of {mass:.4g} together, at most 1 is "
                "possible: it must report log-probabilities (vLLM: --logprobs-mode raw_logprobs), not logits"
            )
        # A server may add an entry for the token of the text beyond the most probable ones.
        return sorted(sorted(kept.items(), key=lambda entry: -entry[1])[: self._top_logprobs])

    def _check_prompt(self, request: Request, answer: Answer) -> None:
        """Raises ServerRequestError if the server says that it read other tokens than it was sent."""
        ids, length = answer.prompt_ids, answer.prompt_tokens
        asked = len(request.prompt_ids)
        if (ids is None or ids == request.prompt_ids) and length in (None, asked):
            return
        read = f"{length} tokens" if ids is None else f"the tokens {ids}"
        sent = f"{asked} tokens" if ids is None else f"{request.prompt_ids}"
        raise ServerRequestError(
            f"{self._url} read {read[:200]} where the tokenizer makes {sent[:200]}: the server adds special tokens, or "
            "has another chat template or another tokenizer; give its own tokenizer, or use api='completions'"
        )


def _agree(data: bytes, text: str) -> bool:
    """Returns whether bytes end in the text that the server shows, which may lack reasoning and broken characters."""
    shown, spelled = (whole.replace("\ufffd", "").strip() for whole in (text, data.decode(errors="replace")))
    return spelled.endswith(shown)
