"""lm-eval's log-likelihoods, kept batch by batch: what a killed run had from its model is not asked for again."""

# lm-eval is an extra; without it, pyright takes the lm_eval.py beside this file for it.
# pyright: reportMissingImports=false
from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from slimkernels.durable import JsonLines
from slimkernels.evaluate.records import content_key

# The texts of context and continuation, and their tokens.
Request = tuple[tuple[str, str], list[int], list[int]]
# log P(continuation | context) in nats, and whether it is what greedy decoding gives.
Answer = tuple[float, bool]


class BatchJournal:
    """A file with the answers of every batch that a model was asked, on the disk as soon as they are known.

    A line is found again by ``decided_by`` and the token ids of its whole batch: lines of anything else are passed
    over. A last line that a kill tore is dropped. Only one process has the file open at a time.

    Args:
        path: Made if it is not there.
        decided_by: What decides the answers beside the tokens: above all, the model's identity.

    Attributes:
        seconds: That the batches took which were found again.

    Raises:
        ValueError: The file is no journal, or a line other than a torn last one is no JSON object.
        BlockingIOError: Another process has it open.
    """

    def __init__(self, path: str | os.PathLike[str], decided_by: Sequence[Any]) -> None:
        self.seconds = 0.0
        self._decided_by = list(decided_by)
        self._file = JsonLines(path, "batch")
        self._found = {line["batch"]: line for line in self._file.found}

    def answers(self, batch: Sequence[Request], ask: Callable[[], list[Answer]]) -> list[Answer]:
        """Of a batch's requests: those in the file, or else what ``ask`` returns, which is written."""
        key = content_key(self._decided_by, [tokens for _, *tokens in batch])
        if key in self._found:
            self.seconds += self._found[key]["seconds"]
            return [(loglikelihood, is_greedy) for loglikelihood, is_greedy in self._found[key]["answers"]]
        start = time.perf_counter()
        answers = ask()
        self._file.append({"batch": key, "seconds": time.perf_counter() - start, "answers": answers})
        return answers

    def close(self) -> None:
        """Lets other processes have the file."""
        self._file.close()

    def __enter__(self) -> BatchJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JournalledLM(HFLM):
    """lm-eval's ``hf`` with a causal model, whose log-likelihoods are asked by batch, each once for a journal.

    Equal to ``HFLM`` to the last digit: the batches are its own, and it is what computes each.

    Args:
        journal: Keeps the answers.
        options: Of ``HFLM``; ``batch_size`` is a number.
    """

    def __init__(self, *arguments: Any, journal: BatchJournal, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._journal = journal

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        found: dict[int, Answer] = {}
        ask = super()._loglikelihood_tokens
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for indices in batches(requests, self.batch_size):
                batch = [requests[index] for index in indices]
                answers = self._journal.answers(batch, partial(ask, batch, disable_tqdm=True, override_bs=override_bs))
                found |= zip(indices, answers, strict=True)
                progress.update(len(batch))
        return [found[index] for index in range(len(requests))]


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """The indices of the requests that lm-eval answers from one forward, forward by forward.

    Requests of the same tokens but for the last one share a sequence. Sequences go from the longest to the shortest,
    equally long ones by their tokens.

    Args:
        requests: All of them.
        batch_size: Sequences in a forward.
    """
    sequences: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (_, context, continuation) in enumerate(requests):
        sequences[(*context, *continuation[:-1])].append(index)
    ordered = sorted(sequences, key=lambda tokens: (-len(tokens), tokens))
    for first in range(0, len(ordered), batch_size):
        yield sorted(index for tokens in ordered[first : first + batch_size] for index in sequences[tokens])
