"""Models of transformers that judge generated steps: a sentence encoder, an entailment model, and a verifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from slimkernels.models.evaluation import context_length
from slimkernels.search.selection import Candidate


class SentenceEncoder:
    """A sentence encoder for ``RepetitionCheck(threshold, embed=...)``: the mean of a text's last hidden states.

    For a sentence-transformers model, pass its ``encode`` method to the check instead.

    Args:
        model: An encoder; it is put into evaluation mode.
        tokenizer: Tokenizer of the model, with a padding token.
        batch_size: Number of texts per forward.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> SentenceEncoder:
        """Loads an encoder from a directory or the Hugging Face Hub."""
        model = AutoModel.from_pretrained(name_or_path, **options)
        return cls(model, AutoTokenizer.from_pretrained(name_or_path))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Computes embeddings (n, d) float32 of n texts."""
        embeddings = []
        for batch in _batches(self.tokenizer, self.model, list(texts), self.batch_size):
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            embeddings.append((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))
        return torch.cat(embeddings).cpu().numpy() if embeddings else np.zeros((0, 0), np.float32)


class NLIModel:
    """A model of natural language inference for ``ContradictionCheck``: P(contradiction) of (premise, hypothesis).

    Args:
        model: A sequence-classification model whose configuration names the labels; it is put into evaluation mode.
        tokenizer: Tokenizer of the model, with a padding token.
        batch_size: Number of pairs per forward.

    Raises:
        ValueError: Not exactly one of the model's labels begins with "contradict".
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64) -> None:
        labels = {int(index): str(label) for index, label in (model.config.id2label or {}).items()}
        found = [index for index, label in labels.items() if label.lower().startswith("contradict")]
        if len(found) != 1:
            raise ValueError(
                f"model.config.id2label must name one label that begins with 'contradict', got "
                f"{sorted(labels.values())}: set it to the names of the model's classes"
            )
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self._contradiction = found[0]

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> NLIModel:
        """Loads an entailment model from a directory or the Hugging Face Hub."""
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, **options)
        return cls(model, AutoTokenizer.from_pretrained(name_or_path))

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Computes the probabilities (n,) float32 that n pairs contradict each other."""
        probabilities = []
        for batch in _batches(self.tokenizer, self.model, [list(pair) for pair in pairs], self.batch_size):
            logits = self.model(**batch).logits.float()
            probabilities.append(logits.softmax(-1)[:, self._contradiction])
        return torch.cat(probabilities).cpu().numpy() if probabilities else np.zeros(0, np.float32)


class Verifier:
    """A scorer of candidates: the probability that a language model says "yes" when asked whether one is correct.

    score = sum of P(token | template) over the spellings of "yes" that are a single token, under the whole softmax.

    Args:
        model: A causal language model; it is put into evaluation mode.
        tokenizer: Tokenizer of the model.
        template: Prompt with the placeholders ``{question}`` (the question's context) and ``{text}`` (the candidate).
        yes: Spellings of "yes".
        batch_size: Number of candidates per forward.

    Raises:
        ValueError: No spelling is a single token, or the template lacks ``{text}``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str = "{question}\n\nProposed answer:\n{text}\n\nIs the proposed answer correct? Answer yes or no:",
        yes: Sequence[str] = ("yes", "Yes", " yes", " Yes"),
        batch_size: int = 8,
    ) -> None:
        if "{text}" not in template:
            raise ValueError(f"template must contain {{text}}, the placeholder of the candidate, got {template!r}")
        encoded = [tokenizer(spelling, add_special_tokens=False)["input_ids"] for spelling in yes]
        self._yes = sorted({token_ids[0] for token_ids in encoded if len(token_ids) == 1})
        if not self._yes:
            raise ValueError(f"yes must have a spelling that is a single token, got {list(yes)}")
        self.model, self.tokenizer, self.template, self.batch_size = model.eval(), tokenizer, template, batch_size

    @torch.inference_mode()
    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """Computes the score of every candidate."""
        texts = [
            self.template.replace("{question}", candidate.context).replace("{text}", candidate.text)
            for candidate in candidates
        ]
        scores: list[float] = []
        for first in range(0, len(texts), self.batch_size):
            encoded = [self.tokenizer(text)["input_ids"] for text in texts[first : first + self.batch_size]]
            logits = last_logits(self.model, *pad_right(encoded, self.model.device))
            scores += logits.float().log_softmax(-1)[:, self._yes].exp().sum(-1).tolist()
        return scores


def pad_right(encoded: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns texts as token ids (B, L) int64, padded with zeros, and their lengths (B,) int64."""
    lengths = torch.tensor([len(token_ids) for token_ids in encoded])
    padded = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.long)
    for row, token_ids in enumerate(encoded):
        padded[row, : len(token_ids)] = torch.tensor(token_ids)
    return padded.to(device), lengths.to(device)


def last_logits(model: PreTrainedModel, padded: Tensor, lengths: Tensor) -> Tensor:
    """Computes a causal model's logits (B, V) after each of B texts, which does not attend to padding on the right."""
    # The head runs only at positions where some row ends, not at all positions of the batch.
    ends = (lengths - 1).unique()
    logits = model(padded, logits_to_keep=ends, use_cache=False).logits
    return logits[torch.arange(len(lengths), device=logits.device), torch.searchsorted(ends, lengths - 1)]


def _batches(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, inputs: list[Any], batch_size: int
) -> Iterator[BatchEncoding]:
    """Yields batches of encoded inputs, truncated to the number of tokens that the model can read."""
    # RoBERTa models have two positions more than they can read, which only their tokenizers take into account. A
    # tokenizer without a limit has an enormous one.
    known = (context_length(model.config), tokenizer.model_max_length)
    limit = min((length for length in known if length is not None and length < 1 << 30), default=None)
    for first in range(0, len(inputs), batch_size):
        batch = inputs[first : first + batch_size]
        encoded = tokenizer(batch, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt")
        yield encoded.to(model.device)
