"""Teachers of a training step: a model that scores the batch, or a store that is searched for its documents."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from slimkernels import _checks
from slimkernels.models.batch import teacher_rows
from slimkernels.models.head import LanguageModelHead, base_model
from slimkernels.models.head_loss import Student, TeacherRows
from slimkernels.models.hidden_states import HeadInput
from slimkernels.models.sharding import is_partitioned
from slimkernels.models.sparse_targets import DEFAULT_ROUNDS, DEFAULT_TOP_FRACTION, draw_targets
from slimkernels.ops.head_teacher import HeadTeacher
from slimkernels.ops.linear_gather_logits import linear_gather_logits
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.packed_logits import PackedHidden, PackedLogits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Document, MixedStores, PackedDocument, Store
from slimkernels.trainer.objective import SlimObjective
from slimkernels.trainer.stored_rows import LARGEST_PADDING
from slimkernels.trainer.support import check_student_top_k, intersection, student_ids, union

logger = logging.getLogger(__name__)


class OnlineTeacher:
    """A teacher model, not trained, that scores batches and keeps the logits that the objective selects.

    The (N, V) logits never exist: where all are kept, the loss makes them for one chunk of rows after the other.

    Args:
        model: A causal language model; set to evaluation mode.
        objective: Training objective, which tells how the logits are selected.
        vocab_size: Number of rows V of the student's head. Where teacher and student are padded differently, only the
            rows that both heads have are used, and a warning is logged.

    Raises:
        ValueError: The vocabularies differ by more than padding, the head is not one linear layer, DeepSpeed ZeRO-3
            has partitioned the weights, or the objective's numbers of logits do not fit its support.
    """

    def __init__(self, model: nn.Module, objective: SlimObjective, vocab_size: int) -> None:
        self.model = model.eval()
        self.objective = objective
        # The trainer changes it where it has a schedule.
        self.temperature = float(objective.temperature)
        if is_partitioned(model):
            raise ValueError(
                "teacher_model must be whole, got one that DeepSpeed ZeRO-3 has partitioned: load it before creating "
                "the training arguments that enable ZeRO-3"
            )
        rows = LanguageModelHead.of(base_model(model)).vocab_size
        if abs(rows - vocab_size) > LARGEST_PADDING:
            raise ValueError(
                f"teacher and student must have the same vocabulary, got heads of {rows} and {vocab_size} rows: choose "
                "a teacher with the student's tokenizer"
            )
        if rows != vocab_size:
            logger.warning(
                "the teacher's head has %d rows and the student's %d: the first %d are taken to be the same tokens",
                rows,
                vocab_size,
                min(rows, vocab_size),
            )
        self.num_rows = min(rows, vocab_size)
        self._top_k, self._num_of_student = self._sizes()

    @torch.no_grad()
    def hidden(self, inputs: dict[str, Any], places: Tensor) -> Tensor:
        """Computes the input (N, D) of the teacher's head at the ``places`` (N,) of a batch, counted over its B x T."""
        catch = HeadInput()
        with catch.inside(base_model(self.model)):
            self.model(**inputs | {"use_cache": False})
        hidden = catch.hidden.flatten(0, -2)
        return hidden.index_select(0, places.to(hidden.device))

    @torch.no_grad()
    def rows(self, hidden: Tensor, target: Tensor, student: Student | None = None) -> TeacherRows:
        """Computes the kept logits (N, K) of hidden states (N, E) whose next tokens are ``target`` (N,).

        The products are in the teacher's dtype, also within the student's autocast region.

        Args:
            hidden: Hidden states of this teacher.
            target: Labels, on the device of ``hidden``.
            student: The student; None where the objective's support is "teacher".

        Returns:
            The rows, on the device of ``hidden``; a ``HeadTeacher`` where the loss is to make them.
        """
        ids = None
        if student is not None:
            ids = student_ids(student, self._num_of_student, self.num_rows).to(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            head = self._head()
            if self.objective.method == "sampled":
                return self._draw(head, hidden, target)
            return self._rows(head.arguments(hidden), target, ids)

    def _rows(self, head: dict[str, Any], target: Tensor, ids: Tensor | None) -> TeacherRows:
        """Computes the rows on the objective's support, of which ``ids`` (N, L) are the student's largest logits."""
        temperatures = tuple(dict.fromkeys((1.0, self.temperature)))
        if ids is None and (self._top_k == self.num_rows or self.objective.teacher_in_chunks):
            return HeadTeacher(top_k=self._top_k, **head)
        if ids is not None and self.objective.support == "student":
            return linear_gather_logits(ids=ids, target=target, temperatures=temperatures, **head)
        rows = linear_topk_logits(top_k=self._top_k, target=target, temperatures=temperatures, **head)
        if ids is None:
            return rows
        if self.objective.support == "intersection":
            return intersection(rows, ids)
        both = union(rows.ids, ids, self.num_rows)
        return linear_gather_logits(ids=both, target=target, temperatures=temperatures, **head)

    def _sizes(self) -> tuple[int, int]:
        """Returns the numbers of the teacher's and of the student's largest logits that are kept."""
        objective = self.objective
        top_k, top_fraction = objective.teacher_top_k, objective.teacher_top_fraction
        if top_k is None and top_fraction is None:
            top_fraction = DEFAULT_TOP_FRACTION if objective.method == "slim" else 1.0
        of_teacher = _checks.resolve_top_k(top_k, top_fraction, self.num_rows)
        of_student = of_teacher if objective.student_top_k is None else objective.student_top_k
        if objective.support == "teacher":
            return of_teacher, of_student
        check_student_top_k(of_student, self.num_rows)
        name = "student_top_k" if objective.support == "student" else "teacher_top_k"
        if (of_student if objective.support == "student" else of_teacher) == self.num_rows:
            raise ValueError(
                f"support {objective.support!r} must choose among the {self.num_rows} ids of the vocabulary, got all "
                f"of them: set {name} or teacher_top_fraction"
            )
        return of_teacher, of_student

    def _head(self) -> LanguageModelHead:
        head = LanguageModelHead.of(base_model(self.model))
        return head if head.vocab_size == self.num_rows else head.first_rows(self.num_rows)

    def _draw(self, head: LanguageModelHead, hidden: Tensor, target: Tensor) -> SparseLogits:
        rounds = DEFAULT_ROUNDS if self.objective.teacher_rounds is None else self.objective.teacher_rounds
        # Checkpoints keep the state of the global generator, so a resumed run gets the seed it would have got.
        seed = torch.full((len(hidden),), int(torch.randint(2**62, ())), device=hidden.device)
        return draw_targets(head, hidden, target, rounds, seed, torch.arange(len(hidden), device=hidden.device))


class StoredTeacher:
    """A store in which the rows of a batch's documents are found by their tokens, for batches of any collator.

    Args:
        store: Store of the documents, or a mixture of several, tokenised as in the batches, which may pack them with
            ``position_ids``.
    """

    def __init__(self, store: Store | MixedStores) -> None:
        self.store = store

    def rows(self, inputs: dict[str, Any], places: Tensor) -> SparseLogits:
        """Finds the teacher's rows of the labels of a batch.

        Args:
            inputs: Tensors ``input_ids`` (B, T) and, where rows hold more than one document or padding,
                ``position_ids`` (B, T), which start at 0 in every document, and ``attention_mask`` (B, T).
            places: Flat indices (N,) into B * T of the hidden states that predict the labels, ascending.

        Returns:
            SparseLogits (N, K) on the device of ``places``.

        Raises:
            ValueError: The store lacks a document, or a row for one of its labels.
        """
        input_ids = inputs["input_ids"].cpu()
        wanted = places.cpu()
        if not len(wanted):
            return self._no_rows().to(places.device)
        length = input_ids.shape[1]
        parts = []
        for row, start, stop in documents_of(input_ids, inputs):
            first = row * length + start
            asked = wanted[(wanted >= first) & (wanted < row * length + stop)] - first + 1
            if len(asked):
                rows = self._document(input_ids[row, start:stop], asked)
                # Decoded where they are used.
                parts.append(teacher_rows(rows.to(places.device)))
        found = SparseLogits.cat(parts) if parts else None
        if found is None or found.leading_shape != (len(wanted),):
            count = 0 if found is None else found.leading_shape[0]
            raise ValueError(
                f"every label must lie in a document of the batch, got {len(wanted)} labels, {count} of which do"
            )
        return found

    def _no_rows(self) -> SparseLogits:
        temperatures = self.store.temperatures
        return SparseLogits(
            ids=torch.zeros(0, 1, dtype=torch.int32),
            logits=torch.zeros(0, 1),
            lse=torch.zeros(0, len(temperatures)),
            temperatures=temperatures,
            target_logit=torch.zeros(0),
            rest_lse=torch.zeros(0, len(temperatures)) if self.store.has_rest_lse else None,
        )

    def _find(self, input_ids: Tensor) -> Document | PackedDocument | None:
        index = self.store.find(input_ids)
        return None if index is None else self.store.packed(index)

    def _document(self, input_ids: Tensor, positions: Tensor) -> SparseLogits | PackedLogits | PackedHidden:
        document = self._find(input_ids)
        if document is None:
            raise ValueError(
                f"every document of a batch must be in the store, got one of {len(input_ids)} tokens that is not, "
                f"{input_ids[:8].tolist()}...: capture the same text with the same tokenizer, template and max_length"
            )
        rows = torch.searchsorted(document.positions, positions)
        known = rows < len(document.positions)
        known &= document.positions[rows.clamp(max=len(document.positions) - 1)] == positions
        if not known.all():
            raise self._lacks_row(int(positions[~known][0]), len(input_ids))
        return document.teacher[rows]

    def _lacks_row(self, position: int, num_tokens: int) -> Exception:
        """Returns the error for a document without the row of one of its labels."""
        return ValueError(
            f"the store must hold a row for each label, got none for position {position} of a document of {num_tokens} "
            "tokens: capture with the labels that the student is trained on"
        )


def documents_of(input_ids: Tensor, inputs: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Returns the row, the start and the end of every document of a batch.

    Tokens that ``attention_mask`` (B, T) excludes belong to no document, whatever their ``position_ids``: they end the
    document before them. Position 0, or another number of the document in the mask, starts the next one.
    """
    found = []
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    for row, ids in enumerate(input_ids):
        is_token = torch.ones(len(ids), dtype=torch.bool)
        is_start = torch.zeros(len(ids), dtype=torch.bool)
        if positions is not None:
            is_start |= positions[row].cpu().eq(0)
        if mask is not None and mask.ndim == 2:
            document = mask[row].cpu()
            is_token &= document.ne(0)
            is_start[1:] |= document[1:].ne(document[:-1])
        is_start[0] = True
        starts = (is_token & is_start).nonzero().flatten().tolist()
        ends = (~is_token | is_start).nonzero().flatten().tolist()
        for start in starts:
            end = next((end for end in ends if end > start), len(ids))
            found.append((row, start, end))
    return found
