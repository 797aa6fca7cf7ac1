"""``patch_model``, which makes a transformers causal language model compute its loss without its logits."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from slimkernels.models.head import (
    LanguageModelHead,
    base_model,
    check_logits,
    output_embeddings,
    relative_tolerance,
)
from slimkernels.models.head_loss import HeadLoss
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
    base.__dict__[_MARK] = base.__dict__.get("forward")
    # A bound method, so that a copy of the model runs itself and not the model it was copied from.
    base.forward = types.MethodType(_forward_without_logits(type(base).forward, in_evaluation), base)
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
    own = base.__dict__.pop(_MARK)
    if own is None:
        del base.forward
    else:
        base.forward = own
    return model


def _forward_without_logits(forward: Callable, in_evaluation: bool) -> Callable:
    """Returns a method with the signature of ``forward`` whose loss is computed from the head's input."""
    place_of_labels = list(inspect.signature(forward).parameters).index("labels") - 1

    # Each call replaces the head by another object, so a compiled forward would be compiled again in every call.
    @torch.compiler.disable
    @functools.wraps(forward)
    def patched(self: PreTrainedModel, *args, **kwargs):
        own = self.__dict__[_MARK] or functools.partial(type(self).forward, self)
        labels = args[place_of_labels] if len(args) > place_of_labels else kwargs.get("labels")
        if labels is None or not (self.training or in_evaluation):
            return own(*args, **kwargs)
        with HeadLoss().inside(self):
            return without_logits(own(*args, **kwargs))

    setattr(patched, _MARK, True)
    return patched


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
    name, was_training = type(model).__name__, model.training
    head = LanguageModelHead.of(model)
    ids = torch.tensor([[1, head.vocab_size - 1, 0, 1]], device=head.weight.device)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    given: list[torch.Tensor] = []
    hook = output_embeddings(model).register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    model.eval()
    try:
        expected = model(**inputs)
        hook.remove()
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
            raise ValueError(f"the loss of {name} is {float(expected.loss):.6g}, but that of its head is {loss:.6g}")
    except ValueError as reason:
        raise ValueError(f"{reason}; compute its logits and call slimkernels.slim_loss on them") from reason
    finally:
        hook.remove()
        model.train(was_training)
