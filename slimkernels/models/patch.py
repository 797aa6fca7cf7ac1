"""``patch_model``: a transformers causal LM that computes its loss without its logits."""

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

from slimkernels.models.head import LanguageModelHead
from slimkernels.models.head_loss import HeadLoss, base_model, is_partitioned, output_embeddings

_MARK = "_slimkernels_patch"


def patch_model(model: nn.Module, *, in_evaluation: bool = False, check: bool = True) -> nn.Module:
    """Makes ``model(input_ids, labels=...)`` compute its loss with ``linear_slim_loss``, in place.

    Equivalent to::

        output = model(input_ids, labels=labels)   # of the model as it was
        output.logits = None

    The (B, T, V) logits and their gradient never exist. Loss and gradients are the model's own to rounding; labels,
    ``shift_labels``, ``num_items_in_batch``, masks, packing, auxiliary losses of experts, gradient checkpointing and
    LoRA adapters, on the head too, work as before. Calls without labels, such as those of ``generate``, are the
    model's own, and so are calls in evaluation mode, which may need the logits. ``torch.compile`` works on the decoder,
    ``model.get_decoder().compile()``; of the model as a whole it compiles nothing.

    Args:
        model: A transformers causal LM, or PEFT's wrapper around one. Its head must be one linear layer, with softcap
            or scale as its configuration says; this holds for all common families.
        in_evaluation: True leaves the logits out in evaluation mode, too, where there are labels.
        check: Runs a few tokens through the model and compares its logits and its loss with the formula used here.
            False for a model that cannot run yet.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a transformers model.
        ValueError: The model is patched already, does something else to its logits, or has another loss.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers causal LM or PEFT's wrapper of one, got {type(model).__name__}")
    if _MARK in base.__dict__:
        raise ValueError(f"this {type(base).__name__} is patched already: call unpatch_model first")
    if base.loss_function is not ForCausalLMLoss:
        raise ValueError(
            f"the loss of {type(base).__name__} must be transformers' ForCausalLMLoss, got "
            f"{getattr(base.loss_function, '__name__', base.loss_function)}: call slimkernels.slim_loss in it"
        )
    if check:
        check_loss(base)
    base.__dict__[_MARK] = base.__dict__.get("forward")
    # Bound to the model as a method is, so that a copy of the model calls itself and not the model it is a copy of.
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
            f"the forward of this {type(base).__name__} was replaced once more after patch_model: undo that first"
        )
    own = base.__dict__.pop(_MARK)
    if own is None:
        del base.forward
    else:
        base.forward = own
    return model


def _forward_without_logits(forward: Callable, in_evaluation: bool) -> Callable:
    """A method with the signature of ``forward``, whose loss comes from the head's input."""
    place_of_labels = list(inspect.signature(forward).parameters).index("labels") - 1

    # What stands in for the head is another object in every call, for which a compiled forward would be compiled anew.
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
    """A model's output whose logits of no width are None; a tuple keeps them, and so its places."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: value for name, value in output.items() if name != "logits"})
    return output


@torch.no_grad()
def check_loss(model: PreTrainedModel) -> None:
    """Runs four tokens through the model and compares its logits and its loss with what ``HeadLoss`` computes.

    A model whose weights DeepSpeed ZeRO-3 has partitioned cannot run yet, and is not checked.

    Raises:
        ValueError: The model does something else to its logits, or does not ask its loss function for its loss.
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
        tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
        logits = expected.logits.float()
        error = float((head.logits(given[-1]).float() - logits).abs().max())
        if not error <= tolerance * max(1.0, float(logits.abs().max())):
            raise ValueError(
                f"the logits of {name} are not softcap(logit_scale * (hidden @ weight.T + bias)) of the head's input "
                f"(they differ by {error:.3g})"
            )
        try:
            with HeadLoss().inside(model):
                loss = float(model(**inputs).loss)
        except (RuntimeError, IndexError) as broken:
            raise ValueError(f"{name} does not leave its loss to its loss_function ({broken})") from broken
        if not abs(loss - float(expected.loss)) <= tolerance * max(1.0, abs(float(expected.loss))):
            raise ValueError(f"the loss of {name} is {float(expected.loss):.6g} and not that of its head, {loss:.6g}")
    except ValueError as reason:
        raise ValueError(f"{reason}; compute its logits and call slimkernels.slim_loss on them") from reason
    finally:
        hook.remove()
        model.train(was_training)
