"""``capture_server``: asks a server for log-probabilities and writes them into a store.

``slimkernels.served_rows`` turns the answers into rows.
"""

from __future__ import annotations

import collections
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from slimkernels.served_rows.api import Answer, Request, ServerApi
from slimkernels.served_rows.rows import AnswerReader, DroppedAnswer, ServedDocument
from slimkernels.served_rows.tokens import TokenMap
from slimkernels.serving.client import ServerClient, ServerRequestError, UnusableAnswerError
from slimkernels.serving.kinds import server_kind
from slimkernels.store import Store, StoreWriter
from slimkernels.store.errors import NotAStoreError
from slimkernels.teacher.chat import around_date
from slimkernels.teacher.corpus import TokenizedDocument, without_end
from slimkernels.teacher.vocabulary import captured_vocabulary, num_token_ids

# Answers in a row that cannot be used, after which a capture ends with the error of the last.
_MAX_UNUSABLE = 8
_SHOWN_REASONS = 5
# Characters that a date in a chat template may take.
_DATE_LENGTHS = range(4, 41)
APIS = ("auto", "completions", "chat", "llama.cpp")


class ServerCost(NamedTuple):
    """The cost of a capture, known before it starts.

    Attributes:
        requests: Documents that are not in the store yet.
        prompt_tokens: Tokens that the server reads for them.
        max_generated_tokens: Upper limit on the tokens that it generates.
    """

    requests: int
    prompt_tokens: int
    max_generated_tokens: int


class ServerReport(NamedTuple):
    """The result of one call of ``capture_server``.

    Attributes:
        documents: Documents added to the store.
        tokens: Tokens in them, prompts included.
        skipped: Documents that were in the store already, or have no label (fewer than 2 tokens).
        dropped: Answers that made no document; the next call asks for them again.
        unmapped_fraction: Share of the server's entries whose token has no id in the tokenizer.
        generated_tokens: Generated tokens, as counted by the server.
        drop_reasons: Why answers were dropped, a clause for each of up to five different reasons.
    """

    documents: int
    tokens: int
    skipped: int
    dropped: int
    unmapped_fraction: float
    generated_tokens: int
    drop_reasons: tuple[str, ...] = ()


def capture_server(
    url: str,
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    store_path: str | os.PathLike[str],
    *,
    documents: Iterable[Sequence[int]] | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    top_logprobs: int = 20,
    api: str = "auto",
    num_documents: int | None = None,
    max_tokens: int = 128,
    temperature: float = 1.0,
    seed: int = 0,
    vocab_size: int | None = None,
    codec: str = "affine8",
    max_unmapped_fraction: float = 0.01,
    key_env: str | None = None,
    concurrency: int = 8,
    max_retries: int = 6,
    requests_per_minute: float | None = None,
    timeout_s: float = 600.0,
    backoff_s: float = 1.0,
    flush_s: float = 60.0,
    shard_rows: int | None = None,
    announce: Callable[[ServerCost], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ServerReport:
    """Adds documents with the log-probabilities of a server to a store: given ones, or continuations of prompts.

    A row holds up to ``top_logprobs`` natural-log probabilities with ``lse = 0``, so that all other tokens together
    have the exact mass ``1 - sum(exp(logprobs))``. Train on it with ``rest="ghost"``, which uses that mass;
    ``rest="renorm"`` would teach the student that all other tokens are impossible. Rows are ragged: an entry whose
    token has no id in the tokenizer is left out, and its mass counts with that of the other tokens. ``target_logit`` is
    the log-probability of the label, or NaN if the server does not give it.

    An answer that cannot be used (an error, a page of HTML, no choice, a text without log-probabilities) is asked for
    again like one with status 429 or 502. One that stays so is dropped, as are answers that are empty (a tool call, a
    filter) or have a token whose id is not known; the report counts them and says why.

    Documents are stored in order, at most ``flush_s`` after they were answered. The store is the only state: after an
    error or a kill, the same call asks for what is missing. A document is recognised by its tokens, and a generated one
    by the tokens before its first row, which are its prompt.

    - ``documents`` are scored through ``/completions``, with ``prompt_logprobs`` (vLLM) or with ``echo``; one token
      is generated per document and thrown away. llama.cpp's server cannot do this. Every token but the first has a row.
    - ``prompts`` are continued through ``/completions`` with ``logprobs``, or ``/chat/completions`` with
      ``top_logprobs``. Generated tokens have rows, tokens of the prompt have none. Document i is drawn from the whole
      distribution with the seed ``seed + i``.

    vLLM and llama.cpp report probabilities before temperature. Other servers may not: keep ``temperature=1`` for them.

    Args:
        url: Base URL, such as ``http://localhost:8000/v1``. A user name and password in it are used but not stored.
        model: The server's name for the model.
        tokenizer: The model's tokenizer, a fast one.
        store_path: New directory, or a store made with the same settings; the server may have moved since.
        documents: Token id lists, as from ``read_documents``. Give these or ``prompts``.
        prompts: Texts or token ids. The tokenizer encodes texts with its defaults, without an end of text at the end.
            With ``api="chat"`` each is the only message of a user, formatted by the tokenizer's chat template.
        top_logprobs: K, the entries to ask for. OpenAI's limit is 20, or 5 for completions; vLLM's is its
            ``--max-logprobs``, 20 by default.
        api: Interface for prompts: "completions", "chat", or "llama.cpp" for its own ``/completion``, the only one that
            gives the ids of all tokens. "auto" is "llama.cpp" for llama.cpp and "completions" for other servers.
        num_documents: Number of documents to generate, going through the prompts repeatedly; None uses each once.
        max_tokens: Longest continuation, in tokens.
        temperature: Sampling temperature; 0 takes the most probable token.
        seed: Seed of the draws, in [0, 2^31].
        vocab_size: V, the rows of the model's head; None means the number of tokens of the tokenizer.
        codec: Codec of the store: "affine8", "affine6", "bfloat16" or "float32".
        max_unmapped_fraction: Largest allowed share of entries whose token has no id. If a document is dropped because
            one of its own tokens has no id, all of its entries count.
        key_env: Environment variable that holds the key; None uses ``OPENAI_API_KEY`` if that is set. Keys are neither
            stored nor shown.
        concurrency: Largest number of requests in flight.
        max_retries: Repetitions of a request after status 408, 409, 425, 429 or 5xx, a lost connection, a timeout or an
            answer that cannot be used.
        requests_per_minute: Limit on requests, repetitions included.
        timeout_s: Seconds without a response after which a request counts as failed.
        backoff_s: Seconds before the first repetition, doubled each time. ``Retry-After`` is obeyed.
        flush_s: Longest time in seconds between two writes to the store; each write makes a shard.
        shard_rows: Rows at which a shard is full, the same as in ``StoreWriter``.
        announce: Called once with the cost, before the first request for a document.
        progress: Called as progress(done, wanted) after each document.

    Returns:
        ServerReport.

    Raises:
        ImportError: The package httpx2 is not installed.
        ValueError: An argument is out of range, there is no document, or the bytes of the tokenizer's tokens are not
            known.
        ServerRequestError: The server refused a request, gives no log-probabilities or ones that are not normalised,
            gave eight answers in a row that cannot be used, or read other tokens than it was sent because it adds
            special tokens, has another chat template or another tokenizer.
        ServerUnavailableError: The server did not answer.
        UnmappedTokensError: The share of entries without an id is above ``max_unmapped_fraction``.
        SettingsMismatchError: The store was made with another model, tokenizer, selection or codec.
    """
    if (documents is None) == (prompts is None):
        raise ValueError("give either documents to score or prompts to continue")
    _check_arguments(api, top_logprobs, num_documents, max_tokens, temperature, seed, max_unmapped_fraction, flush_s)
    # The rows of the server's model are not known; one more than the tokenizer's may be padding that it lacks.
    vocabulary = captured_vocabulary(tokenizer, num_token_ids(tokenizer) + 1, store_path)
    vocab_size = vocabulary.size if vocab_size is None else vocab_size
    tokens = TokenMap(tokenizer, vocab_size)
    client = ServerClient(
        url,
        key_env=key_env,
        concurrency=concurrency,
        max_retries=max_retries,
        requests_per_minute=requests_per_minute,
        timeout_s=timeout_s,
        backoff_s=backoff_s,
    )
    with client:
        kind = server_kind(client.get("/models"))
        if api == "auto":
            api = "llama.cpp" if kind == "llamacpp" else "completions"
        server = ServerApi(client, model, kind, api, top_logprobs, max_tokens, temperature)
        if documents is not None:
            task: _Scoring | _Generation = _Scoring(server, documents)
        else:
            task = _Generation(server, tokenizer, prompts or (), num_documents, seed)
        writer = StoreWriter(
            store_path,
            vocab_size=vocab_size,
            tokenizer_fingerprint=vocabulary.fingerprint,
            teacher=_teacher_description(store_path, {"name": model, "server": client.url, "kind": kind}),
            selection=task.selection,
            codec=codec,
            shard_rows=shard_rows,
        )
        with writer:
            missing = task.missing(writer)
            if announce is not None:
                announce(task.cost(missing))
            reader = AnswerReader(server, tokens, max_unmapped_fraction)
            return _store_answers(task, missing, reader, writer, flush_s, progress)


class _Scoring:
    """The capture of given documents, every token of which the server scores.

    Attributes:
        server: The server that is asked.
        requests: One request per document.
        selection: Description of the rows, for the store.
    """

    def __init__(self, server: ServerApi, documents: Iterable[Sequence[int]]) -> None:
        self.server = server
        self.requests = [
            Request(list(ids), number=number, labels=TokenizedDocument.of(ids).positions)
            for number, ids in enumerate(documents)
        ]
        if not self.requests:
            raise ValueError("documents must hold at least one document, got none")
        self.selection = _selection(server)

    def missing(self, writer: StoreWriter) -> list[Request]:
        """Returns the requests whose document has a label and is not in the store."""
        return [ask for ask in self.requests if len(ask.prompt_ids) > 1 and ask.prompt_ids not in writer]

    def prompt_length(self, _: Request) -> int:
        """Returns 0, as the prompt of a given document is not known."""
        return 0

    def cost(self, missing: Sequence[Request]) -> ServerCost:
        """Returns the cost of the missing documents; the server generates one token of each."""
        return ServerCost(len(missing), sum(len(request.prompt_ids) for request in missing), len(missing))

    def ask(self, request: Request) -> Answer:
        """Asks the server for one document."""
        return self.server.score(request)

    def document(self, reader: AnswerReader, request: Request, answer: Answer) -> ServedDocument | DroppedAnswer:
        """Turns an answer into a document of the store."""
        return reader.scored(request, answer)


class _Generation:
    """The capture of documents that the server generates from prompts.

    Attributes:
        server: The server that is asked.
        requests: One request per document.
        selection: Description of the documents and the rows, for the store.
    """

    def __init__(
        self,
        server: ServerApi,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str | Sequence[int]],
        num_documents: int | None,
        seed: int,
    ) -> None:
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        self.server, self._tokenizer = server, tokenizer
        encoded = [_encode(tokenizer, prompt, server.api == "chat") for prompt in prompts]
        self.requests: list[Request] = []
        for number in range(len(prompts) if num_documents is None else num_documents):
            prompt, ids = prompts[number % len(prompts)], encoded[number % len(prompts)]
            self.requests.append(Request(ids, prompt if isinstance(prompt, str) else "", seed + number, number))
        self.selection = _selection(server) | {
            "api": server.api,
            "max_tokens": server.max_tokens,
            "temperature": server.temperature,
            "seed": seed,
        }

    def missing(self, writer: StoreWriter) -> list[Request]:
        """Returns the requests whose prompt has no document in the store; each document answers one request."""
        prompts = {tuple(request.prompt_ids): request for request in self.requests}
        dated: dict[str, dict[str, tuple[int, ...]]] = {}
        if self.server.api == "chat":
            for ids, request in prompts.items():
                if around := around_date(self._tokenizer, _messages(request.content)):
                    dated.setdefault(around[0], {})[around[1]] = ids

        def of_another_day(ids: list[int]) -> tuple[int, ...] | None:
            return _of_another_day(str(self._tokenizer.decode(ids)), dated) if dated else None

        stored = _stored_prompts(writer, set(prompts), of_another_day)
        missing = []
        for request in self.requests:
            prompt = tuple(request.prompt_ids)
            if stored[prompt] > 0:
                stored[prompt] -= 1
            else:
                missing.append(request)
        return missing

    def cost(self, missing: Sequence[Request]) -> ServerCost:
        """Returns the cost of the missing documents."""
        read = sum(len(request.prompt_ids) for request in missing)
        return ServerCost(len(missing), read, len(missing) * self.server.max_tokens)

    def ask(self, request: Request) -> Answer:
        """Asks the server for one document."""
        return self.server.generate(request)

    def prompt_length(self, request: Request) -> int:
        """Returns the length of the prompt of a generated document."""
        return len(request.prompt_ids)

    def document(self, reader: AnswerReader, request: Request, answer: Answer) -> ServedDocument | DroppedAnswer:
        """Turns an answer into a document of the store."""
        return reader.generated(request, answer)


def _store_answers(
    task: _Scoring | _Generation,
    missing: Sequence[Request],
    reader: AnswerReader,
    writer: StoreWriter,
    flush_s: float,
    progress: Callable[[int, int], None] | None,
) -> ServerReport:
    """Asks for the missing documents, several at a time, and stores the answers in order."""

    def ask(request: Request) -> Answer | UnusableAnswerError:
        try:
            return task.ask(request)
        except ServerRequestError as error:
            # Names the document, because it may be too long for the server.
            named = f"document {request.number}, {len(request.prompt_ids)} tokens of prompt: {error}"
            if isinstance(error, UnusableAnswerError):
                return UnusableAnswerError(named)
            raise ServerRequestError(named) from error

    added = num_tokens = dropped = generated = unusable = 0
    reasons: dict[str, None] = {}
    skipped = len(task.requests) - len(missing)
    flushed = time.monotonic()
    for request, answer in task.server.client.map(ask, missing):
        if isinstance(answer, UnusableAnswerError):
            unusable += 1
            # A server whose answers were never good does not get better, and a broken one should not cost hours.
            if unusable == _MAX_UNUSABLE or unusable == len(missing):
                raise answer
            document = DroppedAnswer(str(answer))
        else:
            unusable = 0
            document = task.document(reader, request, answer)
            reader.check_unmapped()
            generated += answer.generated_tokens or 0
        if isinstance(document, DroppedAnswer):
            dropped += 1
            if len(reasons) < _SHOWN_REASONS:
                reasons[document.reason] = None
        elif document.input_ids in writer:
            # Two requests got the same text.
            skipped += 1
        else:
            writer.add(*document, prompt_length=task.prompt_length(request))
            added += 1
            num_tokens += len(document.input_ids)
        if time.monotonic() - flushed >= flush_s:
            writer.flush()
            flushed = time.monotonic()
        if progress is not None:
            progress(skipped + added + dropped, len(task.requests))
    reader.check_unmapped(is_last=True)
    unmapped_fraction = reader.tokens.unmapped / max(1, reader.tokens.seen)
    return ServerReport(added, num_tokens, skipped, dropped, unmapped_fraction, generated, tuple(reasons))


def _selection(server: ServerApi) -> dict[str, Any]:
    return {"kind": "top_logprobs", "value": server.top_logprobs, "top_k": server.top_logprobs}


def _teacher_description(store_path: str | os.PathLike[str], teacher: dict[str, Any]) -> dict[str, Any]:
    """Returns the teacher's description; an existing store keeps the address that its server had at first."""
    try:
        stored = Store(store_path).settings.teacher
    except NotAStoreError:
        return teacher
    return stored if stored | {"server": teacher["server"]} == teacher else teacher


def _check_arguments(
    api: str,
    top_logprobs: int,
    num_documents: int | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    max_unmapped_fraction: float,
    flush_s: float,
) -> None:
    if api not in APIS:
        raise ValueError(f"api must be one of {', '.join(APIS)}, got {api!r}")
    counts = {"top_logprobs": top_logprobs, "num_documents": num_documents, "max_tokens": max_tokens}
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    limits = {"temperature": (temperature, math.inf), "flush_s": (flush_s, math.inf), "seed": (seed, 2**31)}
    for name, (number, most) in (limits | {"max_unmapped_fraction": (max_unmapped_fraction, 1.0)}).items():
        if not (0 <= number <= most and number < math.inf):
            raise ValueError(f"{name} must be in [0, {most:g}], got {number!r}")


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int], is_chat: bool) -> list[int]:
    if is_chat:
        if not isinstance(prompt, str):
            raise ValueError("a prompt of api='chat' must be text; send token ids with api='completions'")
        if not tokenizer.chat_template:
            raise ValueError("api='chat' needs a tokenizer with a chat template; use api='completions'")
        encoded: Any = tokenizer.apply_chat_template(_messages(prompt), add_generation_prompt=True, return_dict=False)
        return list(encoded)
    if isinstance(prompt, str):
        ids = without_end(list(tokenizer(prompt)["input_ids"]), tokenizer.eos_token_id)
    else:
        ids = list(prompt)
    if not ids:
        raise ValueError(f"every prompt must have at least one token, got {prompt!r}")
    return ids


def _messages(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _of_another_day(text: str, dated: Mapping[str, Mapping[str, tuple[int, ...]]]) -> tuple[int, ...] | None:
    """Returns the prompt that equals a text in everything but the date, or None.

    Args:
        text: A prompt.
        dated: Token ids of prompts, by the text after the date in those of the text before it.
    """
    for before, by_end in dated.items():
        if text.startswith(before):
            ends = (text[len(before) + length :] for length in _DATE_LENGTHS)
            found = next((by_end[end] for end in ends if end in by_end), None)
            if found is not None:
                return found
    return None


def _stored_prompts(
    writer: StoreWriter,
    prompts: set[tuple[int, ...]],
    of_another_day: Callable[[list[int]], tuple[int, ...] | None],
) -> collections.Counter[tuple[int, ...]]:
    """Counts the documents of each prompt in the store; a document's prompt ends where its rows begin.

    Args:
        writer: Writer of the store.
        prompts: Token ids of the prompts.
        of_another_day: Function that finds the prompt whose tokens differ from given ones in the date alone.
    """
    lengths = sorted({len(prompt) for prompt in prompts}, reverse=True)
    counts: collections.Counter[tuple[int, ...]] = collections.Counter()
    store = Store(writer.path)
    for number, entry in enumerate(store.shards):
        shard = store.shard(number)
        for document in range(entry.documents):
            ids = tuple(shard.tokens(document, document).tolist())
            start, stop = shard.rows_of(document)
            # Earlier releases stored empty answers as documents without a row.
            if start == stop:
                continue
            end = int(shard.arrays["positions"][start])
            # The prompt is shorter than that if the first generated token has no row, none of whose entries had an id.
            found = next((ids[:length] for length in lengths if length <= end and ids[:length] in prompts), None)
            if found is None:
                known = int(shard.arrays["prompt_lengths"][document])
                found = of_another_day(list(ids[: known or end]))
            if found is not None:
                counts[found] += 1
    return counts
