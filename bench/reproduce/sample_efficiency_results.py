"""The sample-efficiency experiment: what is compared, and what its results say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Arm(NamedTuple):
    """A way to train a student.

    Attributes:
        method: Of ``SlimConfig``.
        teacher: "none"; "top_k" or "draws", a store; "online", the remembered teacher's rows made again in every epoch.
        options: Of ``SlimConfig``, beside the method's own.
    """

    method: str
    teacher: str
    options: tuple[tuple[str, Any], ...] = ()


SFT, DENSE_KD, SLIM = Arm("sft", "none"), Arm("kd", "online"), Arm("slim", "top_k")
# Method "kd" on a store is "slim" without its weight.
SPARSE_KD = Arm("kd", "top_k")
METHODS = {"SFT": SFT, "dense KD": DENSE_KD, "SLIM": SLIM, "sampled KD": Arm("sampled", "draws")}


def _with(arm: Arm, **options) -> Arm:
    return arm._replace(options=tuple(options.items()))


class Ablation(NamedTuple):
    """One option changed, all else as it is.

    Attributes:
        default: The value that the others are compared with.
        arms: By value.
    """

    default: str
    arms: dict[str, Arm]


_KEPT = {f"{100 * share:g} %": _with(DENSE_KD, teacher_top_fraction=share) for share in (0.001, 0.01, 0.2)}
_RESTS = {f"`{rest}`": _with(SLIM, rest=rest) for rest in ("zero", "ghost", "zero_logit", "renorm_both")}
ABLATIONS = {
    "`rest`, SLIM": Ablation("`renorm`", {"`renorm`": SLIM} | _RESTS),
    "`rest`, weight none": Ablation("`renorm`", {"`renorm`": SPARSE_KD, "`ghost`": _with(SPARSE_KD, rest="ghost")}),
    "`token_weight`": Ablation(
        "`teacher_over_student`",
        {
            "`teacher_over_student`": SLIM,
            "`student_over_teacher`": _with(SLIM, token_weight="student_over_teacher"),
            "`none`": SPARSE_KD,
        },
    ),
    "K / V, weight none": Ablation(
        "5 %",
        {
            "0.1 %": _KEPT["0.1 %"],
            "1 %": _KEPT["1 %"],
            "5 %": SPARSE_KD,
            "20 %": _KEPT["20 %"],
            "100 %": DENSE_KD,
        },
    ),
    "temperature, SLIM": Ablation(
        "1", {"0.5": _with(SLIM, temperature=0.5), "1": SLIM, "2": _with(SLIM, temperature=2.0)}
    ),
}

MEASURES = {
    "teacher_perplexity": "perplexity, teacher's text",
    "english_perplexity": "perplexity, plain English",
    "teacher_kl": "KL to the teacher, nats",
}
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
_T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Estimate(NamedTuple):
    """A mean over seeds with its 95 % t-interval; NaN bounds where there is one seed."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of one value per seed, at most 10."""
        mean, count = statistics.fmean(values), len(values)
        half = _T95[count - 1] * statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
        return cls(mean, mean - half, mean + half)


class Experiment:
    """The trainings of the newest settings.

    Args:
        rows: Of the results file, at least one.

    Attributes:
        last: The newest row.
        rows: Those with its settings.
        seeds: Ascending.
        sizes: Tokens of the subsets, ascending.
        ablation_size: Of the rows with options; None where there are none.
        measures: Those of ``MEASURES`` that there are.
    """

    def __init__(self, rows: Iterable[dict]) -> None:
        rows = list(rows)
        self.last = rows[-1]
        self.rows = [row for row in rows if row["settings"] == self.last["settings"]]
        self.seeds = sorted({row["run"]["seed"] for row in self.rows})
        self._final: dict[tuple[Arm, int], dict[int, dict]] = {}
        for row in self.rows:
            run = row["run"]
            arm = Arm(run["method"], run["teacher"], tuple(run["options"].items()))
            self._final.setdefault((arm, run["size"]), {})[run["seed"]] = row["curve"][-1]
        main = set(METHODS.values())
        self.sizes = sorted({size for arm, size in self._final if arm in main})
        self.ablation_size = next((size for arm, size in self._final if arm.options), None)
        self.measures = [name for name in MEASURES if name in self.last["curve"][-1]]

    def estimate(self, arm: Arm, size: int, measure: str) -> Estimate | None:
        """What the students of an arm reach after the last epoch."""
        points = self._final.get((arm, size))
        return Estimate.of([point[measure] for point in points.values()]) if points else None

    def change(self, arm: Arm, reference: Arm, *sizes: int, measure: str = "teacher_perplexity") -> Estimate | None:
        """By what percentage an arm is above another, of seeds that have both at all of the sizes.

        A seed counts with the mean logarithm of the ratio over the sizes.
        """
        pairs = [(self._final.get((arm, size), {}), self._final.get((reference, size), {})) for size in sizes]
        logs = [
            statistics.fmean(math.log(ours[seed][measure] / theirs[seed][measure]) for ours, theirs in pairs)
            for seed in self.seeds
            if all(seed in points for pair in pairs for points in pair)
        ]
        return Estimate(*(100 * math.expm1(value) for value in Estimate.of(logs))) if logs else None

    def changes(self) -> dict[tuple[str, str], Estimate]:
        """(option, value) of every ablation that there is, the defaults left out."""
        found = {}
        for option, (default, arms) in ABLATIONS.items():
            for value, arm in arms.items():
                change = self.change(arm, arms[default], self.ablation_size) if value != default else None
                if change is not None:
                    found[option, value] = change
        return found


FIGURE = (
    "![Held-out perplexity over tokens per method, and with one option changed at a time]"
    "(bench/results/sample_efficiency.png)"
)


def sample_efficiency_block(rows: list[dict]) -> str:
    """The tables and what they say in words."""
    experiment = Experiment(rows)
    parts = ["Students from random weights, trained on more and more of a teacher's text:"]
    parts += [methods_table(experiment), verdict(experiment)]
    if experiment.ablation_size is not None:
        folded = "<details><summary>One option changed at a time</summary>"
        parts += [folded, ablation_table(experiment), "</details>", defaults(experiment)]
    return "\n\n".join([*parts, _conditions(experiment), FIGURE])


def methods_table(experiment: Experiment) -> str:
    """Every method at every size, by every measure."""
    lines = [_line("after training on", "", *(_tokens(size) for size in experiment.sizes))]
    lines.append(f"|---|---|{'---:|' * len(experiment.sizes)}")
    for measure in experiment.measures:
        for number, (name, arm) in enumerate(METHODS.items()):
            cells = [_plus_minus(experiment.estimate(arm, size, measure)) for size in experiment.sizes]
            lines.append(_line("" if number else MEASURES[measure], name, *cells))
    return "\n".join(lines)


def verdict(experiment: Experiment) -> str:
    """The order of SLIM, KD and SFT at every size."""
    lines = [
        "Held-out perplexity on the teacher's text, with 95 % t-intervals of paired differences; `<` and `>` are clear "
        "of 0, `~` is not decided:",
        "",
    ]
    sizes = [(_tokens(size), (size,)) for size in experiment.sizes]
    for name, several in [*sizes, ("all sizes together", experiment.sizes)]:
        slim, kd = experiment.change(SLIM, DENSE_KD, *several), experiment.change(DENSE_KD, SFT, *several)
        if slim and kd:
            lines.append(
                f"- {name}: SLIM {_relation(slim)} KD {_relation(kd)} SFT; SLIM to dense KD {_percent(slim)}, dense KD "
                f"to SFT {_percent(kd)}"
            )
    return "\n".join(lines)


def ablation_table(experiment: Experiment) -> str:
    """One option changed at a time."""
    size, changes = experiment.ablation_size, experiment.changes()
    perplexities = [name for name in experiment.measures if name.endswith("perplexity")]
    titles = ["option", f"at {_tokens(size)}", *(MEASURES[name] for name in perplexities), "change, teacher's text"]
    lines = [_line(*titles), f"|---|---|{'---:|' * (len(titles) - 2)}"]
    for option, (default, arms) in ABLATIONS.items():
        shown = [value for value in arms if value == default or (option, value) in changes]
        for value in shown:
            cells = [_plus_minus(experiment.estimate(arms[value], size, name)) for name in perplexities]
            change = "" if value == default else _percent(changes[option, value])
            lines.append(_line(option if value == shown[0] else "", value, *cells, change))
    return "\n".join(lines)


def defaults(experiment: Experiment) -> str:
    """Whether the weight helps, and whether the table supports the defaults of ``rest`` and ``token_weight``."""
    size, said = experiment.ablation_size, []
    weight = experiment.change(SLIM, SPARSE_KD, size)
    if weight:
        effect = {"<": "helps", ">": "hurts", "~": "neither helps nor hurts as far as these seeds can tell"}
        said.append(
            f"SLIM's adaptive weight by itself, against weight none on the same store, {effect[_relation(weight)]}: "
            f"{_percent(weight)} at {_tokens(size)}."
        )
    for argument, default in (("rest", "renorm"), ("token_weight", "teacher_over_student")):
        changes = [
            (f"{value} ({option}: {_percent(change)})".replace("`rest`, ", "").replace("`token_weight`: ", ""), change)
            for (option, value), change in experiment.changes().items()
            if option.startswith(f"`{argument}`")
        ]
        better = [name for name, change in changes if _relation(change) == "<"]
        worse = [name for name, change in changes if _relation(change) == ">"]
        supported = (
            f"lower beyond its interval is {', '.join(better)}"
            if better
            else "no other value is lower beyond its interval"
        )
        supported += f"; higher is {', '.join(worse)}" if worse else "; none is higher"
        undecided = len(changes) - len(better) - len(worse)
        supported += f"; {undecided} of {len(changes)} are not decided" if undecided else ""
        said.append(f'The default `{argument}="{default}"`: {supported}.')
    return " ".join(said)


def _conditions(experiment: Experiment) -> str:
    last, settings = experiment.last, experiment.last["settings"]
    teacher = last["teacher_perplexity"]
    own = f"{teacher['teacher']:.1f}" + (f", plain English {teacher['english']:.1f}" if "english" in teacher else "")
    seeds = ", ".join(map(str, experiment.seeds))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in experiment.rows))
    return (
        f"Teacher: {settings['teacher']} (its own perplexity {own}), which wrote all text to train on. Students: "
        f"{last['parameters']:,} parameters from random weights, {settings['num_layers']} layers of "
        f"{settings['hidden_size']}, {settings['epochs']} epochs, {settings['batch_size']} documents a step, learning "
        f"rate {settings['learning_rate']:g} with cosine decay for all, measured after the last epoch on about "
        f"{settings['heldout_tokens']:,} tokens each. Seeds {seeds} choose documents, their order "
        f"and the initialisation; mean ± 95 % t-interval. SLIM and sampled KD learn from stores of the top "
        f"{100 * settings['top_fraction']:g} % of logits and of {settings['rounds']} draws a row. {last['device']}, "
        f"{last['threads']} thread{'s' * (last['threads'] > 1)}, commit {commits}, {last['date'][:10]}; "
        "`python -m bench.reproduce.sample_efficiency`."
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _tokens(size: int) -> str:
    return f"{size / 1000:g}k tokens"


def _plus_minus(estimate: Estimate | None) -> str:
    """672 ± 40; without the interval where there is one seed, a dash where there is none."""
    if estimate is None:
        return "-"
    digits = 0 if estimate.mean >= 100 else 2
    half = estimate.high - estimate.mean
    return f"{estimate.mean:,.{digits}f}" + ("" if math.isnan(half) else f" ± {half:,.{digits}f}")


def _percent(change: Estimate) -> str:
    said = f"{change.mean:+.1f} %"
    return said + (" in one seed" if math.isnan(change.low) else f" [{change.low:+.1f}, {change.high:+.1f}]")


def _relation(change: Estimate) -> str:
    return "<" if change.high < 0 else ">" if change.low > 0 else "~"
