"""The check that a teacher reads plain English, which fails where weights and tokenizer do not belong together."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.models.evaluation import evaluation_mode
from slimkernels.models.perplexity import perplexity

# Plain enough for a small model: SmolLM2-135M has perplexity 16 on the text and 857 on its shuffled tokens.
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
    """An error for a teacher that does not predict plain English, as its weights or its tokenizer are damaged."""


def check_teacher_sanity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Checks that the tokenizer preserves ``SANITY_TEXT`` and that the teacher predicts it better than its shuffle.

    A tokenizer or a weight file that was converted wrongly still gives plausible logits, and would silently spoil a
    capture.

    Args:
        model: A causal language model.
        tokenizer: Tokenizer of the model.

    Returns:
        The perplexities of the text and of its shuffled tokens.

    Raises:
        TeacherSanityError: The decoded text differs by more than case and white space, the perplexity is above
            ``MAX_PERPLEXITY``, or that of the shuffled tokens is not ``MIN_SHUFFLED_RATIO`` times as high.
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
    in_order, out_of_order = _perplexity(model, ids), _perplexity(model, shuffled)
    # NaN compares false and so fails.
    if not (in_order <= MAX_PERPLEXITY and in_order * MIN_SHUFFLED_RATIO <= out_of_order):
        raise TeacherSanityError(
            f"the teacher must read plain English with a perplexity of at most {MAX_PERPLEXITY:g}, "
            f"{MIN_SHUFFLED_RATIO:g} times below that of the shuffled text; got {in_order:.4g} and "
            f"{out_of_order:.4g}: its weights or its tokenizer are damaged or do not belong together"
        )
    return in_order, out_of_order


@torch.inference_mode()
def _perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    ids = ids.to(model.device)
    with evaluation_mode(model):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return perplexity(float(nn.functional.cross_entropy(logits.float(), ids[1:])))
