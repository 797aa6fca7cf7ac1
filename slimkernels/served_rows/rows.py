"""Turns a server's answer into a document of a store: token ids, and rows whose kept and remaining mass is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from slimkernels.served_rows.answers import Answer, Position, Request
from slimkernels.served_rows.api import ServerApi
from slimkernels.served_rows.tokens import NumberedTokens, ServerToken, TokenMap
from slimkernels.serving.errors import ServerRequestError
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
        for place, position in enumerate(answer.positions, answer.start):
            if not self.tokens.may_be(position.chosen, ids[place]):
                raise ServerRequestError(
                    f"{self._url} scored {position.chosen.text!r} where the document has token {ids[place]} at "
                    f"{place}: it did not read the tokens that it was sent, or put others in front"
                )
        labels = range(1, len(ids)) if request.labels is None else request.labels
        return self._document(ids, labels, [answer.positions[label - answer.start] for label in labels])

    def generated(self, request: Request, answer: Answer) -> ServedDocument | DroppedAnswer:
        """Returns the prompt and its continuation, with a row for every reported token of the continuation.

        An answer makes no document if nothing was generated, one of its tokens has no known id, tokens are missing, or
        no row has an entry. Servers may count the end of text, which they do not list.

        Raises:
            ServerRequestError: The server read other tokens, or its numbers are not log-probabilities.
        """
        self._check_prompt(request, answer, "give its own tokenizer, or use api='completions'")
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
        ids = np.full((len(positions), top_logprobs), -1, dtype=np.int32)
        # In float64, as printed.
        logprobs = np.full((len(positions), top_logprobs), -math.inf)
        kept_places, target_logits = [], []
        for place, position in zip(places, positions, strict=True):
            row_ids, row_logprobs = self._row(position)
            if len(row_ids):
                row = len(kept_places)
                ids[row, : len(row_ids)], logprobs[row, : len(row_ids)] = row_ids, row_logprobs
                kept_places.append(place)
                known = position.chosen.logprob > _LEAST_LOGPROB
                target_logits.append(position.chosen.logprob if known else math.nan)
        rows = len(kept_places)
        kept_ids, kept = torch.from_numpy(ids[:rows]), torch.from_numpy(logprobs[:rows])
        teacher = SparseLogits(
            ids=kept_ids,
            logits=kept.masked_fill(kept_ids < 0, 0.0).float(),
            lse=torch.zeros((rows, 1)),
            target_logit=torch.tensor(target_logits, dtype=torch.float32),
            rest_lse=rest_of_logprobs(kept)[:, None].float(),
        )
        return kept_places, teacher

    def _row(self, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ``top_logprobs`` most probable entries that have an id, as ids and log-probabilities, by id."""
        ids, logprobs = self._entries(position)
        order = np.argsort(ids)
        ids, logprobs = ids[order], logprobs[order]
        if (ids[1:] == ids[:-1]).any():
            ids, logprobs = self._without_repeated(ids, logprobs)
        # The token of the text need not be among the entries.
        check_mass(self._url, logprobs, position.chosen.logprob)
        return ids, logprobs

    def _entries(self, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids and log-probabilities of the ``top_logprobs`` most probable entries, without unknown ones."""
        top, chosen = position.top, position.chosen
        if isinstance(top, NumberedTokens):
            logprobs = top.logprobs
            if len(top) > self._top_logprobs:
                top = top[_most_probable(logprobs, top.ids == chosen.id, self._top_logprobs)]
            top = top[top.logprobs > _LEAST_LOGPROB]
            known = self.tokens.have_ids(top)
            return top.ids[known], top.logprobs[known]
        if len(top) > self._top_logprobs:
            logprobs = np.array([token.logprob for token in top])
            is_chosen = np.array([token[0] == chosen[0] and token[2:] == chosen[2:] for token in top])
            top = [top[index] for index in _most_probable(logprobs, is_chosen, self._top_logprobs).tolist()]
        top = [token for token in top if token.logprob > _LEAST_LOGPROB]
        found = [(token_id, token.logprob) for token in top if (token_id := self.tokens.id_of(token)) is not None]
        return np.array([entry[0] for entry in found], np.int64), np.array([entry[1] for entry in found], np.float64)

    def _without_repeated(self, ids: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the most probable of the entries of each id, and counts the others: ids are in order."""
        order = np.lexsort((-logprobs, ids))
        ids, logprobs = ids[order], logprobs[order]
        is_first = np.concatenate([[True], ids[1:] != ids[:-1]])
        for token, logprob in zip(ids[~is_first].tolist(), logprobs[~is_first].tolist(), strict=True):
            self.tokens.count_unmapped(ServerToken(f"token_id:{token}", logprob, None, token))
        return ids[is_first], logprobs[is_first]

    def _check_prompt(self, request: Request, answer: Answer, advice: str = "give its own tokenizer") -> None:
        """Raises ServerRequestError, which ends in ``advice``, if the server says that it read other tokens."""
        ids, length = answer.prompt_ids, answer.prompt_tokens
        asked = len(request.prompt_ids)
        if (ids is None or ids == request.prompt_ids) and length in (None, asked):
            return
        read = f"{length} tokens" if ids is None else f"the tokens {ids}"
        sent = f"{asked} tokens" if ids is None else f"{request.prompt_ids}"
        raise ServerRequestError(
            f"{self._url} read {read[:200]} where the tokenizer makes {sent[:200]}: the server adds special tokens, or "
            f"has another chat template or another tokenizer; {advice}"
        )


def check_mass(url: str, logprobs: np.ndarray, chosen: float = -math.inf) -> None:
    """Checks that the entries (K,) of one position are log-probabilities.

    Args:
        url: Address of the server, for the error.
        logprobs: Log-probabilities of different tokens.
        chosen: Log-probability of the text's token, which may be one of them; NaN where it is not known.

    Raises:
        ServerRequestError: The probabilities sum to more than 1.
    """
    most = max(float(logprobs.max(initial=-math.inf)), chosen)
    mass = max(float(np.exp(logprobs).sum()), math.exp(most)) if most < 1.0 else math.inf
    if mass > _MAX_MASS:
        raise ServerRequestError(
            f"{url} gave entries with a probability of {mass:.4g} together, at most 1 is possible: it must report "
            "log-probabilities (vLLM: --logprobs-mode raw_logprobs), not logits"
        )


def _most_probable(logprobs: np.ndarray, is_chosen: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the most probable entries, in order of their indices.

    A server may add the token of the text as one entry more. It is then the least probable one, and where several are
    equally improbable, it is the one that does not belong to the most probable.
    """
    order = np.lexsort((is_chosen, np.where(np.isnan(logprobs), np.inf, -logprobs)))
    return np.sort(order[:count])


def _agree(data: bytes, text: str) -> bool:
    """Returns whether bytes end in the text that the server shows, which may lack reasoning and broken characters."""
    shown, spelled = (whole.replace("\ufffd", "").strip() for whole in (text, data.decode(errors="replace")))
    return spelled.endswith(shown)
