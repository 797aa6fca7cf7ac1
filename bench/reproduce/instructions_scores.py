"""Rouge-L of responses, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slimkernels.evaluate import scoring

ROUNDS = 10_000


def rouge_l(references: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The F-measure of Rouge-L, 0 to 100, of each response, with stemming; by the package rouge-score.

    Its tokenizer keeps the letters a to z and digits alone: of other scripts nothing is left, and a response scores 0.
    """
    return [100 * scoring.rouge_l(*pair) for pair in zip(responses, references, strict=True)]


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean, over prompts; of differences of pairs, the paired one."""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(values), size=(ROUNDS, len(values)))
    low, high = np.percentile(values[drawn].mean(-1), [2.5, 97.5])
    return float(low), float(high)
