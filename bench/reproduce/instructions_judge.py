"""A local model behind llama.cpp that says which of two responses to an instruction is better, in both orders.

References: Zheng et al. 2023, "Judging LLM-as-a-judge with MT-Bench and Chatbot Arena", arXiv 2306.05685 (section 3.4).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import ServerUnavailableError

# Probabilities of our response where it is shown first, and where it is shown second.
Verdict = tuple[float, float]

_PROMPT = """\
Two assistants responded to an instruction. Responses may be cut off at the end. Which response is better: more \
helpful, relevant, accurate and clear?

[Instruction]
{instruction}

[Response A]
{a}

[Response B]
{b}

Which response is better? Answer with one letter only, A or B."""
# Runs in an interpreter that has xllamacpp.
_SERVER = """
import sys, threading, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 4096, 1, False
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(parameters)
threading.Event().wait()
"""


class PairJudge:
    """A judge behind an OpenAI-compatible server that gives log-probabilities.

    Args:
        url: Base URL of the server.
        model: Name of the judge.
        digest: Digest of its weights.

    Attributes:
        identity: Names of the judge, its weights and its prompt, for rows.
    """

    def __init__(self, url: str, model: str, digest: str) -> None:
        self._client = ServerClient(url, concurrency=1)
        prompt = hashlib.sha256(_PROMPT.encode()).hexdigest()[:12]
        self.identity = {"model": model, "sha256": digest, "prompt": prompt}

    def compare(self, instruction: str, ours: str, theirs: str) -> Verdict:
        """Returns the probability with which the judge names our response as response A, and as response B.

        A probability is that of one letter, of the two; 1/2 where the judge names neither.
        """
        first = self._names_a(instruction, ours, theirs)
        second = self._names_a(instruction, theirs, ours)
        return first, 1 - second

    def _names_a(self, instruction: str, a: str, b: str) -> float:
        content = _PROMPT.format(instruction=instruction, a=a, b=b)
        payload = {"model": self.identity["model"], "messages": [{"role": "user", "content": content}]}
        payload |= {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return self._client.post("/chat/completions", payload, _read)

    def __enter__(self) -> PairJudge:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


def _read(reply: dict[str, Any]) -> float:
    """Returns the probability of the letter A in the first token of an answer, of the letters A and B."""
    mass = {"A": 0.0, "B": 0.0}
    for found in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        letter = found["token"].strip()
        if letter in mass:
            mass[letter] += math.exp(found["logprob"])
    total = sum(mass.values())
    return mass["A"] / total if total else 0.5


def preference(verdict: Verdict) -> float:
    """Returns 1 where both orders together prefer our response, 0 where they prefer the other, and 1/2 for a tie.

    A preference for one of the letters cancels in the sum of the log-odds of both orders, whose sign this is.
    """
    total = sum(verdict)
    return (total > 1) + 0.5 * (total == 1)


def agrees(verdict: Verdict) -> bool:
    """Returns whether the judge prefers the same response in both orders."""
    first, second = verdict
    return (first - 0.5) * (second - 0.5) > 0


@contextlib.contextmanager
def serve(gguf: Path, python: str | None = None, *, start_s: float = 600.0) -> Iterator[str]:
    """Runs llama.cpp on a GGUF file and yields its base URL.

    Args:
        gguf: The model.
        python: Interpreter that has the package xllamacpp; None for this one.
        start_s: Seconds to wait until it answers.

    Raises:
        RuntimeError: The server ended, or did not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python or sys.executable, "-c", _SERVER, str(gguf), str(port), threads]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        end = time.monotonic() + start_s
        while not _answers(f"http://127.0.0.1:{port}/v1"):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"{command[0]} must serve {gguf} through xllamacpp, but did not answer (exit status "
                    f"{process.poll()}): pass an interpreter that has xllamacpp as --llamacpp"
                )
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    client = ServerClient(url, max_retries=0)
    try:
        return client.get("/models") is not None
    except ServerUnavailableError:
        return False
    finally:
        client.close()


def hash_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
