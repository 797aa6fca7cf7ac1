"""A causal language model's loss from its head's input: ``linear_slim_loss`` in place of head and loss function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimkernels.models.head import LanguageModelHead, output_embeddings
from slimkernels.models.hidden_states import empty_logits, hidden_states
from slimkernels.models.replaced import replaced
from slimkernels.models.sharding import uses_fsdp
from slimkernels.ops.head_teacher import HeadTeacher
from slimkernels.ops.linear_slim_loss import linear_slim_loss
from slimkernels.ops.slim_result import SlimLoss
from slimkernels.ops.vocab_parallel.slice import whole
from slimkernels.sparse_logits import SparseLogits

IGNORE_INDEX = -100

TeacherRows = SparseLogits | HeadTeacher
# Returns the student's hidden states (N, D) and head, as ``LanguageModelHead.arguments`` does.
Student = Callable[[], dict[str, Any]]


class BatchTeacher:
    """A teacher that is asked once the student's head has its input.

    Args:
        rows_of: Function from the labels (N,) of a batch and the student to the teacher's rows (N, K), in the order of
            the labels.

    Attributes:
        rows: The rows that were returned last, or None.
    """

    def __init__(self, rows_of: Callable[[Tensor, Student], TeacherRows]) -> None:
        self._rows_of = rows_of
        self.rows: TeacherRows | None = None

    def __call__(self, target: Tensor, student: Student) -> TeacherRows:
        """Returns the rows."""
        self.rows = self._rows_of(target, student)
        return self.rows


class HeadLoss:
    """A replacement for a model's head and loss function in one forward pass, while ``inside(model)``.

    The head keeps its input and returns logits of shape (..., 0), on which the model's own operations cost nothing.
    The loss function then computes ``linear_slim_loss`` from that input. Everything else is the model's own forward
    pass: its masks, its auxiliary losses, and the wrappers around it.

    Args:
        teacher: The teacher of the batch; None for the cross-entropy of the labels alone. With a teacher, rows without
            a label are dropped before the products, for which the host waits for a GPU once.
        num_items: Divisor of the sum over the labels, where the model is not given ``num_items_in_batch``.
        **options: Options of ``linear_slim_loss``.

    Attributes:
        result: The ``SlimLoss``, with one row for each row that the head's product has.
        target: Labels (N,) of these rows, int64.
    """

    def __init__(
        self, teacher: BatchTeacher | None = None, *, num_items: Tensor | int | None = None, **options: Any
    ) -> None:
        self.teacher = teacher
        self.num_items = num_items
        self.options = options
        self.result: SlimLoss | None = None
        self.target: Tensor | None = None
        self._hidden: Tensor | None = None
        self._model: PreTrainedModel

    @contextlib.contextmanager
    def inside(self, model: PreTrainedModel) -> Iterator[None]:
        """Makes calls of ``model``, or of a wrapper around it, with ``labels`` compute this loss within the context.

        Other threads can call the model at the same time, with or without a loss of their own.
        """
        self._model = model
        with replaced(output_embeddings(model), forward=self._head), replaced(model, loss_function=self._loss):
            yield

    def _head(self, hidden: Tensor) -> Tensor:
        if self._hidden is not None:
            raise ValueError(
                f"the head of {type(self._model).__name__} is called more than once in a forward pass, so its loss is "
                "not that of one set of logits: compute the logits and call slimkernels.slim_loss"
            )
        self._hidden = hidden
        return empty_logits(hidden)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **_unused,
    ) -> Tensor:
        """Computes what ``transformers.loss.loss_utils.ForCausalLMLoss`` does; ``logits`` (..., 0) are not read."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise ValueError(
                f"{type(self._model).__name__} computed its logits without calling its output embeddings: compute the "
                "logits and call slimkernels.slim_loss"
            )
        hidden = whole(hidden, "the head's input")
        target = next_labels(labels, ignore_index) if shift_labels is None else shift_labels
        if target.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels must have one label for each hidden state that reaches the head, {tuple(hidden.shape[:-1])}, "
                f"got {tuple(target.shape)}: do not pass logits_to_keep with labels"
            )
        hidden, target = hidden.flatten(0, -2), target.flatten().to(hidden.device)
        if self.teacher is not None:
            labelled = target.ne(ignore_index).nonzero().squeeze(-1)
            hidden, target = hidden.index_select(0, labelled), target[labelled]
        hidden = _as_autocast(hidden)
        self.target = target
        # FSDP2 still holds the full weight here, and would take another call of the head for a second forward pass of
        # its whole group. ZeRO-3 has freed the weight, and gathers it again in a call.
        is_gathered_in_calls = hasattr(LanguageModelHead.of(self._model).weight, "ds_shape")
        self.result = (_loss_in_call if is_gathered_in_calls else _loss_of_head)(
            self._model,
            hidden,
            target=target,
            teacher=self.teacher,
            ignore_index=ignore_index,
            num_items=self.num_items if num_items_in_batch is None else num_items_in_batch,
            **self.options,
        )
        return self.result.loss


def loss_of_batch(
    model: nn.Module, batch: dict[str, Any], *, student: PreTrainedModel | None = None, **arguments: Any
) -> SlimLoss:
    """Computes ``linear_slim_loss`` of a batch of ``SlimCollator``, within calls of the model and of its head.

    Engines prepare their work in these calls: DDP and FSDP2 reduce gradients, FSDP2 and DeepSpeed ZeRO-3 gather
    weights. The head's weight is gathered in full, V x D of memory on each device while the loss is computed.

    Args:
        model: The student, or an engine's wrapper around it.
        batch: Tensors ``input_ids``, ``attention_mask``, ``rows`` and ``target``.
        student: The model inside the wrapper; None where ``model`` is no wrapper.
        **arguments: Arguments of ``linear_slim_loss``, of which ``teacher`` may be a ``BatchTeacher``.
    """
    inner = cast(PreTrainedModel, model) if student is None else student
    results: list[SlimLoss] = []

    def forward() -> Tensor:
        hidden = _as_autocast(hidden_states(inner, batch))
        results.append(_loss_in_call(inner, hidden, target=batch["target"], **arguments))
        return results[-1].loss

    with replaced(inner, forward=forward):
        loss = model()
    return results[-1]._replace(loss=loss)


def next_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Moves labels (B, T) one place to the left, to the hidden states that predict them; the last place gets none."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def _as_autocast(hidden: Tensor) -> Tensor:
    """Casts hidden states to the dtype of autocast where it is on, which casts no operand of this package's ops."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _loss_in_call(model: PreTrainedModel, hidden: Tensor, **arguments: Any) -> SlimLoss:
    """Computes ``_loss_of_head`` within a call of the head, in which engines gather its weight."""
    module = output_embeddings(model)
    results: list[SlimLoss] = []

    def forward(hidden: Tensor) -> Tensor:
        results.append(_loss_of_head(model, hidden, **arguments))
        return results[-1].loss

    with replaced(module, forward=forward):
        loss = module(hidden)
    return results[-1]._replace(loss=loss)


def _loss_of_head(
    model: PreTrainedModel,
    hidden: Tensor,
    *,
    target: Tensor,
    teacher: TeacherRows | BatchTeacher | None = None,
    **options: Any,
) -> SlimLoss:
    """Computes ``linear_slim_loss`` from hidden states (N, D) and the model's head."""
    head = LanguageModelHead.of(model)
    _check_shape(head, hidden, model)
    # Dropout of an adapter of the head is drawn once, and after what a teacher draws.
    student = functools.cache(lambda: head.arguments(hidden))
    rows = teacher(target, student) if isinstance(teacher, BatchTeacher) else teacher
    arguments = student()
    if isinstance(rows, HeadTeacher) and not _can_make_rows(rows, arguments):
        made = rows.rows(target.to(rows.hidden.device), (1.0, options.get("temperature", 1.0)))
        rows = made.to(hidden.device)
    return linear_slim_loss(**arguments, target=target, teacher=rows, **options)


def _can_make_rows(teacher: HeadTeacher, student: dict[str, Any]) -> bool:
    """Returns whether the loss of a student can make a teacher's rows, and makes them once."""
    hidden = student["hidden"]
    # Gradients in float16 are made in the backward pass, and the rows with them once more.
    is_once = hidden.dtype != torch.float16
    return is_once and hidden.device == teacher.hidden.device and not hasattr(student["weight"], "full_tensor")


def _check_shape(head: LanguageModelHead, hidden: Tensor, model: nn.Module) -> None:
    # The placement of a DTensor does not show whether its ranks work on one batch (tensor parallelism) or on several
    # (FSDP).
    sharded = hasattr(head.weight, "full_tensor") and uses_fsdp(model)
    if sharded or head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"the head's weight must be whole, (V, {hidden.shape[-1]}), where the loss is computed, got "
            f"{'a shard of' if sharded else 'shape'} {tuple(head.weight.shape)}: shard it with the model as a whole, "
            "as fully_shard(model) does, and not alone, or train with SlimTrainer, or compute the logits and call "
            "slimkernels.slim_loss"
        )
