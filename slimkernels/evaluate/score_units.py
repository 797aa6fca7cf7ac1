"""What a score is called, in which unit it is written, and whether more of it is better."""

from __future__ import annotations

import dataclasses

from slimkernels.evaluate.heldout import KL, LOSS
from slimkernels.evaluate.tasks import ROUGE


@dataclasses.dataclass(frozen=True)
class Metric:
    """How to write a score.

    Attributes:
        title: In a heading or a sentence.
        unit: Of its values.
        difference_unit: Of differences of two.
        factor: From the score to its unit.
        places: After the point.
        lower_is_better: Or higher.
        highest: Possible score; None: no limit.
    """

    title: str
    unit: str = "%"
    difference_unit: str = "points"
    factor: float = 100
    places: int = 1
    lower_is_better: bool = False
    highest: float | None = 1.0

    def text(self, value: float) -> str:
        """A value, without its unit."""
        return f"{self._rounded(value):.{self.places}f}"

    def signed(self, value: float) -> str:
        """A difference, without its unit."""
        return f"{self._rounded(value):+.{self.places}f}"

    def _rounded(self, value: float) -> float:
        # Adding 0 makes a 0 of what is rounded to -0.
        return round(self.factor * value, self.places) + 0


JUDGE = "judge "
_NATS = {"unit": "nats", "difference_unit": "nats", "factor": 1, "places": 3, "lower_is_better": True, "highest": None}
_METRICS = {
    "strict": Metric("strict: the announced answer"),
    "flexible": Metric("flexible: the announced answer, or else the last possible one"),
    "last_number": Metric("last number"),
    "acc": Metric("acc: the likeliest choice, as lm-eval has it"),
    "acc_norm": Metric("acc_norm: the choice likeliest for its length, as lm-eval has it"),
    ROUGE: Metric("Rouge-L F1"),
    LOSS: Metric("loss: -log p of a label, the logarithm of the perplexity; lower is better", **_NATS),
    KL: Metric("KL divergence of a label from the store's teacher; lower is better", **_NATS),
}


def metric(name: str) -> Metric:
    """How to write a score of this name; a share of right answers, if it is not known here."""
    if name.startswith(JUDGE):
        return Metric(f"rating by {name}", "of 10", "of 10", factor=1, places=2, highest=10)
    return _METRICS.get(name, Metric(name.replace("_", " ")))


def column(name: str) -> str:
    """The name with its unit, to head a column."""
    return f"{name.replace('_', ' ')} {metric(name).unit}"
