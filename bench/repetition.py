"""Measures which steps the repetition check cuts, for several embedding layers and thresholds; appends rows.

python -m bench.repetition --data DIR --out bench/results/repetition.jsonl [--layers 0 1 2 ...] [--encoder FOLDER]

DIR holds ``gsm8k/{train,test}.jsonl`` and ``strategyqa/train.json``. New steps are those of GSM8K's reference
solutions, StrategyQA's facts, and steps that the model generates greedily in words that it has not used before.
Repeated steps are made from GSM8K's, or are loops of the model. Half of the questions choose each embedding's
threshold: the lowest that cuts at most 1 % of the new steps, with equal weights for the three sources. The rows report
the other half, at that threshold and at the default.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from bench import repetition_chains
from bench.machine import machine
from bench.repetition_chains import KINDS, Chain
from slimkernels.search import (
    CheckedBranch,
    CheckedStep,
    PathFinderConfig,
    RepetitionCheck,
    SentenceEncoder,
    TransformersEngine,
)
from slimkernels.teacher import load_teacher

THRESHOLDS = [round(0.5 + 0.001 * place, 3) for place in range(501)]
MOST_NEW_CUT = 0.01
# The scores of the steps of each kind.
Scores = dict[str, list[float]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model, as for load_teacher")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3, 4, 6, 8, 12, 20, 30])
    parser.add_argument("--encoder", help="directory of a sentence encoder to measure too")
    parser.add_argument("--gsm8k", type=int, default=240, help="number of reference solutions")
    parser.add_argument("--strategyqa", type=int, default=200, help="number of questions whose facts are read")
    parser.add_argument("--own", type=int, default=24, help="number of questions that the model answers")
    args = parser.parse_args(arguments)
    model, tokenizer = load_teacher(args.model)
    engine = TransformersEngine(model, tokenizer)
    questions = [json.loads(line)["question"] for line in (args.data / "gsm8k/test.jsonl").read_text().splitlines()]
    config = PathFinderConfig(max_depth=12, max_step_tokens=48, answer_kind=None, batch_questions=args.own or 1)
    chains = [
        *repetition_chains.gsm8k_chains(args.data / "gsm8k/train.jsonl", tokenizer, args.gsm8k),
        *repetition_chains.strategyqa_chains(args.data / "strategyqa/train.json", tokenizer, args.strategyqa),
        *repetition_chains.own_chains(engine, questions[: args.own], config),
    ]
    measured = scores_by_layer(model, chains, args.layers)
    rows = [row for layer in args.layers for row in judge(f"layer {layer}", *measured[layer])]
    if args.encoder:
        rows += judge(
            "/".join(Path(args.encoder).parts[-2:]),
            *scores_by_encoder(SentenceEncoder.from_pretrained(args.encoder), chains),
        )
    default = f"layer {engine.embedding_layer}"
    with args.out.open("a") as out:
        for row in rows:
            row["is_default"] = row["embedding"] == default and row["threshold"] == RepetitionCheck().threshold
            shares = [f"{kind} {100 * share:.0f} %" for cut in row["cut"].values() for kind, share in cut.items()]
            print(f"{row['embedding']} at {row['threshold']}: cut {', '.join(shares)}")
            shared = {"op": "repetition", "model": Path(args.model).name, "dtype": "float32"}
            out.write(json.dumps(shared | row | machine()) + "\n")


def step_embeddings(model: PreTrainedModel, chain: Chain, layers: Sequence[int]) -> np.ndarray:
    """Computes the embeddings (layers, steps, D) that ``TransformersEngine`` gives the steps, from one forward."""
    ids = [*chain.prompt, *(token for step in chain.steps for token in step.token_ids)]
    with torch.inference_mode():
        output = model.base_model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    hidden = torch.stack([output.hidden_states[layer][0].float() for layer in layers])
    ends = np.cumsum([len(chain.prompt), *(len(step.token_ids) for step in chain.steps)])
    # A step is judged before the model reads its last token. A step of one token is embedded by the token before it.
    spans = [(min(begin, end - 2), end - 1) for begin, end in itertools.pairwise(ends)]
    means = torch.stack([hidden[:, begin:end].mean(1) for begin, end in spans], 1)
    return (means - hidden[:, None, : len(chain.prompt)].mean(2)).numpy()


def scores_by_layer(
    model: PreTrainedModel, chains: Iterable[Chain], layers: Sequence[int]
) -> dict[int, tuple[Scores, Scores]]:
    """Returns the scores of the choosing half and of the other half, for each layer."""
    scores = {layer: (defaultdict(list), defaultdict(list)) for layer in layers}
    for chain in chains:
        for layer, embeddings in zip(layers, step_embeddings(model, chain, layers), strict=True):
            _add_scores(scores[layer], chain, embeddings)
    return scores


def scores_by_encoder(encoder: SentenceEncoder, chains: Iterable[Chain]) -> tuple[Scores, Scores]:
    """Returns the scores of the choosing half and of the other half."""
    scores = (defaultdict(list), defaultdict(list))
    for chain in chains:
        _add_scores(scores, chain, encoder([step.text for step in chain.steps]))
    return scores


def _add_scores(scores: tuple[Scores, Scores], chain: Chain, embeddings: np.ndarray) -> None:
    checked = [CheckedStep(step.text, embedding) for step, embedding in zip(chain.steps, embeddings, strict=True)]
    for place, step in enumerate(chain.steps):
        if step.kind:
            score = RepetitionCheck().score(CheckedBranch("", checked[:place], checked[place]))
            scores[chain.number % 2][step.kind].append(score)


def judge(embedding: str, choosing: Scores, held_out: Scores) -> list[dict]:
    """Returns a row for the chosen threshold, and one for the default."""
    new = [choosing[kind] for kind in KINDS["new"] if kind in choosing]
    chosen = next(
        threshold for threshold in THRESHOLDS if np.mean([_share(scores, threshold) for scores in new]) <= MOST_NEW_CUT
    )
    return [
        {
            "embedding": embedding,
            "threshold": threshold,
            "chosen_by": chosen_by,
            "steps": {kind: len(scores) for kind, scores in held_out.items()},
            "cut": {
                group: {kind: _share(held_out[kind], threshold) for kind in kinds if kind in held_out}
                for group, kinds in KINDS.items()
            },
            "score": {
                kind: dict(zip(("p1", "p50", "p99"), np.quantile(scores, (0.01, 0.5, 0.99)).round(4), strict=True))
                for kind, scores in held_out.items()
            },
        }
        for threshold, chosen_by in ((chosen, "the other half"), (RepetitionCheck().threshold, "default"))
    ]


def _share(scores: Sequence[float], threshold: float) -> float:
    return float(np.mean(np.asarray(scores) >= threshold))


if __name__ == "__main__":
    main()
