"""A document as token ids, with what is known about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class TokenizedDocument(list[int]):
    """The token ids of a document, with what is known about them; it equals the list of its ids.

    Attributes:
        positions: Ascending positions in [1, T) of the tokens that are labels; None for every token but the first.
        prompt_length: Number of tokens at the beginning that are a prompt; 0 if that is not known.
        teacher_ids: Token ids that the teacher reads in place of the document, such as the document behind a prefix
            that the student does not see; they end in the document's tokens from its first label on. None for the
            document itself.

    Raises:
        ValueError: ``teacher_ids`` end in other tokens, or have none before the first label.
    """

    def __init__(
        self,
        input_ids: Iterable[int],
        *,
        positions: Sequence[int] | None = None,
        prompt_length: int = 0,
        teacher_ids: Iterable[int] | None = None,
    ) -> None:
        super().__init__(input_ids)
        self.positions = None if positions is None else list(positions)
        self.prompt_length = prompt_length
        self.teacher_ids = None if teacher_ids is None else list(teacher_ids)
        if self.teacher_ids == list(self) or not self.labels:
            self.teacher_ids = None
        if self.teacher_ids is not None:
            end = self[self.labels[0] :]
            if len(self.teacher_ids) <= len(end) or self.teacher_ids[-len(end) :] != end:
                raise ValueError(
                    f"teacher_ids must end in the document's {len(end)} tokens from its first label on, after at least "
                    f"one other token, got {len(self.teacher_ids)} that end in {self.teacher_ids[-8:]}: put the prefix "
                    "before the document's tokens"
                )

    @property
    def read_ids(self) -> list[int]:
        """The token ids that the teacher reads."""
        return self if self.teacher_ids is None else self.teacher_ids

    @property
    def shift(self) -> int:
        """The number of places by which a label is further along in ``read_ids`` than in the document."""
        return len(self.read_ids) - len(self)

    @classmethod
    def of(cls, input_ids: Sequence[int]) -> TokenizedDocument:
        """Returns a document as it is, or a list of token ids as one whose labels are every token but the first."""
        return input_ids if isinstance(input_ids, cls) else cls(input_ids)

    @property
    def labels(self) -> list[int]:
        """The positions of the labels."""
        return list(range(1, len(self))) if self.positions is None else self.positions

    def part(self, start: int, stop: int, begin: Sequence[int] = ()) -> TokenizedDocument:
        """Returns the tokens [start, stop) after the tokens ``begin``, with their labels.

        A part after the first of a document with ``teacher_ids`` has none, as the teacher did not read it so.
        """
        positions, shift = self.positions, len(begin) - start
        if positions is not None:
            positions = [p + shift for p in positions if max(start, 1 - shift) <= p < stop]
        prompt_length = 0 if start else min(self.prompt_length, stop)
        teacher_ids = None
        if self.teacher_ids is not None and not start:
            teacher_ids = self.teacher_ids[: len(self.teacher_ids) - max(0, len(self) - stop)]
        return TokenizedDocument(
            [*begin, *self[start:stop]], positions=positions, prompt_length=prompt_length, teacher_ids=teacher_ids
        )
