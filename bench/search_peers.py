"""What a user of transformers would write: the search with ``generate`` on text, plain generation, and consensus."""

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
    """The text of a branch with its prompt, and what was generated of it."""

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
    """The open leaves of every question at the end; each depth encodes the text of every leaf again.

    ``batch_leaves`` leaves at a time: their prompts and samples have keys and values of their own, which for all
    leaves of all questions together would take gigabytes.
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
    """Samples independent continuations in one batch; seconds from the first new token to the last, a token each.

    Without the encoding of the prompts, which ``generate`` does once for every sample.
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
    # The first call is after the prompts were read; each that follows is one token later.
    return clock.times[-1] - clock.times[0]


class _Clock(LogitsProcessor):
    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores


def consensus_of_sets(candidates: Sequence[Candidate]) -> list[float]:
    """The sum of the Jaccard similarities of a candidate's word trigrams with those of every other."""
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
    """The options of ``generate`` that a depth of the search stands for."""
    return {
        "do_sample": True,
        "temperature": config.temperature_at(depth),
        "top_k": config.top_k,
        "top_p": config.top_p,
    }


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, which never ends a text, so that all providers generate the same number of tokens."""
    endless = copy.copy(model)
    endless.generation_config = copy.deepcopy(model.generation_config)
    endless.generation_config.eos_token_id = None
    endless.generation_config.pad_token_id = 0
    return endless
