"""``ServedTeacher``, a server that scores the documents of a training while the steps before them run."""

from __future__ import annotations

import collections
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimkernels.mixture.unions import first_values
from slimkernels.models.fingerprints import tokenizer_fingerprint
from slimkernels.served_rows.answers import Request
from slimkernels.served_rows.asking import ask_by_name, num_token_ids, selection_of
from slimkernels.served_rows.rows import AnswerReader, DroppedAnswer, ServedDocument, check_mass
from slimkernels.served_rows.tokens import TokenMap
from slimkernels.serving.client import ServerClient, TokenBudget
from slimkernels.serving.errors import ServerRequestError
from slimkernels.sparse_logits import SparseLogits, rest_of_logprobs
from slimkernels.store import Document, Store
from slimkernels.trainer.answered_documents import AnsweredDocuments, as_stored, key_of
from slimkernels.trainer.teacher_server import TeacherServer, check_spelling, check_tokenizer, scoring_server
from slimkernels.trainer.teachers import StoredTeacher, documents_of


class ServedTeacher(StoredTeacher):
    """A teacher behind a server, whose rows are read from a store where it holds them.

    ``ask`` sends the requests for the documents of a batch, without waiting for the answers, and ``rows`` waits for
    them. Rows are the ones that ``capture_server`` writes: ragged, with the exact mass of all other tokens.

    Args:
        settings: The server and the store.
        tokenizer: The tokenizer of the documents, which must be that of the server's model.
        vocab_size: Number of rows V of the student's head.
        rank: Number of this process, which names its store.

    Attributes:
        wait_seconds: Time that ``rows`` has waited for answers.

    Raises:
        ImportError: The package httpx2 is not installed.
        ValueError: The variable of the key is not set, or there is no tokenizer.
        ServerRequestError: The server is of a kind that cannot score text, or its tokenizer is another one.
        ServerUnavailableError: The server does not answer.
        BudgetSpentError: ``token_budget`` does not allow the one text that is scored here.
        SettingsMismatchError: The store was made with another model, tokenizer, number of entries or codec.
    """

    def __init__(
        self, settings: TeacherServer, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, rank: int = 0
    ) -> None:
        if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
            raise ValueError("teacher_server needs the tokenizer of its model, got none: give processing_class")
        self.settings = settings
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._asked: dict[bytes, Future[Document]] = {}
        # Documents of the batch whose rows are wanted.
        self._taken: dict[bytes, Document] = {}
        self._reading = threading.Lock()
        self._num_asked = 0
        self.wait_seconds = 0.0
        self._budget = TokenBudget(settings.token_budget)
        # Closed with every ``stop``.
        self._client: ServerClient | None = None
        vocab_size = min(num_token_ids(tokenizer), vocab_size)
        tokens = TokenMap(tokenizer, vocab_size)
        with self._new_client() as client:
            self._server, self._context = scoring_server(client, settings)
            check_tokenizer(client, self._server.model, tokenizer)
            check_spelling(self._server, tokens, tokenizer)
            self._url = client.url
        self._reader = AnswerReader(self._server, tokens, settings.max_unmapped_fraction)
        self._answers = AnsweredDocuments(
            Path(settings.store),
            rank,
            vocab_size=vocab_size,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            teacher={"name": settings.model, "kind": self._server.kind},
            selection=selection_of(self._server),
            codec=settings.codec,
        )
        self._flushed = time.monotonic()
        super().__init__(Store(self._answers.path))

    def check_length(self, longest: int) -> None:
        """Checks that the server's context holds a document of ``longest`` tokens and the one that it generates.

        Raises:
            ValueError: It does not.
        """
        if self._context is not None and longest >= self._context:
            raise ValueError(
                f"documents must have at most {self._context - 1} tokens for the server {self._url}, whose "
                f"context holds {self._context} with the one that it generates, got one of {longest}: start it with "
                "a longer context, or train on shorter documents"
            )

    def ask(self, inputs: dict[str, Any], *, keep: bool = True) -> None:
        """Sends the requests for those documents of a batch that no store holds; returns at once.

        Args:
            inputs: A batch, as for ``rows``.
            keep: Whether the rows are written to the store; False for text that no later epoch repeats.
        """
        for ids in self._documents(inputs):
            key = key_of(ids)
            if len(ids) < 2 or key in self._asked or self._find(ids) is not None:
                continue
            self.check_length(len(ids))
            self._start()
            asked = _Asked(Request(ids.tolist(), number=self._num_asked), keep, Future())
            self._asked[key] = asked.future
            self._queue.put(asked)
            self._num_asked += 1

    def rows(self, inputs: dict[str, Any], places: Tensor) -> SparseLogits:
        """Returns the teacher's rows of the labels of a batch, and waits for those that the server still owes.

        Args:
            inputs: Tensors of a batch, the same as for ``StoredTeacher.rows``.
            places: Flat indices (N,) into B * T of the hidden states that predict the labels, ascending.

        Returns:
            SparseLogits (N, K) on the device of ``places``.

        Raises:
            ServerRequestError, ServerUnavailableError: The server refused a document or did not answer.
            UnmappedTokensError: The share of entries without an id is above ``max_unmapped_fraction``.
            BudgetSpentError: ``token_budget`` does not allow to ask for all documents of the batch.
        """
        self.ask(inputs)
        began = time.monotonic()
        keys = [key_of(ids) for ids in self._documents(inputs)]
        self._taken = {key: self._asked.pop(key).result() for key in keys if key in self._asked}
        self.wait_seconds += time.monotonic() - began
        found = super().rows(inputs, places)
        self._taken = {}
        if time.monotonic() - self._flushed >= self.settings.flush_s:
            self.flush()
        return found

    def check_scores_ids(self, support: str) -> None:
        """Checks that the server scores given ids.

        Raises:
            ServerRequestError: It does not.
        """
        if self._server.kind != "sglang":
            raise ServerRequestError(
                f"support {support!r} needs the teacher's scores of the student's own ids, which SGLang gives "
                f"(token_ids_logprob), got {self._url} of kind {self._server.kind!r}: use support 'teacher' or "
                "'intersection', or a teacher_model"
            )

    def scores(self, inputs: dict[str, Any], places: Tensor, ids: Tensor, support: str) -> SparseLogits:
        """Asks for the scores of given ids and waits for them; they are not stored, as the ids change with the student.

        A request names all ids of a document, and is answered with the score of each at every label.

        Args:
            inputs: Tensors of a batch, as for ``rows``.
            places: Flat indices (N,), as for ``rows``.
            ids: Ids (N, L) of the labels, ascending.
            support: "student" for these ids, "union" for those of the server's most probable tokens too.

        Returns:
            SparseLogits (N, L) or, for "union", (N, K + L).

        Raises:
            ServerRequestError, ServerUnavailableError: As ``rows``; also where a score is missing, or the probabilities
                of a label's ids sum to more than 1.
        """
        self._start()
        input_ids, ids = inputs["input_ids"].cpu(), ids.cpu()
        wanted, length = places.cpu(), input_ids.shape[1]
        asked: list[tuple[Request, Tensor]] = []
        for row, start, stop in documents_of(input_ids, inputs):
            chosen = (wanted >= row * length + start) & (wanted < row * length + stop)
            if chosen.any():
                labels = (wanted[chosen] - (row * length + start) + 1).tolist()
                named = ids[chosen].unique().tolist()
                request = Request(
                    input_ids[row, start:stop].tolist(), number=self._num_asked, labels=labels, token_ids=named
                )
                asked.append((request, ids[chosen]))
                self._num_asked += 1
                self.check_length(len(request.prompt_ids))
        began = time.monotonic()
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            parts = list(pool.map(lambda one: self._scores_of(one[0], one[1], support), asked))
        self.wait_seconds += time.monotonic() - began
        return SparseLogits.cat(parts) if parts else self._no_rows()

    def _scores_of(self, request: Request, ids: Tensor, support: str) -> SparseLogits:
        answer = ask_by_name(self._server.score, request)
        with self._reading:
            document = self._reader.scored(request, answer)
            self._reader.check_unmapped()
        labels = list(request.labels or ())
        if isinstance(document, DroppedAnswer) or document.positions != labels:
            raise ServerRequestError(f"document {request.number}: the server gave no entry for one of its labels")
        logprobs = torch.empty(ids.shape, dtype=torch.float64)
        for row, label in enumerate(labels):
            given = answer.positions[label - answer.start].given
            if given is None or given.ids.tolist() != list(request.token_ids):
                raise ServerRequestError(f"{self._url} did not give the scores of the ids that it was asked for")
            places = torch.searchsorted(torch.from_numpy(given.ids), ids[row].long())
            logprobs[row] = torch.from_numpy(given.logprobs)[places]
        # The server writes no number for a probability of 0.
        logprobs = logprobs.masked_fill(logprobs.isnan(), -torch.inf)
        if support == "union":
            ids, logprobs = first_values([document.teacher.ids, ids], [document.teacher.logits.double(), logprobs])
        for row in logprobs.numpy():
            check_mass(self._url, row)
        return SparseLogits(
            ids=ids,
            logits=logprobs.masked_fill(ids < 0, 0.0).float(),
            lse=torch.zeros(len(ids), 1),
            target_logit=document.teacher.target_logit,
            rest_lse=rest_of_logprobs(logprobs)[:, None].float(),
        )

    def flush(self) -> None:
        """Writes what was answered to the store, where other processes find it."""
        self._answers.flush()
        self._flushed = time.monotonic()

    def stop(self, *, wait: bool = True) -> None:
        """Abandons the requests that were not sent yet, stores the answers and unlocks the store; ``ask`` reopens it.

        Args:
            wait: Whether to wait for the requests that were sent, which the server may charge for.
        """
        for future in self._asked.values():
            future.cancel()
        for _ in self._workers:
            self._queue.put(None)
        if self._client is not None:
            if not wait:
                self._client.stop()
            close = functools.partial(_close_after, self._workers, self._client)
            closing = threading.Thread(target=close, name="teacher-server-close", daemon=True)
            closing.start()
            if wait:
                closing.join()
            self._client = None
        self._workers = []
        self._queue = queue.SimpleQueue()
        self._asked.clear()
        self._answers.close()

    def _new_client(self) -> ServerClient:
        names = ("key_env", "concurrency", "max_retries", "requests_per_minute", "timeout_s", "backoff_s")
        options = {name: getattr(self.settings, name) for name in names}
        return ServerClient(self.settings.url, budget=self._budget, **options)

    def _documents(self, inputs: dict[str, Any]) -> list[Tensor]:
        input_ids = inputs["input_ids"].cpu()
        return [input_ids[row, start:stop] for row, start, stop in documents_of(input_ids, inputs)]

    def _start(self) -> None:
        """Starts the threads that ask. They are daemons, so that none keeps an interrupted process alive."""
        if not self._workers:
            self._answers.open()
            self._client = self._new_client()
            self._server = dataclasses.replace(self._server, client=self._client)
            work = functools.partial(self._work, self._queue)
            self._workers = [
                threading.Thread(target=work, name=f"teacher-server-{number}", daemon=True)
                for number in range(self.settings.concurrency)
            ]
            for worker in self._workers:
                worker.start()

    def _work(self, waiting: queue.SimpleQueue[_Asked | None]) -> None:
        while (asked := waiting.get()) is not None:
            if asked.future.set_running_or_notify_cancel():
                try:
                    document = self._answer(asked.request)
                    # One that lacks a row is asked for again by a later epoch or run, which may need that row.
                    if asked.keep and len(document.positions) == len(document.input_ids) - 1:
                        self._answers.add(document)
                    asked.future.set_result(as_stored(document))
                except BaseException as error:
                    asked.future.set_exception(error)

    def _answer(self, request: Request) -> ServedDocument:
        answer = ask_by_name(self._server.score, request)
        # The reader counts the entries without an id.
        with self._reading:
            document = self._reader.scored(request, answer)
            self._reader.check_unmapped()
        if isinstance(document, DroppedAnswer):
            raise ServerRequestError(f"document {request.number}: {document.reason}")
        return document

    def _lacks_row(self, position: int, num_tokens: int) -> Exception:
        return ServerRequestError(
            f"{self._url} gave no log-probability of a token with an id for the label at position {position} of a "
            f"document of {num_tokens} tokens; the answer is not kept, so the next run asks for it again"
        )

    def _find(self, input_ids: Tensor) -> Document | None:
        """Returns a document of this batch, one that was just answered, or one in the store of any process."""
        taken = self._taken.get(key_of(input_ids))
        return self._answers.find(input_ids) if taken is None else taken


class Ahead:
    """An iterator over batches that asks the teacher for the next ones before it gives the first.

    Args:
        batches: Iterator over the micro-batches of an epoch.
        teacher: The teacher.
        number: Micro-batches to be ahead.
        is_known: Function that says of the micro-batch with a number, counted from 0, whether its text is the one that
            is trained on, so that it can be asked for.
    """

    def __init__(
        self,
        batches: Iterator[dict[str, Any]],
        teacher: ServedTeacher,
        number: int,
        is_known: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.batches = batches
        self._teacher, self._number, self._is_known = teacher, number, is_known
        self._read: collections.deque[dict[str, Any]] = collections.deque()
        self._num_read = 0

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> dict[str, Any]:
        while len(self._read) <= self._number:
            batch = next(self.batches, None)
            if batch is None:
                break
            if self._is_known(self._num_read):
                self._teacher.ask(batch)
            self._read.append(batch)
            self._num_read += 1
        if not self._read:
            raise StopIteration
        return self._read.popleft()


def _close_after(workers: list[threading.Thread], client: ServerClient) -> None:
    """Closes a client when its last request has ended, as a connection in use would stay open."""
    for worker in workers:
        worker.join()
    client.close()


class _Asked(NamedTuple):
    request: Request
    keep: bool
    future: Future[Document]
