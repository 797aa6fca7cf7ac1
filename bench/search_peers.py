"""Peers of the search, as a user of transformers would write them: search and generation by ``generate``, consensus."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.search import Candidate, PathFinderConfig
from slimkernels.search.selection import word_trigrams


class Leaf(NamedTuple):
    """An open leaf.

    Attributes:
        text: Text of the branch, prompt included.
        sum_logprob: Sum of the log-probabilities of the generated tokens, in nats.
        num_tokens: Number of generated tokens.
    """

    text: str
    sum_logprob: float
    num_tokens: int


def search_with_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PathFinderConfig,
    questions: Sequence[str],
    batch_leaves: int,
) -> list[list[Leaf]]:
    """Searches every question by sampling from the text of each leaf, which every depth encodes again.

    Returns the open leaves of every question at the end. It samples from ``batch_leaves`` leaves at a time, because
    ``generate`` keeps keys and values for every sample, which for all leaves of all questions would take gigabytes.
    """
    beams = [[Leaf(question, 0.0, 0)] for question in questions]
    for depth in range(config.max_depth):
        leaves = [leaf for beam in beams for leaf in beam]
        children: list[list[Leaf]] = []
        for first in range(0, len(leaves), batch_leaves):
            children += _sample(model, tokenizer, config, depth, leaves[first : first + batch_leaves])
        children = iter(children)
        beams = [_best(config, [child for _ in beam for child in next(children)]) for beam in beams]
    return beams


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PathFinderConfig,
    depth: int,
    leaves: Sequence[Leaf],
) -> list[list[Leaf]]:
    inputs = tokenizer([leaf.text for leaf in leaves], return_tensors="pt", padding=True, padding_side="left")
    branching = config.branching_at(depth)
    output = model.generate(
        **inputs,
        **sampling(config, depth),
        max_new_tokens=config.max_step_tokens,
        num_return_sequences=branching,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logprobs = model.compute_transition_scores(output.sequences, output.logits, normalize_logits=True).sum(-1)
    steps = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = iter(zip(steps, logprobs.tolist(), strict=True))
    return [
        [
            Leaf(leaf.text + step, leaf.sum_logprob + logprob, leaf.num_tokens + config.max_step_tokens)
            for step, logprob in (next(rows) for _ in range(branching))
        ]
        for leaf in leaves
    ]


def _best(config: PathFinderConfig, leaves: Sequence[Leaf]) -> list[Leaf]:
    return sorted(leaves, key=lambda leaf: leaf.sum_logprob / leaf.num_tokens**config.length_penalty)[-config.beam :]


def generate_plainly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PathFinderConfig,
    questions: Sequence[str],
    samples: int,
    num_tokens: int,
) -> float:
    """Samples independent continuations in one batch. Returns the seconds from the first to the last new token.

    This excludes the encoding of the prompts, which ``generate`` does once for every sample.
    """
    clock = _Clock()
    inputs = tokenizer(list(questions), return_tensors="pt", padding=True, padding_side="left")
    model.generate(
        **inputs,
        **sampling(config, 0),
        max_new_tokens=num_tokens + 1,
        num_return_sequences=samples,
        logits_processor=LogitsProcessorList([clock]),
    )
    # The first call comes after the prompts were read; each further call is one token later.
    return clock.times[-1] - clock.times[0]


class _Clock(LogitsProcessor):
    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def consensus_of_sets(candidates: Sequence[Candidate]) -> list[float]:
    """Computes the sum of the Jaccard similarities of each candidate's word trigrams with those of all others."""
    trigrams = [word_trigrams(candidate.text) for candidate in candidates]
    scores = [0.0] * len(candidates)
    for one, two in itertools.combinations(range(len(candidates)), 2):
        shared = len(trigrams[one] & trigrams[two])
        if shared:
            similarity = shared / (len(trigrams[one]) + len(trigrams[two]) - shared)
            scores[one] += similarity
            scores[two] += similarity
    return scores


def sampling(config: PathFinderConfig, depth: int) -> dict:
    """Returns the options of ``generate`` that match a depth of the search."""
    return {
        "do_sample": True,
        "temperature": config.temperature_at(depth),
        "top_k": config.top_k,
        "top_p": config.top_p,
    }


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model with no end-of-text token, so that all providers generate the same number of tokens."""
    endless = copy.copy(model)
    endless.generation_config = copy.deepcopy(model.generation_config)
    endless.generation_config.eos_token_id = None
    endless.generation_config.pad_token_id = 0
    return endless
