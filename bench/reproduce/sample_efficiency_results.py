"""Results of the sample-efficiency experiment: the compared methods, estimates, and the tables of the documentation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Arm(NamedTuple):
    """A way to train a student.

    Attributes:
        method: Method of ``SlimConfig``.
        teacher: Source of the teacher's rows: "none", "top_k" or "draws" (stores), or "online" (``RememberedTeacher``).
        options: Options of ``SlimConfig`` that differ from the method's defaults.
    """

    method: str
    teacher: str
    options: tuple[tuple[str, Any], ...] = ()


SFT, DENSE_KD, SLIM = Arm("sft", "none"), Arm("kd", "online"), Arm("slim", "top_k")
# On a store, method "kd" equals "slim" without the adaptive weight.
SPARSE_KD = Arm("kd", "top_k")
METHODS = {"SFT": SFT, "dense KD": DENSE_KD, "SLIM": SLIM, "sampled KD": Arm("sampled", "draws")}


def _with(arm: Arm, **options) -> Arm:
    return arm._replace(options=tuple(options.items()))


class Ablation(NamedTuple):
    """Arms that differ in one option.

    Attributes:
        default: Value that the other values are compared with.
        arms: Arms by the value of the option.
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
        """Estimates the mean from one value per seed, for at most 10 seeds."""
        mean, count = statistics.fmean(values), len(values)
        half = _T95[count - 1] * statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
        return cls(mean, mean - half, mean + half)


class Experiment:
    """The trainings of the newest settings.

    Args:
        rows: Rows of the results file, at least one.

    Attributes:
        last: Newest row.
        rows: Rows with the settings of the newest row.
        seeds: Seeds, ascending.
        sizes: Numbers of training tokens, ascending.
        ablation_size: Size at which single options were changed; None if none was.
        measures: Names of the available ``MEASURES``.
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
        """Estimates a measure of an arm's students after the last epoch; None without results."""
        points = self._final.get((arm, size))
        return Estimate.of([point[measure] for point in points.values()]) if points else None

    def change(self, arm: Arm, reference: Arm, *sizes: int, measure: str = "teacher_perplexity") -> Estimate | None:
        """Estimates the relative difference of an arm from another in percent; None without paired results.

        Only seeds with results of both arms at all sizes count, each with its mean log-ratio over the sizes.
        """
        pairs = [(self._final.get((arm, size), {}), self._final.get((reference, size), {})) for size in sizes]
        logs = [
            statistics.fmean(math.log(ours[seed][measure] / theirs[seed][measure]) for ours, theirs in pairs)
            for seed in self.seeds
            if all(seed in points for pair in pairs for points in pair)
        ]
        return Estimate(*(100 * math.expm1(value) for value in Estimate.of(logs))) if logs else None

    def changes(self) -> dict[tuple[str, str], Estimate]:
        """Estimates the change for every (option, value) that differs from the option's default and has results."""
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
    """Writes the tables of the experiment and their interpretation in words."""
    experiment = Experiment(rows)
    parts = ["Students from random weights, trained on more and more of a teacher's text:"]
    parts += [methods_table(experiment), verdict(experiment)]
    if experiment.ablation_size is not None:
        folded = "<details><summary>One option changed at a time</summary>"
        parts += [folded, ablation_table(experiment), "</details>", defaults(experiment)]
    return "\n\n".join([*parts, _conditions(experiment), FIGURE])


def methods_table(experiment: Experiment) -> str:
    """Tabulates all methods at all sizes by all measures."""
    lines = [_line("after training on", "", *(_tokens(size) for size in experiment.sizes))]
    lines.append(f"|---|---|{'---:|' * len(experiment.sizes)}")
    for measure in experiment.measures:
        for number, (name, arm) in enumerate(METHODS.items()):
            cells = [_plus_minus(experiment.estimate(arm, size, measure)) for size in experiment.sizes]
            lines.append(_line("" if number else MEASURES[measure], name, *cells))
    return "\n".join(lines)


def verdict(experiment: Experiment) -> str:
    """Ranks SLIM, KD and SFT at every size."""
    lines = [
        "Held-out perplexity on the teacher's text, with 95 % t-intervals of paired relative differences. `<` and `>` "
        "mean that the interval excludes 0, `~` that it does not:",
        "",
    ]
    sizes = [(_tokens(size), (size,)) for size in experiment.sizes]
    for name, several in [*sizes, ("all sizes together", experiment.sizes)]:
        slim, kd = experiment.change(SLIM, DENSE_KD, *several), experiment.change(DENSE_KD, SFT, *several)
        whole = experiment.change(SLIM, SFT, *several)
        if slim and kd and whole:
            lines.append(
                f"- {name}: SLIM {_relation(slim)} KD {_relation(kd)} SFT; SLIM to SFT {_percent(whole)}, SLIM to "
                f"dense KD {_percent(slim)}, dense KD to SFT {_percent(kd)}"
            )
    return "\n".join(lines)


def ablation_table(experiment: Experiment) -> str:
    """Tabulates the changes of single options."""
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
    """States whether the weight helps, and whether the results support the defaults of two options."""
    size, said = experiment.ablation_size, []
    weight = experiment.change(SLIM, SPARSE_KD, size)
    if weight:
        effect = {"<": "helps", ">": "hurts", "~": "neither helps nor hurts as far as these seeds can tell"}
        said.append(
            f"SLIM's adaptive weight alone, compared with no weight on the same store, {effect[_relation(weight)]}: "
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
        effects = (("lowers", better), ("raises", worse))
        found = [f"{', '.join(names)} {verb} it" for verb, names in effects if names]
        if len(better) + len(worse) < len(changes):
            found.append("no other value changes it measurably")
        said.append(f'Perplexity with other values of `{argument}` than "{default}": {"; ".join(found)}.')
    return " ".join(said)


def _conditions(experiment: Experiment) -> str:
    last, settings = experiment.last, experiment.last["settings"]
    teacher = last["teacher_perplexity"]
    own = f"{teacher['teacher']:.1f}" + (f", plain English {teacher['english']:.1f}" if "english" in teacher else "")
    seeds = ", ".join(map(str, experiment.seeds))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in experiment.rows))
    return (
        f"Teacher: {settings['teacher']} (its own perplexity {own}), which wrote all training text. Students: "
        f"{last['parameters']:,} parameters, randomly initialised, {settings['num_layers']} layers, hidden size "
        f"{settings['hidden_size']}. Training: {settings['epochs']} epochs, {settings['batch_size']} documents per "
        f"step, learning rate {settings['learning_rate']:g} with cosine decay for all methods. Values are measured "
        f"after the last epoch on about {settings['heldout_tokens']:,} tokens each: mean ± 95 % t-interval over seeds "
        f"{seeds}, which decide the documents, their order and the initialisation. SLIM learns from a store of the top "
        f"{100 * settings['top_fraction']:g} % of logits, sampled KD from a store of {settings['rounds']} draws per "
        f"row. {last['device']}, {last['threads']} thread{'s' * (last['threads'] > 1)}, commit {commits}, "
        f"{last['date'][:10]}; the command is above."
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _tokens(size: int) -> str:
    return f"{size / 1000:g}k tokens"


def _plus_minus(estimate: Estimate | None) -> str:
    """Formats an estimate as "672 ± 40", as "672" for a single seed, and as "-" if it is None."""
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
