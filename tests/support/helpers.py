"""Helpers for tests of the ops: problems, hostile rows, and the accuracy that a result must have."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from slimkernels import SparseLogits, reference, slim_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Every legal pair. All divergences but the first two need both distributions to sum to 1.
RESTS_AND_DIVERGENCES = tuple(
    (rest, divergence)
    for rest in ("renorm", "zero", "ghost", "zero_logit", "renorm_both")
    for divergence in reference.DIVERGENCES
    if divergence in ("forward_kl", "soft_ce") or rest in ("ghost", "renorm_both")
)

# Error allowed on top of twice that of torch in the same dtype, relative to the largest entry of the truth: a few units
# in the last place of the dtype of the result. In float64 torch is the truth itself, so the floor is the whole
# allowance; it covers the error of an ill-conditioned tail 1 - a.
FLOORS = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_FACTOR = 2.0


def assert_as_accurate(
    actual: Tensor,
    same_dtype_torch: Tensor,
    truth: Tensor,
    floor: float | None = None,
    *,
    at_least: float = 0.0,
) -> None:
    """Asserts that our error is at most twice that of torch in the same dtype plus a floor, both against float64.

    Infinities and NaN must be where the truth has them; errors are measured on the other entries. ``floor`` is relative
    to the largest magnitude of the truth, or to ``at_least`` if that is larger, for a truth that is a small difference
    of large terms. It defaults to the entry of ``FLOORS`` for the dtype of ``actual``.
    """
    assert actual.dtype == same_dtype_torch.dtype, f"dtype {actual.dtype}, torch has {same_dtype_torch.dtype}"
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    floor = FLOORS[actual.dtype] if floor is None else floor
    wide, torch_wide = actual.detach().double(), same_dtype_torch.detach().double()
    truth = truth.detach().double()
    finite = truth.isfinite()
    torch.testing.assert_close(wide[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    ours = (wide - truth)[finite].abs()
    theirs = (torch_wide - truth)[finite].abs().nan_to_num(0.0, posinf=0.0)
    scale = truth[finite].abs().max().clamp(min=at_least)
    bound = _FACTOR * theirs.max() + floor * scale
    assert ours.max() <= bound, (
        f"error {ours.max():.3e} of {scale:.3e}, allowed {bound:.3e} (torch in this dtype: {theirs.max():.3e})"
    )


def num_drawn(number: int, interpreted: int) -> int:
    """Returns the number of draws of a test: ``interpreted`` in Triton's interpreter or on the emulated GPU.

    Those take about 0.1 s for each.
    """
    is_slow = os.environ.get("TRITON_INTERPRET") == "1" or "EMULATED_SAMPLE_LOGITS" in os.environ
    return interpreted if is_slow else number


class Problem(NamedTuple):
    """A student's logits (N, V), labels (N,) some of which are ignored, and a teacher (N, K)."""

    logits: Tensor
    target: Tensor
    teacher: SparseLogits


def random_problem(
    num_rows: int = 7,
    vocab_size: int = 203,
    top_k: int = 13,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    seed: int = 0,
    ignored: tuple[int, ...] = (2,),
    ragged: bool = False,
    with_target_logit: bool = True,
) -> Problem:
    """Draws a problem with a peaked teacher and a student close to it, as in training; ``ragged`` pads some rows.

    The teacher's logits have the dtype of the student's, and their lse is the exact one of the rounded logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_logits = (3.0 * randn(num_rows, vocab_size)).to(dtype)
    logits = (0.6 * teacher_logits.double() + randn(num_rows, vocab_size)).to(dtype)
    target = torch.randint(vocab_size, (num_rows,), generator=generator)
    # Every other label is the teacher's favourite, so that both small and large weights w occur.
    target[::2] = teacher_logits[::2].argmax(-1) if num_rows else target[::2]
    temperatures = (1.0,) if temperature == 1.0 else (1.0, temperature)
    teacher = reference.topk_logits(teacher_logits, top_k, target=target, temperatures=temperatures)
    if ragged:
        keep = torch.arange(top_k) < torch.randint(1, top_k + 1, (num_rows, 1), generator=generator)
        cut = teacher.logits.to(teacher.lse.dtype).masked_fill(keep, -math.inf)
        cut_lse = torch.stack([torch.logsumexp(cut / t, -1) for t in temperatures], -1)
        # The NaN at padding must never be read.
        teacher = dataclasses.replace(
            teacher,
            ids=teacher.ids.masked_fill(~keep, -1),
            logits=teacher.logits.masked_fill(~keep, math.nan),
            rest_lse=torch.logaddexp(teacher.rest_lse, cut_lse),
        )
    if not with_target_logit:
        # A record of the first releases.
        teacher = SparseLogits(teacher.ids, teacher.logits, teacher.lse, temperatures)
    for row in ignored:
        if row < num_rows:
            target[row] = -100
    return Problem(logits, target, teacher)


def to_dtype(teacher: SparseLogits, dtype: torch.dtype) -> SparseLogits:
    """Converts the floating-point fields of a record to another dtype."""
    fields = {name: getattr(teacher, name) for name in ("logits", "lse", "target_logit", "rest_lse")}
    return dataclasses.replace(
        teacher, **{name: field.to(dtype) for name, field in fields.items() if field is not None}
    )


def loss_and_grads(function: Callable, operands: tuple[Tensor, ...], upstream: Tensor | float, /, *args, **options):
    """Runs ``function(*operands, *args, **options)`` and its backward; returns the SlimLoss and the gradients."""
    leaves = tuple(operand.detach().clone().requires_grad_() for operand in operands)
    out = function(*leaves, *args, **options)
    grads = torch.autograd.grad(out.loss, leaves, torch.as_tensor(upstream).to(out.loss).expand(out.loss.shape))
    return out, grads


def assert_fields_and_grads_as_accurate(actual: tuple, same_dtype_torch: tuple, truth: tuple) -> None:
    """Applies ``assert_as_accurate`` to every field and gradient; each argument is (named tuple, gradients)."""
    for name in truth[0]._fields:
        with explain(name):
            if getattr(truth[0], name) is None:
                assert getattr(actual[0], name) is None
                continue
            # The fields are sums of terms of order 1, even if the sum itself is small.
            fields = (getattr(out, name) for out, _ in (actual, same_dtype_torch, truth))
            assert_as_accurate(*fields, at_least=1.0)
    for index, grads in enumerate(zip(actual[1], same_dtype_torch[1], truth[1], strict=True)):
        with explain(f"gradient of operand {index}"):
            assert_as_accurate(*grads)


def assert_slim_loss_matches(
    function: Callable,
    same_dtype_torch: Callable,
    truth: Callable,
    operands: tuple[Tensor, ...],
    target: Tensor,
    teacher: SparseLogits | None,
    *,
    upstream: Tensor | float = 1.0,
    **options,
) -> None:
    """Asserts that every field of the loss and every operand's gradient is accurate, by ``assert_as_accurate``.

    The functions take (*operands, target, teacher, **options); ``truth`` gets everything in float64.
    """
    actual = loss_and_grads(function, operands, upstream, target, teacher, **options)
    theirs = loss_and_grads(same_dtype_torch, operands, upstream, target, teacher, **options)
    wide = tuple(operand.double() for operand in operands)
    teacher = None if teacher is None else to_dtype(teacher, torch.float64)
    expected = loss_and_grads(truth, wide, upstream, target, teacher, **options)
    assert_fields_and_grads_as_accurate(actual, theirs, expected)
    ignored = target == options.get("ignore_index", -100)
    assert not actual[1][0][ignored].any(), "an ignored row has a gradient"


def assert_slim_loss_of_rows(logits: Tensor, target: Tensor, teacher: SparseLogits | None, **options) -> None:
    """Asserts that ``slim_loss`` matches the reference in the same dtype, both against the reference in float64."""
    functions = slim_loss, reference.slim_loss, reference.slim_loss
    assert_slim_loss_matches(*functions, (logits,), target, teacher, **options)


@contextlib.contextmanager
def explain(what: str):
    """Adds ``what`` to the message of an assertion that fails inside."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error


def assert_same_bits(actual: Tensor | Sequence | None, expected: Tensor | Sequence | None) -> None:
    """Asserts that two tensors, or sequences of tensors and None, are equal bit for bit; all NaN count as equal."""
    if actual is None or expected is None:
        assert actual is expected
        return
    if not isinstance(actual, Tensor):
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    one, other = (tensor.detach().masked_fill(nan, 0).contiguous() for tensor in (actual, expected))
    assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def assert_rows_match(actual: SparseLogits, expected: SparseLogits, truth: SparseLogits, logits: Tensor) -> None:
    """Asserts that ids and logits are exact, and log-sum-exps as accurate as torch's relative to their own row.

    The exponentials of the rest may be taken relative to the row's largest logit, if that is finite, and the largest
    of them may be rounded; the sum of thousands of equal numbers errs by some units in the last place.

    Args:
        actual: The rows in question.
        expected: Those of the reference in the dtype of ``logits``.
        truth: Those of the reference in float64.
        logits: (..., V).
    """
    assert torch.equal(actual.ids, expected.ids)
    assert_same_bits(actual.logits, expected.logits)
    assert actual.temperatures == expected.temperatures
    wide = logits.double()
    # One more column takes the marks of the padding.
    ids = expected.ids.long().masked_fill(expected.ids < 0, wide.shape[-1])
    kept = torch.zeros(*wide.shape[:-1], wide.shape[-1] + 1, dtype=torch.bool).scatter(-1, ids, True)[..., :-1]
    peak = 1.0 + wide.amax(-1, keepdim=True).nan_to_num(0.0, 0.0, 0.0).abs()
    for name, entries, level, units in (
        ("lse", wide, 0.0, 1),
        ("rest_lse", wide.masked_fill(kept, -math.inf), peak, 4),
    ):
        wanted, ours, theirs = (getattr(each, name) for each in (truth, actual, expected))
        assert ours.dtype == theirs.dtype
        scale = wanted.abs() + ((entries.amax(-1, keepdim=True).abs() + level) / torch.tensor(actual.temperatures))
        floor = units * torch.finfo(ours.dtype).eps * scale
        finite = wanted.isfinite()
        torch.testing.assert_close(
            ours.double()[~finite], wanted[~finite], rtol=0, atol=0, equal_nan=True, check_dtype=False
        )
        error, torch_error = ((each.double() - wanted).abs() for each in (ours, theirs))
        assert (error <= 2.0 * torch_error + floor)[finite].all(), name
    if expected.target_logit is None:
        assert actual.target_logit is None
    else:
        assert_same_bits(actual.target_logit, expected.target_logit)


def sparse_fields(sparse: SparseLogits) -> list[Tensor]:
    """Returns the tensors of a record."""
    fields = [sparse.ids, sparse.logits, sparse.lse, sparse.target_logit, sparse.rest_lse]
    return [field for field in fields if field is not None]


def row_strided(rows: Tensor) -> Tensor:
    """Returns the same rows (N, V) as a view of wider rows that hold NaN."""
    wide = rows.new_full((rows.shape[0], rows.shape[1] + 13), math.nan)
    wide[:, 5 : 5 + rows.shape[1]] = rows
    return wide[:, 5 : 5 + rows.shape[1]]


def misaligned(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy that starts one element after an aligned address."""
    flat = tensor.new_empty(tensor.numel() + 1)
    flat[1:] = tensor.reshape(-1)
    return flat[1:].view(tensor.shape)


def column_major(rows: Tensor) -> Tensor:
    """Returns the same values with the elements of a column adjacent in memory."""
    return rows.t().contiguous().t()


LAYOUTS = {"row strided": row_strided, "misaligned": misaligned, "column major": column_major}


class recorded_ops(TorchFunctionMode):  # noqa: N801 -- used like a function
    """A context that records every call of an operator of this package, for ``torch.library.opcheck``."""

    def __enter__(self):
        self.calls: list[tuple] = []
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if isinstance(func, torch._ops.OpOverloadPacket) and str(func).startswith("slimkernels."):
            self.calls.append((func.default, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def opcheck_calls_of(function: Callable, *args, **options) -> list[str]:
    """Runs ``torch.library.opcheck`` on every operator that ``function`` calls; returns their names."""
    with recorded_ops() as mode:
        function(*args, **options)
    for op, op_args, op_kwargs in mode.calls:
        # The public functions pass views of their arguments, but opcheck reads .grad and needs leaves.
        leaves = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in op_args]
        torch.library.opcheck(op, leaves, op_kwargs)
    return [op.name() for op, _, _ in mode.calls]


def hostile_rows(vocab_size: int, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Returns rows (V,) by name on which a faulty top-k or log-sum-exp is most likely to fail."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    index = torch.arange(vocab_size)

    def choose(share: float) -> Tensor:
        return torch.rand(vocab_size, generator=generator) < share

    tiny = torch.finfo(dtype).tiny
    rows = {
        "all equal": torch.full((vocab_size,), 0.75),
        "all zero": torch.zeros(vocab_size),
        "two valued": torch.where(choose(0.5), 2.0, -1.0),
        "two valued, few large": torch.where(choose(0.01), 2.0, -1.0),
        "one binade": 1.0 + torch.rand(vocab_size, generator=generator, dtype=torch.float64),
        "one negative binade": -1.0 - torch.rand(vocab_size, generator=generator, dtype=torch.float64),
        "some -inf": noise.masked_fill(choose(0.5), -math.inf),
        "few finite": noise.masked_fill(index % (vocab_size // 2 + 1) != 0, -math.inf),
        "one finite, last": noise.masked_fill(index != vocab_size - 1, -math.inf),
        "all -inf": torch.full((vocab_size,), -math.inf),
        "one +inf": noise.masked_fill(index == vocab_size // 2, math.inf),
        "many +inf": noise.masked_fill(choose(0.5), math.inf),
        "denormal": tiny / 4 * noise,
        "signed zeros": torch.where(choose(0.5), 0.0, -0.0),
        "signed zeros among negatives": torch.where(choose(0.5), -noise.abs(), torch.where(choose(0.5), 0.0, -0.0)),
        "one NaN": noise.masked_fill(index == vocab_size // 3, math.nan),
        "many NaN": noise.masked_fill(choose(0.5), math.nan),
        "NaN and infinities": noise.masked_fill(choose(0.1), math.nan)
        .masked_fill(choose(0.1), math.inf)
        .masked_fill(choose(0.3), -math.inf),
        "rising": noise.sort().values,
        "falling": noise.sort(descending=True).values,
        "periodic": (index % 7).double(),
        "period of a vector": (index % 16).double(),
        "large at the end": torch.where(index >= vocab_size - vocab_size // 8, 10.0, 0.0) + noise,
        "one outlier": noise.masked_fill(index == vocab_size - 1, 1e4),
        # Patterns that a sample of the row at a fixed stride sees completely, or misses completely.
        "comb of 16": torch.where(index % 16 == 0, 5.0, 0.0) + 0.1 * noise,
        "comb of 64": torch.where(index % 64 == 0, 5.0, 0.0) + 0.1 * noise,
        "low comb of 64": torch.where(index % 64 == 0, -5.0, 0.0) + 0.1 * noise,
        "comb of 63": torch.where(index % 63 == 0, 5.0, 0.0),
        "large magnitude": 1e4 * noise,
        "heavy tail": noise**5,
    }
    return {name: row.to(dtype) for name, row in rows.items()}


def hand_worked_problem() -> Problem:
    """Returns a problem of one row that can be worked by hand: V = 4, ids {0, 1} kept, label 2.

    Teacher (8, 4, 2, 2) / 16 = (1/2, 1/4, 1/8, 1/8), so a = 3/4 and t_y = 1/8; its raw logits are ln 8, ln 4, ln 2,
    ln 2. Student (1/8, 1/2, 1/4, 1/8), so P = 5/8 and s_y = 1/4; its logits are shifted by 1, so lse = 1.
    """
    student = torch.tensor([[1 / 8, 1 / 2, 1 / 4, 1 / 8]], dtype=torch.float64).log() + 1.0
    teacher = SparseLogits(
        ids=torch.tensor([[0, 1]], dtype=torch.int32),
        logits=torch.tensor([[math.log(8.0), math.log(4.0)]], dtype=torch.float64),
        lse=torch.tensor([[math.log(16.0)]], dtype=torch.float64),
        target_logit=torch.tensor([math.log(2.0)], dtype=torch.float64),
    )
    return Problem(student, torch.tensor([2]), teacher)


_LN = math.log
# (rest, divergence, options of the divergence, D of hand_worked_problem() at T = 1)
HAND_WORKED = (
    # q / a = (2/3, 1/3) against p = (1/8, 1/2): ratios 16/3 and 2/3.
    ("renorm", "forward_kl", {}, 2 / 3 * _LN(16 / 3) + 1 / 3 * _LN(2 / 3)),
    ("renorm", "soft_ce", {}, 2 / 3 * _LN(8) + 1 / 3 * _LN(2)),
    # q = (1/2, 1/4): ratios 4 and 1/2, so ln 2 - (ln 2) / 4.
    ("zero", "forward_kl", {}, 3 / 4 * _LN(2)),
    ("zero", "soft_ce", {}, 1 / 2 * _LN(8) + 1 / 4 * _LN(2)),
    # One more outcome: 1/4 against 3/8.
    ("ghost", "forward_kl", {}, 3 / 4 * _LN(2) + 1 / 4 * _LN(2 / 3)),
    ("ghost", "soft_ce", {}, 1 / 2 * _LN(8) + 1 / 4 * _LN(2) + 1 / 4 * _LN(8 / 3)),
    # p / q = (1/4, 2, 3/2) weighed with p = (1/8, 1/2, 3/8).
    ("ghost", "reverse_kl", {}, 1 / 8 * _LN(1 / 4) + 1 / 2 * _LN(2) + 3 / 8 * _LN(3 / 2)),
    # m = (q + p) / 2 = (5/16, 3/8, 5/16): q / m = (8/5, 2/3, 4/5), p / m = (2/5, 4/3, 6/5).
    (
        "ghost",
        "jsd",
        {},
        (1 / 2 * _LN(8 / 5) + 1 / 4 * _LN(2 / 3) + 1 / 4 * _LN(4 / 5)) / 2
        + (1 / 8 * _LN(2 / 5) + 1 / 2 * _LN(4 / 3) + 3 / 8 * _LN(6 / 5)) / 2,
    ),
    # beta = 1/4: m = q / 4 + 3 p / 4 = (7/32, 7/16, 11/32): q / m = (16/7, 4/7, 8/11), p / m = (4/7, 8/7, 12/11).
    (
        "ghost",
        "jsd",
        {"beta": 0.25},
        (1 / 2 * _LN(16 / 7) + 1 / 4 * _LN(4 / 7) + 1 / 4 * _LN(8 / 11)) / 4
        + 3 * (1 / 8 * _LN(4 / 7) + 1 / 2 * _LN(8 / 7) + 3 / 8 * _LN(12 / 11)) / 4,
    ),
    ("ghost", "skew_kl", {"alpha": 0.25}, 1 / 2 * _LN(16 / 7) + 1 / 4 * _LN(4 / 7) + 1 / 4 * _LN(8 / 11)),
    # alpha = 1/10: m = (13/80, 19/40, 29/80): q / m = (40/13, 10/19, 20/29).
    ("ghost", "skew_kl", {}, 1 / 2 * _LN(40 / 13) + 1 / 4 * _LN(10 / 19) + 1 / 4 * _LN(20 / 29)),
    # m = p / 4 + 3 q / 4 = (13/32, 5/16, 9/32): p / m = (4/13, 8/5, 4/3).
    ("ghost", "skew_reverse_kl", {"alpha": 0.25}, 1 / 8 * _LN(4 / 13) + 1 / 2 * _LN(8 / 5) + 3 / 8 * _LN(4 / 3)),
    # |q - p| = (3/8, 1/4, 1/8)
    ("ghost", "tvd", {}, 3 / 8),
    # Half the sum of (q - p)^2, and the limits that are the two KLs.
    ("ghost", "ab", {"alpha": 1.0, "beta": 1.0}, (9 / 64 + 4 / 64 + 1 / 64) / 2),
    ("ghost", "ab", {"alpha": 1, "beta": 0}, 3 / 4 * _LN(2) + 1 / 4 * _LN(2 / 3)),
    ("ghost", "ab", {"alpha": 0, "beta": 1}, 1 / 8 * _LN(1 / 4) + 1 / 2 * _LN(2) + 3 / 8 * _LN(3 / 2)),
    # alpha = beta = 1/2: 4 - 4 sqrt(q p), with q p = (1/16, 1/8, 3/32).
    ("ghost", "ab", {"alpha": 0.5, "beta": 0.5}, 4 - 4 * (1 / 4 + (1 / 8) ** 0.5 + (3 / 32) ** 0.5)),
    # H(q) = 3/2 ln 2 = 1.04: below it the forward KL counts, here with a factor of 2.
    (
        "ghost",
        "gated",
        {"forward_weight": 2.0, "entropy_threshold": 1.03},
        1 / 8 * _LN(1 / 4) + 1 / 2 * _LN(2) + 3 / 8 * _LN(3 / 2) + 2 * (3 / 4 * _LN(2) + 1 / 4 * _LN(2 / 3)),
    ),
    (
        "ghost",
        "gated",
        {"entropy_threshold": 1.05},
        1 / 8 * _LN(1 / 4) + 1 / 2 * _LN(2) + 3 / 8 * _LN(3 / 2),
    ),
    # Half of the teacher: q^(1/2) p^(1/2) = (2, 8^(1/2), 6^(1/2)) / 8, and tvd against p.
    (
        "ghost",
        "tvd",
        {"teacher_blend": 0.5},
        sum(abs(b / (2 + 8**0.5 + 6**0.5) - p) for b, p in ((2, 1 / 8), (8**0.5, 1 / 2), (6**0.5, 3 / 8))) / 2,
    ),
    # The bucket's share is 1/4 ln(2/3) - 1/4 + 3/8.
    (
        "ghost",
        "forward_kl",
        {"tail_weight": 3.0},
        3 / 4 * _LN(2) + 1 / 4 * _LN(2 / 3) + 2 * (1 / 4 * _LN(2 / 3) + 1 / 8),
    ),
    ("ghost", "reverse_kl", {"tail_weight": 0.0}, 1 / 8 * _LN(1 / 4) + 1 / 2 * _LN(2) - 5 / 8 + 3 / 4),
    # exp of the filled row is (8, 4, 1, 1), Z = 14, against (1/8, 1/2, 1/4, 1/8).
    (
        "zero_logit",
        "forward_kl",
        {},
        4 / 7 * _LN(32 / 7) + 2 / 7 * _LN(4 / 7) + 1 / 14 * _LN(2 / 7) + 1 / 14 * _LN(4 / 7),
    ),
    ("zero_logit", "soft_ce", {}, 4 / 7 * _LN(8) + 2 / 7 * _LN(2) + 1 / 14 * _LN(4) + 1 / 14 * _LN(8)),
    # (2/3, 1/3) against p / P = (1/5, 4/5): ratios 10/3 and 5/12.
    ("renorm_both", "forward_kl", {}, 2 / 3 * _LN(10 / 3) + 1 / 3 * _LN(5 / 12)),
    ("renorm_both", "soft_ce", {}, 2 / 3 * _LN(5) + 1 / 3 * _LN(5 / 4)),
    ("renorm_both", "reverse_kl", {}, 1 / 5 * _LN(3 / 10) + 4 / 5 * _LN(12 / 5)),
    # m = (13/30, 17/30): q / m = (20/13, 10/17), p / m = (6/13, 24/17).
    (
        "renorm_both",
        "jsd",
        {},
        (2 / 3 * _LN(20 / 13) + 1 / 3 * _LN(10 / 17)) / 2 + (1 / 5 * _LN(6 / 13) + 4 / 5 * _LN(24 / 17)) / 2,
    ),
    ("renorm_both", "skew_kl", {"alpha": 0.5}, 2 / 3 * _LN(20 / 13) + 1 / 3 * _LN(10 / 17)),
    ("renorm_both", "skew_reverse_kl", {"alpha": 0.5}, 1 / 5 * _LN(6 / 13) + 4 / 5 * _LN(24 / 17)),
    ("renorm_both", "tvd", {}, 7 / 15),
    ("renorm_both", "ab", {"alpha": 1.0, "beta": 1.0}, 49 / 225),
    # The entropy is that of the outcomes of "ghost" here too.
    (
        "renorm_both",
        "gated",
        {"entropy_threshold": 1.03},
        1 / 5 * _LN(3 / 10) + 4 / 5 * _LN(12 / 5) + 2 / 3 * _LN(10 / 3) + 1 / 3 * _LN(5 / 12),
    ),
    # (2/3)^(1/2) (1/5)^(1/2) against (1/3)^(1/2) (4/5)^(1/2) is 1 : 2^(1/2).
    ("renorm_both", "tvd", {"teacher_blend": 0.5}, 1 / (1 + 2**0.5) - 1 / 5),
)

# The label's ratio is t_y / s_y = (1/8) / (1/4) = 1/2.
HAND_WORKED_WEIGHTS = (
    ("teacher_over_student", 1 - math.exp(-1 / 2)),
    ("student_over_teacher", 1 - math.exp(-2)),
    ("none", 1.0),
)


def largest_allocation(function: Callable, *args, **options) -> int:
    """Returns the bytes of the largest single tensor that ``function`` allocates."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        function(*args, **options)
    return max(event.cpu_memory_usage for event in profile.events() if event.name == "aten::empty")
