"""One forward pass of a transformers causal LM in which the head and the loss function are ``linear_slim_loss``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimkernels.models.head import LanguageModelHead
from slimkernels.ops.linear_slim_loss import linear_slim_loss
from slimkernels.ops.slim_result import SlimLoss
from slimkernels.ops.vocab_parallel.slice import whole
from slimkernels.sparse_logits import SparseLogits

IGNORE_INDEX = -100

# The teacher's rows (N, K) of the labels (N,) of a batch, in their order.
TeacherOfLabels = Callable[[Tensor], SparseLogits]


class HeadLoss:
    """Stands in for a model's head and its loss function while ``inside(model)``.

    The head hands its input over and returns logits of no width, (..., 0), which go through whatever the model does to
    its logits for nothing; the loss function then computes ``linear_slim_loss`` of that input. Everything else is the
    model's own forward: its masks, its auxiliary losses, and the wrappers around it.

    Args:
        teacher: None for the cross entropy of the labels alone. With one, rows without a label are left out of the
            products, for which the host waits for a GPU once.
        num_items: What the sum over the labels is divided by, where the model is not given ``num_items_in_batch``.
        **options: Of ``linear_slim_loss``.

    Attributes:
        result: The ``SlimLoss``, one row for each row that went through the head's product.
        target: (N,) int64, their labels.
        rows: The teacher's rows of them, or None.
    """

    def __init__(
        self, teacher: TeacherOfLabels | None = None, *, num_items: Tensor | int | None = None, **options: Any
    ) -> None:
        self.teacher = teacher
        self.num_items = num_items
        self.options = options
        self.result: SlimLoss | None = None
        self.target: Tensor | None = None
        self.rows: SparseLogits | None = None
        self._hidden: Tensor | None = None
        self._model: PreTrainedModel

    @contextlib.contextmanager
    def inside(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the context, calls of ``model`` or of a wrapper around it with ``labels`` compute this loss."""
        self._model = model
        had_own = "_loss_function" in model.__dict__
        own = model.__dict__.get("_loss_function")
        with forward_as(output_embeddings(model), self._head):
            model.loss_function = self._loss
            try:
                yield
            finally:
                if had_own:
                    model.loss_function = own
                else:
                    del model._loss_function

    def _head(self, hidden: Tensor) -> Tensor:
        if self._hidden is not None:
            raise ValueError(
                f"the head of {type(self._model).__name__} is called more than once in a forward pass, so its loss is "
                "not that of one set of logits: compute the logits and call slimkernels.slim_loss"
            )
        self._hidden = hidden
        return hidden.new_empty(*hidden.shape[:-1], 0)

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
        """What ``transformers.loss.loss_utils.ForCausalLMLoss`` computes; ``logits`` (..., 0) are not looked at."""
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
                f"got {tuple(target.shape)}: leave logits_to_keep out where there are labels"
            )
        hidden, target = hidden.flatten(0, -2), target.flatten().to(hidden.device)
        if self.teacher is not None:
            labelled = target.ne(ignore_index).nonzero().squeeze(-1)
            hidden, target = hidden.index_select(0, labelled), target[labelled]
            self.rows = self.teacher(target)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        self.target = target
        # FSDP2 still holds the whole weight here, and would take a second call of the head for a second pass of all
        # that is in its group; ZeRO-3 has let go of it, and gathers it anew.
        is_gathered_in_calls = hasattr(LanguageModelHead.of(self._model).weight, "ds_shape")
        self.result = (_loss_in_call if is_gathered_in_calls else _loss_of_head)(
            self._model,
            hidden,
            target=target,
            teacher=self.rows,
            ignore_index=ignore_index,
            num_items=self.num_items if num_items_in_batch is None else num_items_in_batch,
            **self.options,
        )
        return self.result.loss


def loss_of_batch(
    model: nn.Module, batch: dict[str, Any], *, student: PreTrainedModel | None = None, **arguments: Any
) -> SlimLoss:
    """``linear_slim_loss`` of a batch of ``SlimCollator``, within calls of the model and of its head.

    Engines prepare their work in these calls: DDP and FSDP2 the reduction of gradients, FSDP2 and DeepSpeed ZeRO-3 the
    gathering of weights. The head's is gathered whole, V x D of memory on each device while the loss is computed.

    Args:
        model: The student, or an engine's wrapper around it.
        batch: ``input_ids``, ``attention_mask``, ``rows`` and ``target``.
        student: The model inside the wrapper.
        **arguments: Of ``linear_slim_loss``.
    """
    inner = cast(PreTrainedModel, model) if student is None else student
    results: list[SlimLoss] = []

    def forward() -> Tensor:
        hidden = hidden_states(inner, batch)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        results.append(_loss_in_call(inner, hidden, target=batch["target"], **arguments))
        return results[-1].loss

    with forward_as(inner, forward):
        loss = model()
    return results[-1]._replace(loss=loss)


def hidden_states(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """The decoder's last hidden state (N, D) of a collated batch's labelled rows; no logits are computed."""
    output = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.last_hidden_state.flatten(0, 1).index_select(0, batch["rows"])


class HeadInput:
    """Catches what a model's head is given, and computes no logits, while ``inside(model)``.

    Raises:
        ValueError: When ``hidden`` is read and the head was not called.
    """

    def __init__(self) -> None:
        self._hidden: Tensor | None = None

    @property
    def hidden(self) -> Tensor:
        """(B, T, D), of the last call."""
        if self._hidden is None:
            raise ValueError(
                "the model computed its logits without calling its output embeddings, which LanguageModelHead is read "
                "from: use a causal language model whose get_output_embeddings() is the module that it calls"
            )
        return self._hidden

    @contextlib.contextmanager
    def inside(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the context, calls of ``model`` or of a wrapper around it return logits of no width."""
        with forward_as(output_embeddings(model), self._head):
            yield

    def _head(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden
        return hidden.new_empty(*hidden.shape[:-1], 0)


def output_embeddings(model: PreTrainedModel) -> nn.Module:
    """The module that makes a causal language model's logits.

    Raises:
        ValueError: It has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} must be a causal language model with output embeddings, got none")
    return head


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return cast(PreTrainedModel, model if inner is None else inner())


def next_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """(B, T) labels moved to the place whose hidden state predicts them; the last place gets none."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


@contextlib.contextmanager
def forward_as(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Within the context, calls of ``module`` or of a wrapper around it reach ``forward``."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has split the model's weights over processes, each with a shape of (0,)."""
    return any(hasattr(parameter, "ds_shape") and not parameter.numel() for parameter in model.parameters())


def _loss_in_call(model: PreTrainedModel, hidden: Tensor, **arguments: Any) -> SlimLoss:
    """``_loss_of_head`` within a call of the head, where engines gather its weight."""
    module = output_embeddings(model)
    results: list[SlimLoss] = []

    def forward(hidden: Tensor) -> Tensor:
        results.append(_loss_of_head(model, hidden, **arguments))
        return results[-1].loss

    with forward_as(module, forward):
        loss = module(hidden)
    return results[-1]._replace(loss=loss)


def _loss_of_head(model: PreTrainedModel, hidden: Tensor, **arguments: Any) -> SlimLoss:
    """``linear_slim_loss`` of hidden states (N, D) and the model's head."""
    head = LanguageModelHead.of(model)
    _check_shape(head, hidden, model)
    return linear_slim_loss(**head.arguments(hidden), **arguments)


def _check_shape(head: LanguageModelHead, hidden: Tensor, model: nn.Module) -> None:
    # A DTensor says in which way it is sharded, but not whether the ranks work on one batch: those of FSDP do not.
    sharded = hasattr(head.weight, "full_tensor") and _uses_fsdp(model)
    if sharded or head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"the head's weight must be whole, (V, {hidden.shape[-1]}), where the loss is computed, got "
            f"{'a shard of' if sharded else 'shape'} {tuple(head.weight.shape)}: shard it with the model as a whole, "
            "as fully_shard(model) does, and not by itself, or train with SlimTrainer, or compute the logits and call "
            "slimkernels.slim_loss"
        )


def _uses_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
