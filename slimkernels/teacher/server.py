"""``capture_server``: asks a server for log-probabilities and writes them into a store.

``slimkernels.served_rows`` turns the answers into rows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from slimkernels import _checks
from slimkernels.served_rows.answers import Answer, Request
from slimkernels.served_rows.api import ServerApi
from slimkernels.served_rows.asking import ask_by_name, num_token_ids
from slimkernels.served_rows.rows import AnswerReader, DroppedAnswer
from slimkernels.served_rows.sglang import adapter_of
from slimkernels.served_rows.tokens import TokenMap
from slimkernels.serving.client import ServerClient, TokenBudget
from slimkernels.serving.errors import UnusableAnswerError
from slimkernels.serving.kinds import Kind, identify
from slimkernels.store import Store, StoreWriter
from slimkernels.store.errors import NotAStoreError
from slimkernels.store.format import StoreSettings
from slimkernels.teacher.server_documents import Generation, Scoring, ServerCost
from slimkernels.teacher.vocabulary import captured_vocabulary

# Answers in a row that cannot be used, after which a capture ends with the error of the last.
_MAX_UNUSABLE = 8
_SHOWN_REASONS = 5
APIS = ("auto", "completions", "chat", "llama.cpp", "sglang")
# The interfaces that give the ids of all tokens.
_OWN_APIS = {"llamacpp": "llama.cpp", "sglang": "sglang"}


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
    token_budget: int | None = None,
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

    - ``documents`` are scored through SGLang's ``/generate``, through vLLM's ``/inference/v1/generate`` where it has
      one, or through ``/completions``, with ``prompt_logprobs`` (vLLM) or with ``echo``; one token is generated per
      document and thrown away. llama.cpp's server cannot do this. Every label of a document has a row, or every token
      but the first.
    - ``prompts`` are continued through ``/completions`` with ``logprobs``, or ``/chat/completions`` with
      ``top_logprobs``. Generated tokens have rows, tokens of the prompt have none. Document i is drawn from the whole
      distribution with the seed ``seed + i``.

    vLLM and llama.cpp report probabilities before temperature. Other servers may not: keep ``temperature=1`` for them.

    Args:
        url: Base URL, such as ``http://localhost:8000/v1``. A user name and password in it are used but not stored.
        model: The server's name for the model; for SGLang also that of a loaded adapter.
        tokenizer: The model's tokenizer, a fast one.
        store_path: New directory, or a store made with the same settings; the server may have moved since.
        documents: Token id lists, as from ``read_documents``. Give these or ``prompts``. The server scores the
            ``teacher_ids`` of a ``TokenizedDocument`` that has them, and the store holds the document.
        prompts: Texts or token ids. The tokenizer encodes texts with its defaults, without an end of text at the end.
            With ``api="chat"`` each is the only message of a user, formatted by the tokenizer's chat template.
        top_logprobs: K, the entries to ask for. OpenAI's limit is 20, or 5 for completions; vLLM's is its
            ``--max-logprobs``, 20 by default.
        api: Interface for prompts: "completions", "chat", or the servers' own, which give the ids of all tokens:
            "llama.cpp" for its ``/completion`` and "sglang" for its ``/generate``. "auto" is the server's own interface
            for llama.cpp and SGLang, and "completions" for other servers.
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
        token_budget: Limit on the tokens that the server reads and, at most, generates, repetitions included. Before
            it is exceeded the capture ends with an error; what was answered is stored.
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
        BudgetSpentError: The next request would exceed ``token_budget``.
        UnmappedTokensError: The share of entries without an id is above ``max_unmapped_fraction``.
        SettingsMismatchError: The store was made with another model, tokenizer, selection or codec.
        TeacherContextError: A document is in the store, or comes again, with other ``teacher_ids``.
    """
    if (documents is None) == (prompts is None):
        raise ValueError("give either documents to score or prompts to continue")
    check_arguments(
        api=api,
        top_logprobs=top_logprobs,
        num_documents=num_documents,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        max_unmapped_fraction=max_unmapped_fraction,
    )
    if not 0 <= flush_s < math.inf:
        raise ValueError(f"flush_s must be in [0, inf), got {flush_s!r}")
    # The rows of the server's model are not known; one more than the tokenizer's may be padding that it lacks.
    vocabulary = captured_vocabulary(tokenizer, num_token_ids(tokenizer) + 1, store_path)
    vocab_size = vocabulary.size if vocab_size is None else vocab_size
    tokens = TokenMap(tokenizer, vocab_size)
    stored = _settings(store_path)
    client = ServerClient(
        url,
        key_env=key_env,
        concurrency=concurrency,
        max_retries=max_retries,
        requests_per_minute=requests_per_minute,
        timeout_s=timeout_s,
        backoff_s=backoff_s,
        budget=TokenBudget(token_budget),
    )
    with client:
        kind, listing = identify(client)
        server = ServerApi(
            client=client,
            api=_own_api(kind, stored) if api == "auto" else api,
            model=model,
            kind=kind,
            top_logprobs=top_logprobs,
            max_tokens=max_tokens,
            temperature=temperature,
            adapter=adapter_of(listing, model, client.url) if kind == "sglang" else None,
        )
        if documents is not None:
            task: Scoring | Generation = Scoring(server, documents)
        else:
            task = Generation(server, tokenizer, prompts or (), num_documents, seed)
        writer = StoreWriter(
            store_path,
            vocab_size=vocab_size,
            tokenizer_fingerprint=vocabulary.fingerprint,
            teacher=_teacher_description(stored, {"name": model, "server": client.url, "kind": kind}),
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


def _store_answers(
    task: Scoring | Generation,
    missing: Sequence[Request],
    reader: AnswerReader,
    writer: StoreWriter,
    flush_s: float,
    progress: Callable[[int, int], None] | None,
) -> ServerReport:
    """Asks for the missing documents, several at a time, and stores the answers in order."""

    def ask(request: Request) -> Answer | UnusableAnswerError:
        try:
            return ask_by_name(task.ask, request)
        except UnusableAnswerError as error:
            return error

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
        teacher_ids = task.teacher_ids(request)
        if isinstance(document, DroppedAnswer):
            dropped += 1
            if len(reasons) < _SHOWN_REASONS:
                reasons[document.reason] = None
        elif writer.has(document.input_ids, teacher_ids):
            # Two requests got the same text.
            skipped += 1
        else:
            writer.add(*document, prompt_length=task.prompt_length(request), teacher_ids=teacher_ids)
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


def _settings(store_path: str | os.PathLike[str]) -> StoreSettings | None:
    """Returns the settings of an existing store, or None."""
    try:
        return Store(store_path).settings
    except NotAStoreError:
        return None


def _teacher_description(stored: StoreSettings | None, teacher: dict[str, Any]) -> dict[str, Any]:
    """Returns the teacher's description; an existing store keeps the address that its server had at first.

    It also keeps the kind "openai", which every server has of which no more was known when the store was made.
    """
    if stored is None:
        return teacher
    known = {"server": teacher["server"]}
    if stored.teacher.get("kind") == "openai":
        known["kind"] = teacher["kind"]
    return stored.teacher if stored.teacher | known == teacher else teacher


def _own_api(kind: Kind, stored: StoreSettings | None) -> str:
    """Returns the interface for prompts of a kind of server; an existing store keeps that of its first prompts."""
    known = None if stored is None or stored.teacher.get("kind") != "openai" else stored.selection.get("api")
    return str(known or _OWN_APIS.get(kind, "completions"))


def check_arguments(
    *,
    api: str,
    top_logprobs: int,
    num_documents: int | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    max_unmapped_fraction: float,
) -> None:
    """Checks those arguments of ``capture_server`` that say what is asked of a server.

    Raises:
        ValueError: One is out of range.
    """
    if api not in APIS:
        raise ValueError(f"api must be one of {', '.join(APIS)}, got {api!r}")
    counts = {"top_logprobs": top_logprobs, "num_documents": num_documents, "max_tokens": max_tokens}
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    _checks.as_temperature(temperature, or_zero=True)
    for name, number, most in (("seed", seed, 2**31), ("max_unmapped_fraction", max_unmapped_fraction, 1.0)):
        if not 0 <= number <= most:
            raise ValueError(f"{name} must be in [0, {most:g}], got {number!r}")
