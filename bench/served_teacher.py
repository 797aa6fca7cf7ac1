"""Trains from a served teacher and appends, per number of micro-batches asked ahead, the share of a step spent waiting.

python -m bench.served_teacher --out bench/results/served_teacher.jsonl [--ahead 0 2] [--delay 0.5] [--steps 12]

The server replays answers that were made before, in the form of vLLM, each after ``--delay`` times the time of a step
that waits for nothing, which is measured first. The documents and the answers are random, the student is a small Llama,
and its tokenizer is SmolLM2's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

import slimkernels as sk
from bench import records
from bench.machine import machine
from slimkernels.models.load import load_tokenizer
from slimkernels.models.make_student import make_student
from slimkernels.store import Store, StoreDataset, StoreWriter
from slimkernels.trainer import SlimConfig, SlimTrainer, TeacherServer
from slimkernels.trainer.teacher_server import SAMPLE

MODEL = "teacher"
# The first steps are not timed, as threads and connections are made.
WARM_UP_STEPS = 3


class Replay(ThreadingHTTPServer):
    """A server on localhost that sends the answer for a document after ``delay_s`` seconds, for a ``with`` block.

    Args:
        answers: Answers by the token ids of the document.
        delay_s: Seconds between a request and its answer.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answers: dict[tuple[int, ...], bytes], delay_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.delay_s = answers, delay_s
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self) -> Replay:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Replay

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": MODEL, "owned_by": "vllm", "max_model_len": 4096}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self._send(b"{}", 404)
            return
        time.sleep(self.server.delay_s)
        self._send(self.server.answers[tuple(body["prompt"])])

    def _send(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class TimedTrainer(SlimTrainer):
    """A trainer that records when every step began, and how long steps had waited for the teacher until then."""

    def get_batch_samples(self, *args):
        self.starts.append((time.perf_counter(), self.served_teacher.wait_seconds if self.served_teacher else 0.0))
        return super().get_batch_samples(*args)


def main() -> None:
    """Prints and appends a row per number of micro-batches that are asked ahead."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 2], help="micro-batches to ask ahead")
    parser.add_argument("--delay", type=float, default=0.5, help="time of an answer, in steps that wait for nothing")
    parser.add_argument("--top-k", type=int, default=20, help="entries per token")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per document")
    parser.add_argument("--batch", type=int, default=4, help="documents per step")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the student")
    parser.add_argument("--layers", type=int, default=4, help="layers of the student")
    args = parser.parse_args()
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "store", len(tokenizer), args)
        answers = make_answers(Store(folder / "store"), tokenizer, args.top_k)
        step_s, _ = train(folder, tokenizer, args)
        rows = []
        for ahead in args.ahead:
            with Replay(answers, args.delay * step_s) as server:
                teacher = TeacherServer(server.url, MODEL, folder / f"rows-{ahead}", args.top_k, ahead)
                seconds, waited = train(folder, tokenizer, args, teacher)
            rows.append(row(args, len(tokenizer), ahead, step_s, seconds, waited))
    for found in rows:
        print(
            f"{found['ahead']} ahead: {found['step_ms']:.1f} ms per step, {100 * found['waiting']:.2f} % of it waiting "
            f"for answers that take {found['answer_ms']:.1f} ms"
        )
    records.append(args.out, [found | machine() for found in rows])


def write_store(path: Path, vocab_size: int, args: argparse.Namespace) -> None:
    """Writes documents of random tokens, enough that none is read twice, with random rows."""
    generator = torch.Generator().manual_seed(0)
    settings = {"tokenizer_fingerprint": "", "teacher": {}, "selection": {"top_k": args.top_k}, "codec": "float32"}
    with StoreWriter(path, vocab_size=vocab_size, **settings) as writer:
        for _ in range(args.batch * (args.steps + WARM_UP_STEPS + 1)):
            ids = torch.randint(vocab_size, (args.tokens,), generator=generator)
            logits = 3 * torch.randn(args.tokens - 1, vocab_size, generator=generator)
            writer.add(ids, range(1, args.tokens), sk.topk_logits(logits, args.top_k, target=ids[1:]))


def make_answers(store: Store, tokenizer: Any, top_k: int) -> dict[tuple[int, ...], bytes]:
    """Returns vLLM's form of the rows of every document, and an answer for the text that tells tokenizers apart."""
    answers = {}
    for document in store:
        teacher = document.teacher
        logprobs = (teacher.logits - teacher.lse).tolist()
        labels = (teacher.target_logit - teacher.lse[:, 0]).tolist()
        rows = zip(document.input_ids[1:].tolist(), labels, teacher.ids.tolist(), logprobs, strict=True)
        answers[tuple(document.input_ids.tolist())] = [
            {str(label): {"logprob": logprob}} | {str(i): {"logprob": p} for i, p in zip(ids, values, strict=True)}
            for label, logprob, ids, values in rows
        ]
    sample = tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    answers[tuple(sample)] = [{str(token): {"logprob": -1.0}} for token in sample[1:]]
    return {
        ids: json.dumps({"choices": [{"text": "", "prompt_logprobs": [None, *positions]}]}).encode()
        for ids, positions in answers.items()
    }


def train(
    folder: Path, tokenizer: Any, args: argparse.Namespace, teacher: TeacherServer | None = None
) -> tuple[float, float]:
    """Trains on the rows of a server, or without one on those of the store.

    Returns:
        Mean seconds of a step, and mean seconds of it that it waited for the server.
    """
    student = make_student(
        vocab_size=len(tokenizer), hidden_size=args.hidden, num_layers=args.layers, max_length=args.tokens
    )
    config = SlimConfig(
        output_dir=str(folder / "out"),
        method="reverse_kl",
        max_steps=args.steps + WARM_UP_STEPS + 1,
        per_device_train_batch_size=args.batch,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = TimedTrainer(
        model=student,
        args=config,
        train_dataset=StoreDataset(folder / "store"),
        processing_class=None if teacher is None else tokenizer,
        teacher_server=teacher,
    )
    trainer.starts = []
    trainer.train()
    (start, before), (end, after) = trainer.starts[WARM_UP_STEPS], trainer.starts[-1]
    return (end - start) / args.steps, (after - before) / args.steps


def row(
    args: argparse.Namespace, vocab_size: int, ahead: int, free_s: float, step_s: float, waited_s: float
) -> dict[str, Any]:
    """Returns the fields of a result; ``free_s`` is the time of a step that waits for nothing."""
    names = ("tokens", "batch", "top_k", "hidden", "layers")
    return {
        "op": "served_teacher",
        "shape": {"vocab": vocab_size} | {name: getattr(args, name) for name in names},
        "ahead": ahead,
        "answer_ms": 1e3 * args.delay * free_s,
        "step_ms": 1e3 * step_s,
        "wait_ms": 1e3 * waited_s,
        "waiting": waited_s / step_s,
    }


if __name__ == "__main__":
    main()
