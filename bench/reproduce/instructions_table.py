"""The documentation's table of the instruction-following experiment."""

from __future__ import annotations

import math

import numpy as np

from slimkernels.evaluate.statistics import bootstrap_interval

MODELS = {
    "teacher": "the teacher",
    "sft": "SFT: responses only",
    "kd": "KD: responses + top 5 % logits",
    "minillm": "MiniLLM: reverse KL on the student's own responses (TRL)",
    "slim": "SLIM: adaptive weight",
    "warmed_up": "the student that all methods start from",
    "dropped": "the student before any training",
}
METHODS = ("sft", "kd", "slim", "minillm")
_SAME = ("settings", "data")


def instructions_table(rows: list[dict]) -> str:
    """Tabulates Rouge-L of the newest settings with 95 % intervals over prompts, and paired differences from SFT."""
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in _SAME)]
    last = rows[-1]
    values = {method: _values(rows, method) for method in MODELS if any(row["method"] == method for row in rows)}
    heads = [f"{dataset} ({len(score['values'])})" for dataset, score in last["scores"].items()]
    lines = [f"| | {' | '.join(heads)} | all | minus SFT |", f"|---|{'---:|' * (len(heads) + 2)}"]
    for method, found in values.items():
        cells = [_cell(found[dataset]) for dataset in last["scores"]]
        whole = np.concatenate(list(found.values()))
        cells.append(_cell(whole))
        is_compared = "sft" in values and method in METHODS and method != "sft"
        cells.append(_cell(whole - np.concatenate(list(values["sft"].values())), "+") if is_compared else "")
        lines.append(f"| {MODELS[method]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _caption(rows)])


def _values(rows: list[dict], method: str) -> dict[str, np.ndarray]:
    """Returns each prompt's mean score over seeds, from the newest row of every seed."""
    seeds = {row["seed"]: row["scores"] for row in rows if row["method"] == method}
    return {
        dataset: np.mean([scores[dataset]["values"] for scores in seeds.values()], axis=0)
        for dataset in rows[-1]["scores"]
    }


def _cell(values: np.ndarray, sign: str = "") -> str:
    value, low, high = bootstrap_interval(values)
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _caption(rows: list[dict]) -> str:
    last, chosen = rows[-1], rows[-1]["settings"]
    newest = list({(row["method"], row["seed"]): row for row in rows}.values())
    trained = [row for row in newest if row["method"] in METHODS]
    minutes: dict[str, list[float]] = {}
    for row in trained:
        minutes.setdefault(row["method"], []).append(row.get("cpu_seconds", math.nan) / 60)
    seeds = len({row["seed"] for row in trained})
    prompts = sum(len(score["values"]) for score in last["scores"].values())
    non_ascii = max(max(row["non_ascii"].values()) for row in newest)
    decoding = f"sampled at temperature {chosen['temperature']:g}" if chosen["temperature"] else "decoded greedily"
    took = ", ".join(f"{method} {np.mean(spent):.1f}" for method, spent in minutes.items() if np.isfinite(spent).all())
    took = f" Processor minutes of training: {took}." if took else ""
    return (
        f"Rouge-L (F1 in %, with stemming) of responses of at most {chosen['max_new_tokens']} tokens, {decoding}. "
        f"Brackets hold 95 % bootstrap intervals over prompts, in the last column those of the paired difference. "
        f"Teacher: {chosen['teacher']}. Student: {chosen['layers']} of its layers, after {chosen['warm_up_steps']} "
        f"steps of SFT that all methods share. Each method then trains for {chosen['steps']} steps with "
        f"{chosen['batch_size']} of {last['documents']:,} examples ({last['labels']:,} response tokens) per step, "
        f"MiniLLM for {chosen['minillm_steps']} steps with as many prompts.{took} {seeds} seed{'s' * (seeds != 1)}. "
        f"{last['left_out']} training examples with held-out or repeated instructions were removed. Rouge's tokenizer "
        f"drops characters outside ASCII, which occur in at most {non_ascii} of a model's {prompts} responses or of "
        f"the references. {last['device']}, {last['threads']} thread{'s' * (last['threads'] != 1)}, "
        f"{last['date'][:10]}; the command is above."
    )
