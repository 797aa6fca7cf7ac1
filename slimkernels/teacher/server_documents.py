"""The documents that ``capture_server`` asks a server for: given ones to score, or prompts to continue.

Each of the two classes knows its requests, which of them the store lacks, and how an answer becomes a document.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from slimkernels.served_rows.answers import Answer, Request
from slimkernels.served_rows.api import ServerApi
from slimkernels.served_rows.asking import selection_of
from slimkernels.served_rows.rows import AnswerReader, DroppedAnswer, ServedDocument
from slimkernels.store import Store, StoreWriter
from slimkernels.teacher.chat import around_date
from slimkernels.teacher.corpus import TokenizedDocument, without_end

# Characters that a date in a chat template may take.
_DATE_LENGTHS = range(4, 41)


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


class Scoring:
    """The capture of given documents, every token of which the server scores.

    Attributes:
        server: The server that is asked.
        requests: One request per document.
        selection: Description of the rows, for the store.
    """

    def __init__(self, server: ServerApi, documents: Iterable[Sequence[int]]) -> None:
        self.server = server
        self._documents = [TokenizedDocument.of(ids) for ids in documents]
        self.requests = [_scored(ids, number) for number, ids in enumerate(self._documents)]
        if not self.requests:
            raise ValueError("documents must hold at least one document, got none")
        self.selection = selection_of(server)

    def missing(self, writer: StoreWriter) -> list[Request]:
        """Returns the requests whose document has a label and is not in the store."""
        return [
            ask
            for ask, ids in zip(self.requests, self._documents, strict=True)
            if len(ids) > 1 and not writer.has(ids, ids.teacher_ids)
        ]

    def teacher_ids(self, request: Request) -> list[int] | None:
        """Returns the token ids that the server reads in place of a document; None for the document itself."""
        return self._documents[request.number].teacher_ids

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
        scored = reader.scored(request, answer)
        ids = self._documents[request.number]
        if isinstance(scored, DroppedAnswer) or ids.teacher_ids is None:
            return scored
        return scored._replace(input_ids=list(ids), positions=[place - ids.shift for place in scored.positions])


def _scored(ids: TokenizedDocument, number: int) -> Request:
    """Returns the request for the scores of a document's labels, in what the server reads."""
    labels = ids.positions if ids.teacher_ids is None else [label + ids.shift for label in ids.labels]
    return Request(list(ids.read_ids), number=number, labels=labels)


class Generation:
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
        self.selection = selection_of(server) | {
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

    def teacher_ids(self, _: Request) -> None:
        """Returns None, as the server reads what it writes."""
        return

    def prompt_length(self, request: Request) -> int:
        """Returns the length of the prompt of a generated document."""
        return len(request.prompt_ids)

    def document(self, reader: AnswerReader, request: Request, answer: Answer) -> ServedDocument | DroppedAnswer:
        """Turns an answer into a document of the store."""
        return reader.generated(request, answer)


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
