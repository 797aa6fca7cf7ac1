"""Times the search, the same search by ``generate``, and plain generation in turns; appends a row for each.

python -m bench.search --out bench/results/search.jsonl [--rounds 3] [--dtype bfloat16] [--model smollm2-135m-instruct]

Every provider generates the same number of tokens in every round: steps have a fixed length, texts never end. The
search is 8 questions by branching 8 by beam 8, so 512 sequences live at its full width, as many as plain generation
has all the time. Tokens are drawn from the whole softmax, the cheapest way for ``generate``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import search_peers
from bench.case import OURS
from bench.machine import machine
from bench.measure import percentiles
from slimkernels.search import PathFinder, PathFinderConfig, TransformersEngine
from slimkernels.teacher import load_teacher

REENCODING = "generate on the text of each leaf"
PLAIN = "plain batched generate"
QUESTIONS = [
    f"Question: A baker has {trays} trays with {trays + 3} buns each. She sells {trays + 9} buns before noon and gives "
    f"away {trays} buns in the evening. How many buns does she have left at the end of the day?\nAnswer:"
    for trays in range(4, 12)
]

WORKED = (
    "Question: A farmer has 6 crates with 12 pears each. He sells 20 pears in the morning and gives away 7 pears in "
    "the evening. How many pears does he have left at the end of the day?\nAnswer: 6 crates hold 6 * 12 = 72 pears. "
    "After the morning 72 - 20 = 52 are left. After the evening 52 - 7 = 45 are left. The answer is 45.\n\n"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="as of load_teacher")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="in which every provider has its turn")
    parser.add_argument("--branching", type=int, default=8)
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--step-tokens", type=int, default=16)
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each question")
    parser.add_argument("--prompt-tokens", type=int, default=300, help="of the prompts for which memory is compared")
    parser.add_argument("--batch-leaves", type=int, default=8, help="that generate continues at a time; 8 was fastest")
    args = parser.parse_args(arguments)
    model, tokenizer = load_teacher(args.model, dtype=getattr(torch, args.dtype))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = search_peers.without_end(model)
    config = PathFinderConfig(
        branching_factor=args.branching,
        beam=args.beam,
        max_depth=args.depth,
        max_step_tokens=args.step_tokens,
        top_p=1.0,
        step_end=lambda _: False,
    )
    questions = [WORKED * args.shots + question for question in QUESTIONS]
    sizes = ("branching", "beam", "depth", "step_tokens", "prompt_tokens")
    shared = {
        "op": "search",
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "shape": {"questions": len(QUESTIONS)} | {name: getattr(args, name) for name in sizes},
        "question_tokens": len(tokenizer(questions[0])["input_ids"]),
        "rounds": args.rounds,
    }
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [
            {"provider": name, "metric": "throughput", "unit": "tokens/s"} | percentiles(rates)
            for name, rates in throughputs(model, tokenizer, config, questions, args.rounds, args.batch_leaves).items()
        ]
        rows += [
            {"provider": name, "metric": "kv_memory", "unit": "bytes", "p50": count}
            for name, count in memory(model, tokenizer, config, args.prompt_tokens).items()
        ]
    with args.out.open("a") as out:
        for row in rows:
            print(f"{row['provider']}: {row['p50']:,.0f} {row['unit']}")
            out.write(json.dumps(shared | row | machine()) + "\n")


def throughputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PathFinderConfig,
    questions: Sequence[str],
    rounds: int,
    batch_leaves: int,
) -> dict[str, list[float]]:
    """Generated tokens per second of every provider in every round."""
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    rows = _rows(config)
    total = len(questions) * sum(rows) * config.max_step_tokens

    def ours() -> float:
        start = time.perf_counter()
        results = PathFinder(engine, config, checks=()).solve(questions)
        seconds = time.perf_counter() - start
        _require(sum(result.num_tokens for result in results), total)
        return total / seconds

    def reencoding() -> float:
        start = time.perf_counter()
        beams = search_peers.search_with_generate(model, tokenizer, config, questions, batch_leaves)
        seconds = time.perf_counter() - start
        _require({leaf.num_tokens for beam in beams for leaf in beam}, {config.max_depth * config.max_step_tokens})
        return total / seconds

    def plain() -> float:
        tokens = config.max_step_tokens
        seconds = search_peers.generate_plainly(model, tokenizer, config, questions, rows[-1], tokens)
        return len(questions) * rows[-1] * tokens / seconds

    return _in_turns({OURS: ours, REENCODING: reencoding, PLAIN: plain}, rounds)


def memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PathFinderConfig, prompt_tokens: int
) -> dict[str, int]:
    """The most bytes of keys and values in a search on long prompts, and of a batch of as many copies."""
    text = tokenizer(" ".join(QUESTIONS))["input_ids"]
    prompts = [(text * (prompt_tokens // len(text) + 1))[shift:][:prompt_tokens] for shift in range(len(QUESTIONS))]
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    PathFinder(engine, config, checks=()).solve(prompts)
    # transformers' own cache of one sequence that is as long as ours are at the end; a batch has one for each.
    length = prompt_tokens + config.max_depth * config.max_step_tokens
    cache = model(torch.tensor([(prompts[0] * 2)[:length]]), use_cache=True, logits_to_keep=1).past_key_values
    one = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    return {OURS: engine.peak.shared_bytes, "unshared copies": len(QUESTIONS) * _rows(config)[-1] * one}


def _rows(config: PathFinderConfig) -> list[int]:
    """Sequences of a question that grow together, at every depth."""
    rows, leaves = [], 1
    for depth in range(config.max_depth):
        rows.append(leaves * config.branching_at(depth))
        leaves = min(rows[-1], config.beam)
    return rows


def _in_turns(providers: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(providers[name]())
    return found


def _require(got: object, wanted: object) -> None:
    if got != wanted:
        raise RuntimeError(f"all providers must generate the same number of tokens: expected {wanted}, got {got}")


if __name__ == "__main__":
    main()
