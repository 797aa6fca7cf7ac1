"""Titles and units of scores, and whether a lower score is better."""

from __future__ import annotations

import dataclasses

from slimkernels.evaluate.heldout import KL, LOSS
from slimkernels.evaluate.tasks import ROUGE


@dataclasses.dataclass(frozen=True)
class Metric:
    """The title and format of a kind of score.

    Attributes:
        title: Title in headings and sentences.
        unit: Unit of values.
        difference_unit: Unit of differences of two values.
        factor: Factor that converts a score to its unit.
        places: Number of decimal places.
        lower_is_better: Whether a lower score is better.
        highest: Highest possible score; None if there is no limit.
    """

    title: str
    unit: str = "%"
    difference_unit: str = "points"
    factor: float = 100
    places: int = 1
    lower_is_better: bool = False
    highest: float | None = 1.0

    def text(self, value: float) -> str:
        """Formats a value without its unit."""
        return f"{self._rounded(value):.{self.places}f}"

    def signed(self, value: float) -> str:
        """Formats a difference with its sign and without its unit."""
        return f"{self._rounded(value):+.{self.places}f}"

    def _rounded(self, value: float) -> float:
        # Adding 0 turns -0.0 into 0.0.
        return round(self.factor * value, self.places) + 0


JUDGE = "judge "
_NATS = {"unit": "nats", "difference_unit": "nats", "factor": 1, "places": 3, "lower_is_better": True, "highest": None}
_METRICS = {
    "strict": Metric("strict: the announced answer"),
    "flexible": Metric("flexible: the announced answer, or else the last possible one"),
    "last_number": Metric("last number"),
    "acc": Metric("acc: the choice with the highest log-likelihood, by lm-eval"),
    "acc_norm": Metric("acc_norm: the choice with the highest log-likelihood per character, by lm-eval"),
    ROUGE: Metric("Rouge-L F1"),
    LOSS: Metric("loss: mean -log p of the labels, the logarithm of the perplexity; lower is better", **_NATS),
    KL: Metric("KL divergence from the store's teacher, mean over the labels; lower is better", **_NATS),
}


def metric(name: str) -> Metric:
    """Returns the title and format of the score with this name; an unknown name is taken for a share of answers."""
    if name.startswith(JUDGE):
        return Metric(f"rating by {name}", "of 10", "of 10", factor=1, places=2, highest=10)
    return _METRICS.get(name, Metric(name.replace("_", " ")))


def column(name: str) -> str:
    """Returns the heading of a column: the score's name with its unit."""
    return f"{name.replace('_', ' ')} {metric(name).unit}"
