"""What the README says of one results file each, but for those of the ops."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench import records
from bench.ops.case import OURS
from bench.reproduce.instructions_table import instructions_table
from bench.reproduce.sample_efficiency_results import sample_efficiency_block

METHODS = {"sft": "SFT: labels only", "kd": "KD: labels + top 5 % logits", "slim": "SLIM: adaptive weight"}


def demo_table(rows: list[dict]) -> str:
    """What the demo's students reached on documents that none of them was trained on."""
    latest = {row["method"]: row for row in rows}
    lines = ["| student | held-out perplexity | KL to the teacher | at its best |", "|---|---:|---:|---:|"]
    for method, row in latest.items():
        last = row["curve"][-1]
        best = min(row["curve"], key=lambda point: point["perplexity"])
        lines.append(
            f"| {METHODS[method]} | {last['perplexity']:.0f} | {last['kl_ghost']:.2f} nats | "
            f"{best['perplexity']:.0f}, {best['kl_ghost']:.2f} nats after {best['tokens_seen'] / 1000:.0f}k tokens |"
        )
    row = rows[-1]
    lines += [
        "",
        f"One `make demo`: SmolLM2-135M-Instruct (held-out perplexity {row['teacher_perplexity']:.1f}) writes "
        f"{row['train_rows']:,} tokens; the same small randomly initialised student learns from them three ways, and "
        f"is measured on {row['heldout_rows']:,} tokens from other prompts. One seed, so read differences of a few per "
        f"cent as none. Its logits take {row['store_bytes_per_token'] / 1000:.1f} kB per token, "
        f"{row['store_bits_per_entry']:.2f} bits per kept entry. {row['device']}, {row['threads']} threads, "
        f"{row['date'][:10]}.",
    ]
    return "\n".join(lines)


def codec_table(rows: list[dict]) -> str:
    """What the rows of a real teacher take, and what rounding them costs."""
    latest = {row["codec"]: row for row in rows}
    lines = ["| kept logits as | bits per entry | KL of the rounding, nats |", "|---|---:|---:|"]
    for name, row in sorted(latest.items(), key=lambda item: item[1]["bits_per_entry"]):
        error = "0" if row["kl_nats"] == 0 else f"{row['kl_nats']:.1e}"
        lines.append(f"| {f'**codec `{name}`**' if row['is_ours'] else name} | {row['bits_per_entry']:.1f} | {error} |")
    row = rows[-1]
    lines += [
        "",
        f"{row['rows']:,} rows of {row['top_k']:,} entries, {100 * row['top_k'] / row['vocab']:.0f} % of the "
        f"vocabulary of {row['teacher']}. Ours are whole stores, with token ids, index and checksums; the others are "
        f"their rows alone. The polynomial is fitted by our benchmark. `python -m bench.codecs`, {row['date'][:10]}.",
    ]
    return "\n".join(lines)


def loader_sentence(rows: list[dict]) -> str:
    """How long a training step waits for its batch."""
    latest = {(row["shape"]["vocab"], row["workers"]): row for row in rows}
    said = [
        f"{100 * row['waiting']:.1f} % with {workers} worker{'s' * (workers != 1)} at V = {vocab}"
        for (vocab, workers), row in sorted(latest.items())
    ]
    row = rows[-1]
    return (
        f"Of a training step, this share is waiting for its batch of a store: {', '.join(said)} (a student of "
        f"{row['shape']['layers']} layers of {row['shape']['hidden']}, {row['device']}, {row['threads']} threads, "
        f"{row['date'][:10]}; `python -m bench.loader`)."
    )


def training_step_table(rows: list[dict]) -> str:
    """What whole steps of a student take with our loss and with the usual one."""
    latest = {(row["shape"]["layers"], row["dtype"], row["mode"], row["metric"], row["provider"]): row for row in rows}
    lines = [
        "| training step | layers | precision | time, ours / peer | speed-up | peak memory, ours / peer |",
        "|---|---:|---|---:|---:|---:|",
    ]
    names = {"slim": "SLIM, peer: eager loss", "sft": "SFT, peer: transformers"}
    precisions = {"float32": "float32", "bfloat16": "bfloat16 autocast"}
    for layers, dtype, mode in dict.fromkeys(key[:3] for key in latest):
        seconds, peaks = (
            _ours_first({key[4]: row["p50"] for key, row in latest.items() if key[:4] == (layers, dtype, mode, metric)})
            for metric in ("time", records.MEMORY)
        )
        lines.append(
            f"| {names[mode]} | {layers} | {precisions[dtype]} | {seconds[0] / 1e3:.2f} / {seconds[1] / 1e3:.2f} s | "
            f"{seconds[1] / seconds[0]:.2f}x | {peaks[0] / 2**20:.0f} / {peaks[1] / 2**20:.0f} MiB |"
        )
    row = rows[-1]
    lines += [
        "",
        f"Forward, loss, backward and AdamW of a student shaped like SmolLM2-135M (V = {row['shape']['vocab']}, "
        f"D = {row['shape']['hidden']}) on {row['shape']['batch']} x {row['shape']['tokens']} tokens; medians of steps "
        "in turns; memory over weights and optimizer state, gradients included. "
        f"{row['device']}, {row['threads']} threads, commit {row['commit']}, {row['date'][:10]}; "
        "`python -m bench.training_step`.",
    ]
    return "\n".join(lines)


def _ours_first(figures: dict[str, float]) -> list[float]:
    return [figures[name] for name in sorted(figures, key=lambda name: name != OURS)]


def search_sentence(rows: list[dict]) -> str:
    """How fast the tree search generates, what its branches take, and how long the selection among them is."""
    rows = _newest(rows, ("device", "isa", "threads"))
    searches = [row for row in rows if row["op"] == "search"]
    speeds: dict[int, list[dict]] = {}
    for row in searches:
        if row["metric"] == "throughput":
            speeds.setdefault(row["question_tokens"], []).append(row)
    said = []
    for tokens, of_length in sorted(speeds.items()):
        speed = _newest_medians(of_length)
        beside = ", ".join(
            f"{speed[OURS] / rate:.1f}x {provider} ({rate:,.0f})"
            for provider, rate in speed.items()
            if provider != OURS
        )
        said.append(f"after prompts of {tokens} tokens {speed[OURS]:,.0f} tokens/s, {beside}")
    memory = _newest_medians([row for row in searches if row["metric"] == "kv_memory"])
    [copies] = (count for provider, count in memory.items() if provider != OURS)
    row = searches[-1]
    shape = row["shape"]
    return (
        f"A search over {shape['questions']} questions at once, branching {shape['branching']}, beam {shape['beam']}, "
        f"{shape['depth']} steps of {shape['step_tokens']} tokens, generates {'; '.join(said)}. "
        f"With prompts of {shape['prompt_tokens']} tokens its keys and values take {memory[OURS] / 2**20:.0f} MiB, "
        f"{copies / memory[OURS]:.0f}x less than a copy for each sequence. The plain batch has the search's "
        f"{shape['questions'] * shape['branching'] * shape['beam']} sequences all the time, and its reading of prompts "
        f"is not counted. {_search_limits(searches)}{_consensus_sentence(rows)}{row['model']}, {row['dtype']}, "
        f"{row['device']}, {row['threads']} threads, {row['date'][:10]}; `python -m bench.search`."
    )


def _search_limits(searches: list[dict]) -> str:
    """What a reader must know where less than the whole benchmark was run."""
    row = next(row for row in reversed(searches) if row["metric"] == "throughput")
    rounds = 1 + row.get("round", 0)
    part = row.get("reencoded", row["shape"]["questions"])
    fewer = f"; generate on text searched {part} of the questions" if part < row["shape"]["questions"] else ""
    return f"{rounds} {'round' if rounds == 1 else 'rounds'}{fewer}. "


def _consensus_sentence(rows: list[dict]) -> str:
    times = [row for row in rows if row["op"] == "consensus"]
    if not times:
        return ""
    shape, figures = times[-1]["shape"], _newest_medians(times)
    [(peer, slow)] = ((provider, time) for provider, time in figures.items() if provider != OURS)
    return (
        f"The consensus of {shape['texts']} candidates of {shape['words']} words takes {figures[OURS]:.0f} ms, "
        f"{slow / figures[OURS]:.0f}x less than {peer} ({slow:,.0f} ms). "
    )


def _newest_medians(rows: list[dict]) -> dict[str, float]:
    """Of every provider, the median over the rounds of the newest commit."""
    found: dict[str, list[float]] = {}
    for row in _newest(rows, ("commit",)):
        found.setdefault(row["provider"], []).append(row["p50"])
    return {provider: statistics.median(values) for provider, values in found.items()}


def _newest(rows: list[dict], fields: Sequence[str]) -> list[dict]:
    """Those that are as the last in some fields, such as where they were measured."""
    return [row for row in rows if all(row[field] == rows[-1][field] for field in fields)]


STEPS = {
    "gsm8k": "of GSM8K's solutions",
    "strategyqa": "of StrategyQA's facts",
    "own": "of the model's own",
    "loop": "of the model's own loops",
    "verbatim": "verbatim",
    "retyped": "in other case and punctuation",
    "reworded": "with words replaced",
    "paraphrased": "paraphrased",
    "renumbered": "with other numbers",
}


def repetition_sentence(rows: list[dict]) -> str:
    """Which steps the repetition check cuts as it is by default."""
    row = [row for row in rows if row["is_default"]][-1]
    said = {
        group: ", ".join(f"{100 * share:.0f} % of {row['steps'][kind]} {STEPS[kind]}" for kind, share in cut.items())
        for group, cut in row["cut"].items()
    }
    return (
        f"The repetition check at its default ({row['embedding']} of {row['model']}, threshold {row['threshold']}) "
        f"cuts of new steps {said['new']}; of repeated ones {said['repeated']}; of those in between {said['between']}. "
        f"{row['device']}, {row['date'][:10]}; `python -m bench.repetition`."
    )


# What the README shows between the markers NAME:begin and NAME:end, from bench/results/NAME.jsonl.
BLOCKS = {
    "demo": demo_table,
    "codecs": codec_table,
    "loader": loader_sentence,
    "training_step": training_step_table,
    "search": search_sentence,
    "repetition": repetition_sentence,
    "instructions": instructions_table,
    "sample_efficiency": sample_efficiency_block,
}
