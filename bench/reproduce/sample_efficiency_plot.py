"""The figure of the sample-efficiency experiment."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.reproduce.sample_efficiency_results import ABLATIONS, MEASURES, METHODS, Experiment


def sample_efficiency(rows: list[dict]) -> plt.Figure:
    """Draws perplexity over tokens by method, and its change by single options; bars are 95 % t-intervals."""
    experiment = Experiment(rows)
    measures = [name for name in experiment.measures if name.endswith("perplexity")]
    with_changes = experiment.ablation_size is not None
    figure, axes = plt.subplots(
        1, len(measures) + with_changes, figsize=(4.2 * len(measures) + 5.2, 4.2), layout="constrained", squeeze=False
    )
    for panel, measure in zip(axes[0], measures, strict=False):
        _curves(panel, experiment, measure)
    if with_changes:
        _changes(axes[0][-1], experiment)
    axes[0][0].legend(frameon=False)
    return figure


def _curves(panel: plt.Axes, experiment: Experiment, measure: str) -> None:
    shown: list[float] = []
    for number, (name, arm) in enumerate(METHODS.items()):
        # Methods are shifted sideways so that their bars do not overlap.
        shift = 1 + 0.03 * (number - 1.5)
        points = [(shift * size, experiment.estimate(arm, size, measure)) for size in experiment.sizes]
        points = [(size, found) for size, found in points if found is not None]
        if not points:
            continue
        means = [found.mean for _, found in points]
        shown += means
        panel.errorbar(
            [size for size, _ in points],
            means,
            yerr=[_half(found) for _, found in points],
            marker="o",
            markersize=4,
            capsize=3,
            color=f"C{number}",
            label=name,
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator(experiment.sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    # The limits ignore the bars, since the interval of a few seeds can be much wider than the range of the curves.
    panel.set_ylim(min(shown) / 1.6, max(shown) * 1.6)
    panel.set_xlabel("tokens to train on")
    panel.set_ylabel(MEASURES[measure])
    panel.grid(which="both", linewidth=0.3)


def _changes(panel: plt.Axes, experiment: Experiment) -> None:
    at, ticks, labels, above = 0.0, [], [], None
    for (option, value), change in experiment.changes().items():
        at += 0.6 * (above not in (None, option))
        bars = [[_bar(change.mean - change.low)], [_bar(change.high - change.mean)]]
        panel.errorbar(change.mean, at, xerr=bars, fmt="ko", markersize=4, capsize=3)
        ticks.append(at)
        labels.append(f"{option}: {value}".replace("`", ""))
        at, above = at + 1, option
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(ticks, labels)
    panel.set_ylim(at, -1)
    panel.grid(axis="x", linewidth=0.3)
    panel.set_xlabel(
        f"change of perplexity, teacher's text, %, at {experiment.ablation_size / 1000:g}k tokens, against\n"
        + ", ".join(dict.fromkeys(ablation.default.replace("`", "") for ablation in ABLATIONS.values()))
    )


def _half(found) -> float:
    return _bar(found.high - found.mean)


def _bar(length: float) -> float:
    return 0.0 if math.isnan(length) else length
