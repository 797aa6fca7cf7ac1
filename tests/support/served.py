"""Servers for tests: real ones on localhost, one that records their answers, and one that replays them.

    python tests/support/served.py llama.cpp PYTHON        records tests/data/served_llamacpp.jsonl
    python tests/support/served.py vllm PYTHON             records tests/data/served_vllm.jsonl
    python tests/support/served.py vllm-tokens PYTHON      records tests/data/served_vllm_tokens.jsonl
    ... PYTHON search                              records what a search asks, tests/data/searched_*.jsonl
    ... PYTHON training                            records what a training asks, tests/data/trained_*.jsonl

PYTHON is the interpreter of an environment that has xllamacpp or vLLM; `make test-servers` makes both.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data"
MODEL = "smollm2"
RECORDINGS = {
    "llama.cpp": DATA / "served_llamacpp.jsonl",
    "vllm": DATA / "served_vllm.jsonl",
    # Started with --enable-scale-out.
    "vllm-tokens": DATA / "served_vllm_tokens.jsonl",
}
# Paths that tell which server answers, or that a server may lack; they take no fault of a server without them.
OPTIONAL_PATHS = ("/model_info", "/get_model_info", "/server_info", "/get_server_info", "/inference/v1/generate")
PROMPTS = ["The capital of France is", "Once upon a time", "The café serves"]
# The answers contain characters of several tokens, and an end of text.
QUESTIONS = ["Write one emoji", "Say hi"]
TEXTS = ["When the rain stopped, Anna put on her boots.", "A black cat 🐈 was sleeping on the bench."]
TRAININGS = {"vllm": DATA / "trained_vllm.jsonl"}
SEARCHES = {"llama.cpp": DATA / "searched_llamacpp.jsonl", "vllm": DATA / "searched_vllm.jsonl"}
# The steps begin with the delimiter, end with the end of text, or reach their limit.
SEARCHED = [
    "Question: Tom has 3 apples and buys 4 more. How many?\nAnswer:",
    "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n",
]
SEARCH = {"branching_factor": 2, "beam": 2, "max_depth": 3, "max_step_tokens": 14, "temperature": 0.8, "top_k": 50}
OPTIONS = {"top_logprobs": 5, "max_tokens": 12, "codec": "float32"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two packets; the second would wait until the client has acknowledged the first.
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        self.server.seen.append(
            {"path": self.path, "headers": dict(self.headers), "body": body, "at": time.monotonic()}
        )
        fault = (404, {}, "{}") if self.server.lacks(self.path) else self.server.next_fault()
        if fault == "disconnect":
            self.close_connection = True
            return
        if fault == "hang":
            self.server.released.wait(900)
            self.close_connection = True
            return
        status, headers, data = self.server.reply(self.path, body) if fault in (None, "cut") else fault
        sent = data.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(sent)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent[: len(sent) // 2] if fault == "cut" else sent)
        self.close_connection = fault == "cut" or self.close_connection

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    """On a free port of localhost, for as long as its ``with`` block; ``faults`` come before any answer.

    A fault is "disconnect", "hang", "cut" (half of the real body), or a (status, headers, body).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.seen: list[dict[str, Any]] = []
        self.faults: list[Any] = []
        self.released = threading.Event()
        self._lock = threading.Lock()

    def next_fault(self) -> Any:
        with self._lock:
            return self.faults.pop(0) if self.faults else None

    def lacks(self, path: str) -> bool:
        """Returns whether the server has nothing at a path that servers need not have."""
        return path in OPTIONAL_PATHS

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], str]:
        raise NotImplementedError

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Tests make clients disconnect.
        if not isinstance(sys.exception() if sys.version_info >= (3, 11) else sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class ReplayServer(_Server):
    """Replays the recorded answers of a real server; a request that was not recorded gets status 418."""

    def __init__(self, recording: Path, *, names_itself: bool = True) -> None:
        super().__init__()
        self.names_itself = names_itself
        self.exchanges = [json.loads(line) for line in recording.read_text(encoding="utf-8").splitlines()]

    def lacks(self, path: str) -> bool:
        return super().lacks(path) and all(exchange["path"] != path for exchange in self.exchanges)

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], str]:
        if path == "/v1/models" and not self.names_itself:
            return 404, {}, "{}"
        for exchange in self.exchanges:
            if (exchange["path"], exchange["request"]) == (path, body):
                return exchange["status"], {}, exchange["answer"]
        return 418, {}, json.dumps({"error": {"message": f"never recorded: {path} {body}"}})


class RecordingServer(_Server):
    """Forwards requests to a real server and records the exchanges."""

    def __init__(self, real: str, *, names_itself: bool = True) -> None:
        super().__init__()
        self.real, self.names_itself, self.exchanges = real, names_itself, []

    def lacks(self, path: str) -> bool:
        return False

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], str]:
        if path == "/v1/models" and not self.names_itself:
            return 404, {}, "{}"
        request = urllib.request.Request(  # noqa: S310 -- localhost
            self.real + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=900) as response:  # noqa: S310 -- localhost
                status, answer = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read().decode()
        self.exchanges.append({"path": path, "request": body, "status": status, "answer": answer})
        return status, {}, answer


class ModelServer(_Server):
    """Serves a transformers model like vLLM, or with kind "openai" like a server that takes only texts.

    After ``dies_after`` completions it drops every connection.
    """

    def __init__(self, folder: Path, *, kind: str = "vllm", names: tuple[str, ...] = (MODEL,)) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        super().__init__()
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.kind, self.names, self.dies_after = kind, names, None

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The bodies of the requests for completions."""
        return [seen["body"] for seen in self.seen if seen["path"] == "/v1/completions"]

    def next_fault(self) -> Any:
        dead = self.dies_after is not None and len(self.completions) > self.dies_after
        return "disconnect" if dead else super().next_fault()

    def reply(self, path: str, body: Any) -> tuple[int, dict[str, str], str]:
        if path == "/v1/models":
            # vLLM gives the time of the request here.
            own = {"owned_by": self.kind, "max_model_len": 512, "created": time.time()}
            return 200, {}, json.dumps({"data": [{"id": name} | own for name in self.names]})
        if body["model"] not in self.names:
            return 404, {}, json.dumps({"error": {"message": f"The model {body['model']} does not exist."}})
        if path == "/tokenize" and self.kind == "vllm":
            return 200, {}, json.dumps({"tokens": self.tokenizer(body["prompt"])["input_ids"]})
        if path == "/v1/completions" and isinstance(body["prompt"], str) == (self.kind == "openai"):
            return 200, {}, json.dumps({"choices": [self._choice(body)]})
        return 400, {}, json.dumps({"error": {"message": f"cannot be asked: {path} {body}"}})

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        import torch

        noise = torch.Generator().manual_seed(body["seed"])
        prompt = body["prompt"]
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        own: list[int] = []
        logprobs: list[float] = []
        text, finish, stopped_at = "", "length", None
        while len(own) < body["max_tokens"] and finish == "length":
            with torch.inference_mode():
                row = self.model(torch.tensor([ids + own])).logits[0, -1].log_softmax(-1)
            if body["temperature"] == 0:
                token = int(row.argmax())
            else:
                token = int((row / body["temperature"]).softmax(-1).multinomial(1, generator=noise))
            own.append(token)
            logprobs.append(float(row[token]))
            text = self.tokenizer.decode(own, skip_special_tokens=True)
            stopped_at = next((stop for stop in body.get("stop", ()) if stop in text), None)
            finish = "stop" if stopped_at or token == self.tokenizer.eos_token_id else "length"
        pieces = [self.tokenizer.decode(token) for token in own]
        choice = {"text": text, "finish_reason": finish, "logprobs": {"tokens": pieces, "token_logprobs": logprobs}}
        return choice | ({"token_ids": own, "stop_reason": stopped_at} if self.kind == "vllm" else {})


_LLAMA_CPP = """
import sys, threading, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, port = sys.argv[1], int(sys.argv[2])
parameters.model_alias = {"smollm2"}
parameters.port, parameters.n_ctx, parameters.n_parallel, parameters.warmup = port, 2048, 2, False
parameters.cpuparams.n_threads = 2
server = xllamacpp.Server(parameters)
threading.Event().wait()
"""


@contextlib.contextmanager
def real_server(
    kind: str, python: str, model: Path, gguf: Path, log: Path, *, dtype: str = "bfloat16"
) -> Iterator[str]:
    """Starts llama.cpp, or vLLM in a dtype, with SmolLM2, and yields its address, without /v1, when it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    if kind == "llama.cpp":
        command = [python, "-c", _LLAMA_CPP, str(gguf), str(port)]
    else:
        folder = Path(python).parent
        environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
        serve = f"--dtype {dtype} --max-model-len 1024 --enforce-eager --max-logprobs 50 --host 127.0.0.1"
        options = [*serve.split(), "--port", str(port), "--served-model-name", MODEL]
        if kind == "vllm-tokens":
            options.append("--enable-scale-out")
        command = [python, str(folder / "vllm"), "serve", str(model), *options]
    with open(log, "wb") as output:
        # Runs in its own session, so that vLLM's workers can be ended with it.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True, cwd=log.parent
        )
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _wait_until_ready(process: subprocess.Popen, address: str, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/v1/models", timeout=5):  # noqa: S310 -- localhost
                return
        except (OSError, ValueError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start; the end of {log}:\n{log.read_text(errors='replace')[-3000:]}")


def captures(kind: str, tokenizer: Any) -> list[tuple[str, bool, dict[str, Any]]]:
    """Returns the recorded captures: a name, whether the server tells its kind, and arguments of capture_server."""
    documents = [tokenizer(text)["input_ids"] for text in TEXTS]
    if kind == "vllm-tokens":
        return [("scored", True, {"documents": documents})]
    wanted = [
        ("generated", True, {"prompts": PROMPTS}),
        ("chat", True, {"prompts": QUESTIONS, "api": "chat", "seed": 3}),
        ("chat_greedy", True, {"prompts": QUESTIONS, "api": "chat", "temperature": 0.0, "max_tokens": 32}),
        ("generated_as_openai", False, {"prompts": PROMPTS, "api": "completions"}),
        ("chat_as_openai", False, {"prompts": QUESTIONS, "api": "chat", "seed": 3}),
        ("scored", True, {"documents": documents}),
        ("scored_as_openai", False, {"documents": documents}),
    ]
    if kind == "llama.cpp":
        # Characters of several tokens through llama.cpp's own interface, the last of them cut off.
        messages = [{"role": "user", "content": QUESTIONS[0]}]
        prompts = [tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)]
        wanted.append(("generated_emoji", True, {"prompts": prompts, "temperature": 0.0, "max_tokens": 11}))
    return wanted


def record_search(kind: str, python: str, model: Path, gguf: Path, log: Path) -> None:
    """Records the requests of a search to the real server, and its answers without the settings they repeat."""
    from slimkernels.search import PathFinder, PathFinderConfig, ServerEngine

    exchanges: list[dict[str, Any]] = []
    with real_server(kind, python, model, gguf, log) as address:
        for names_itself in (True, False):
            with RecordingServer(address, names_itself=names_itself) as server:
                engine = ServerEngine(server.url, MODEL, concurrency=1)
                PathFinder(engine, PathFinderConfig(**SEARCH)).solve(SEARCHED)
                engine.close()
                exchanges += server.exchanges
    with open(SEARCHES[kind], "w", encoding="utf-8") as file:
        for exchange in exchanges:
            answer = json.loads(exchange["answer"])
            for bulk in ("generation_settings", "timings", "prompt"):
                answer.pop(bulk, None)
            file.write(json.dumps(exchange | {"answer": json.dumps(answer)}, ensure_ascii=False) + "\n")


def record_training(kind: str, python: str, model: Path, gguf: Path, work: Path) -> None:
    """Records the requests of a training to the real server, and its answers."""
    from support import served_training

    from slimkernels.cli import main as slimkernels

    with real_server(kind, python, model, gguf, work / "log") as address, RecordingServer(address) as server:
        store = served_training.make_documents(work / "store")
        if slimkernels(served_training.command(server.url, store, work / "out")):
            raise RuntimeError("the training failed")
        with open(TRAININGS[kind], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(exchange, ensure_ascii=False) + "\n" for exchange in server.exchanges)


def main() -> None:
    from support.teachers import smollm2_gguf

    from slimkernels.models.gguf import converted_folder, default_cache_dir
    from slimkernels.serving.errors import ServerRequestError
    from slimkernels.teacher import load_tokenizer
    from slimkernels.teacher.server import capture_server

    kind, python, *what = sys.argv[1:]
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    gguf = smollm2_gguf()
    work = Path(tempfile.mkdtemp())
    if what == ["training"]:
        record_training(kind, python, converted_folder(gguf, default_cache_dir()), gguf, work)
        return
    if what == ["search"]:
        record_search(kind, python, converted_folder(gguf, default_cache_dir()), gguf, work / "log")
        return
    exchanges: list[dict[str, Any]] = []
    with real_server(kind, python, converted_folder(gguf, default_cache_dir()), gguf, work / "log") as address:
        for name, names_itself, options in captures(kind, tokenizer):
            with RecordingServer(address, names_itself=names_itself) as server:
                try:
                    arguments = OPTIONS | options | {"max_unmapped_fraction": 1.0, "concurrency": 1}
                    report = capture_server(server.url, MODEL, tokenizer, work / name, **arguments)
                except ServerRequestError as error:
                    report = error
                print(name, report)  # noqa: T201
                exchanges += [exchange for exchange in server.exchanges if exchange not in exchanges]
    with open(RECORDINGS[kind], "w", encoding="utf-8") as file:
        file.writelines(json.dumps(exchange, ensure_ascii=False) + "\n" for exchange in exchanges)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
