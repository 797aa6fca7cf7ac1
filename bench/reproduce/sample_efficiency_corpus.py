"""The training data of the sample-efficiency experiment: a teacher's text, stores of its logits, and the teacher."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import records
from slimkernels.models.hidden_states import HeadInput
from slimkernels.store import Store, StoreDataset
from slimkernels.teacher import capture, generate_documents, load_teacher, shipped_prompts

# Number of documents per batch when the teacher's hidden states are computed.
_HIDDEN_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that decide a result, in addition to the method and the seed.

    The experiment takes at most 3 hours on two CPU cores with the defaults.

    Attributes:
        teacher: Name or folder of the teacher, as for ``load_teacher``.
        teacher_dtype: Data type of the teacher's weights and of the captured logits.
        prompts: Number of shipped prompts to use, from the first on; the first 40 begin stories.
        heldout_every: Distance between held-out prompts, starting with the first; all their documents are held out.
        documents: Number of documents that the teacher writes, over all prompts.
        max_new_tokens: Maximum number of tokens that continue a prompt.
        sampling_temperature: Temperature of the teacher's sampling.
        sampling_top_k: Number of most probable tokens that the teacher samples from.
        heldout_tokens: Number of tokens to measure on, of held-out documents and of plain English each.
        top_fraction: Share of the vocabulary kept of each row of the teacher's logits.
        rounds: Number of draws per row for sampled distillation.
        sizes: Numbers of tokens to train on; for each seed, the documents of one size are a prefix of the next.
        ablation_size: Size at which single options are changed.
        hidden_size: Hidden size D of the student.
        num_layers: Number of layers of the student.
        num_heads: Number of attention heads of the student.
        epochs: Number of passes over the training documents.
        batch_size: Documents per optimizer step.
        learning_rate: Peak learning rate, after a linear warm-up over a tenth of the steps and before a cosine decay.
    """

    teacher: str = "smollm2-135m-instruct"
    teacher_dtype: str = "bfloat16"
    prompts: int = 40
    heldout_every: int = 8
    documents: int = 480
    max_new_tokens: int = 120
    sampling_temperature: float = 0.8
    sampling_top_k: int = 40
    heldout_tokens: int = 3000
    top_fraction: float = 0.05
    rounds: int = 50
    sizes: tuple[int, ...] = (5000, 10000, 20000, 40000)
    ablation_size: int = 10000
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    epochs: int = 4
    batch_size: int = 4
    learning_rate: float = 6e-3


class Corpus:
    """The teacher's text and stores of its logits; parts that exist in the working folder are reused.

    Args:
        work: Folder for text, stores and hidden states.
        settings: Settings of the experiment.
        english: File of plain English to measure on, one paragraph per line; None measures on the teacher's text only.

    Attributes:
        teacher: Teacher model.
        tokenizer: Tokenizer of the teacher.
        training: Token ids of the training documents.
        stores: Folders of the stores of the training documents, by kind: "top_k" or "draws".
        heldout: Stores to measure on, by name: "teacher", and "english" if given.
    """

    def __init__(self, work: Path, settings: Settings, english: Path | None) -> None:
        self.work, self.settings = work, settings
        dtype = getattr(torch, settings.teacher_dtype)
        self.teacher, self.tokenizer = load_teacher(settings.teacher, dtype=dtype)
        training, heldout = self._split()
        self.training = training
        heldout = first_tokens(heldout, settings.heldout_tokens)
        fraction = {"top_fraction": settings.top_fraction}
        self.stores = {
            "top_k": self._capture("top_k", training, **fraction),
            "draws": self._capture("draws", training, select="sample", rounds=settings.rounds),
        }
        self.heldout = {"teacher": Store(self._capture("heldout", heldout, **fraction))}
        if english is not None:
            documents = paragraphs(english, self.tokenizer, settings.max_new_tokens)
            documents = first_tokens(documents, settings.heldout_tokens)
            self.heldout["english"] = Store(self._capture("english", documents, **fraction))

    @property
    def vocab_size(self) -> int:
        """The vocabulary size V."""
        return self.heldout["teacher"].vocab_size

    @cached_property
    def remembered(self) -> RememberedTeacher:
        """The teacher with cached hidden states of the training documents."""
        path = self.work / "hidden.pt"
        if path.exists():
            held = torch.load(path)
            if held["documents"] == self.training:
                return RememberedTeacher(self.teacher, self.training, held["hidden"])
        print("hidden states of the training documents", flush=True)
        hidden = list(_hidden_states(self.teacher, self.training))
        torch.save({"documents": self.training, "hidden": hidden}, path)
        return RememberedTeacher(self.teacher, self.training, hidden)

    def subset(self, seed: int, tokens: int, kind: str) -> Subset:
        """Returns the first documents of a seed's order that have ``tokens`` tokens, from the store of this kind.

        Raises:
            ValueError: The training documents have fewer tokens.
        """
        order = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(seed)).tolist()
        documents = first_tokens([self.training[index] for index in order], tokens)
        total = sum(map(len, documents))
        if total < tokens:
            raise ValueError(f"tokens must be at most {total}, as in the training documents, got {tokens}")
        store = Store(self.stores[kind])
        return Subset(StoreDataset(self.stores[kind]), [store.find(ids) for ids in documents])

    def _split(self) -> tuple[list[list[int]], list[list[int]]]:
        """Returns the documents to train on, and those of other prompts to measure on, without duplicates."""
        settings, path = self.settings, self.work / "text" / "documents.jsonl"
        prompts = shipped_prompts()[: settings.prompts]
        generate_documents(
            self.teacher,
            self.tokenizer,
            prompts,
            path,
            num_documents=settings.documents,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.sampling_temperature,
            top_k=settings.sampling_top_k,
            batch_size=64,
            progress=lambda done, wanted: print(f"the teacher wrote {done} of {wanted} documents", flush=True),
        )
        heldout_prompts = set(prompts[:: settings.heldout_every])
        parts: dict[bool, dict[tuple[int, ...], None]] = {False: {}, True: {}}
        for line in records.read(path):
            parts[line["prompt"] in heldout_prompts][tuple(line["input_ids"])] = None
        return [list(ids) for ids in parts[False]], [list(ids) for ids in parts[True]]

    def _capture(self, name: str, documents: list[list[int]], **options) -> Path:
        path = self.work / "store" / name
        print(f"store {name}: {len(documents)} documents, {sum(map(len, documents))} tokens", flush=True)
        capture(self.teacher, self.tokenizer, documents, path, **options)
        return path


def paragraphs(path: Path, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[list[int]]:
    """Tokenizes the paragraphs of running text, one a line as in WikiText, cut off after ``longest`` tokens."""
    lines = [re.sub(r" @(.)@ ", r"\1", line.strip()) for line in path.read_text().splitlines()]
    lines = [line for line in lines if len(line) > 200 and not line.startswith("=") and "<unk>" not in line]
    return [ids[:longest] for ids in tokenizer(lines)["input_ids"]]


def first_tokens(documents: list[list[int]], tokens: int) -> list[list[int]]:
    """Returns the shortest prefix of the documents that has at least ``tokens`` tokens, or all of them."""
    totals = itertools.accumulate(map(len, documents))
    return documents[: next((count for count, total in enumerate(totals, 1) if total >= tokens), None)]


class RememberedTeacher(nn.Module):
    """A ``teacher_model`` for ``SlimTrainer`` with cached hidden states, of which only the head is computed again.

    A row of the whole vocabulary would take 100 kB in a store; its hidden state takes one product with the head.

    Args:
        model: Teacher with the head and its configuration.
        documents: Token ids of the documents.
        hidden: Inputs of the head for each document, (T, D).
    """

    def __init__(self, model: PreTrainedModel, documents: list[list[int]], hidden: list[torch.Tensor]) -> None:
        super().__init__()
        self.config, self.head = model.config, model.get_output_embeddings()
        self.hidden_of = {tuple(ids): states for ids, states in zip(documents, hidden, strict=True)}

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head, as in transformers."""
        return self.head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        """Computes the logits of a right-padded batch of the documents."""
        lengths = attention_mask.sum(-1).tolist()
        states = [self.hidden_of[tuple(ids[:n])] for ids, n in zip(input_ids.tolist(), lengths, strict=True)]
        hidden = nn.utils.rnn.pad_sequence(states, batch_first=True)
        return self.head(nn.functional.pad(hidden, (0, 0, 0, input_ids.shape[1] - hidden.shape[1])))


@torch.no_grad()
def _hidden_states(model: PreTrainedModel, documents: list[list[int]]) -> Iterator[torch.Tensor]:
    catch = HeadInput()
    with catch.inside(model):
        for first in range(0, len(documents), _HIDDEN_BATCH):
            batch = [torch.tensor(ids) for ids in documents[first : first + _HIDDEN_BATCH]]
            mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in batch], batch_first=True)
            model(nn.utils.rnn.pad_sequence(batch, batch_first=True), attention_mask=mask, use_cache=False)
            yield from (states[: len(ids)].clone() for states, ids in zip(catch.hidden, batch, strict=True))
