"""``sample_logits`` and ``sample_distinct``: draw tokens from the truncated softmax, reproducibly for every row."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops import _sample_options
from slimkernels.ops._library import (
    accumulation_dtype,
    check_kernels,
    define,
    flat_rows,
    run_on_rows,
)


class Sampled(NamedTuple):
    """Tokens that a sampling op drew, without gradient.

    Attributes:
        token: (...) int64; (..., m) from ``sample_distinct``. -1 if no id was left to draw.
        logprob: Natural log-probability of the token under softmax(logits), in the shape of ``token``; float32
            (float64 for float64 logits), like the fields below.
        truncated_logprob: Natural log-probability of the token under the distribution drawn from: softmax(logits / T)
            renormalised over the ids that the truncation keeps.
        entropy: (...) Entropy of softmax(logits) in nats.
    """

    token: Tensor
    logprob: Tensor
    truncated_logprob: Tensor
    entropy: Tensor


def sample_logits(
    logits: Tensor,
    *,
    seed: int | Tensor,
    position: int | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Sampled:
    """Draws ``argmax_v(truncated_logprob_v + gumbel(seed, position, v))`` from every row.

    Equivalent, in distribution, to::

        scores = MinP(min_p)(TopP(top_p)(TopK(top_k)(logits / temperature)))  # -inf for ids that are cut
        truncated = torch.log_softmax(scores, -1)
        token = torch.multinomial(truncated.exp(), 1)
        logprob = torch.log_softmax(logits, -1).gather(-1, token)
        truncated_logprob = truncated.gather(-1, token)

    Each truncation keeps either all or none of the ids that share a logit. The noise is Philox-4x32-10 of (seed,
    position, id), so a row's draw depends on its own logits, options, seed and position only, not on the number of
    threads, and with one seed per row not on the rest of the batch either. A row is never sorted; it is read
    twice, or once by the CUDA C++ kernel, which keeps it in shared memory. That kernel serves GPUs where it is built,
    and has run on an emulated one only; Triton serves AMD GPUs, float64, machines without nvcc, more than 32 draws, and
    several without a truncation. Scratch memory is O(V) per thread; in Triton it is O(V) for each of a few programs per
    multiprocessor, in CUDA C++ there is none.

    A logit of ``-inf`` is never drawn. Logits of ``+inf`` share all of the mass equally, which is the limit of ever
    larger ones. A row with a NaN, or of ``-inf`` only, has no distribution: its token is -1, its other fields are NaN.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        seed: int64, a number or a tensor (...). A number, or a tensor (), is spread over the rows: row 0 takes it as it
            is, and row n of the flattened call the first 64 bits of Philox-4x32-10 with key ``seed`` and counter
            (n, 2^32 - 1, 0, 0), so equal rows draw independently. A tensor (...) is used as given: pass one where rows
            move between batches, and ``torch.full(logits.shape[:-1], seed)`` for the same noise in all rows.
        position: int64, a number, which is the same for all rows, or a tensor (...). Give every step of a text its own:
            calls with the same seed and position share their noise, as do rows.
        temperature: T, at least 0, a number or a floating-point tensor (...). 0 takes the argmax, the lowest id on a
            tie; the other options then have no effect.
        top_k: Number of ids that top-k keeps, and all that tie with the last of them; a number or an int64 tensor
            (...). 0, or V and more, keeps every id.
        top_p: Mass of the nucleus, in [0, 1], a number or a tensor (...). After top-k and renormalisation, an id is
            kept if all strictly likelier ids sum to less than this; the likeliest is always kept. 1 keeps every id.
        min_p: Smallest ratio to the likeliest id's probability that is kept, in [0, 1], a number or a tensor (...). 0
            keeps every id.

    Returns:
        Sampled(token, logprob, truncated_logprob, entropy), each (...).

    Raises:
        ValueError: An option is outside its range, or a tensor has another shape or device. Values inside tensors are
            checked on CPU only: on CUDA raising would need a sync, so such a row gets token -1 and NaN.
        TypeError: A dtype is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x no backward x deterministic.

    Precision: perturbed scores are compared in float64; sums are accumulated in float64 over float32 blocks of 1024. An
    id whose likelier ids sum to top_p within float32 rounding may be kept or cut.

    References: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Holtzman et al. 2020,
    arXiv 1904.09751 (top-p); Nguyen et al. 2024, arXiv 2407.01082 (min-p).

    >>> logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 2.0]])
    >>> sample_logits(logits, seed=0, position=torch.arange(2), temperature=0).token.tolist()
    [1, 0]
    >>> sample_logits(logits, seed=0, position=torch.arange(2), top_k=1).truncated_logprob.exp().tolist()
    [1.0, 0.5]
    >>> sample_logits(torch.zeros(6, 1000), seed=0, position=0).token.unique().numel()
    6
    """
    outputs = _sample(logits, 1, seed, position, temperature, top_k, top_p, min_p)
    return Sampled(*(field.reshape(logits.shape[:-1]) for field in outputs))


def sample_distinct(
    logits: Tensor,
    m: int,
    *,
    seed: int | Tensor,
    position: int | Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Sampled:
    """Draws the m ids with the largest ``truncated_logprob_v + gumbel(seed, position, v)`` of every row, largest first.

    Equivalent, in distribution, to m draws without replacement::

        token = torch.multinomial(truncated.exp(), m, replacement=False)  # truncated as in sample_logits

    The first id is the one that ``sample_logits`` draws. Log-probabilities are those of a single draw, not conditional
    on the earlier ids. Scratch memory is O(V + m) per thread.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any stride.
        m: Number of draws per row, at least 1.
        seed: Same as in ``sample_logits``, like every option below.
        position: See ``sample_logits``.
        temperature: See ``sample_logits``.
        top_k: See ``sample_logits``.
        top_p: See ``sample_logits``.
        min_p: See ``sample_logits``.

    Returns:
        Sampled with token, logprob and truncated_logprob (..., m), entropy (...). A row with fewer than m ids left
        (temperature 0 leaves one) ends in tokens -1 with log-probabilities -inf.

    Raises:
        ValueError: m is below 1, or as in ``sample_logits``.
        TypeError: A dtype is not supported.

    Supports: cpu and cuda x (float32, bfloat16, float16, float64) x no backward x deterministic.

    Precision: the same as that of ``sample_logits``.

    References: Kool et al. 2019, "Stochastic beams and where to find them", arXiv 1903.06059 (Gumbel top-k).

    >>> sample_distinct(torch.zeros(1, 3), 4, seed=0, position=0).token.sort().values.tolist()
    [[-1, 0, 1, 2]]
    """
    m = _checks.as_integer(m, "m")
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    *drawn, entropy = _sample(logits, m, seed, position, temperature, top_k, top_p, min_p)
    leading_shape = logits.shape[:-1]
    token, logprob, truncated_logprob = (field.reshape(*leading_shape, m) for field in drawn)
    return Sampled(token, logprob, truncated_logprob, entropy.reshape(leading_shape))


def _sample(logits: Tensor, m: int, seed, position, temperature, top_k, top_p, min_p):
    _checks.check_vocabulary(logits, "logits", "(..., V)")
    options = (
        *_sample_options.resolve_seed(seed, logits),
        *_sample_options.resolve_integer(position, "position", logits),
        *_sample_options.resolve_float(temperature, "temperature", logits),
        *_sample_options.resolve_top_k(top_k, logits),
        *_sample_options.resolve_float(top_p, "top_p", logits),
        *_sample_options.resolve_float(min_p, "min_p", logits),
    )
    check_kernels(logits, "logits")
    rows = flat_rows(logits.detach())
    return run_on_rows(torch.ops.slimkernels.sample_logits, logits.shape[:-1], rows, m, *options)


def _sample_logits(logits: Tensor, m: int, *options):
    _, _, _, _, _, temperatures, _, top_ks, _, top_ps, _, min_ps = options
    if logits.device.type == "cpu":  # on CUDA this would need a sync, so the kernel checks instead
        _sample_options.check_values(temperatures, "temperature")
        _sample_options.check_values(top_ks, "top_k")
        _sample_options.check_values(top_ps, "top_p")
        _sample_options.check_values(min_ps, "min_p")
    outputs = _fake(logits, m)
    _checks.raise_fault(torch.ops.slimkernels.sample_logits_rows(logits, m, *options, *outputs))
    return outputs


def _fake(logits: Tensor, m: int, *_options):
    num_rows = logits.shape[0]
    dtype = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty(num_rows, m, dtype=torch.int64),
        logits.new_empty(num_rows, m, dtype=dtype),
        logits.new_empty(num_rows, m, dtype=dtype),
        logits.new_empty(num_rows, dtype=dtype),
    )


# Every option is a pair: a number, and a tensor (N,) that replaces it if given.
_OPTIONS = (
    "Tensor logits, SymInt m, SymInt seed, Tensor? seeds, SymInt position, Tensor? positions, float temperature,"
    " Tensor? temperatures, SymInt top_k, Tensor? top_ks, float top_p, Tensor? top_ps, float min_p, Tensor? min_ps"
)
define(
    f"sample_logits_rows({_OPTIONS}, Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) truncated_logprob,"
    " Tensor(d!) entropy) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.sample_logits",
)
define(
    f"sample_logits({_OPTIONS}) -> (Tensor token, Tensor logprob, Tensor truncated_logprob, Tensor entropy)",
    fake=_fake,
    implementation=_sample_logits,
)
