"""The README's table of bench/reproduce/instructions.py."""

from __future__ import annotations

import math

import numpy as np

from bench.reproduce.instructions_scores import interval

MODELS = {
    "teacher": "the teacher",
    "sft": "SFT: responses only",
    "kd": "KD: responses + top 5 % logits",
    "minillm": "MiniLLM: reverse KL on its own words (TRL)",
    "slim": "SLIM: adaptive weight",
    "warmed_up": "where these four start",
    "dropped": "its layers before any training",
}
METHODS = ("sft", "kd", "slim", "minillm")
_SAME = ("settings", "data")


def instructions_table(rows: list[dict]) -> str:
    """Rouge-L of the newest settings, with 95 % intervals over prompts, and the differences from SFT, in pairs."""
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in _SAME)]
    last = rows[-1]
    values = {method: _values(rows, method) for method in MODELS if any(row["method"] == method for row in rows)}
    heads = [f"{dataset} ({len(score['values'])})" for dataset, score in last["scores"].items()]
    lines = [f"| | {' | '.join(heads)} | all | less SFT |", f"|---|{'---:|' * (len(heads) + 2)}"]
    for method, found in values.items():
        cells = [_cell(found[dataset]) for dataset in last["scores"]]
        whole = np.concatenate(list(found.values()))
        cells.append(_cell(whole))
        is_compared = "sft" in values and method in METHODS and method != "sft"
        cells.append(_cell(whole - np.concatenate(list(values["sft"].values())), "+") if is_compared else "")
        lines.append(f"| {MODELS[method]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _caption(rows)])


def _values(rows: list[dict], method: str) -> dict[str, np.ndarray]:
    """What each prompt scored, the mean over seeds; of rows of the same seed the newest counts."""
    seeds = {row["seed"]: row["scores"] for row in rows if row["method"] == method}
    return {
        dataset: np.mean([scores[dataset]["values"] for scores in seeds.values()], axis=0)
        for dataset in rows[-1]["scores"]
    }


def _cell(values: np.ndarray, sign: str = "") -> str:
    low, high = interval(values)
    return f"{values.mean():{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


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
    decoding = f"drawn at temperature {chosen['temperature']:g}" if chosen["temperature"] else "greedy"
    took = ", ".join(f"{method} {np.mean(spent):.1f}" for method, spent in minutes.items() if np.isfinite(spent).all())
    took = f"; processor minutes of training: {took}" if took else ""
    return (
        f"Rouge-L (F, in %, with stemming) of the first {chosen['max_new_tokens']} tokens, {decoding}; in brackets 95 "
        f"% bootstrap intervals over prompts, in the last column of the paired difference. Teacher: "
        f"{chosen['teacher']}; student: {chosen['layers']} of its layers, after {chosen['warm_up_steps']} steps of SFT "
        f"that all share. Then {chosen['steps']} steps of {chosen['batch_size']} of {last['documents']:,} examples "
        f"({last['labels']:,} response tokens), MiniLLM {chosen['minillm_steps']} of as many prompts{took}. "
        f"{seeds} seed{'s' * (seeds != 1)}. {last['left_out']} training examples with held-out or "
        f"repeated instructions were left out; of {prompts} references, or responses of a model, at most {non_ascii} "
        f"hold characters beyond ASCII, which Rouge's tokenizer drops. {last['device']}, {last['threads']} "
        f"thread{'s' * (last['threads'] != 1)}, {last['date'][:10]}; `python -m bench.reproduce.instructions`."
    )
