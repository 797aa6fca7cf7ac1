"""A stub of vLLM that scores documents exactly with a tiny local model, and can hold its answers back."""

from __future__ import annotations

import json
import threading
from typing import Any

import torch
from support import served, teachers

from slimkernels.trainer.teacher_server import SAMPLE


class ScoringServer(served._Server):
    """Serves ``teachers.make_teacher`` in the form of vLLM's ``/completions`` with ``prompt_logprobs``.

    Attributes:
        documents: Token ids of every document that was asked for, without the sample before a training.
        held: Documents whose answers wait for ``gate``.
        answered: Number of documents that were answered.
        shift: Number that is added to the ids of ``/tokenize``, as if the tokenizer were another one.
        tokenizes: Whether the server has ``/tokenize``.
        spelling: Function from the id of a scored token to its text.
    """

    def __init__(self, *, kind: str = "vllm", max_model_len: int = 512, model=None) -> None:
        super().__init__()
        self.model, self.tokenizer = model or teachers.make_teacher(seed=3), teachers.make_tokenizer()
        self.kind, self.max_model_len = kind, max_model_len
        self.documents: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.held: set[tuple[int, ...]] = set()
        self.shift = self.answered = 0
        self.tokenizes, self.spelling = True, self.tokenizer.decode
        self._sample = self.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Returns the model's log-probabilities (T, V) after each token."""
        return self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def next_fault(self) -> Any:
        return None

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], str]:
        if path == "/v1/models":
            entry = {"id": served.MODEL, "owned_by": self.kind, "max_model_len": self.max_model_len}
            return 200, {}, json.dumps({"data": [entry]})
        if path == "/tokenize" and not self.tokenizes:
            return 404, {}, "{}"
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {}, json.dumps({"tokens": [token + self.shift for token in ids]})
        ids = body["prompt"]
        if ids != self._sample:
            self.documents.append(tuple(ids))
        if tuple(ids) in self.held:
            self.gate.wait(900)
        if self.faults:
            return self.faults[0]
        logprobs = self.logprobs(ids)
        positions: list[Any] = [None]
        for row, token in zip(logprobs[:-1], ids[1:], strict=True):
            top = row.topk(body["prompt_logprobs"])
            entries = {str(token): {"logprob": float(row[token]), "decoded_token": self.spelling(token)}}
            for value, other in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                entries.setdefault(str(other), {"logprob": value})
            positions.append(entries)
        self.answered += ids != self._sample
        answer = {"choices": [{"text": "x", "prompt_logprobs": positions, "finish_reason": "length"}]}
        return 200, {}, json.dumps(answer | {"usage": {"prompt_tokens": len(ids), "completion_tokens": 1}})


class ScoringSglang(ScoringServer):
    """The same in the form of SGLang's ``/generate``, which scores given ids too.

    Attributes:
        named: The ids that each request for a document named.
        forgets: Whether the answers lack the scores of given ids.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(kind="sglang", **options)
        self.named: list[list[int]] = []
        self.forgets = False

    def lacks(self, path: str) -> bool:
        return super().lacks(path) and path != "/generate"

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], str]:
        if path != "/generate":
            return super().reply(path, body)
        ids, start, named = body["input_ids"], body["logprob_start_len"], body.get("token_ids_logprob")
        if ids != self._sample:
            self.documents.append(tuple(ids))
            self.named.append(named or [])
        logprobs = self.logprobs(ids)
        tokens, tops, given = [[None, ids[start], None]], [None], [None]
        for place in range(start + 1, len(ids)):
            row = logprobs[place - 1]
            top = row.topk(body["top_logprobs_num"])
            tokens.append([float(row[ids[place]]), ids[place], None])
            tops.append([[value, token, None] for value, token in zip(*map(torch.Tensor.tolist, top), strict=True)])
            given.append([[float(row[token]), token, None] for token in named or ()])
        meta = {
            "finish_reason": {"type": "length", "length": 1},
            "prompt_tokens": len(ids),
            "completion_tokens": 1,
            "input_token_logprobs": tokens,
            "input_top_logprobs": tops,
        }
        if named is not None and not self.forgets:
            meta["input_token_ids_logprobs"] = given
        return 200, {}, json.dumps({"text": "x", "output_ids": [2], "meta_info": meta})
