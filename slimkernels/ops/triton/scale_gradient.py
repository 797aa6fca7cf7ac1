"""The Triton kernel behind ``scale_gradients``, which does nothing but one load where the factor is 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch

# Enough programs to fill any GPU, and few enough to end at once if there is nothing to do.
_MAX_PROGRAMS = 1024


@triton.jit
def scale_in_place_kernel(gradient_ptr, factor_ptr, numel, num_programs, BLOCK: tl.constexpr):
    """Scales blocks of the flat gradient, which the programs take in turn."""
    factor = tl.load(factor_ptr)
    if factor != 1:
        for block in range(tl.program_id(0), tl.cdiv(numel, BLOCK), num_programs):
            offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = offs < numel
            x = tl.load(gradient_ptr + offs, mask=mask)
            tl.store(gradient_ptr + offs, (x.to(factor.dtype) * factor).to(x.dtype), mask=mask)


def scale_in_place(gradient: Tensor, upstream: Tensor) -> None:
    """Multiplies a contiguous gradient by a scalar tensor, which stays on the device."""
    settings = launch.settings_of("scale_in_place", gradient.view(1, -1))
    num_programs = min(_MAX_PROGRAMS, triton.cdiv(gradient.numel(), settings.block))
    launch.run(
        scale_in_place_kernel,
        num_programs,
        settings,
        gradient,
        gradient,
        upstream,
        gradient.numel(),
        num_programs,
        BLOCK=settings.block,
    )
