"""The options of ``slim_loss`` and ``linear_slim_loss``: one definition, and their checks.

``SlimOptions`` is the definition. The operators' schemas are derived from it, and tests hold the public signatures, the
Triton launcher and the C++ function to its names and order.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from slimkernels import _checks
from slimkernels.ops._divergences import DIVERGENCES, check_rest, default_parameters, resolve_divergence
from slimkernels.ops._library import accumulation_dtype, operand_of
from slimkernels.packed_logits import check_sparse_logits
from slimkernels.sparse_logits import SparseLogits, widen_float8

ADAPTIVE_WEIGHTS = ("teacher_over_student", "student_over_teacher")
WEIGHTS = (*ADAPTIVE_WEIGHTS, "none")


class SlimOptions(NamedTuple):
    """Arguments of the operators after the operands, in the order of the schemas.

    Attributes:
        ids: (N, K) int32 kept ids of the teacher, ascending, padded with -1; None without a teacher.
        teacher_logits: (N, K) logits of the teacher at ``ids``, any float dtype.
        teacher_lse: (N,) log-sum-exp of the teacher's whole row at the temperature; None where it is unknown.
        teacher_lse_one: (N,) the same at temperature 1.
        teacher_rest_lse: (N,) log-sum-exp of the teacher's entries outside ``ids`` at the temperature, NaN where
            unknown; None where unknown for every row.
        target_logit: (N,) logit of the teacher at the label, NaN where unknown; None where unknown for every row.
        token_weight: (N,) given token weights, for ``weighting`` "tensor".
        temperature: T of the divergence.
        rest: Treatment of the teacher's mass outside its ids.
        divergence: Name of the divergence.
        weighting: Name of the token weight: one of ``WEIGHTS``, or "tensor" for a given ``token_weight``.
        detach_weight: Whether the token weight is a constant to the gradient.
        beta: Mixture weight of "jsd", or exponent of the student in "ab".
        alpha: Mixture weight of "skew_kl" and "skew_reverse_kl", or exponent of the teacher in "ab".
        forward_weight: Factor of the forward KL in "gated".
        entropy_threshold: Entropy of the teacher's outcomes above which "gated" has the forward KL.
        teacher_blend: Exponent of the teacher in its geometric mixture with the student, 1 for the teacher alone.
        tail_weight: Factor of the ghost outcome's share of the divergence.
        ce_weight: Factor of the cross entropy.
        kd_weight: Factor of the weighted divergence.
        label_smoothing: Share of the uniform distribution in the cross entropy's target.
        z_loss_weight: Factor of the squared log-sum-exp.
        softcap: Bound of the effective logits, 0 for none.
        logit_scale: Factor of the logits before the softcap.
        ignore_index: Label of the rows to skip.
        statistics: Statistics to compute, a key of ``NUM_STATS``.
    """

    ids: Tensor | None
    teacher_logits: Tensor | None
    teacher_lse: Tensor | None
    teacher_lse_one: Tensor | None
    teacher_rest_lse: Tensor | None
    target_logit: Tensor | None
    token_weight: Tensor | None
    temperature: float
    rest: str
    divergence: str
    weighting: str
    detach_weight: bool
    beta: float
    alpha: float
    forward_weight: float
    entropy_threshold: float
    teacher_blend: float
    tail_weight: float
    ce_weight: float
    kd_weight: float
    label_smoothing: float
    z_loss_weight: float
    softcap: float
    logit_scale: float
    ignore_index: int
    statistics: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The fields that hold a value per row; they come first."""
        return self[:7]

    @property
    def settings(self) -> tuple[float | str, ...]:
        """The fields that hold one value for all rows."""
        return self[7:]

    @property
    def operand(self) -> Tensor | None:
        """The float options as one tensor for a compiled graph, None where they are constants (``operand_of``)."""
        return operand_of([getattr(self, name) for name in _FLOAT_DEFAULTS], list(_FLOAT_DEFAULTS.values()))

    def read(self, operand: Tensor | None) -> SlimOptions:
        """Returns the options with the values of ``operand`` in place of the float options, where it is given."""
        if operand is None:
            return self
        return self._replace(**dict(zip(_FLOAT_DEFAULTS, operand.tolist(), strict=True)))

    @property
    def constants(self) -> SlimOptions:
        """The options for an operator that takes ``operand``: with the defaults in place of the float options."""
        return self._replace(**_FLOAT_DEFAULTS)

    def rows(self, rows: slice) -> SlimOptions:
        """Returns the options of some of the rows."""
        given = zip(self._fields, self.tensors, strict=False)
        return self._replace(**{name: t[rows] for name, t in given if t is not None})


_FLOAT_DEFAULTS = {
    "temperature": 1.0,
    **default_parameters("forward_kl"),
    "forward_weight": 1.0,
    "entropy_threshold": 0.8,
    "teacher_blend": 1.0,
    "tail_weight": 1.0,
    "ce_weight": 1.0,
    "kd_weight": 1.0,
    "label_smoothing": 0.0,
    "z_loss_weight": 0.0,
    "softcap": 0.0,
    "logit_scale": 1.0,
}
_SCHEMA_TYPES = {Tensor | None: "Tensor?", float: "float", str: "str", bool: "bool", int: "int"}
OPTIONS_SCHEMA = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(SlimOptions).items())


def resolve_options(
    like: Tensor,
    like_name: str,
    teacher: SparseLogits | None,
    temperature: float,
    rest: str,
    divergence: str,
    token_weight: str | Tensor,
    detach_weight: bool,
    beta: float | None,
    alpha: float | None,
    forward_weight: float,
    entropy_threshold: float,
    teacher_blend: float,
    tail_weight: float,
    ce_weight: float,
    kd_weight: float,
    label_smoothing: float,
    z_loss_weight: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    statistics: bool | str,
) -> SlimOptions:
    """Checks the options of a loss on rows ``like`` (..., V or D), and flattens the teacher's fields to rows.

    From ``temperature`` on, the parameters are those of ``slim_loss``.
    """
    temperature = _checks.as_temperature(temperature)
    _checks.check_one_of(rest, "rest", _checks.RESTS)
    _checks.check_one_of(divergence, "divergence", DIVERGENCES)
    teacher_blend = _checks.as_float(teacher_blend, "teacher_blend")
    if not 0 < teacher_blend <= 1:
        raise ValueError(f"teacher_blend must be in (0, 1], got {teacher_blend}")
    tail_weight = _checks.as_at_least_zero(tail_weight, "tail_weight")
    check_rest(rest, divergence, teacher_blend, tail_weight)
    divergence, beta, alpha = resolve_divergence(divergence, beta, alpha)
    forward_weight = _checks.as_at_least_zero(forward_weight, "forward_weight")
    entropy_threshold = _checks.as_at_least_zero(entropy_threshold, "entropy_threshold")
    label_smoothing = _checks.as_float(label_smoothing, "label_smoothing")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    ce_weight = _checks.as_at_least_zero(ce_weight, "ce_weight")
    kd_weight = _checks.as_at_least_zero(kd_weight, "kd_weight")
    z_loss_weight = _checks.as_at_least_zero(z_loss_weight, "z_loss_weight")
    logit_scale = _checks.as_positive(logit_scale, "logit_scale")
    cap = 0.0 if softcap is None else _checks.as_positive(softcap, "softcap")
    ignore_index = _checks.as_integer(ignore_index, "ignore_index")
    if not isinstance(statistics, bool) and statistics != "without_overlap":
        raise ValueError(f"statistics must be False, 'without_overlap' or True, got {statistics!r}")
    if isinstance(statistics, bool):
        statistics = "all" if statistics else "none"
    weighting, given_weight = _resolve_weight(token_weight, like, like_name)
    dtype = accumulation_dtype(like.dtype)

    def per_row(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(dtype).reshape(-1).contiguous()

    ids = teacher_logits = teacher_lse = teacher_lse_one = teacher_rest_lse = target_logit = None
    if teacher is not None:
        _check_teacher(teacher, like, like_name)
        if weighting in ADAPTIVE_WEIGHTS and kd_weight != 0:
            _warn_of_unknown_labels(teacher, weighting, stacklevel=5 if like_name == "hidden" else 4)
        ids = teacher.ids.reshape(-1, teacher.top_k).contiguous()
        teacher_logits = widen_float8(teacher.logits.detach().reshape(-1, teacher.top_k)).contiguous()
        teacher_lse = per_row(_lse_or_none(teacher, rest, divergence, temperature))
        teacher_lse_one = per_row(teacher.lse[..., 0])
        teacher_rest_lse = per_row(teacher.rest_lse_at(temperature))
        target_logit = per_row(teacher.target_logit)
    return SlimOptions(
        ids, teacher_logits, teacher_lse, teacher_lse_one, teacher_rest_lse, target_logit, per_row(given_weight),
        temperature, rest, divergence, weighting, detach_weight, beta, alpha, forward_weight, entropy_threshold,
        teacher_blend, tail_weight, ce_weight, kd_weight, label_smoothing, z_loss_weight, cap, logit_scale,
        ignore_index, statistics
    )  # fmt: skip


def _resolve_weight(weight: str | Tensor, like: Tensor, like_name: str) -> tuple[str, Tensor | None]:
    """Returns the name of the weighting, and the token weights where they are given."""
    name = "token_weight"
    if not isinstance(weight, Tensor):
        if not isinstance(weight, str):
            choices = ", ".join(map(repr, WEIGHTS))
            raise TypeError(f"{name} must be one of {choices}, or a torch.Tensor, got {type(weight).__name__}")
        _checks.check_one_of(weight, name, WEIGHTS)
        return weight, None
    _checks.check_no_gradient(weight, name)
    leading_shape = tuple(like.shape[:-1])
    if tuple(weight.shape) != leading_shape:
        raise ValueError(f"{name} must have shape {leading_shape}, got {tuple(weight.shape)}")
    _checks.check_same_device(weight, name, like, like_name)
    return "tensor", weight


def _warn_of_unknown_labels(teacher: SparseLogits, weighting: str, stacklevel: int) -> None:
    if teacher.target_logit is not None or torch.compiler.is_compiling():
        return
    # Python shows a warning once for each place in the caller's code.
    warnings.warn(
        f"teacher has no target_logit, so token_weight={weighting!r} takes the teacher's probability of a label that "
        "is not among its ids as 0: make the teacher with target=, or choose token_weight='none'",
        UserWarning,
        stacklevel=stacklevel,
    )


def _check_teacher(teacher: SparseLogits, like: Tensor, like_name: str) -> None:
    check_sparse_logits(teacher, "teacher")
    if teacher.leading_shape != tuple(like.shape[:-1]):
        raise ValueError(
            f"teacher must hold one row for each row of {like_name}, {tuple(like.shape[:-1])}, "
            f"got {teacher.leading_shape}"
        )
    _checks.check_same_device(teacher.ids, "teacher", like, like_name)


def _lse_or_none(teacher: SparseLogits, rest: str, divergence: str, temperature: float) -> Tensor | None:
    is_known = teacher.column_of(temperature) is not None
    if divergence == "gated" and not is_known:
        raise ValueError(
            f"divergence='gated' takes the teacher's entropy at temperature={temperature}, which is not among its "
            f"temperatures={teacher.temperatures}: capture the teacher with temperatures=(1.0, {temperature})"
        )
    # Other rests need it for the reported teacher_mass alone, which becomes NaN.
    if rest not in _checks.RESTS_WITH_LSE and not is_known:
        return None
    return teacher.lse_at(temperature)
