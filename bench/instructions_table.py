"""The README's table of bench/reproduce_instructions.py."""

from __future__ import annotations

import numpy as np

from bench.instructions_scores import interval

MODELS = {
    "teacher": "the teacher",
    "sft": "SFT: responses only",
    "kd": "KD: responses + top 5 % logits",
    "minillm": "MiniLLM: reverse KL on its own words (TRL)",
    "slim": "SLIM: adaptive weight",
    "warmed_up": "where these four start",
    "dropped": "its layers before any training",
}
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
        is_compared = "sft" in values and method not in ("sft", "teacher", "dropped", "warmed_up")
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
    row, chosen = rows[-1], rows[-1]["settings"]
    newest = {(row["method"], row["seed"]): row for row in rows}.values()
    minutes = {
        method: np.mean([row["train_seconds"] for row in newest if row["method"] == method]) / 60
        for method in ("sft", "kd", "slim", "minillm")
        if any(row["method"] == method for row in newest)
    }
    seeds = len({row["seed"] for row in newest if row["method"] in minutes})
    prompts = sum(len(score["values"]) for score in row["scores"].values())
    non_ascii = max(max(row["non_ascii"].values()) for row in newest)
    decoding = f"drawn at temperature {chosen['temperature']:g}" if chosen["temperature"] else "greedy"
    took = ", ".join(f"{method} {count:.1f}" for method, count in minutes.items())
    return (
        f"Rouge-L (F, in %, with stemming) of the first {chosen['max_new_tokens']} tokens, {decoding}; in brackets 95 "
        f"% bootstrap intervals over prompts, in the last column of the paired difference. Teacher: "
        f"{chosen['teacher']}; student: {chosen['layers']} of its layers, after {chosen['warm_up_steps']} steps of SFT "
        f"that all share. Then {chosen['steps']} steps of {chosen['batch_size']} of {row['documents']:,} examples "
        f"({row['labels']:,} response tokens), MiniLLM {chosen['minillm_steps']} of as many prompts; minutes of "
        f"training: {took}. {seeds} seed{'s' * (seeds != 1)}. {row['left_out']} training examples with held-out or "
        f"repeated instructions were left out; at most {non_ascii} of {prompts} texts hold characters beyond ASCII, "
        f"which Rouge's tokenizer drops. {row['device']}, {row['threads']} "
        f"thread{'s' * (row['threads'] != 1)}, {row['date'][:10]}; `python -m bench.reproduce_instructions`."
    )
