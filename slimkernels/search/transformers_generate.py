"""``custom_generate``: the search behind ``model.generate`` of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.search.checks import Check
from slimkernels.search.config import PathFinderConfig
from slimkernels.search.engines.transformers import TransformersEngine
from slimkernels.search.pathfinder import PathFinder
from slimkernels.search.selection import Scorer


def custom_generate(
    tokenizer: PreTrainedTokenizerBase,
    config: PathFinderConfig | None = None,
    *,
    checks: Sequence[Check] | None = None,
    selector: Scorer | None = None,
) -> Callable[..., Tensor]:
    """What ``model.generate(**inputs, custom_generate=...)`` takes to answer by tree search.

    Lengths, sampling and seed are those of ``config``; of the generation configuration only the padding token is used
    (the first end of text where there is none).

    Args:
        tokenizer: Of the model.
        config: As ``PathFinder`` takes it.
        checks: The same.
        selector: The same.

    Returns:
        A callable that ``generate`` calls with the model and ``input_ids`` (B, L). It returns (B, L + the most tokens
        of an answer) int64: each row's prompt and selected branch, padded on the right; where nothing was found, the
        prompt alone.

    Raises:
        ValueError: The call asks for what the search does not give: more than one sequence of a prompt, beams, scores.

    A streamer gets no answer: a branch is chosen at the end.
    """
    # It reads the model's forward once when it is made, and is kept for the next call with the same model.
    engine: TransformersEngine | None = None

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # a mask of its own name would be passed twice
    ) -> Tensor:
        nonlocal engine
        for name, only in (("num_return_sequences", 1), ("num_beams", 1), ("return_dict_in_generate", False)):
            if getattr(generation_config, name, None) not in (None, only):
                raise ValueError(f"{name} must be {only} with this custom_generate, which gives one branch of a prompt")
        if engine is None or engine.model is not model:
            engine = TransformersEngine(model, tokenizer)
        mask = model_kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(input_ids)
        prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]
        results = PathFinder(engine, config, checks=checks, selector=selector).solve(prompts)
        answers = [[] if result.node is None else result.tree.token_ids(result.node) for result in results]
        padding = generation_config.pad_token_id
        if padding is None:
            padding = min(engine.eos_token_ids, default=0)
        output = input_ids.new_full((len(answers), max(map(len, answers), default=0)), padding)
        for row, answer in enumerate(answers):
            output[row, : len(answer)] = torch.tensor(answer, dtype=output.dtype)
        return torch.cat([input_ids, output], dim=-1)

    return generate
