"""Times the search, the same search by ``generate``, and plain generation; appends one row per measurement.

python -m bench.search --out bench/results/search.jsonl [--rounds 2] [--shots 0 3] [--dtype bfloat16 | float32]

Prompts are questions alone (53 tokens with SmolLM2's tokenizer), and questions after three worked examples (275
tokens). Measurements that the file already holds for this commit and machine are skipped, so an interrupted run can be
resumed.

Every provider generates the same number of tokens in every round: steps have a fixed length, and texts never end. The
search has 8 questions, branching 8 and beam 8, so at its full width 512 sequences grow at once, as many as plain
generation has all the time. Tokens are drawn from the whole softmax, which is the fastest setting for ``generate``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import records, search_peers
from bench.machine import machine
from bench.ops.case import OURS
from slimkernels.search import Candidate, PathFinder, PathFinderConfig, TransformersEngine, consensus
from slimkernels.search.plan import growth
from slimkernels.search.selection import Scorer
from slimkernels.teacher import load_teacher

REENCODING = "generate on the text of each leaf"
PLAIN = "plain batched generate"
SETS = "sets of trigrams, pair by pair"
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
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model, as for load_teacher")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2, help="number of measurements of every provider")
    parser.add_argument("--branching", type=int, default=8)
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--step-tokens", type=int, default=16)
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[0, 3], help="numbers of worked examples before a question"
    )
    parser.add_argument("--prompt-tokens", type=int, default=300, help="length of the prompts when memory is compared")
    parser.add_argument(
        "--batch-leaves", type=int, default=8, help="leaves that generate continues at a time; 8 was fastest"
    )
    parser.add_argument(
        "--reencoded",
        type=int,
        default=len(QUESTIONS),
        help="number of questions that generate searches per round, a divisor of 8",
    )
    parser.add_argument("--candidates", type=int, default=512, help="number of texts in the consensus")
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
        answer_kind=None,
    )
    sizes = ("branching", "beam", "depth", "step_tokens", "prompt_tokens")
    log = Log(
        args.out,
        shared={
            "op": "search",
            "model": Path(args.model).name,
            "dtype": args.dtype,
            "shape": {"questions": len(QUESTIONS)} | {name: getattr(args, name) for name in sizes},
            "reencoded": args.reencoded,
        },
    )
    torch.manual_seed(0)
    with torch.inference_mode():
        for shots in args.shots:
            questions = [WORKED * shots + question for question in QUESTIONS]
            tokens = len(tokenizer(questions[0])["input_ids"])
            providers = throughputs(model, tokenizer, config, questions, args.reencoded, args.batch_leaves)
            for number, name in _rounds(list(providers), args.rounds):
                fields = {"provider": name, "metric": "throughput", "question_tokens": tokens, "round": number}
                log.measure(fields, "tokens/s", providers[name])
        providers = memory(model, tokenizer, config, args.prompt_tokens)
        for name, run in providers.items():
            log.measure({"provider": name, "metric": "kv_memory"}, "bytes", run)
    log.shared = {"op": "consensus", "shape": {"texts": args.candidates, "words": 400}}
    providers = consensus_times(**log.shared["shape"])
    for number, name in _rounds(list(providers), args.rounds):
        log.measure({"provider": name, "metric": "time", "round": number}, "ms", providers[name])


class Log:
    """A file of measurements, which skips those that it already holds for this commit and machine.

    Attributes:
        shared: Fields of all rows that are appended from now on.
    """

    def __init__(self, path: Path, shared: dict) -> None:
        self.shared = shared
        self._path = path
        self._machine = machine()

    def measure(self, fields: dict, unit: str, run: Callable[[], float]) -> None:
        """Runs a measurement and appends its row, unless the file holds a row with these fields."""
        names = (*records.MACHINE_FIELDS, "threads")
        wanted = self.shared | fields | {name: self._machine[name] for name in names}
        known = not self._machine["commit"].endswith("-dirty")
        if known and any(wanted.items() <= row.items() for row in records.read(self._path)):
            return
        row = self.shared | fields | {"unit": unit, "p50": run()} | machine()
        print(f"{row['op']}, {row['provider']}: {row['p50']:,.0f} {unit}", flush=True)
        with self._path.open("a") as out:
            out.write(json.dumps(row) + "\n")


def throughputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PathFinderConfig,
    questions: Sequence[str],
    reencoded: int,
    batch_leaves: int,
) -> dict[str, Callable[[], float]]:
    """Returns, for every provider, the function that measures its generated tokens per second."""
    parts = itertools.cycle(range(0, len(questions), reencoded))
    engine = TransformersEngine(model, tokenizer, eos_token_ids=())
    rows = [children for _, children in growth(config)]
    total = len(questions) * sum(rows) * config.max_step_tokens

    def ours() -> float:
        start = time.perf_counter()
        results = PathFinder(engine, config, checks=(), chat=False).solve(questions)
        seconds = time.perf_counter() - start
        _require(sum(result.num_tokens for result in results), total)
        return total / seconds

    def reencoding() -> float:
        first = next(parts)
        part = questions[first : first + reencoded]
        start = time.perf_counter()
        beams = search_peers.search_with_generate(model, tokenizer, config, part, batch_leaves)
        seconds = time.perf_counter() - start
        _require({leaf.num_tokens for beam in beams for leaf in beam}, {config.max_depth * config.max_step_tokens})
        return total / len(questions) * len(part) / seconds

    def plain() -> float:
        tokens = config.max_step_tokens
        seconds = search_peers.generate_plainly(model, tokenizer, config, questions, rows[-1], tokens)
        return len(questions) * rows[-1] * tokens / seconds

    return {OURS: ours, REENCODING: reencoding, PLAIN: plain}


def memory(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PathFinderConfig, prompt_tokens: int
) -> dict[str, Callable[[], int]]:
    """Returns the functions that measure the peak bytes of keys and values of a search, and of unshared copies."""
    text = tokenizer(" ".join(QUESTIONS))["input_ids"]
    prompts = [(text * (prompt_tokens // len(text) + 1))[shift:][:prompt_tokens] for shift in range(len(QUESTIONS))]

    def ours() -> int:
        engine = TransformersEngine(model, tokenizer, eos_token_ids=())
        PathFinder(engine, config, checks=(), chat=False).solve(prompts)
        return engine.peak.shared_bytes

    def copies() -> int:
        # transformers' own cache of one sequence of the final length, times the number of sequences of a batch.
        length = prompt_tokens + config.max_depth * config.max_step_tokens
        cache = model(torch.tensor([(prompts[0] * 2)[:length]]), use_cache=True, logits_to_keep=1).past_key_values
        one = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        *_, (_, rows) = growth(config)
        return len(QUESTIONS) * rows * one

    return {OURS: ours, "unshared copies": copies}


def consensus_times(texts: int, words: int) -> dict[str, Callable[[], float]]:
    """Returns, for every provider, the function that measures the milliseconds of scoring texts of Zipf words."""
    generator = np.random.default_rng(0)
    drawn = generator.zipf(1.5, (texts, words)) % 2000
    candidates = [
        Candidate(index, " ".join(f"w{word}" for word in row), None, -1.0, 1) for index, row in enumerate(drawn)
    ]
    expected = search_peers.consensus_of_sets(candidates)

    def timed(score: Scorer) -> float:
        start = time.perf_counter()
        scores = score(candidates)
        seconds = time.perf_counter() - start
        np.testing.assert_allclose(scores, expected, rtol=1e-9)
        return 1e3 * seconds

    return {OURS: lambda: timed(consensus()), SETS: lambda: timed(search_peers.consensus_of_sets)}


def _rounds(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yields the number of each round with every name, rotated by one in each round."""
    for number in range(rounds):
        yield from ((number, name) for name in names[number % len(names) :] + names[: number % len(names)])


def _require(got: object, wanted: object) -> None:
    if got != wanted:
        raise RuntimeError(f"all providers must generate the same number of tokens: expected {wanted}, got {got}")


if __name__ == "__main__":
    main()
