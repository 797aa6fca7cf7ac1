"""The generated blocks of README and docs that show one results file each; those of the ops are in table.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench import records
from bench.losses.table import parity_block
from bench.ops.case import OURS
from bench.reproduce.downstream_table import downstream_table
from bench.reproduce.instructions_table import instructions_table
from bench.reproduce.methods_results import methods_block
from bench.reproduce.sample_efficiency_results import sample_efficiency_block

METHODS = {"sft": "SFT: labels only", "kd": "KD: labels + top 5 % logits", "slim": "SLIM: adaptive weight"}


def demo_table(rows: list[dict]) -> str:
    """Returns what the demo's students reached on documents that none of them was trained on."""
    latest = latest_demo(rows)
    row = latest["kd"]
    start = row["curve"][0]
    lines = ["| model | held-out perplexity | KL to the teacher |", "|---|---:|---:|"]
    lines.append(
        f"| before: {len(row['layers'])} of 30 layers | {start['perplexity']:,.0f} | {start['kl_ghost']:.2f} nats |"
    )
    for method, found in latest.items():
        last = found["curve"][-1]
        lines.append(f"| {METHODS[method]} | {last['perplexity']:.1f} | {last['kl_ghost']:.2f} nats |")
    lines.append(f"| the teacher: all layers | {row['teacher_perplexity']:.1f} | 0 |")
    seconds = row["phase_seconds"]
    trained = sum(time for name, time in seconds.items() if name.startswith("student "))
    lines += [
        "",
        f"One run of `make demo`, {sum(seconds.values()):.0f} s, of which {trained:.0f} s train. SmolLM2-135M-Instruct "
        f"loses half of its layers. What is left learns from {row['train_rows']:,} labels of the whole model's own "
        f"text, {row['epochs']} times by each method, and is measured on {row['heldout_rows']:,} labels from other "
        f"prompts. A measurement of ten seconds decides how much text there is time for. KD's KL has the factor "
        f"{row['kd_weight']:.2f}, the mean of SLIM's weights. One run with one seed cannot tell close methods apart. "
        f"The teacher's logits take {row['store_bytes_per_token'] / 1000:.1f} kB per token, "
        f"{row['store_bits_per_entry']:.2f} bits per kept entry. {row['device']}, {row['threads']} threads, "
        f"commit {row['commit']}, {row['date'][:10]}.",
    ]
    return "\n".join(lines)


def latest_demo(rows: list[dict]) -> dict[str, dict]:
    """Returns the newest run, by method."""
    return {row["method"]: row for row in _newest(rows, ("date",))}


def codec_table(rows: list[dict]) -> str:
    """Returns the bits that the rows of a real teacher take, and the divergence that rounding them causes."""
    latest = {row["codec"]: row for row in rows}
    lines = ["| kept logits as | bits per entry | KL of the rounding, nats |", "|---|---:|---:|"]
    for name, row in sorted(latest.items(), key=lambda item: item[1]["bits_per_entry"]):
        error = "0" if row["kl_nats"] == 0 else f"{row['kl_nats']:.1e}"
        lines.append(f"| {f'**codec `{name}`**' if row['is_ours'] else name} | {row['bits_per_entry']:.1f} | {error} |")
    row = rows[-1]
    lines += [
        "",
        f"{row['rows']:,} rows of {row['top_k']:,} entries, {100 * row['top_k'] / row['vocab']:.0f} % of the "
        f"vocabulary of {row['teacher']}. Codecs in bold are ours and are measured as whole stores, with token ids, "
        f"index and checksums; the others as rows alone. The polynomial is fitted by this benchmark. {row['device']}, "
        f"commit {row['commit']}, {row['date'][:10]}; `python -m bench.codecs --store runs/exact "
        "--out bench/results/codecs.jsonl`, on a store that was captured with `--codec float32`.",
    ]
    return "\n".join(lines)


def divergence_table(rows: list[dict]) -> str:
    """Returns the time of each divergence as a multiple of that of forward KL."""
    newest = _newest(rows, ("commit",))
    dtypes = list(dict.fromkeys(row["dtype"] for row in newest))
    ratios = {(row["options"], row["dtype"]): row["ratio"] for row in newest}
    lines = [f"| loss with | {' | '.join(dtypes)} |", "|---|" + "---:|" * len(dtypes)]
    for options in dict.fromkeys(row["options"] for row in newest):
        figures = " | ".join(f"{ratios[options, dtype]:.2f}" for dtype in dtypes)
        lines.append(f"| {', '.join(f'`{name}`' for name in options.split(', '))} | {figures} |")
    row = newest[-1]
    shape = row["shape"]
    lines += [
        "",
        f"Time of `slim_loss` and its gradient over that with `forward_kl`, under `ghost`, with {shape['top_k']:,} of "
        f"{shape['vocab']:,} logits kept. {row['device']} ({row['isa']}), {row['threads']} thread, commit "
        f"{row['commit']}, {row['date'][:10]}; `python -m bench.divergences --out bench/results/divergences.jsonl`.",
    ]
    return "\n".join(lines)


def loader_table(rows: list[dict]) -> str:
    """Returns the share of a training step that is spent waiting for its batch."""
    latest = {(row["shape"]["vocab"], row["workers"]): row for row in rows}
    lines = ["| vocabulary | workers of the `DataLoader` | share of a step spent waiting |", "|---:|---:|---:|"]
    lines += [
        f"| {vocab:,} | {workers} | {100 * row['waiting']:.1f} % |" for (vocab, workers), row in sorted(latest.items())
    ]
    row = rows[-1]
    lines += [
        "",
        f"A student of {row['shape']['layers']} layers of {row['shape']['hidden']}. {row['device']}, {row['threads']} "
        f"threads, commit {row['commit']}, {row['date'][:10]}; `python -m bench.loader "
        "--out bench/results/loader.jsonl`.",
    ]
    return "\n".join(lines)


def training_step_table(rows: list[dict]) -> str:
    """Returns time and memory of whole training steps with our loss and with the usual one."""
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
        f"D = {row['shape']['hidden']}) on {row['shape']['batch']} x {row['shape']['tokens']} tokens. Times are "
        "medians; the two take turns. Memory is the peak beyond weights and optimizer state, with gradients. "
        f"{row['device']}, {row['threads']} threads, commit {row['commit']}, {row['date'][:10]}; "
        "`python -m bench.training_step --out bench/results/training_step.jsonl`.",
    ]
    return "\n".join(lines)


def _ours_first(figures: dict[str, float]) -> list[float]:
    return [figures[name] for name in sorted(figures, key=lambda name: name != OURS)]


def search_table(rows: list[dict]) -> str:
    """Returns how fast the tree search generates on every machine, what its branches take, and its selection's time."""
    searches = [row for row in rows if row["op"] == "search"]
    groups: dict[tuple, list[dict]] = {}
    for row in searches:
        if row["metric"] == "throughput":
            groups.setdefault((row["device"], row["dtype"], row["question_tokens"]), []).append(row)
    peers = list(
        dict.fromkeys(row["provider"] for group in groups.values() for row in group if row["provider"] != OURS)
    )
    titles = [
        "machine",
        "precision",
        "tokens of a prompt",
        "search",
        *(f"faster than {peer}" for peer in peers),
        "rounds",
    ]
    lines = [f"| {' | '.join(titles)} |", f"|---|---|{'---:|' * (len(titles) - 2)}"]
    for (device, dtype, tokens), group in groups.items():
        speed = _newest_medians(group)
        ratios = [f"{speed[OURS] / speed[peer]:.1f}x" for peer in peers]
        # Newer rows are one round each and number it; older ones hold all of their rounds.
        rounds = str(1 + group[-1]["round"] if "round" in group[-1] else group[-1]["rounds"])
        lines.append(f"| {' | '.join([device, dtype, str(tokens), f'{speed[OURS]:,.0f} tokens/s', *ratios, rounds])} |")
    memory = _newest_medians([row for row in _newest(searches, ("device", "isa")) if row["metric"] == "kv_memory"])
    [copies] = (count for provider, count in memory.items() if provider != OURS)
    row = searches[-1]
    shape = row["shape"]
    sequences = shape["questions"] * shape["branching"] * shape["beam"]
    last = next(row for row in reversed(searches) if row["metric"] == "throughput")
    part = last.get("reencoded", shape["questions"])
    fewer = f" On {last['device']} generate on text searched {part} of the questions." * (part < shape["questions"])
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines += [
        "",
        f"A search over {shape['questions']} questions at once, branching {shape['branching']}, beam {shape['beam']}, "
        f"{shape['depth']} steps of {shape['step_tokens']} tokens, with {row['model']}. The plain batch has the "
        f"search's {sequences} sequences all the time, and the time in which it "
        f"reads the prompts is not counted.{fewer} With prompts of {shape['prompt_tokens']} tokens the keys and values "
        f"of the search take {memory[OURS] / 2**20:.0f} MiB in {row['dtype']}, {copies / memory[OURS]:.0f} times "
        f"less than a copy for each sequence. {_consensus_sentence(rows)}{row['threads']} threads, commits {commits}, "
        f"{rows[-1]['date'][:10]}; `python -m bench.search --out bench/results/search.jsonl`.",
    ]
    return "\n".join(lines)


def _consensus_sentence(rows: list[dict]) -> str:
    times = [row for row in rows if row["op"] == "consensus"]
    if not times:
        return ""
    shape, figures = times[-1]["shape"], _newest_medians(times)
    [(peer, slow)] = ((provider, time) for provider, time in figures.items() if provider != OURS)
    return (
        f"The consensus of {shape['texts']} candidates of {shape['words']} words takes {figures[OURS]:.0f} ms, "
        f"{slow / figures[OURS]:.0f} times less than {peer} ({slow:,.0f} ms). "
    )


def _newest_medians(rows: list[dict]) -> dict[str, float]:
    """Returns the median over the rounds of the newest commit, for every provider."""
    found: dict[str, list[float]] = {}
    for row in _newest(rows, ("commit",)):
        found.setdefault(row["provider"], []).append(row["p50"])
    return {provider: statistics.median(values) for provider, values in found.items()}


def _newest(rows: list[dict], fields: Sequence[str]) -> list[dict]:
    """Returns the rows that equal the last one in some fields, such as where they were measured."""
    return [row for row in rows if all(row[field] == rows[-1][field] for field in fields)]


STEPS = {
    "gsm8k": "a solution of GSM8K",
    "strategyqa": "a fact of StrategyQA",
    "own": "the model's own",
    "loop": "the model's own loop",
    "verbatim": "verbatim",
    "retyped": "other case and punctuation",
    "reworded": "some words replaced",
    "paraphrased": "a paraphrase",
    "renumbered": "other numbers",
}
GROUPS = {"new": "new", "repeated": "repeats an earlier step", "between": "resembles an earlier step"}


def repetition_table(rows: list[dict]) -> str:
    """Returns the share of every kind of step that the repetition check cuts by default."""
    row = [row for row in rows if row["is_default"]][-1]
    lines = ["| step | kind | steps | cut |", "|---|---|---:|---:|"]
    for group, cut in row["cut"].items():
        lines += [
            f"| {GROUPS[group]} | {STEPS[kind]} | {row['steps'][kind]} | {100 * share:.0f} % |"
            for kind, share in cut.items()
        ]
    lines += [
        "",
        f"The default embeds steps by {row['embedding']} of {row['model']} and cuts at a scaled cosine of "
        f"{row['threshold']}. {row['device']}, commit {row['commit']}, {row['date'][:10]}; "
        "`python -m bench.repetition --data DIR --out bench/results/repetition.jsonl`.",
    ]
    return "\n".join(lines)


# Content between the markers NAME:begin and NAME:end, from bench/results/NAME.jsonl.
BLOCKS = {
    "demo": demo_table,
    "codecs": codec_table,
    "divergences": divergence_table,
    "loader": loader_table,
    "training_step": training_step_table,
    "search": search_table,
    "repetition": repetition_table,
    "instructions": instructions_table,
    "sample_efficiency": sample_efficiency_block,
    "methods": methods_block,
    "downstream": downstream_table,
    "parity": parity_block,
}
