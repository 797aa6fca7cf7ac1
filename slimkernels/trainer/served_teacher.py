"""``ServedTeacher``, a server that scores the documents of a training while the steps before them run."""

from __future__ import annotations

import collections
import dataclasses
import functools
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimkernels.models.fingerprints import tokenizer_fingerprint
from slimkernels.served_rows.answers import Request
from slimkernels.served_rows.asking import ask_by_name, num_token_ids, selection_of
from slimkernels.served_rows.rows import AnswerReader, DroppedAnswer, ServedDocument
from slimkernels.served_rows.tokens import TokenMap
from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import ServerRequestError
from slimkernels.sparse_logits import SparseLogits, rest_of_logprobs
from slimkernels.store import Document, Store, StoreWriter
from slimkernels.store.format import MANIFEST_NAME
from slimkernels.trainer.support import union_of_logprobs
from slimkernels.trainer.teacher_server import TeacherServer, check_tokenizer, scoring_server
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
        SettingsMismatchError: The store was made with another model, tokenizer, number of entries or codec.
    """

    def __init__(
        self, settings: TeacherServer, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, rank: int = 0
    ) -> None:
        if tokenizer is None or not hasattr(tokenizer, "get_vocab"):
            raise ValueError(
                "teacher_server needs the tokenizer of its model, got none: pass it as the trainer's processing_class"
            )
        self.settings = settings
        self._queue: queue.SimpleQueue[tuple[Request, Future[ServedDocument]] | None] = queue.SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._asked: dict[bytes, _Asked] = {}
        # Documents that were answered since the last write to the store, or belong to no later epoch.
        self._fresh: dict[bytes, Document] = {}
        self._stores: dict[Path, tuple[int, Store]] = {}
        self._reading = threading.Lock()
        self._num_asked = 0
        self.wait_seconds = 0.0
        # Closed with every ``stop``.
        self._client: ServerClient | None = None
        with self._new_client() as client:
            self._server, self._context = scoring_server(client, settings)
            check_tokenizer(client, self._server.model, tokenizer)
            self._url = client.url
        vocab_size = min(num_token_ids(tokenizer), vocab_size)
        self._reader = AnswerReader(self._server, TokenMap(tokenizer, vocab_size), settings.max_unmapped_fraction)
        self._folder = Path(settings.store)
        self._writer_options: dict[str, Any] = {
            "path": self._folder / f"rank-{rank:05d}",
            "vocab_size": vocab_size,
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "teacher": {"name": settings.model, "kind": self._server.kind},
            "selection": selection_of(self._server),
            "codec": settings.codec,
        }
        self._writer: StoreWriter | None = None
        self._flushed = time.monotonic()
        self._opened_writer()
        super().__init__(Store(self._writer_options["path"]))

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
            key = _key(ids)
            if len(ids) < 2 or key in self._asked or self._find(ids) is not None:
                continue
            self.check_length(len(ids))
            self._start()
            future: Future[ServedDocument] = Future()
            self._asked[key] = _Asked(future, keep)
            self._queue.put((Request(ids.tolist(), number=self._num_asked), future))
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
        """
        self.ask(inputs)
        keys = [_key(ids) for ids in self._documents(inputs)]
        once = [key for key in keys if key in self._asked and not self._asked[key].keep]
        began = time.monotonic()
        for key in keys:
            if key in self._asked:
                self._take(key)
        self.wait_seconds += time.monotonic() - began
        found = super().rows(inputs, places)
        for key in once:
            self._fresh.pop(key, None)
        self._take_finished()
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
            ServerRequestError, ServerUnavailableError: As ``rows``; also where a score is missing.
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
            parts = list(pool.map(lambda one: self._scores_of(*one, support), asked))
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
        logprobs = logprobs.nan_to_num(nan=-torch.inf)
        if support == "union":
            ids, logprobs = union_of_logprobs(document.teacher, ids, logprobs)
        return SparseLogits(
            ids=ids,
            logits=logprobs.masked_fill(ids < 0, 0.0).float(),
            lse=torch.zeros(len(ids), 1),
            target_logit=document.teacher.target_logit,
            rest_lse=rest_of_logprobs(logprobs)[:, None].float(),
        )

    def flush(self) -> None:
        """Writes what was answered to the store."""
        self._opened_writer().flush()
        self._flushed = time.monotonic()
        self._fresh.clear()

    def stop(self, *, wait: bool = True) -> None:
        """Abandons the requests that were not sent yet, stores the answers and unlocks the store; ``ask`` reopens it.

        Args:
            wait: Whether to wait for the requests that were sent, which the server may charge for.
        """
        for asked in self._asked.values():
            asked.future.cancel()
        for _ in self._workers:
            self._queue.put(None)
        if wait:
            for worker in self._workers:
                worker.join()
        self._workers = []
        self._queue = queue.SimpleQueue()
        if self._client is not None:
            self._client.close()
            self._client = None
        self._take_finished()
        self._asked.clear()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._fresh.clear()

    def _new_client(self) -> ServerClient:
        names = ("key_env", "concurrency", "max_retries", "requests_per_minute", "timeout_s", "backoff_s")
        return ServerClient(self.settings.url, **{name: getattr(self.settings, name) for name in names})

    def _documents(self, inputs: dict[str, Any]) -> list[Tensor]:
        input_ids = inputs["input_ids"].cpu()
        return [input_ids[row, start:stop] for row, start, stop in documents_of(input_ids, inputs)]

    def _start(self) -> None:
        """Starts the threads that ask. They are daemons, so that none keeps an interrupted process alive."""
        if not self._workers:
            self._client = self._new_client()
            self._server = dataclasses.replace(self._server, client=self._client)
            work = functools.partial(self._work, self._queue)
            self._workers = [
                threading.Thread(target=work, name=f"teacher-server-{number}", daemon=True)
                for number in range(self.settings.concurrency)
            ]
            for worker in self._workers:
                worker.start()

    def _work(self, waiting: queue.SimpleQueue[tuple[Request, Future[ServedDocument]] | None]) -> None:
        while (item := waiting.get()) is not None:
            request, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._answer(request))
                except BaseException as error:
                    future.set_exception(error)

    def _answer(self, request: Request) -> ServedDocument:
        answer = ask_by_name(self._server.score, request)
        # The reader counts the entries without an id.
        with self._reading:
            document = self._reader.scored(request, answer)
            self._reader.check_unmapped()
        if isinstance(document, DroppedAnswer):
            raise ServerRequestError(f"document {request.number}: {document.reason}")
        return document

    def _take(self, key: bytes) -> None:
        """Waits for a document and adds it to the store's buffer."""
        asked = self._asked[key]
        document = asked.future.result()
        del self._asked[key]
        positions = torch.tensor(document.positions)
        self._fresh[key] = Document(torch.tensor(document.input_ids), positions, document.teacher)
        writer = self._opened_writer()
        if asked.keep and document.input_ids not in writer:
            writer.add(*document)

    def _take_finished(self) -> None:
        """Adds the documents that were answered ahead of their step, so that a kill does not lose them."""
        for key, asked in list(self._asked.items()):
            if asked.keep and asked.future.done() and not asked.future.cancelled() and not asked.future.exception():
                self._take(key)

    def _opened_writer(self) -> StoreWriter:
        if self._writer is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = StoreWriter(**self._writer_options)
        return self._writer

    def _find(self, input_ids: Tensor) -> Document | None:
        """Returns a document that was just answered, or one in the store of any process."""
        if (fresh := self._fresh.get(_key(input_ids))) is not None:
            return fresh
        for path in sorted(self._folder.glob("rank-*")):
            store = self._store_at(path)
            if store is not None and (index := store.find(input_ids)) is not None:
                return store[index]
        return None

    def _store_at(self, path: Path) -> Store | None:
        """Returns the store of a process as it is now, opened again only after it was written to."""
        try:
            written = (path / MANIFEST_NAME).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        known = self._stores.get(path)
        if known is None or known[0] != written:
            known = self._stores[path] = written, Store(path)
        return known[1]


class Ahead:
    """An iterator over batches that asks the teacher for the next ones before it gives the first.

    Args:
        batches: Iterator over the micro-batches of an epoch.
        teacher: The teacher.
        number: Micro-batches to be ahead.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], teacher: ServedTeacher, number: int) -> None:
        self.batches = batches
        self._teacher, self._number = teacher, number
        self._read: collections.deque[dict[str, Any]] = collections.deque()

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> dict[str, Any]:
        while len(self._read) <= self._number:
            batch = next(self.batches, None)
            if batch is None:
                break
            self._teacher.ask(batch)
            self._read.append(batch)
        if not self._read:
            raise StopIteration
        return self._read.popleft()


class _Asked(NamedTuple):
    future: Future[ServedDocument]
    keep: bool


def _key(input_ids: Tensor) -> bytes:
    return input_ids.to(torch.int64).numpy().tobytes()
