"""A server in the form of SGLang, whose numbers are those that vLLM gave for the same texts.

SGLang has no build that installs beside this project's tests. The forms are therefore not recorded but written after
release 0.5.23: ``GenerateReqInput`` says what a request may hold (``managers/io_struct.py``), and
``add_logprob_to_meta_info``, ``_build_flat_top_logprobs_fields`` (``managers/tokenizer_manager.py``) and
``_process_input_token_logprobs`` (``managers/scheduler_components/logprob_result_processor.py``) what an answer holds.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

from support import served

REQUEST_FIELDS = {
    "input_ids",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "return_text_in_logprobs",
    "return_flat_raw_top_logprobs",
    "return_flat_raw_output_top_logprobs",
    "return_flat_raw_top_logprobs_b64",
    "lora_path",
}
SAMPLING_FIELDS = {"max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "sampling_seed"}
INFO = {"model_path": "/models/smollm2", "tokenizer_path": "/models/smollm2", "is_generation": True}
# The forms in which releases give the most probable tokens.
FORMS = ("triples", "flat", "base64")

Entries = list[tuple[int, float]]


def prompts_of_vllm() -> dict[tuple[int, ...], list[dict[str, Any] | None]]:
    """Returns vLLM's ``prompt_logprobs`` by scored tokens."""
    found = {}
    for recording in (served.TRAININGS["vllm"], served.RECORDINGS["vllm"]):
        for line in recording.read_text(encoding="utf-8").splitlines():
            exchange = json.loads(line)
            if "prompt_logprobs" in (exchange["request"] or {}):
                (choice,) = json.loads(exchange["answer"])["choices"]
                found[tuple(exchange["request"]["prompt"])] = choice["prompt_logprobs"]
    return found


def scored_by_vllm() -> dict[tuple[int, ...], list[tuple[float, Entries] | None]]:
    """Returns vLLM's log-probability of the token of the text and its five most probable ones, by scored tokens."""
    return {ids: list(map(_of_vllm, positions)) for ids, positions in prompts_of_vllm().items()}


def texts_of_vllm() -> dict[int, str]:
    """Returns the texts of the tokens that vLLM scored, by id."""
    positions = (position for found in prompts_of_vllm().values() for position in found if position)
    return {int(token): entry["decoded_token"] for position in positions for token, entry in position.items()}


def _of_vllm(position: dict[str, dict[str, Any]] | None) -> tuple[float, Entries] | None:
    if position is None:
        return None
    entries = [(int(token), entry["logprob"], entry["rank"]) for token, entry in position.items()]
    top = sorted(((token, logprob) for token, logprob, rank in entries if rank <= 5), key=lambda entry: -entry[1])
    return entries[0][1], top


def generated_by_vllm() -> dict[tuple[tuple[int, ...], int], tuple[str, list[int], list[tuple[float, Entries]]]]:
    """Returns vLLM's continuations by prompt and seed: text, ids, and for each the same as ``scored_by_vllm``."""
    found = {}
    for line in served.RECORDINGS["vllm"].read_text(encoding="utf-8").splitlines():
        exchange = json.loads(line)
        request = exchange["request"] or {}
        if exchange["path"] == "/v1/completions" and request.get("return_token_ids"):
            (choice,) = json.loads(exchange["answer"])["choices"]
            logprobs = choice["logprobs"]
            tops = [
                sorted(((int(name[9:]), value) for name, value in top.items()), key=lambda entry: -entry[1])[:5]
                for top in logprobs["top_logprobs"]
            ]
            values = list(zip(logprobs["token_logprobs"], tops, strict=True))
            found[tuple(request["prompt"]), request["seed"]] = choice["text"], choice["token_ids"], values
    return found


def top_fields(side: str, rows: list[Entries | None], form: str) -> dict[str, Any]:
    """Returns the fields of the most probable tokens in one of ``FORMS``."""
    missing = next((number for number, row in enumerate(rows) if row), len(rows))
    if form == "triples":
        triples = [row and [[logprob, token, None] for token, logprob in row] for row in rows]
        return {f"{side}_top_logprobs": triples}
    width = len(rows[-1] or ()) if rows else 5
    ids = [token for row in rows for token, _ in row or ()]
    logprobs = [logprob for row in rows for _, logprob in row or ()]
    name = f"{side}_top_logprobs"
    fields: dict[str, Any] = {f"{name}_shape": [len(rows) - missing, width], f"{name}_null_prefix": missing}
    if form == "flat":
        return fields | {f"{name}_val_flat": logprobs, f"{name}_idx_flat": ids}
    return fields | {
        f"{name}_val_flat_b64": base64.b64encode(struct.pack(f"<{len(logprobs)}f", *logprobs)).decode(),
        f"{name}_idx_flat_b64": base64.b64encode(struct.pack(f"<{len(ids)}i", *ids)).decode(),
        f"{name}_val_flat_b64_dtype": "float32",
        f"{name}_idx_flat_b64_dtype": "int32",
    }


class SglangServer(served._Server):
    """Answers like SGLang, in one of ``FORMS``, about the texts that vLLM scored and continued.

    Args:
        form: Form of the most probable tokens.
        owner: Owner of the model in the list; None for a server without a list.
        vocab_size: Size of the model's vocabulary, whose last id is written as 0.
    """

    def __init__(self, form: str = "base64", owner: str | None = "sglang", vocab_size: int = 49152) -> None:
        super().__init__()
        self.form, self.owner, self.vocab_size = form, owner, vocab_size
        self.scored, self.generated, self.texts = scored_by_vllm(), generated_by_vllm(), texts_of_vllm()

    def lacks(self, path: str) -> bool:
        return super().lacks(path) and path != "/get_model_info"

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], str]:
        if path == "/get_model_info":
            return 200, {}, json.dumps(INFO)
        if path == "/v1/models" and self.owner is not None:
            base = {"id": served.MODEL, "owned_by": self.owner, "parent": None, "max_model_len": 8192}
            adapter = {"id": "tuned", "owned_by": self.owner, "parent": served.MODEL, "max_model_len": None}
            return 200, {}, json.dumps({"object": "list", "data": [base, adapter]})
        if path == "/generate" and body.keys() <= REQUEST_FIELDS and body["sampling_params"].keys() <= SAMPLING_FIELDS:
            return self._generate(body)
        return 404, {}, json.dumps({"error": {"message": f"nothing at {path} for {body}"}})

    def _generate(self, body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
        ids, start = body["input_ids"], body["logprob_start_len"]
        if len(ids) >= 1000:
            message = f"The input ({len(ids)} tokens) is longer than the model's context length (1000 tokens)."
            return 400, {}, json.dumps({"error": {"message": message}})
        if start >= 0:
            is_spelled = body["return_text_in_logprobs"]
            return 200, {}, json.dumps(self.score(ids, start, body.get("token_ids_logprob"), is_spelled))
        text, token_ids, values = self.generated[tuple(ids), body["sampling_params"]["sampling_seed"]]
        meta = {
            "finish_reason": {"type": "length", "length": len(token_ids)},
            "prompt_tokens": len(ids),
            "completion_tokens": len(token_ids),
            "input_token_logprobs": [],
            "output_token_logprobs": [[value[0], token, None] for token, value in zip(token_ids, values, strict=True)],
            **top_fields("input", [], self.form),
            **top_fields("output", [row for _, row in values], self.form),
        }
        return 200, {}, json.dumps({"text": text, "output_ids": token_ids, "meta_info": meta})

    def score(
        self, ids: list[int], start: int, token_ids: list[int] | None = None, is_spelled: bool = False
    ) -> dict[str, Any]:
        """Returns the answer for scored tokens from the one at ``start`` on, with the texts of the tokens or null."""
        values = self.scored[tuple(ids)][start:]
        # The server does not know the probability of its first token, wherever it starts.
        values[0] = None
        shown = [token if token < self.vocab_size - 1 else 0 for token in ids[start:]]
        meta = {
            "id": "4f0c",
            "finish_reason": {"type": "length", "length": 1},
            "prompt_tokens": len(ids),
            "weight_version": "default",
            "completion_tokens": 1,
            "cached_tokens": 0,
            "input_token_logprobs": [
                [value and value[0], token, self.texts.get(token) if is_spelled else None]
                for token, value in zip(shown, values, strict=True)
            ],
            "output_token_logprobs": [[-1.1083, 2306, None]],
            **top_fields("input", [value and value[1] for value in values], self.form),
            "output_top_logprobs": [[[-1.1083, 2306, None]]],
        }
        if token_ids is not None:
            meta["input_token_ids_logprobs"] = [
                value and [[-0.25 * place, token, None] for token in token_ids] for place, value in enumerate(values)
            ]
            meta["output_token_ids_logprobs"] = [[[-1.0, token, None] for token in token_ids]]
        return {"text": " She", "output_ids": [2306], "meta_info": meta}
