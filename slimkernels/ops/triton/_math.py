"""Arithmetic of the Triton kernels: float64 arguments, accurate logarithms, integers that sort like floats."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double(argument):
    """Converts a float argument to float64; without a ``tl.float64`` in the kernel's signature it arrives rounded."""
    return tl.full((), argument, tl.float64)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """Converts to a wider dtype exactly. The interpreter of Triton 3.9 flushes bfloat16 denormals in ``x.to()``."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = x.to(dtype)
    return wide


@triton.jit
def order_keys(x):
    """Maps floats to signed integers that sort like them (16-bit floats to int32): -0.0 equals +0.0, NaN is largest."""
    if x.dtype.primitive_bitwidth == 64:
        bits = x.to(tl.int64, bitcast=True)
        keys = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        largest = 0x7FFFFFFFFFFFFFFF
    elif x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        largest = 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFF)
        largest = 0x7FFF
    wide = x.to(tl.float32) if x.dtype.primitive_bitwidth < 32 else x
    # Only -0.0 has the key -1. Comparing x with 0 would also match denormals that are flushed to 0.
    return tl.where(wide != wide, largest, tl.where(keys == -1, 0, keys))


@triton.jit
def value_of_key(key, dtype: tl.constexpr):
    """Inverts ``order_keys``: the same map of the bits undoes itself. Keys above that of +inf become NaN."""
    if dtype.primitive_bitwidth == 64:
        bits = key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)
    elif dtype.primitive_bitwidth == 32:
        bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    else:
        bits = (key ^ ((key >> 31) & 0x7FFF)).to(tl.int16)
    return bits.to(dtype, bitcast=True)


@triton.jit
def log_add_exp(a, b):
    """Computes log(exp(a) + exp(b)); -inf if both are -inf."""
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    return tl.where(high == float("-inf"), high, high + log1p(tl.exp(tl.where(high == float("inf"), 0.0, low - high))))


@triton.jit
def log1p(x):
    """Computes log(1 + x) for x > -1, accurately for small x (Kahan's correction; Triton has no log1p)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def expm1(x):
    """Computes exp(x) - 1, accurately for small x (the same correction as in ``log1p``)."""
    u = tl.exp(x)
    middle = (u != 1) & (u - 1 != -1) & (u != float("inf"))
    safe = tl.where(middle, u, 2.0)
    return tl.where(middle, (safe - 1) * x / tl.log(safe), tl.where(u == 1, x, u - 1))


@triton.jit
def log1m_exp(x):
    """Computes log(1 - exp(x)) without cancellation; -inf for x >= 0."""
    near = x > -0.6931471805599453
    small = log1p(-tl.exp(tl.where(near, -1.0, x)))
    large = tl.log(-expm1(tl.where(near & (x < 0), x, -1.0)))
    return tl.where(x >= 0, float("-inf"), tl.where(near, large, small))
