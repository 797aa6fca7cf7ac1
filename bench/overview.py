"""The front page of the README: its sentence, its table and its figure, all from committed results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from bench import records
from bench.blocks import latest_demo
from bench.claims import healed_sentence, weight_sentence
from bench.ops.case import OURS
from bench.records import CaseRecord
from bench.reproduce.sample_efficiency_results import DENSE_KD, SFT, SLIM, Experiment

# The sources of the overview; without one of them, except the last, the README keeps what it has.
SOURCES = ("cpu", "training_step", "search", "codecs", "sample_efficiency", "demo")
COMPARED = "methods"
LOSS = "linear_slim_loss"
# The ops of the table: the name in the results, what it does, and how its peer is called.
OPS = {
    "topk_logits": ("`topk_logits`: the largest 5 % of every row, with its log-sum-exp", "`torch.topk`"),
    "sample_logits": ("`sample_logits`: one draw per row after top-k and top-p", "transformers' logits warpers"),
    "slim_loss": ("`slim_loss`: the loss and its gradient, from logits", "eager PyTorch"),
    "slim_loss (CE only)": ("`slim_loss` without a teacher: cross entropy", "`F.cross_entropy`"),
    LOSS: ("`linear_slim_loss`: the same from hidden states", "eager PyTorch"),
}
SEARCH_PEER = "generate on the text of each leaf"
CODEC, ARRAYS = "affine8", "int32 and bfloat16 arrays"


class Comparison(NamedTuple):
    """A line of the table.

    Attributes:
        what: Description of the line.
        peer: Name of the other way.
        ratios: Time of the peer over ours, one for each figure; empty where no time is compared.
        size: Memory or bits of ours and of the peer.
    """

    what: str
    peer: str
    ratios: list[float]
    size: str


class Results(NamedTuple):
    """The rows of every source, by its name."""

    rows: dict[str, list[dict]]

    @classmethod
    def read(cls, folder: Path) -> Results | None:
        """Reads a folder; returns None where a source is missing."""
        rows = {name: records.read(folder / f"{name}.jsonl") for name in (*SOURCES, COMPARED)}
        return cls(rows) if all(rows[name] for name in SOURCES) else None

    def cases(self, op: str) -> list[CaseRecord]:
        """Returns the newest figures of an op, of every shape on every machine."""
        rows = [row for row in self.rows["cpu"] if row["op"] == op and row["sweep"] is None]
        machines = dict.fromkeys((row["device"], row["isa"]) for row in rows)
        return [
            case
            for machine in machines
            for case in records.newest_cases(row for row in rows if (row["device"], row["isa"]) == machine)
        ]

    def largest(self, op: str) -> CaseRecord:
        """Returns the case of an op whose peer takes the most memory."""
        return max(self.cases(op), key=lambda case: case.peak_bytes(case.row["peer"]) or 0)


def headline(results: Results) -> str:
    """Returns the sentence that says what the loss saves, and what the teacher's logits are worth."""
    largest = results.largest(LOSS)
    ours, theirs = largest.peak_bytes(OURS) or 0, largest.peak_bytes(largest.row["peer"]) or 0
    sizes, speed = largest.row["sizes"], ratios_of(results.cases(LOSS))
    experiment = Experiment(results.rows["sample_efficiency"])
    change = experiment.change(SLIM, SFT, *experiment.sizes)
    learned = healed_sentence(results.rows[COMPARED])
    if not learned and change is not None:
        learned = (
            f"Small students that were trained from scratch on such logits ended at {-change.mean:.0f} % lower "
            f"perplexity than on the same text alone (95 % interval {-change.high:.0f} to {-change.low:.0f} %, "
            f"{len(experiment.seeds)} seeds; [SLIM to SFT](docs/reproduced.md#sample-efficiency), all sizes together)."
        )
    return (
        f"Two lines of your training loop distil a teacher's top 5 % of logits in **{_mib(ours)} MiB of extra memory "
        f"instead of {_mib(theirs)}** ({sizes['N']} tokens, a vocabulary of {sizes['V']:,}), at {min(speed):.2f} to "
        f"{max(speed):.2f} times the speed of eager PyTorch. {learned}"
    )


def summary_table(results: Results) -> str:
    """Returns the README's table: the typical ratio with its range, and the memory, of the main comparisons."""
    lines = ["| what | compared with | times faster | memory, ours / theirs |", "|---|---|---:|---:|"]
    for line in comparisons(results):
        lines.append(f"| {line.what} | {line.peer} | {_typical(line.ratios)} | {line.size} |")
    lines += [
        "",
        "Times faster is the time of the other over ours, both measured in one run: the median over shapes, "
        "precisions, thread counts and machines, and in brackets the least and the most. Memory is the peak beyond "
        "inputs and gradients in the case where the other takes most; for the training step with gradients, for the "
        f"search its keys and values. {_machines(results)}. Every case: [docs/speed.md](docs/speed.md).",
        "",
        _demo_sentence(results),
    ]
    return "\n".join(lines)


def comparisons(results: Results) -> list[Comparison]:
    """Returns the lines of the table, at most eight."""
    lines = []
    for op, (what, peer) in OPS.items():
        largest = results.largest(op)
        ours, theirs = largest.peak_bytes(OURS) or 0, largest.peak_bytes(largest.row["peer"]) or 0
        lines.append(Comparison(what, peer, ratios_of(results.cases(op)), f"{_mib(ours)} / {_mib(theirs)} MiB"))
    return [*lines, _training_step(results), _search(results), _store(results)]


def ratios_of(cases: Iterable[CaseRecord]) -> list[float]:
    """Returns the time of the peer over ours, for every case and thread count."""
    found = [case.speedup(case.row["peer"], count) for case in cases for count in case.threads]
    return [ratio for ratio in found if ratio is not None]


def _training_step(results: Results) -> Comparison:
    rows = [row for row in results.rows["training_step"] if row["mode"] == "slim"]
    peaks: dict[str, dict[bool, float]] = {}
    for row in rows:
        if row["metric"] == records.MEMORY:
            peaks.setdefault(row["dtype"], {})[row["provider"] == OURS] = row["p50"]
    largest = max(peaks.values(), key=lambda of_dtype: of_dtype[False])
    return Comparison(
        "a whole training step with SLIM, SmolLM2-135M's shape",
        "the step with the eager loss",
        _paired(rows, "time", lambda ours, theirs: theirs / ours),
        f"{_mib(largest[True])} / {_mib(largest[False])} MiB",
    )


def _search(results: Results) -> Comparison:
    rows = [row for row in results.rows["search"] if row["op"] == "search"]
    rows = [row for row in rows if row["provider"] in (OURS, SEARCH_PEER, "unshared copies")]
    memory = {row["provider"]: row["p50"] for row in rows if row["metric"] == "kv_memory"}
    [copies] = (size for provider, size in memory.items() if provider != OURS)
    shape = rows[-1]["shape"]
    branches = shape["questions"] * shape["branching"] * shape["beam"]
    return Comparison(
        f"tree search, {branches} branches of {shape['questions']} questions",
        "`generate` on the text of each leaf",
        _paired(rows, "throughput", lambda ours, theirs: ours / theirs),
        f"{_mib(memory[OURS])} / {_mib(copies)} MiB",
    )


def _store(results: Results) -> Comparison:
    bits = {row["codec"]: row["bits_per_entry"] for row in results.rows["codecs"]}
    return Comparison(
        "the store: token ids, logits, index and checksums on disk",
        "int32 and bfloat16 arrays",
        [],
        f"{bits[CODEC]:.1f} / {bits[ARRAYS]:.1f} bits per kept logit",
    )


def _paired(rows: list[dict], metric: str, ratio: Callable[[float, float], float]) -> list[float]:
    """Returns a ratio for every run, which is one commit, machine, precision and prompt length."""
    fields = ("commit", "device", "dtype", "question_tokens")
    runs: dict[tuple, dict[bool, list[float]]] = {}
    for row in rows:
        if row["metric"] == metric:
            run = runs.setdefault(tuple(row.get(field) for field in fields), {True: [], False: []})
            run[row["provider"] == OURS].append(row["p50"])
    return [
        ratio(statistics.median(run[True]), statistics.median(run[False])) for run in runs.values() if all(run.values())
    ]


def _demo_sentence(results: Results) -> str:
    """Returns what the newest demonstration healed, and whether SLIM's adaptive weight helps."""
    latest = latest_demo(results.rows["demo"])
    reached = {method: f"{row['curve'][-1]['perplexity']:.0f}" for method, row in latest.items()}
    row = latest["kd"]
    return (
        f"`make demo` halves SmolLM2-135M (perplexity {row['teacher_perplexity']:.1f} to "
        f"{row['curve'][0]['perplexity']:,.0f}), healed on {row['train_rows']:,} tokens: {reached['sft']} by "
        f"labels, {reached['kd']} by KD, {reached['slim']} by SLIM. {weight_sentence(results.rows[COMPARED])}"
        "[More](docs/reproduced.md)."
    )


def _typical(ratios: list[float]) -> str:
    """Returns text such as 20.2 (16.4 to 23.9): median, least and most; empty where no time is compared."""
    if not ratios:
        return ""
    digits = 2 if statistics.median(ratios) < 2 else 1
    typical, least, most = (f"{value:.{digits}f}" for value in (statistics.median(ratios), min(ratios), max(ratios)))
    return f"{typical} ({least} to {most})"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def _machines(results: Results) -> str:
    """Returns every machine with what was measured on it at which commits, and the span of dates."""
    sources = {"ops": "cpu", "training step": "training_step", "search": "search", "store": "codecs"}
    measured: dict[str, list[str]] = {}
    dates = []
    for name, source in sources.items():
        rows = results.rows[source]
        dates += [row["date"][:10] for row in rows]
        for device in dict.fromkeys(row["device"] for row in rows):
            commits = list(dict.fromkeys(row["commit"] for row in rows if row["device"] == device))
            span = commits[0] if len(commits) == 1 else f"{commits[0]} to {commits[-1]}"
            measured.setdefault(device, []).append(f"{name}: {span}")
    machines = " and ".join(f"{device} ({'; '.join(found)})" for device, found in measured.items())
    return f"Machines, with the commits: {machines}, {min(dates)} to {max(dates)}"


def overview_figure(results: Results):
    """Draws the memory of the loss, the speed of every comparison, and the students' perplexity, side by side."""
    import matplotlib.pyplot as plt

    figure, (memory, speed, learning) = plt.subplots(
        1, 3, figsize=(13, 3.9), layout="constrained", width_ratios=(1.05, 1.0, 1.05)
    )
    _draw_memory(memory, results)
    _draw_speed(speed, results)
    _draw_learning(learning, results)
    return figure


OUR_COLOUR, THEIR_COLOUR, THIRD_COLOUR = "#1f6fb4", "#b9bec5", "#e07b39"


def _draw_memory(axes, results: Results) -> None:
    cases = [case for case in results.cases(LOSS) if case.peak_bytes(case.row["peer"])]
    labels = []
    for place, case in enumerate(cases):
        ours, theirs = case.peak_bytes(OURS) or 0, case.peak_bytes(case.row["peer"]) or 0
        for shift, size, colour in ((-0.2, theirs, THEIR_COLOUR), (0.2, ours, OUR_COLOUR)):
            axes.barh(place + shift, size / 2**20, height=0.38, color=colour)
            axes.annotate(
                f"{_mib(size)} MiB", (size / 2**20, place + shift), (4, 0), textcoords="offset points", va="center"
            )
        sizes = case.row["sizes"]
        labels.append(f"{sizes['N']} tokens\nV = {sizes['V']:,}\n{case.row['dtype']}")
    axes.set_yticks(range(len(cases)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlim(left=0)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    handles = [axes.patches[1], axes.patches[0]]
    axes.legend(handles, ["linear_slim_loss", "eager PyTorch"], frameon=False, loc="lower right")
    axes.set_title("Extra memory of the loss and its gradient", loc="left", weight="bold")


def _draw_speed(axes, results: Results) -> None:
    names = {"topk_logits": "topk_logits", "sample_logits": "sample_logits", "slim_loss": "slim_loss"}
    names |= {"slim_loss (CE only)": "cross entropy", LOSS: "linear_slim_loss"}
    lines = [(names[op], ratios_of(results.cases(op))) for op in names]
    lines += [("training step", _training_step(results).ratios), ("tree search", _search(results).ratios)]
    for place, (_, ratios) in enumerate(lines):
        typical = statistics.median(ratios)
        axes.plot([min(ratios), max(ratios)], [place, place], color=OUR_COLOUR, linewidth=5, alpha=0.35)
        axes.plot(typical, place, "o", color=OUR_COLOUR, markersize=6)
        axes.annotate(
            f"{typical:.{1 if typical >= 2 else 2}f}x",
            (max(ratios), place),
            (7, 0),
            textcoords="offset points",
            va="center",
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.8, 250)
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1x", "2x", "5x", "10x", "20x", "50x", "100x"])
    axes.minorticks_off()
    axes.set_yticks(range(len(lines)), [name for name, _ in lines])
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.3)
    axes.set_title("Times faster: typical, least and most", loc="left", weight="bold")


def _draw_learning(axes, results: Results) -> None:
    experiment = Experiment(results.rows["sample_efficiency"])
    arms = {"the text alone (SFT)": (SFT, THEIR_COLOUR), "all logits (KD)": (DENSE_KD, THIRD_COLOUR)}
    arms["top 5 % of logits (SLIM)"] = (SLIM, OUR_COLOUR)
    for number, (name, (arm, colour)) in enumerate(arms.items()):
        points = [(size, experiment.estimate(arm, size, "teacher_perplexity")) for size in experiment.sizes]
        points = [(size * (1 + 0.03 * (number - 1)), found) for size, found in points if found is not None]
        means = [found.mean for _, found in points]
        bars = [found.high - found.mean for _, found in points]
        axes.errorbar([size for size, _ in points], means, yerr=bars, color=colour, marker="o", capsize=3, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(experiment.sizes, [f"{size // 1000}k" for size in experiment.sizes])
    axes.set_yticks([200, 400, 800, 1600], ["200", "400", "800", "1,600"])
    axes.minorticks_off()
    axes.set_ylim(130, 2000)
    axes.set_xlabel("tokens that the teacher wrote")
    axes.grid(linewidth=0.3)
    axes.legend(frameon=False, loc="lower left")
    axes.set_title("Held-out perplexity of the student", loc="left", weight="bold")
