"""Checks that a teacher reads plain English: its weights and its tokenizer belong together."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Plain enough that a small model reads it well; SmolLM2-135M has perplexity 16 on it, and 857 on its shuffled tokens.
SANITY_TEXT = """\
When the rain stopped, Anna put on her boots and went out to look at the garden. The apple trees were still wet, and \
small drops of water fell from the leaves whenever the wind moved them. She walked slowly along the path to the old \
wall at the far end, where her grandfather used to sit in the evening and read the newspaper. A black cat was \
sleeping on the wooden bench. It opened one eye, looked at her for a moment, and went back to sleep. Anna laughed \
and sat down next to it. She thought about the long summer that was coming, about the books she wanted to read and \
the friends she wanted to see, and for the first time in many weeks she did not feel tired at all."""
MAX_PERPLEXITY = 100.0
MIN_SHUFFLED_RATIO = 5.0


class TeacherSanityError(ValueError):
    """The teacher does not predict plain English: its weights and its tokenizer do not belong together."""


def check_teacher_sanity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Checks that the teacher reads ``SANITY_TEXT``: the text survives the tokenizer, and its order matters.

    A tokenizer or a weight file that was converted wrongly still gives fluent-looking logits, and would spoil a
    capture silently.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.

    Returns:
        The perplexity of the text and of its shuffled tokens.

    Raises:
        TeacherSanityError: The decoded text differs by more than case and white space, the perplexity is above
            ``MAX_PERPLEXITY``, or it is not below that of the shuffled tokens by ``MIN_SHUFFLED_RATIO``.
    """
    ids = torch.tensor(tokenizer(SANITY_TEXT)["input_ids"])
    decoded = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
    if "".join(decoded.split()).casefold() != "".join(SANITY_TEXT.split()).casefold():
        raise TeacherSanityError(
            f"the tokenizer must decode the English text it encoded, got {decoded[:60]!r}...: it is not the one the "
            "teacher was trained with, or was converted wrongly"
        )
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=ids.dtype))
    words = (~special).nonzero()[:, 0]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    shuffled = ids.clone()
    shuffled[words] = ids[words[order]]
    perplexity, shuffled_perplexity = _perplexity(model, ids), _perplexity(model, shuffled)
    # Written so that NaN fails.
    if not (perplexity <= MAX_PERPLEXITY and perplexity * MIN_SHUFFLED_RATIO <= shuffled_perplexity):
        raise TeacherSanityError(
            f"the teacher must read plain English with a perplexity of at most {MAX_PERPLEXITY:g}, "
            f"{MIN_SHUFFLED_RATIO:g} times below that of the shuffled text; got {perplexity:.4g} and "
            f"{shuffled_perplexity:.4g}: its weights or its tokenizer are damaged or do not belong together"
        )
    return perplexity, shuffled_perplexity


@torch.inference_mode()
def _perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    ids = ids.to(model.device)
    was_training = model.training
    model.eval()
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    finally:
        model.train(was_training)
    loss = float(nn.functional.cross_entropy(logits.float(), ids[1:]))
    return math.exp(loss) if loss < 700 else math.inf
