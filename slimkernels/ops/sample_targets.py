"""``sample_targets``: an unbiased sparse teacher made from draws with replacement."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops import _sample_options
from slimkernels.ops._library import (
    accumulation_dtype,
    check_kernels,
    define,
    flat_rows,
    operand_of,
    run_on_rows,
)
from slimkernels.sparse_logits import SparseLogits

# The definition of the draws. Version 1, until release 0.1.0, ran a Gumbel race for each draw.
DRAW_VERSION = 2


def sample_targets(
    logits: Tensor,
    rounds: int,
    seed: int | Tensor,
    *,
    position: int | Tensor,
    temperature: float = 1.0,
    target: Tensor | None = None,
) -> SparseLogits:
    """Keeps the distinct ids of ``rounds`` draws from softmax(logits / T), with ``logits = log(count / rounds)``.

    Equivalent, in distribution, to::

        drawn = torch.multinomial(torch.softmax(logits / temperature, -1), rounds, replacement=True)
        count = torch.zeros_like(logits).scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=logits.dtype))
        # ids where count > 0, logits = log(count / rounds), lse = 0

    A row is a complete distribution (lse 0), to be used at temperature 1. Its expectation over the draws is
    softmax(logits / T), so the expected gradient of ``slim_loss`` on it is the dense one; that of the K largest logits
    is biased.

    Draw r of a row is the inverse of the row's cumulative distribution at a uniform number of Philox-4x32-10 of (seed,
    position, r), so with one seed per row it does not depend on other rows. Weights, prefix sums and uniforms are
    integers, defined bit by bit: the CPU with any instruction set and number of threads, and CUDA, draw the same ids
    (``DRAW_VERSION`` names this definition). The work is two walks over the row, O(V + rounds log rounds), and one
    block of ids for every distinct block (on CUDA, for every draw) that is drawn from. Scratch memory is O(V / 256 +
    rounds) per thread, on CUDA O(V / 1024 + rounds) per row.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        rounds: Number of draws per row, at least 1.
        seed: int64, a number or a tensor (...). As in ``sample_logits``, a number is spread over the rows: equal rows
            draw independently. A tensor (...) is used as given.
        position: int64, a number, which is the same for all rows, or a tensor (...).
        temperature: T, positive.
        target: (...) int64 labels, or None. ``target_logit`` is then the label's exact log softmax(logits) at
            temperature 1; it is NaN for a negative label, which means no label.

    Returns:
        SparseLogits with K = min(rounds, V): ids (..., K) int32 ascending, padded with -1; logits (..., K), lse
        (..., 1), rest_lse (..., 1), which is -inf, and target_logit (...) float32 (float64 for float64 logits). A row
        with a NaN, or of ``-inf`` only, keeps no id, and its rest_lse is NaN. Logits of ``+inf`` share all of the mass
        equally.

    Raises:
        ValueError: rounds is below 1, the temperature is not positive, or a tensor has another shape or device. On CPU
            also a target at or above V; on CUDA raising would need a sync, so such a row keeps no id and its logits
            and target_logit are NaN.
        TypeError: A dtype is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x no backward x deterministic.

    Precision: every id's probability is within 2^-20 of softmax(logits / T), and half of the differences of all ids sum
    to less than 2^-18, for T between 2^-99 and 2^125 and rows whose largest and smallest finite logit differ by a
    finite number of their dtype (float32 for 16-bit logits). Ids of less than V 2^-62 of the largest probability are
    never drawn.

    References: Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870.

    >>> sparse = sample_targets(torch.tensor([[5.0, 5.0, -20.0]]), 64, 0, position=0)
    >>> sparse.ids[0, :3].tolist(), round(sparse.logits[0, :2].exp().sum().item(), 6)
    ([0, 1, -1], 1.0)
    """
    _checks.check_vocabulary(logits, "logits", "(..., V)")
    rounds = _checks.as_integer(rounds, "rounds")
    if not 1 <= rounds < 2**31:
        raise ValueError(f"rounds must be at least 1 and below 2**31, got {rounds}")
    temperature = _checks.as_temperature(temperature)
    leading_shape = logits.shape[:-1]
    seed, seeds = _sample_options.resolve_seed(seed, logits)
    position, positions = _sample_options.resolve_integer(position, "position", logits)
    if target is not None:
        _checks.check_target(target, leading_shape, logits, "logits")
        target = target.reshape(-1).contiguous()
    check_kernels(logits, "logits")
    rows = flat_rows(logits.detach())
    operand = operand_of([temperature], [1.0])
    given = temperature if operand is None else 1.0
    ids, log_shares, target_logit = run_on_rows(
        torch.ops.slimkernels.sample_targets,
        leading_shape,
        rows,
        rounds,
        seed,
        seeds,
        position,
        positions,
        given,
        target,
        operand,
    )
    return SparseLogits(
        ids=ids.reshape(*leading_shape, ids.shape[-1]),
        logits=log_shares.reshape(*leading_shape, ids.shape[-1]),
        lse=log_shares.new_zeros(*leading_shape, 1),
        # The draws represent the whole teacher, so no mass is left out. In a row without draws the rest is unknown.
        rest_lse=torch.where(ids[:, :1] < 0, math.nan, -math.inf).to(log_shares.dtype).reshape(*leading_shape, 1),
        target_logit=None if target is None else target_logit.reshape(leading_shape),
    )


def _sample_targets(logits: Tensor, rounds: int, seed, seeds, position, positions, temperature, target, operand):
    if operand is not None:
        (temperature,) = operand.tolist()
    options = (logits, rounds, seed, seeds, position, positions, temperature, target)
    ids, log_shares, target_logit = outputs = _fake(*options)
    wanted = None if target is None else target_logit
    fault = torch.ops.slimkernels.sample_targets_rows(*options, ids, log_shares, wanted)
    _checks.raise_fault(fault, no_label=_checks.NEGATIVE_TARGET)
    return outputs


def _fake(logits: Tensor, rounds: int, _seed, _seeds, _position, _positions, _temperature, target, *_operand):
    num_rows, vocab_size = logits.shape
    dtype = accumulation_dtype(logits.dtype)
    top_k = min(rounds, vocab_size)
    return (
        logits.new_empty(num_rows, top_k, dtype=torch.int32),
        logits.new_empty(num_rows, top_k, dtype=dtype),
        logits.new_empty(0 if target is None else num_rows, dtype=dtype),
    )


_OPTIONS = (
    "Tensor logits, SymInt rounds, SymInt seed, Tensor? seeds, SymInt position, Tensor? positions, float temperature,"
    " Tensor? target"
)
define(
    f"sample_targets_rows({_OPTIONS}, Tensor(a!) ids, Tensor(b!) log_shares, Tensor(c!)? target_logit) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.sample_targets",
)
define(
    f"sample_targets({_OPTIONS}, Tensor? operand) -> (Tensor ids, Tensor log_shares, Tensor target_logit)",
    fake=_fake,
    implementation=_sample_targets,
)
