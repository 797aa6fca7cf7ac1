"""On-policy batches: documents whose prompts the student continues."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimkernels.models.evaluation import evaluation_mode

logger = logging.getLogger(__name__)


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    batch: dict[str, Any],
    *,
    max_new_tokens: int,
    temperature: float,
    pad_token_id: int,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Replaces the labels of every document of a batch by a continuation that the student draws.

    The student draws tokens from softmax(logits / temperature) after the prompt, up to and including the end of text,
    or ``max_new_tokens`` of them. They are the new labels. The draws use torch's global generator.

    Args:
        model: The student; it generates in evaluation mode, and its mode is restored.
        batch: A batch of ``SlimCollator``, whose ``prompt_lengths`` say how many tokens of each document are continued.
        max_new_tokens: Largest number of tokens to draw for each document.
        temperature: Sampling temperature, > 0.
        pad_token_id: Id that pads prompts and documents; never attended to.
        max_length: Number of tokens that the student can read; None for no limit.

    Returns:
        A batch in the form of ``SlimCollator``, without a teacher. It lacks documents without a label. Where no
        document has a label, or a prompt leaves no room for a token, the given batch is returned.
    """
    input_ids, rows = batch["input_ids"], batch["rows"]
    length = input_ids.shape[1]
    document, place = rows // length, rows % length
    first = torch.full((len(input_ids),), length, device=rows.device).scatter_reduce(0, document, place + 1, "amin")
    first = batch.get("prompt_lengths", first).to(rows.device)
    labelled = torch.zeros(len(input_ids), dtype=torch.bool, device=rows.device).index_fill(0, document, True)
    lengths = first[labelled]
    longest = int(lengths.max()) if len(lengths) else 0
    room = max_new_tokens if max_length is None else min(max_new_tokens, max_length - longest)
    if not longest or room < 1:
        return batch
    prompts = torch.full((len(lengths), longest), pad_token_id, device=input_ids.device)
    mask = _right_aligned(lengths, longest)
    prompts[mask] = input_ids[labelled][:, :longest][mask.flip(-1)]
    written = _generate(model, prompts, mask, room, temperature, pad_token_id)
    return _collate(prompts, mask, lengths, written, _lengths_to_end(written, model), pad_token_id)


def warn_of_other_ends(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Warns where a student ends its text with other tokens than its teacher, who then never scores an end as one."""
    own, others = (_end_tokens(model) for model in (student, teacher))
    if own and others and own.isdisjoint(others):
        logger.warning(
            "the student ends its text with the tokens %s and the teacher with %s, so the teacher finds the student's "
            "ends improbable: set the eos_token_id of the student's generation_config",
            sorted(own),
            sorted(others),
        )


def _end_tokens(model: PreTrainedModel) -> set[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    return set() if ends is None else set(torch.as_tensor(ends).flatten().tolist())


def _generate(model, prompts: Tensor, mask: Tensor, max_new_tokens: int, temperature: float, pad: int) -> Tensor:
    with evaluation_mode(model):
        whole = model.generate(
            prompts,
            attention_mask=mask.long(),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
        )
    return whole[:, prompts.shape[1] :]


def _right_aligned(lengths: Tensor, width: int) -> Tensor:
    """Returns a mask (B, width) that is True in the last ``lengths`` places of each row."""
    return torch.arange(width, device=lengths.device) >= width - lengths[:, None]


def _lengths_to_end(written: Tensor, model: PreTrainedModel) -> Tensor:
    """Returns the number of tokens (B,) of each row up to and including its first end of text."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return torch.full((len(written),), written.shape[1], device=written.device)
    is_end = torch.isin(written, torch.as_tensor(ends, device=written.device))
    before = is_end.long().cumsum(-1) - is_end.long()
    return (before == 0).sum(-1)


def _collate(prompts, mask: Tensor, prompt_lengths: Tensor, written, written_lengths: Tensor, pad: int) -> dict:
    """Makes a right-padded batch of the prompts followed by their continuations."""
    lengths = prompt_lengths + written_lengths
    width = int(lengths.max())
    place = torch.arange(width, device=prompts.device)
    input_ids = torch.full((len(prompts), width), pad, device=prompts.device)
    is_prompt = place < prompt_lengths[:, None]
    is_written = (place >= prompt_lengths[:, None]) & (place < lengths[:, None])
    input_ids[is_prompt] = prompts[mask]
    written_mask = torch.arange(written.shape[1], device=written.device) < written_lengths[:, None]
    input_ids[is_written] = written[written_mask]
    # The hidden state before a token predicts it.
    rows = is_written.flatten().nonzero().squeeze(-1) - 1
    return {
        "input_ids": input_ids,
        "attention_mask": (is_prompt | is_written).long(),
        "rows": rows,
        "target": written[written_mask],
        "teacher": None,
    }
