"""Models that judge what was generated: a sentence encoder, an entailment model, a verifier. All of transformers."""

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

from slimkernels.search.selection import Candidate


class SentenceEncoder:
    """Texts to the mean of their tokens' last hidden states, for ``RepetitionCheck(threshold, embed=...)``.

    A sentence-transformers model needs no wrapping: give its ``encode``.

    Args:
        model: An encoder, in evaluation mode.
        tokenizer: Its tokenizer, with a padding token.
        batch_size: Texts in a forward.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> SentenceEncoder:
        """Loads an encoder from a folder or a hub."""
        model = AutoModel.from_pretrained(name_or_path, **options)
        return cls(model, AutoTokenizer.from_pretrained(name_or_path))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (n, d) float32."""
        embeddings = []
        for batch in _batches(self.tokenizer, self.model, list(texts), self.batch_size):
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            embeddings.append((hidden * mask).sum(1) / mask.sum(1).clamp(min=1))
        return torch.cat(embeddings).cpu().numpy() if embeddings else np.zeros((0, 0), np.float32)


class NLIModel:
    """Pairs (premise, hypothesis) to P(contradiction), for ``ContradictionCheck``.

    Args:
        model: A sequence-classification model of natural language inference; its configuration names the labels.
        tokenizer: Its tokenizer, with a padding token.
        batch_size: Pairs in a forward.

    Raises:
        ValueError: Not exactly one of the model's labels is a contradiction's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 64) -> None:
        labels = {int(index): str(label) for index, label in (model.config.id2label or {}).items()}
        found = [index for index, label in labels.items() if label.lower().startswith("contradict")]
        if len(found) != 1:
            raise ValueError(
                f"model.config.id2label must name one label that begins with 'contradict', got "
                f"{sorted(labels.values())}: set it to what the classes of the model mean"
            )
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self._contradiction = found[0]

    @classmethod
    def from_pretrained(cls, name_or_path: str, **options: Any) -> NLIModel:
        """Loads an entailment model from a folder or a hub."""
        model = AutoModelForSequenceClassification.from_pretrained(name_or_path, **options)
        return cls(model, AutoTokenizer.from_pretrained(name_or_path))

    @torch.inference_mode()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Probabilities (n,) float32."""
        probabilities = []
        for batch in _batches(self.tokenizer, self.model, [list(pair) for pair in pairs], self.batch_size):
            logits = self.model(**batch).logits.float()
            probabilities.append(logits.softmax(-1)[:, self._contradiction])
        return torch.cat(probabilities).cpu().numpy() if probabilities else np.zeros(0, np.float32)


class Verifier:
    """A scorer of candidates: the probability that a language model, asked whether one is right, says yes.

    score = sum over spellings of "yes" that are one token of P(token | template), under the whole softmax.

    Args:
        model: A causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        template: What is asked, with ``{question}`` (the question's context) and ``{text}`` (the candidate).
        yes: The spellings.
        batch_size: Candidates in a forward.

    Raises:
        ValueError: No spelling is one token, or the template lacks ``{text}``.
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
            raise ValueError(f"template must contain {{text}}, where the candidate goes, got {template!r}")
        encoded = [tokenizer(spelling, add_special_tokens=False)["input_ids"] for spelling in yes]
        self._yes = sorted({token_ids[0] for token_ids in encoded if len(token_ids) == 1})
        if not self._yes:
            raise ValueError(f"yes must have a spelling that is one token, got {list(yes)}")
        self.model, self.tokenizer, self.template, self.batch_size = model.eval(), tokenizer, template, batch_size

    @torch.inference_mode()
    def __call__(self, candidates: Sequence[Candidate]) -> list[float]:
        """The score of every candidate."""
        texts = [
            self.template.replace("{question}", candidate.context).replace("{text}", candidate.text)
            for candidate in candidates
        ]
        scores: list[float] = []
        for first in range(0, len(texts), self.batch_size):
            encoded = [self.tokenizer(text)["input_ids"] for text in texts[first : first + self.batch_size]]
            # Padded on the right, where a causal model does not look back at it: no padding token is needed.
            lengths = torch.tensor([len(token_ids) for token_ids in encoded])
            padded = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.long)
            for row, token_ids in enumerate(encoded):
                padded[row, : len(token_ids)] = torch.tensor(token_ids)
            logits = self._last_logits(padded.to(self.model.device), lengths.to(self.model.device))
            scores += logits.float().log_softmax(-1)[:, self._yes].exp().sum(-1).tolist()
        return scores

    def _last_logits(self, padded: Tensor, lengths: Tensor) -> Tensor:
        # The head sees the last position of every row alone, for rows of one length; else those that some row ends at.
        ends = (lengths - 1).unique()
        logits = self.model(padded, logits_to_keep=ends, use_cache=False).logits
        return logits[torch.arange(len(lengths), device=logits.device), torch.searchsorted(ends, lengths - 1)]


def _batches(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, inputs: list[Any], batch_size: int
) -> Iterator[BatchEncoding]:
    """Encoded inputs, cut to what the model can read."""
    # RoBERTa's models have two positions more than they can read, which their tokenizers know; others may know none.
    known = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    limit = min((most for most in known if most is not None and most < 1 << 30), default=None)
    for first in range(0, len(inputs), batch_size):
        batch = inputs[first : first + batch_size]
        encoded = tokenizer(batch, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt")
        yield encoded.to(model.device)
