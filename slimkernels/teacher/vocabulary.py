"""The ids that a capture reads of a teacher's rows, and the fingerprint of their tokenizer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from slimkernels.models.fingerprints import tokenizer_fingerprint
from slimkernels.served_rows.asking import num_token_ids
from slimkernels.store import Store
from slimkernels.store.errors import NotAStoreError
from slimkernels.store.identity import is_same_tokenizer


class CapturedVocabulary(NamedTuple):
    """The vocabulary of a store.

    Attributes:
        size: V, the number of ids.
        fingerprint: Fingerprint of the tokenizer; "" without one.
    """

    size: int
    fingerprint: str

    def check(self, ids: Sequence[int], number: int, subject: str = "document") -> None:
        """Checks that token ids are in the vocabulary; ``subject`` and ``number`` name the document in the error."""
        if min(ids) < 0 or max(ids) >= self.size:
            raise ValueError(
                f"token ids must lie in [0, {self.size}), the teacher's vocabulary, got {min(ids)} to {max(ids)} in "
                f"{subject} {number}: give the ids that the teacher's tokenizer makes"
            )


def num_text_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the number of ids that texts can have: without a padding token that was added as the last."""
    own = num_token_ids(tokenizer)
    is_padded = tokenizer.pad_token_id == own - 1 and tokenizer.pad_token_id != tokenizer.eos_token_id
    return own - 1 if is_padded else own


def captured_vocabulary(
    tokenizer: PreTrainedTokenizerBase | None,
    num_rows: int,
    store_path: str | os.PathLike[str],
    subject: str = "the teacher has",
) -> CapturedVocabulary:
    """Returns the ids that a capture reads of every row: those that the tokenizer has.

    Many heads have more rows, which pad them to a multiple of 64 or 128: untrained, they are no tokens and belong
    neither among the kept entries nor into the log-sum-exp. Stores of version 0.1.0 counted them; a capture that
    continues such a store counts them too. A padding token that was added to the tokenizer is no token of a text: a
    store that was begun without it is continued without it, and one that was begun with it is continued with it.

    Args:
        tokenizer: The teacher's tokenizer; None for all rows.
        num_rows: Number of logits of a row.
        store_path: Directory of the store, which need not exist.
        subject: Subject of the error, and its verb.

    Raises:
        ValueError: The tokenizer has more ids than a row has logits, so that the two do not belong together.
    """
    if tokenizer is None:
        return CapturedVocabulary(num_rows, "")
    own, least = num_token_ids(tokenizer), num_text_ids(tokenizer)
    if least > num_rows:
        raise ValueError(
            f"the tokenizer has {own} tokens, but {subject} {num_rows}: give the tokenizer that belongs to the teacher"
        )
    fingerprint = tokenizer_fingerprint(tokenizer)
    try:
        stored = Store(store_path)
    except NotAStoreError:
        return CapturedVocabulary(min(own, num_rows), fingerprint)
    sizes = {own, num_rows}
    if is_same_tokenizer(stored.tokenizer_fingerprint, fingerprint):
        sizes |= {least, least + 1}
    size = stored.vocab_size if stored.vocab_size in sizes else own
    return CapturedVocabulary(min(size, num_rows), fingerprint)
