"""A journal of lm-eval's log-likelihoods, batch by batch, from which a killed run resumes."""

# lm-eval is an optional dependency. Without it, pyright takes this folder for the package lm_eval.
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

# (texts of context and continuation, token ids of the context, token ids of the continuation)
Request = tuple[tuple[str, str], list[int], list[int]]
# (log P(continuation | context) in nats, whether greedy decoding gives the continuation)
Loglikelihood = tuple[float, bool]


class BatchJournal:
    """A file with a model's answers to batches of requests, each written to the disk as soon as it is known.

    A batch's answers are looked up by ``decided_by`` and the token ids of the whole batch; other lines are ignored. An
    incomplete last line, left by a kill, is dropped. Only one process can have the file open at a time.

    Args:
        path: Path of the file, created if it does not exist.
        decided_by: JSON values that decide the answers in addition to the tokens, above all the model's identity.

    Attributes:
        seconds: Total time of the batches served from the journal.

    Raises:
        ValueError: The file is not a journal, or a complete line is not a JSON object.
        BlockingIOError: Another process has the file open.
    """

    def __init__(self, path: str | os.PathLike[str], decided_by: Sequence[Any]) -> None:
        self.seconds = 0.0
        self._decided_by = list(decided_by)
        self._file = JsonLines(path, "batch")
        self._found = {line["batch"]: line for line in self._file.found}

    def answers(self, batch: Sequence[Request], ask: Callable[[], list[Loglikelihood]]) -> list[Loglikelihood]:
        """Returns the answers to a batch from the file, or else from ``ask``, and writes the latter to the file."""
        key = content_key(self._decided_by, [tokens for _, *tokens in batch])
        if key in self._found:
            self.seconds += self._found[key]["seconds"]
            return [(loglikelihood, is_greedy) for loglikelihood, is_greedy in self._found[key]["answers"]]
        start = time.perf_counter()
        answers = ask()
        self._file.append({"batch": key, "seconds": time.perf_counter() - start, "answers": answers})
        return answers

    def close(self) -> None:
        """Closes the file, so that other processes can open it."""
        self._file.close()

    def __enter__(self) -> BatchJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JournalledLM(HFLM):
    """lm-eval's ``hf`` with a causal model, which takes the log-likelihoods of batches from a journal if it has them.

    The results equal those of ``HFLM`` to the last digit, since ``HFLM`` computes the same batches.

    Args:
        *arguments: Arguments of ``HFLM``.
        journal: Journal of the answers.
        **options: Options of ``HFLM``; ``batch_size`` must be a number.
    """

    def __init__(self, *arguments: Any, journal: BatchJournal, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._journal = journal

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Loglikelihood]:
        found: dict[int, Loglikelihood] = {}
        ask = super()._loglikelihood_tokens
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for indices in batches(requests, self.batch_size):
                batch = [requests[index] for index in indices]
                answers = self._journal.answers(batch, partial(ask, batch, disable_tqdm=True, override_bs=override_bs))
                found |= zip(indices, answers, strict=True)
                progress.update(len(batch))
        return [found[index] for index in range(len(requests))]


def batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[int]]:
    """Yields, for every forward pass of lm-eval, the indices of the requests that it answers.

    Requests whose tokens differ only in the last one share a sequence. lm-eval sorts sequences from the longest to the
    shortest, and equally long ones by their tokens.

    Args:
        requests: All requests of a call.
        batch_size: Sequences per forward pass.
    """
    sequences: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, (_, context, continuation) in enumerate(requests):
        sequences[(*context, *continuation[:-1])].append(index)
    ordered = sorted(sequences, key=lambda tokens: (-len(tokens), tokens))
    for first in range(0, len(ordered), batch_size):
        yield sorted(index for tokens in ordered[first : first + batch_size] for index in sequences[tokens])
