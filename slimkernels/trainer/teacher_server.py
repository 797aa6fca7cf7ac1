"""``TeacherServer``, the settings of a server that scores the documents of a training, and what it must be."""

from __future__ import annotations

import dataclasses
import os

from transformers import PreTrainedTokenizerBase

from slimkernels import _checks
from slimkernels.served_rows.answers import Request
from slimkernels.served_rows.api import ServerApi
from slimkernels.served_rows.sglang import adapter_of
from slimkernels.served_rows.tokens import TokenMap
from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import NotFoundError, ServerRequestError
from slimkernels.serving.kinds import identify, listed_models, model_facts

# Kinds of servers that score given text.
_SCORING = ("vllm", "sglang")
_CODECS = ("float32", "affine8", "affine6", "bfloat16")
# The text by which tokenizers are compared.
SAMPLE = "When the rain stopped, Anna put on 2 boots."


@dataclasses.dataclass(frozen=True)
class TeacherServer:
    """A vLLM or SGLang server that scores the documents of a training.

    Attributes:
        url: Base URL, such as ``http://localhost:8000/v1``.
        model: The server's name for the model.
        store: Directory into which each process writes the rows that it got, in a store of its own, ``rank-00000``
            and so on. A document that one of them holds is not asked for again.
        top_logprobs: K, the entries to ask for per token.
        ahead: Micro-batches that are asked for before they are needed, at least 0.
        key_env: Environment variable that holds the key; None uses ``OPENAI_API_KEY`` if that is set.
        concurrency: Largest number of requests in flight, per process.
        max_retries: Repetitions of a request that failed.
        requests_per_minute: Limit on requests per process, repetitions included; None for no limit.
        token_budget: Limit on the tokens that the server reads and generates for one run and process, repetitions
            included; None for no limit. A training that needs more ends with an error at the first such document.
        timeout_s: Seconds without a response after which a request counts as failed.
        backoff_s: Seconds before the first repetition, doubled each time.
        flush_s: Longest time in seconds between two writes to the store, each of which makes a shard. Until then
            answers are kept in a journal beside the store, so that a kill loses none.
        codec: Codec of the store: "float32", with which later epochs read the rows of the first, or "affine8",
            "affine6" or "bfloat16".
        max_unmapped_fraction: Largest allowed share of entries whose token has no id, in [0, 1].

    Raises:
        TypeError: An attribute is of another type.
        ValueError: A number is out of its range, or the codec is not one of the above.
    """

    url: str
    model: str
    store: str | os.PathLike[str]
    top_logprobs: int = 20
    ahead: int = 2
    key_env: str | None = None
    concurrency: int = 8
    max_retries: int = 6
    requests_per_minute: float | None = None
    token_budget: int | None = None
    timeout_s: float = 600.0
    backoff_s: float = 1.0
    flush_s: float = 10.0
    codec: str = "float32"
    max_unmapped_fraction: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("top_logprobs", 1), ("ahead", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        for name in ("url", "model"):
            if not isinstance(value := getattr(self, name), str):
                raise TypeError(f"{name} must be a str, got {value!r}")
        if not isinstance(self.store, str | os.PathLike):
            raise TypeError(f"store must be the path of a folder, got {self.store!r}")
        _checks.check_one_of(self.codec, "codec", _CODECS)
        _checks.as_at_least_zero(self.flush_s, "flush_s")
        if _checks.as_at_least_zero(self.max_unmapped_fraction, "max_unmapped_fraction") > 1:
            raise ValueError(f"max_unmapped_fraction must be in [0, 1], got {self.max_unmapped_fraction}")


def scoring_server(client: ServerClient, settings: TeacherServer) -> tuple[ServerApi, int | None]:
    """Returns the server, and the length of its context where it says that."""
    kind, listing = identify(client)
    if kind not in _SCORING:
        raise ServerRequestError(
            f"teacher_server must be a vLLM or SGLang server, which score given text, got {client.url} of kind "
            f"{kind!r}: serve the teacher with one of them, or capture what this server generates with capture_server"
        )
    server = ServerApi(
        client=client,
        api="completions",
        model=settings.model,
        kind=kind,
        top_logprobs=settings.top_logprobs,
        max_tokens=1,
        temperature=1.0,
        adapter=adapter_of(listing, settings.model, client.url) if kind == "sglang" else None,
    )
    entry = next((entry for entry in listed_models(listing) if entry["id"] == settings.model), {})
    length = model_facts(entry).get("max_model_len")
    return server, length if isinstance(length, int) else None


def check_tokenizer(client: ServerClient, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compares the server's tokens of a text with the tokenizer's, where the server has ``/tokenize``."""
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    payload = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        read = client.post("../tokenize", payload, lambda content: list(content["tokens"]))
    except NotFoundError:
        return
    if read != expected:
        raise ServerRequestError(
            f"the server {client.url} reads {text!r} as the tokens {read[:20]}, and the student's tokenizer as "
            f"{expected[:20]}: give the student the tokenizer of the model {model!r}"
        )


def check_spelling(server: ServerApi, tokens: TokenMap, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lets the server score one text, and compares its texts of the tokens, where it gives them, with the tokenizer's.

    The ids that a server is sent are the ones that it scores, so that only their texts show another tokenizer.
    """
    ids = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    answer = server.score(Request(ids, spelled=True))
    for place, position in enumerate(answer.positions, answer.start):
        own = tokens.text_of([ids[place]]).decode(errors="replace")
        # Many servers leave out the space before a word.
        if position.chosen.is_spelled and position.chosen.text.strip() != own.strip():
            raise ServerRequestError(
                f"the server {server.client.url} reads token {ids[place]} as {position.chosen.text!r}, and the "
                f"student's tokenizer as {own!r}: give the student the tokenizer of the model {server.model!r}"
            )
