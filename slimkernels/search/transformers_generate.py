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
    """Returns a function for ``model.generate(**inputs, custom_generate=...)`` that answers by tree search.

    Lengths, sampling and seed are those of ``config``. The only setting used of the generation configuration is the
    padding token; without one, the first end-of-text token pads. A streamer receives nothing, because a branch is
    selected only at the end.

    Args:
        tokenizer: Tokenizer of the model.
        config: Settings of the search, as for ``PathFinder``.
        checks: Checks of new steps, as for ``PathFinder``.
        selector: Scorer of a question's candidates, as for ``PathFinder``.

    Returns:
        A function that ``generate`` calls with the model and ``input_ids`` (B, L). It returns (B, L + length of the
        longest answer) int64: each row's prompt and selected branch, padded on the right; only the prompt if no branch
        is left. It raises ValueError if the call requests several sequences per prompt, beams or scores.
    """
    # The engine is reused for further calls with the same model, because it checks the model's forward when created.
    engine: TransformersEngine | None = None

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        **model_kwargs: Any,  # ``generate`` would pass a parameter named attention_mask twice
    ) -> Tensor:
        nonlocal engine
        for name, only in (("num_return_sequences", 1), ("num_beams", 1), ("return_dict_in_generate", False)):
            if getattr(generation_config, name, None) not in (None, only):
                raise ValueError(
                    f"{name} must be {only} with this custom_generate, which returns one branch per prompt"
                )
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
