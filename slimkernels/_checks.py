"""Checks user input. Every message names the argument, what was expected, what was got, and what to do."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

RESTS = ("renorm", "zero", "ghost", "zero_logit", "renorm_both")
RESTS_WITH_LSE = ("zero", "ghost")  # these normalise by the lse of the teacher's whole row

# The extension is built against the torch that is installed, so that pip must not isolate the build.
INSTALL_EXTENSION = "install it with `pip install --no-build-isolation .` in the source tree of slimkernels"

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def missing_extension(error: ImportError) -> str:
    """Returns the message for a caller of kernels or codecs of ``slimkernels._C`` that could not be imported."""
    return f"the native extension slimkernels._C is not built for this Python and torch ({error}); {INSTALL_EXTENSION}"


def check_tensor(value: object, name: str) -> None:
    """Checks that an operand is a tensor, and neither a list nor an array of numpy."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}: call torch.as_tensor({name})")


def check_floating(tensor: Tensor, name: str) -> None:
    """Checks that an operand is a tensor of a dtype that the kernels support."""
    check_tensor(tensor, name)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_vocabulary(logits: Tensor, name: str, shape: str) -> None:
    """Checks that logits have a supported dtype and a last dimension of at least 1; ``shape`` is for the message."""
    check_floating(logits, name)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must have shape {shape} with at least one entry, got {tuple(logits.shape)}")


def check_same_device(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Checks that two tensors are on the same device."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {tensor.device}: move one of them")


def check_target(target: Tensor, leading_shape: Sequence[int], like: Tensor, like_name: str) -> None:
    """Checks that labels are int64, of the leading shape, and on the device of ``like``."""
    check_tensor(target, "target")
    if target.dtype != torch.int64:
        raise TypeError(f"target must have dtype torch.int64, got {target.dtype}: call target.long()")
    if tuple(target.shape) != tuple(leading_shape):
        raise ValueError(
            f"target must have shape {tuple(leading_shape)}, one label per row of {like_name}, "
            f"got {tuple(target.shape)}"
        )
    check_same_device(target, "target", like, like_name)


def as_float(value: object, name: str) -> float:
    """Checks that an option is a real number, of Python or numpy, and returns it as a float.

    A tensor of one element is read, which waits for its device.
    """
    if isinstance(value, Tensor):
        check_no_gradient(value, name)
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)} and {value.dtype}")
        return float(value.item())
    # The type of a number in a graph that is being compiled is float, too.
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    return float(value)


def as_integer(value: object, name: str) -> int:
    """Checks that an option is an integer, of Python or numpy, and returns it as an int."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    return int(value)


def check_no_gradient(value: Tensor, name: str) -> None:
    """Checks that a tensor does not require a gradient, which the ops would not compute for it."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but the op computes none for it: pass {name}.detach()")


# These compare instead of calling math.isfinite, because a compiler traces comparisons. A NaN fails all of them.
def as_positive(value: object, name: str) -> float:
    """Checks that a number is positive and finite, and returns it as a float."""
    number = as_float(value, name)
    if not 0 < number <= sys.float_info.max:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def as_at_least_zero(value: object, name: str) -> float:
    """Checks that a number is finite and at least 0, and returns it as a float."""
    number = as_float(value, name)
    if not 0 <= number <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return number


# The kernels divide by a temperature in float32, where it and its inverse must be normal numbers.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 2.0**-126, 2.0**126


def as_temperature(value: object, name: str = "temperature", *, or_zero: bool = False) -> float:
    """Checks that a number is a temperature that the kernels can divide by, and returns it as a float.

    With ``or_zero``, 0 is a temperature as well: that of the most probable token.
    """
    number = as_at_least_zero(value, name) if or_zero else as_positive(value, name)
    if number > 0 and not LOWEST_TEMPERATURE <= number <= HIGHEST_TEMPERATURE:
        raise ValueError(
            f"{name} must be in [{LOWEST_TEMPERATURE:.2g}, {HIGHEST_TEMPERATURE:.2g}], where float32 can divide by it, "
            f"got {value}"
        )
    return number


def check_one_of(value: str, name: str, choices: Sequence[str]) -> None:
    """Checks that a string is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def resolve_top_k(top_k: int | None, top_fraction: float | None, vocab_size: int) -> int:
    """Returns K, which must be given by exactly one of ``top_k`` and ``top_fraction``."""
    if (top_k is None) == (top_fraction is None):
        raise ValueError(f"give exactly one of top_k and top_fraction, got top_k={top_k}, top_fraction={top_fraction}")
    if top_fraction is not None:
        fraction = as_float(top_fraction, "top_fraction")
        if not 0 < fraction <= 1:
            raise ValueError(f"top_fraction must be in (0, 1], got {top_fraction}")
        return math.ceil(fraction * vocab_size)
    number = as_integer(top_k, "top_k")
    if not 1 <= number <= vocab_size:
        raise ValueError(f"top_k must be an integer in [1, V = {vocab_size}], got {top_k}")
    return number


def resolve_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    """Checks the temperatures and returns them as floats, with 1.0 first."""
    if isinstance(temperatures, (numbers.Real, str)) or not hasattr(temperatures, "__iter__"):
        raise TypeError(f"temperatures must be a sequence of numbers, got {temperatures!r}: write ({temperatures},)")
    resolved = [as_temperature(temperature, "temperatures") for temperature in temperatures]
    return (1.0, *(t for t in resolved if t != 1.0))


# Ops without ignore_index read no label from a negative target, whichever label the caller's loss ignores.
NEGATIVE_TARGET = "negative for no label (target.masked_fill(target == ignore_index, -100) makes it so)"


class RowError(ValueError):
    """A fault in one of an op's flat rows (N, ...), whose message holds ``INDEX`` in place of the row's index."""

    INDEX = "<index>"

    def __init__(self, message: str, row: int) -> None:
        self.message, self.row = message, row
        super().__init__(message.replace(self.INDEX, str(row)))

    def in_shape(self, leading_shape: Sequence[int]) -> ValueError:
        """Returns the error that names the row by its index in the caller's shape."""
        row, index = self.row, []
        for size in reversed(leading_shape):
            row, place = divmod(row, size)
            index.insert(0, str(place))
        return ValueError(self.message.replace(self.INDEX, ", ".join(index)))


def raise_fault(fault: int, first_row: int = 0, no_label: str = "ignored", ids: str = "teacher.ids") -> None:
    """Raises the exception for the fault that a row kernel returned.

    Args:
        fault: 0 for no fault, else 4 * row + the number of the fault (``Fault`` in csrc/cpu/dispatch.h).
        first_row: Index of the kernel's row 0 in the caller's rows.
        no_label: Phrase for the targets that the op accepts although they are no label.
        ids: Name of the ids.
    """
    if fault == 0:
        return
    row = fault // 4 + first_row
    if fault % 4 == 1:
        raise RowError(
            f"target[{RowError.INDEX}] must be a label in [0, V) or {no_label}, got an index outside the vocabulary",
            row,
        )
    if fault % 4 == 2:
        advice = ": call teacher.validate(V) for details" if ids == "teacher.ids" else ""
        raise RowError(
            f"{ids}[{RowError.INDEX}] must ascend strictly inside [0, V), padding (-1) last, but an id is duplicated, "
            f"unsorted or outside the vocabulary{advice}",
            row,
        )
    raise MemoryError("a CPU kernel could not allocate its scratch row")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Checks hidden (..., D) against the lm_head's weight (V, D) and bias (V,)."""
    check_floating(hidden, "hidden")
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden must have shape (..., D) with D of at least 1, got {tuple(hidden.shape)}")
    check_tensor(weight, "weight")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}) to match hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}: cast one of them")
    check_same_device(weight, "weight", hidden, "hidden")
    if bias is not None:
        check_tensor(bias, "bias")
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bias must have shape ({weight.shape[0]},) to match weight, got {tuple(bias.shape)}")
        if bias.dtype != hidden.dtype:
            raise TypeError(f"bias must have hidden's dtype {hidden.dtype}, got {bias.dtype}: cast one of them")
        check_same_device(bias, "bias", hidden, "hidden")
