"""``patch_model``, which makes a transformers causal language model compute its loss without its logits."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from slimkernels.models.evaluation import evaluation_mode
from slimkernels.models.head import (
    LanguageModelHead,
    base_model,
    check_logits,
    output_embeddings,
    relative_tolerance,
)
from slimkernels.models.head_loss import HeadLoss
from slimkernels.models.replaced import new_instance, replaced, subclass_of
from slimkernels.models.sharding import is_partitioned

_MARK = "_slimkernels_patch"


def patch_model(model: nn.Module, *, in_evaluation: bool = False, check: bool = True) -> nn.Module:
    """Makes ``model(input_ids, labels=...)`` compute its loss with ``linear_slim_loss``, in place.

    Equivalent to::

        output = model(input_ids, labels=labels)   # the model before the patch
        output.logits = None

    The (B, T, V) logits and their gradient never exist. Loss and gradients are the model's own to rounding; labels,
    ``shift_labels``, ``num_items_in_batch``, masks, packing, auxiliary losses of experts, gradient checkpointing and
    LoRA adapters, also on the head, work as before. Calls without labels, such as those of ``generate``, are not
    changed, nor are calls in evaluation mode, which may need the logits. ``torch.compile`` works on the decoder,
    ``model.get_decoder().compile()``; applied to the whole model it compiles nothing.

    Args:
        model: A transformers causal language model, or PEFT's wrapper around one. Its head must be one linear layer,
            with the softcap or scale of its configuration, as in all common families.
        in_evaluation: True to compute no logits in evaluation mode either, where there are labels.
        check: True to run a few tokens through the model and compare its logits and its loss with the formula used
            here. False for a model that cannot run yet.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: The model is already patched, does something else to its logits, or has another loss.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers causal LM or PEFT's wrapper of one, got {type(model).__name__}")
    if _MARK in base.__dict__:
        raise ValueError(f"this {type(base).__name__} is already patched: call unpatch_model first")
    if base.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"the loss of {type(base).__name__} must be transformers' ForCausalLMLoss, got "
            f"{getattr(base.loss_function, '__name__', base.loss_function)}: call slimkernels.slim_loss in it"
        )
    if check:
        check_loss(base)
    if not isinstance(base, _Patched):
        # A class, and not a function on the instance, so that copies, pickles and replicas of the model stay patched.
        base.__class__ = _patched_class(type(base))
    own = base.__dict__.pop("forward", None)
    place_of_labels = list(inspect.signature(base.forward).parameters).index("labels")
    base.__dict__[_MARK] = _Patch(in_evaluation, place_of_labels, own)
    if own is not None:
        base.forward = types.MethodType(_around_own_forward(type(base).forward), base)
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes ``patch_model``, in place.

    Returns:
        The model.

    Raises:
        ValueError: The model is not patched.
    """
    base = base_model(model)
    if _MARK not in base.__dict__:
        raise ValueError(f"this {type(base).__name__} is not patched: nothing to undo")
    if not hasattr(base.forward, _MARK):
        raise ValueError(
            f"the forward of this {type(base).__name__} was replaced again after patch_model: undo that first"
        )
    own = base.__dict__.pop(_MARK).own_forward
    base.__dict__.pop("forward", None)
    if own is not None:
        base.forward = own
    # A class that FSDP2 has made since stays. Without a patch it computes what the class below it computes.
    own_class = type(base).__dict__.get("_own_class")
    if own_class is not None:
        base.__class__ = own_class
    return model


class _Patch(NamedTuple):
    """The settings of a patched model, and the ``forward`` that its instance had, such as one of accelerate's."""

    in_evaluation: bool
    place_of_labels: int
    own_forward: Callable | None


class _Patched:
    """A base class of the classes of patched models; copies and pickles of a model are patched as it is."""

    _own_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *rest = super().__reduce_ex__(max(2, protocol))  # pyright: ignore[reportGeneralTypeIssues]
        return _new_patched, (self._own_class,), *rest


@functools.cache
def _patched_class(own: type) -> type:
    return subclass_of(own, _Patched, _own_class=own, forward=_forward_without_logits(own.forward))


def _new_patched(own: type) -> nn.Module:
    return new_instance(_patched_class(own))


def _forward_without_logits(own: Callable) -> Callable:
    """Returns a method with the signature of ``own``, a class's ``forward``, that computes the loss without logits."""

    def forward(self: PreTrainedModel, *args, **kwargs):
        return _call(self, functools.partial(own, self), args, kwargs)

    # The head's replacement is another object in every call, for which a compiled forward would be compiled again.
    patched: Any = torch.compiler.disable(functools.wraps(own)(forward))
    setattr(patched, _MARK, True)
    patched.__signature__ = inspect.signature(own)
    # accelerate's unwrap_model goes down to the last __wrapped__, which would undo the patch.
    del patched.__wrapped__
    return patched


def _around_own_forward(patched: Callable) -> Callable:
    """Returns a method as ``patched`` that calls the ``forward`` which the instance had before."""

    @torch.compiler.disable
    @functools.wraps(patched)
    def forward(self: PreTrainedModel, *args, **kwargs):
        return _call(self, self.__dict__[_MARK].own_forward, args, kwargs)

    return forward


def _call(model: PreTrainedModel, own: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Calls ``own``, a forward of ``model``, and computes its loss without logits where the patch says so."""
    patch = model.__dict__.get(_MARK)
    if patch is None or not (model.training or patch.in_evaluation):
        return own(*args, **kwargs)
    place = patch.place_of_labels
    if (args[place] if len(args) > place else kwargs.get("labels")) is None:
        return own(*args, **kwargs)
    with HeadLoss().inside(model):
        return without_logits(own(*args, **kwargs))


def without_logits(output):
    """Returns a model's output without its logits of shape (..., 0); a tuple keeps them, so that no entry moves."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})
    return output


@torch.no_grad()
def check_loss(model: PreTrainedModel) -> None:
    """Runs four tokens through the model and compares its logits and its loss with those of its head.

    A model whose weights DeepSpeed ZeRO-3 has partitioned cannot run yet and is not checked.

    Raises:
        ValueError: The model does something else to its logits, or does not call its loss function.
    """
    if is_partitioned(model):
        return
    name = type(model).__name__
    head = LanguageModelHead.of(model)
    ids = torch.tensor([[1, head.vocab_size - 1, 0, 1]], device=head.weight.device)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    given: list[torch.Tensor] = []
    module = output_embeddings(model)
    compute_logits = module.forward

    def keep_input(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return compute_logits(hidden)

    try:
        with evaluation_mode(model):
            with replaced(module, forward=keep_input):
                expected = model(**inputs)
            if expected.loss is None or not given:
                raise ValueError(f"{name} computes no loss from its output embeddings and labels")
            check_logits(model, head, given[-1], expected.logits, hidden_name="the head's input")
            try:
                with HeadLoss().inside(model):
                    loss = float(model(**inputs).loss)
            except (RuntimeError, IndexError) as broken:
                raise ValueError(f"{name} does not compute its loss with its loss_function ({broken})") from broken
            tolerance = relative_tolerance(head.weight.dtype) * max(1.0, abs(float(expected.loss)))
            if not abs(loss - float(expected.loss)) <= tolerance:
                raise ValueError(
                    f"the loss of {name} is {float(expected.loss):.6g}, but that of its head is {loss:.6g}"
                )
    except ValueError as reason:
        raise ValueError(f"{reason}; compute its logits and call slimkernels.slim_loss on them") from reason
