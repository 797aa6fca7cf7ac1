"""The divergences of ``slim_loss``: which rests and options each of them allows, and the checks of those."""

from __future__ import annotations

import math

from slimkernels import _checks

DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "ab", "gated")
# The divergences in which the student weighs the outcomes too, and the rests under which both sides sum to 1.
PROPER_DIVERGENCES = DIVERGENCES[2:]
PROPER_RESTS = ("ghost", "renorm_both")
# The divergences that are sums of KL(q || p) and KL(p || q), with or without skew.
KL_DIVERGENCES = ("forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "gated")
# The exponents of "ab" that make it one of the two KLs, and the smallest of any others.
_AB_LIMITS = {(1.0, 0.0): "forward_kl", (0.0, 1.0): "reverse_kl"}
_AB_LOWEST = 0.05
# The values of a divergence that has none of its own: they are arguments of every kernel.
_PARAMETERS = {"beta": 0.5, "alpha": 0.1}
# The KLs that those with a skew are at alpha = 0.
_WITHOUT_SKEW = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}


def check_rest(rest: str, divergence: str, teacher_blend: float, tail_weight: float) -> None:
    """Checks that the rest allows the divergence and its options."""
    if rest not in PROPER_RESTS:
        user = f"divergence={divergence!r}" if divergence in PROPER_DIVERGENCES else None
        user = f"teacher_blend={teacher_blend}" if user is None and teacher_blend != 1 else user
        if user is not None:
            raise ValueError(
                f"{user} needs a proper distribution on both sides: rest must be 'ghost' or 'renorm_both', got {rest!r}"
            )
    if tail_weight != 1 and (rest != "ghost" or divergence not in KL_DIVERGENCES):
        raise ValueError(
            f"tail_weight is a factor of the bucket's share of a KL: rest must be 'ghost' and divergence one of "
            f"{KL_DIVERGENCES}, got {rest!r} and {divergence!r}; or leave it at 1"
        )


def default_parameters(divergence: str) -> dict[str, float]:
    """Returns the beta and alpha that a divergence has where they are None."""
    return {"beta": 0.7, "alpha": 0.2} if divergence == "ab" else _PARAMETERS


def resolve_divergence(divergence: str, beta: float | None, alpha: float | None) -> tuple[str, float, float]:
    """Checks beta and alpha, fills in the defaults, and returns a divergence that is a KL at its limits as that KL."""
    defaults = default_parameters(divergence)
    beta = _checks.as_float(defaults["beta"] if beta is None else beta, "beta")
    alpha = _checks.as_float(defaults["alpha"] if alpha is None else alpha, "alpha")
    if divergence != "ab":
        if not 0 < beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {beta}")
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), got {alpha}")
        return _WITHOUT_SKEW.get(divergence, divergence) if alpha == 0 else divergence, beta, alpha
    if (alpha, beta) in _AB_LIMITS:
        # They are out of range for the others, so the defaults take their places.
        return _AB_LIMITS[alpha, beta], _PARAMETERS["beta"], _PARAMETERS["alpha"]
    if not (math.isfinite(alpha + beta) and min(alpha, beta) >= _AB_LOWEST):
        raise ValueError(
            f"alpha and beta must be at least {_AB_LOWEST} with divergence='ab', or (1, 0), its forward KL, or (0, 1), "
            f"its reverse KL; got alpha={alpha} and beta={beta}"
        )
    return divergence, beta, alpha
