"""The text of the comparison of methods: what the teacher wrote for training, development and test, and its logits."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import records
from bench.reproduce.sample_efficiency_corpus import first_tokens, paragraphs
from slimkernels.durable import FileInUseError
from slimkernels.store import Store, StoreDataset
from slimkernels.store.errors import StoreLockedError
from slimkernels.teacher import capture, generate_documents, load_teacher, shipped_prompts
from slimkernels.teacher.corpus import TokenizedDocument

# Parts that no student learns from: the first chooses every method's options, the second measures the choice.
DEVELOPMENT, TEST = "development", "test"
# Time between attempts to write a store that another run writes.
_LOCKED_S = 5.0


@dataclasses.dataclass(frozen=True)
class Text:
    """The teacher, and how it writes.

    Attributes:
        teacher: Name or folder, as ``load_teacher`` takes it.
        dtype: Dtype of the teacher's weights.
        prompts: Number of shipped prompts to use, from the first.
        heldout_every: Distance between the prompts of a held-out part; the prompts of the development part lie halfway
            between those of the test part. Each held-out prompt is continued once.
        max_new_tokens: Longest continuation of a prompt, in tokens.
        temperature: Temperature at which the teacher writes.
        top_k: Number of most probable tokens from which it samples.
        top_fraction: Share of the vocabulary kept of each row of its logits.
        rounds: Number of draws per row for sampled distillation.
    """

    teacher: str = "smollm2-135m-instruct"
    dtype: str = "bfloat16"
    prompts: int = 373
    heldout_every: int = 8
    max_new_tokens: int = 120
    temperature: float = 0.8
    top_k: int = 40
    top_fraction: float = 0.05
    rounds: int = 50


class Corpus:
    """The teacher's text and stores of its logits, made when they are first asked for and kept in folders.

    Args:
        work: Folder for stores.
        text: The teacher, and how it writes.
        documents: Folder for what it wrote, so that other machines can learn from the same; None for one in ``work``.
    """

    def __init__(self, work: Path, text: Text, documents: Path | None = None) -> None:
        self.work, self.text, self.documents = work, text, documents or work / "text"
        prompts = shipped_prompts()[: text.prompts]
        every = text.heldout_every
        held = {TEST: prompts[::every], DEVELOPMENT: prompts[every // 2 :: every]}
        self._heldout_prompts = held
        # The arguments of ``capture`` of each kind of store.
        self._stores = {
            "top": {"top_fraction": text.top_fraction},
            "top_1_percent": {"top_fraction": 0.01},
            "top_50": {"top_k": 50},
            "top_20": {"top_k": 20},
            "top_5": {"top_k": 5},
            "hidden": {"codec": "hidden16"},
            "draws": {"select": "sample", "rounds": text.rounds},
        }
        self._training_prompts = [prompt for prompt in prompts if prompt not in held[TEST] + held[DEVELOPMENT]]

    @cached_property
    def teacher(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The teacher and its tokenizer."""
        return load_teacher(self.text.teacher, dtype=getattr(torch, self.text.dtype))

    def heldout(self, part: str) -> Store:
        """Returns the store of a held-out part, "development" or "test"."""
        return Store(self._captured(part, "top", self._heldout(part)))

    def english(self, path: Path, tokens: int = 3000) -> Store:
        """Returns the store of the first paragraphs of a file of plain English, one a line."""
        documents = first_tokens(paragraphs(path, self.teacher[1], self.text.max_new_tokens), tokens)
        return Store(self._captured(f"english-{path.stem}", "top", list(map(TokenizedDocument, documents))))

    def training(self, seed: int, labels: int, kind: str) -> Subset:
        """Returns the first documents of a seed's own text that have ``labels`` labels, from a store of this kind.

        Args:
            seed: Seed of the text; a smaller number of labels is a prefix of a larger one.
            labels: Least number of labels.
            kind: Name of what the store keeps of the teacher, as a method's ``teacher``.
        """
        documents = self._learned(seed, labels)
        store = StoreDataset(self._captured(f"training-{seed}", kind, documents))
        return Subset(store, [store.store.find(document) for document in documents])

    def digest(self, seed: int, labels: int, part: str) -> str:
        """Returns a digest of the documents of a training and of a held-out part; their store may still be missing.

        Another processor rounds the teacher's logits otherwise, and so writes another text from the same seed.
        """
        found = hashlib.sha256()
        for document in [*self._learned(seed, labels), *self._heldout(part)]:
            found.update(json.dumps(document).encode())
        return found.hexdigest()[:12]

    def _heldout(self, part: str) -> list[TokenizedDocument]:
        prompts = self._heldout_prompts[part]
        return self._written(part, prompts, seed=0, num_documents=len(prompts))

    def _learned(self, seed: int, labels: int) -> list[TokenizedDocument]:
        # Prompts, a fifteenth of the text, have no labels; the text is extended until there are enough.
        for tokens in itertools.count(labels + labels // 12, 1 + labels // 100):
            documents = self._written(f"training-{seed}", self._training_prompts, seed=seed, num_tokens=tokens)
            totals = list(itertools.accumulate(len(document.labels) for document in documents))
            if totals[-1] >= labels:
                break
        return documents[: next(count for count, total in enumerate(totals, 1) if total >= labels)]

    def _written(self, part: str, prompts: list[str], *, seed: int, **size: int) -> list[TokenizedDocument]:
        """Returns the documents of a part without repetitions, whose labels are what the teacher wrote.

        The teacher writes the documents that are missing.
        """
        path = self.documents / f"{part}.jsonl"
        name, wanted = next(iter(size.items()))
        lines = records.read(path)
        done = len(lines) if name == "num_documents" else sum(len(line["input_ids"]) for line in lines)
        if done < wanted:
            print(f"text of {part}: {done:,} of {wanted:,} {name.removeprefix('num_')}", flush=True)
            generate_documents(
                *self.teacher,
                prompts,
                path,
                max_new_tokens=self.text.max_new_tokens,
                temperature=self.text.temperature,
                top_k=self.text.top_k,
                seed=seed,
                batch_size=64,
                # Another run may be writing it.
                wait=True,
                **size,
            )
            lines = records.read(path)
        starts = map(len, self.teacher[1]([line["prompt"] for line in lines])["input_ids"])
        found = {tuple(line["input_ids"]): start for line, start in zip(lines, starts, strict=True)}
        return [
            TokenizedDocument(ids, positions=range(start, len(ids)), prompt_length=start)
            for ids, start in found.items()
        ]

    def _captured(self, part: str, kind: str, documents: list[TokenizedDocument]) -> Path:
        """Returns the folder of a store of documents; the teacher scores those that are missing."""
        path = self.work / "store" / part / kind
        while True:
            found = Store(path) if (path / "manifest.json").exists() else ()
            if all(document in found for document in documents):
                return path
            print(f"store of {part}, {kind}: {len(documents)} documents", flush=True)
            try:
                capture(*self.teacher, documents, path, **self._stores[kind])
            except StoreLockedError as error:
                if not isinstance(error.__cause__, FileInUseError):
                    raise
                # Another run is writing it.
                time.sleep(_LOCKED_S)
