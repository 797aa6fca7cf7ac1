"""Asks SGLang's own ``/generate`` for tokens and log-probabilities by id, and reads its answers.

The forms are those of release 0.5.23 (``GenerateReqInput`` of ``managers/io_struct.py``, ``add_logprob_to_meta_info``
of ``managers/tokenizer_manager.py``). All log-probabilities are in ``meta_info``. Those of the text are triples
(log-probability, id, text or null). Those of the most probable tokens are such triples too, a list per position, or
with ``return_flat_raw_top_logprobs`` two flat arrays with their shape, as JSON numbers or with
``return_flat_raw_top_logprobs_b64`` as little-endian base64. Releases without flat arrays ignore these options, and
newer ones fall back to triples where positions have different numbers of entries, so all three forms are read. SGLang
writes infinities and NaN as null.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimkernels.served_rows import arrays
from slimkernels.served_rows.answers import Answer, Call, Options, Position, Request, read_answer
from slimkernels.served_rows.tokens import NumberedTokens, ServerToken
from slimkernels.serving.errors import ServerRequestError, UnusableAnswerError
from slimkernels.serving.kinds import listed_models

_NO_TOKENS = NumberedTokens(np.zeros(0, np.int64), np.zeros(0))


def adapter_of(listing: Mapping[str, Any] | None, model: str, url: str) -> str | None:
    """Returns the adapter that a name of a model means, or None if it is the model itself.

    ``/generate`` has no field for the model: it would answer with the only one that it has, whatever was asked for.

    Args:
        listing: Answer to ``GET /models``; None for a server that has no list.
        model: Name of the model.
        url: Address of the server, for errors.

    Raises:
        ServerRequestError: The server lists other models only.
    """
    listed = {entry["id"]: entry for entry in listed_models(listing)}
    if listed and model not in listed:
        raise ServerRequestError(f"{url} has no model {model!r}; it serves {', '.join(sorted(listed))}")
    return model if listed and listed[model].get("parent") else None


def scores(options: Options, request: Request, url: str) -> Call:
    """Returns the call that scores a document from the token before its first label on.

    The server keeps the tokens before that in its prefix cache. One token is generated and thrown away, because not
    every release accepts ``max_new_tokens=0``.

    Args:
        options: Options of the request.
        request: The document.
        url: Address of the server, for errors.
    """
    ids = request.prompt_ids
    start = max(1, request.labels[0]) if request.labels else 1
    payload = _payload(options, ids, {"max_new_tokens": 1, "temperature": 0.0}) | {
        "logprob_start_len": start - 1,
        "return_text_in_logprobs": request.spelled,
    }
    if request.token_ids:
        payload["token_ids_logprob"] = list(request.token_ids)

    def read(content: dict[str, Any]) -> Answer:
        positions = _positions(content["meta_info"], "input")
        if len(positions) != len(ids) - start + 1:
            raise UnusableAnswerError(
                f"{url} gave logprobs for {len(positions)} tokens of a given text, asked for the last "
                f"{len(ids) - start + 1} of {len(ids)}"
            )
        _forgive_last_id(positions, ids[start - 1 :])
        # The first position has no log-probability.
        return _answer(content, positions[1:])._replace(start=start)

    return Call("../generate", payload, functools.partial(read_answer, read=read))


def generation(options: Options, request: Request) -> Call:
    """Returns the call that lets SGLang continue a prompt."""
    sampling = {
        "max_new_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "sampling_seed": request.seed,
    }
    payload = _payload(options, request.prompt_ids, sampling) | {
        "logprob_start_len": -1,
        "return_flat_raw_output_top_logprobs": True,
    }

    def read(content: dict[str, Any]) -> Answer:
        positions = _positions(content["meta_info"], "output")
        if content["text"] and not positions:
            raise ValueError("it has a text without logprobs")
        return _answer(content, positions)._replace(token_ids=[int(position.chosen.id or 0) for position in positions])

    return Call("../generate", payload, functools.partial(read_answer, read=read))


def _payload(options: Options, ids: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
    payload = {
        "input_ids": ids,
        "sampling_params": sampling,
        "return_logprob": True,
        "top_logprobs_num": options.top_logprobs,
        "return_text_in_logprobs": False,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }
    return payload if options.adapter is None else payload | {"lora_path": options.adapter}


def _answer(content: dict[str, Any], positions: list[Position]) -> Answer:
    meta = content["meta_info"]
    finish = meta["finish_reason"] or {}
    if finish.get("type") == "abort":
        raise ValueError(f"the server gave the request up: {finish.get('message')}")
    return Answer(
        positions=positions,
        text=content["text"],
        token_ids=None,
        prompt_ids=None,
        prompt_tokens=meta["prompt_tokens"],
        generated_tokens=meta["completion_tokens"],
        finish_reason=finish.get("type"),
    )


def _positions(meta: dict[str, Any], side: str) -> list[Position]:
    """Reads the log-probabilities of the tokens that the server read (side "input") or generated ("output").

    Raises:
        ValueError: The tokens of the text and the most probable ones are for different numbers of positions.
    """
    chosen = _numbered(meta[f"{side}_token_logprobs"])
    tops = _flat_tops(meta, side) if f"{side}_top_logprobs_shape" in meta else _tops(meta[f"{side}_top_logprobs"])
    given: Sequence[NumberedTokens | None] = [None] * len(chosen)
    if f"{side}_token_ids_logprobs" in meta:
        given = _tops(meta[f"{side}_token_ids_logprobs"])
    if not len(tops) == len(given) == len(chosen):
        raise ValueError(
            f"{len(chosen)} {side} tokens have logprobs, but {len(tops)} have top logprobs and {len(given)} have those "
            "of given ids"
        )
    texts = [text for _, _, text in meta[f"{side}_token_logprobs"] or ()]
    tokens = map(ServerToken.numbered, chosen.ids.tolist(), chosen.logprobs.tolist(), texts)
    return [Position(*position) for position in zip(tokens, tops, given, strict=True)]


def _tops(positions: list[Any]) -> list[NumberedTokens]:
    return [_numbered(triples) for triples in positions]


def _numbered(triples: Sequence[Any] | None) -> NumberedTokens:
    """Reads triples (log-probability, id, text or null); None stands for no triple."""
    if not triples:
        return _NO_TOKENS
    if set(map(len, triples)) != {3}:
        raise ValueError(f"a token must be a triple, got {next(t for t in triples if len(t) != 3)!r}")
    logprobs, ids, _ = zip(*triples, strict=True)
    return NumberedTokens(arrays.integers(ids), arrays.floats(logprobs))


def _flat_tops(meta: dict[str, Any], side: str) -> list[NumberedTokens]:
    """Reads flat arrays of the shape (rows, K), which follow a number of positions without entries."""
    name = f"{side}_top_logprobs"
    rows, width = arrays.integers(meta[f"{name}_shape"]).tolist()
    (missing,) = arrays.integers([meta[f"{name}_null_prefix"]]).tolist()
    if min(rows, width, missing) < 0 or missing > len(meta[f"{side}_token_logprobs"]):
        raise ValueError(f"{name} has the shape ({rows}, {width}) after {missing} positions")
    if f"{name}_val_flat_b64" in meta:
        logprobs = arrays.decoded(meta[f"{name}_val_flat_b64"], meta[f"{name}_val_flat_b64_dtype"], (rows, width))
        ids = arrays.decoded(meta[f"{name}_idx_flat_b64"], meta[f"{name}_idx_flat_b64_dtype"], (rows, width))
        if logprobs.dtype != np.float64 or ids.dtype != np.int64:
            raise ValueError(f"{name} must hold log-probabilities as floats and ids as integers")
    else:
        logprobs = arrays.floats(meta[f"{name}_val_flat"]).reshape(rows, width)
        ids = arrays.integers(meta[f"{name}_idx_flat"]).reshape(rows, width)
    return [_NO_TOKENS] * missing + list(map(NumberedTokens, ids, logprobs))


def _forgive_last_id(positions: list[Position], ids: Sequence[int]) -> None:
    """Takes the name from tokens that SGLang calls 0 although another id was sent, in place.

    It writes 0 for the last id of its vocabulary (``_process_input_token_logprobs``), which can only be the largest
    id of a document. Their log-probabilities are those of the true id.
    """
    largest = max(ids)
    for place, position in enumerate(positions):
        if position.chosen.id == 0 and ids[place] == largest != 0:
            positions[place] = position._replace(chosen=ServerToken("", position.chosen.logprob))
