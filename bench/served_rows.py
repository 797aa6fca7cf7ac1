"""Compares the time from a parsed answer to rows with the time that parsing takes, for every kind of server.

python -m bench.served_rows --positions 1000 --top-k 1000

An answer scores a document of ``--positions`` tokens with ``--top-k`` entries each, one of them beyond the most
probable, as vLLM sends it. "parse" is ``json.loads`` of its text; "rows" is everything from there to ``SparseLogits``.
Both are the least of ``--rounds`` times, taken in turns in one process. A base64 text takes almost no time to parse, so
its last column, the ratio to the parsing of SGLang's triples for the same rows, says more than its ratio to its own.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from slimkernels.served_rows import openai, sglang, vllm
from slimkernels.served_rows.answers import Answer, Options, Request
from slimkernels.served_rows.rows import AnswerReader
from slimkernels.served_rows.tokens import TokenMap

URL = "http://localhost/v1"
VOCAB_SIZE = 150_000


class IdMap(TokenMap):
    """A map for servers that name tokens by id, without a tokenizer."""

    def __init__(self) -> None:
        self.vocab_size, self._bytes, self._added, self._examples = VOCAB_SIZE, {}, {}, {}
        self.seen = self.unmapped = 0


def main() -> None:
    """Prints a line for each kind of server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1000, metavar="N", help="tokens of the document")
    parser.add_argument("--top-k", type=int, default=1000, metavar="K", help="entries of every token")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of which the fastest counts")
    args = parser.parse_args()
    parses: dict[str, float] = {}
    print(f"{'answer':32} {'MB':>6} {'parse':>9} {'rows':>9} {'ratio':>7} {'to triples':>11}")
    for name, text, request, read in answers(args.positions, args.top_k):
        parse, rows = fastest(text, request, read, args.top_k, args.rounds)
        parses[name] = parse
        to_triples = rows / parses["SGLang, triples"]
        columns = (
            f"{len(text) / 1e6:6.1f} {1e3 * parse:6.0f} ms {1e3 * rows:6.0f} ms {rows / parse:7.2f} {to_triples:11.2f}"
        )
        print(f"{name:32} {columns}")


def answers(positions: int, top_k: int) -> list[tuple[str, str, Request, Callable[[dict[str, Any]], Answer]]]:
    """Returns answers about the same random rows: name, text, request, and the function that reads the content."""
    draw = np.random.default_rng(0)
    ids = draw.permuted(np.tile(np.arange(0, VOCAB_SIZE, VOCAB_SIZE // top_k)[:top_k], (positions, 1)), axis=1)
    ids += draw.integers(0, VOCAB_SIZE // top_k, (positions, 1))
    logits = -np.sort(draw.exponential(3.0, (positions, top_k)), axis=1)
    logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.1).astype(np.float32).astype(np.float64)
    # The token of the text is none of the most probable ones.
    labels = ids.max(1) + 1
    values = np.full(positions, -25.0)
    request = Request(labels.tolist())
    sg, vl = (
        Options(model="m", kind=kind, top_logprobs=top_k, max_tokens=1, temperature=1.0) for kind in ("sglang", "vllm")
    )
    rows = list(zip(labels.tolist(), values.tolist(), ids.tolist(), logprobs.tolist(), strict=True))[1:]
    triples = [None, *([[v, t, None] for t, v in zip(i, p, strict=True)] for _, _, i, p in rows)]
    meta = {
        "finish_reason": {"type": "length"},
        "prompt_tokens": positions,
        "completion_tokens": 1,
        "input_token_logprobs": [[None, labels[0].item(), None], *([v, t, None] for t, v, _, _ in rows)],
    }
    flat = {"input_top_logprobs_shape": [positions - 1, top_k], "input_top_logprobs_null_prefix": 1}
    lists = {"val_flat": logprobs[1:].reshape(-1).tolist(), "idx_flat": ids[1:].reshape(-1).tolist()}
    encoded = {
        "val_flat_b64": base64.b64encode(logprobs[1:].astype("<f4").tobytes()).decode(),
        "idx_flat_b64": base64.b64encode(ids[1:].astype("<i4").tobytes()).decode(),
        "val_flat_b64_dtype": "float32",
        "idx_flat_b64_dtype": "int32",
    }
    read = sglang.scores(sg, request, URL).read
    found = []
    for name, fields in (
        ("SGLang, triples", {"input_top_logprobs": triples}),
        ("SGLang, flat", flat | {f"input_top_logprobs_{key}": value for key, value in lists.items()}),
        ("SGLang, base64", flat | {f"input_top_logprobs_{key}": value for key, value in encoded.items()}),
    ):
        found.append((name, json.dumps({"text": "", "meta_info": meta | fields}), request, read))
    keyed = [{str(t): v} | dict(zip(map(str, i), p, strict=True)) for t, v, i, p in rows]
    prompt = [
        None,
        *({t: {"logprob": v, "rank": n, "decoded_token": None} for n, (t, v) in enumerate(k.items())} for k in keyed),
    ]
    content = {"choices": [{"index": 0, "finish_reason": "length"}], "prompt_logprobs": prompt}
    read = vllm.scores_without_text(vl, request, URL).read
    found.append(("vLLM, prompt_logprobs", json.dumps(content), request, read))
    logprobs_of_text = {
        "tokens": ["", *(f"token_id:{t}" for t, _, _, _ in rows)],
        "token_logprobs": [None, *(v for _, v, _, _ in rows)],
        "top_logprobs": [None, *({f"token_id:{t}": v for t, v in k.items()} for k in keyed)],
    }
    content = {"choices": [{"text": "a", "logprobs": logprobs_of_text}]}
    found.append(("completions, token_id:123", json.dumps(content), request, openai.echo(vl, request, URL).read))
    listed = [
        {
            "id": t,
            "token": "",
            "bytes": [],
            "logprob": v,
            "top_logprobs": [{"id": n, "token": "", "bytes": [], "logprob": w} for n, w in zip(i, p, strict=True)],
        }
        for t, v, i, p in rows[:1] + rows
    ]
    content = {"choices": [{"text": "a", "logprobs": {"content": listed}}]}
    found.append(("chat, llama.cpp's ids", json.dumps(content), request, openai.echo(vl, request, URL).read))
    return found


def fastest(
    text: str, request: Request, read: Callable[[dict[str, Any]], Answer], top_k: int, rounds: int
) -> tuple[float, float]:
    """Returns the least seconds of parsing, and from the parsed answer to rows."""
    server: Any = SimpleNamespace(client=SimpleNamespace(url=URL), model="m", top_logprobs=top_k)
    parse_s, rows_s = [], []
    for _ in range(rounds):
        gc.collect()
        begin = time.perf_counter()
        content = json.loads(text)
        parsed = time.perf_counter()
        document = AnswerReader(server, IdMap(), 1.0).scored(request, read(content))
        end = time.perf_counter()
        if len(document.positions) != len(request.prompt_ids) - 1:  # type: ignore[union-attr]
            raise ValueError(f"expected a row for all tokens but the first, got {document}")
        parse_s.append(parsed - begin)
        rows_s.append(end - parsed)
    return min(parse_s), min(rows_s)


if __name__ == "__main__":
    main()
