"""Trains on a store and appends, per number of workers, the share of a step's time spent waiting for data.

python -m bench.loader --out bench/results/loader.jsonl [--workers 0 1 2] [--vocab 49152] [--steps 12] [--device cuda]

The store holds random logits and the student is a small Llama. Steps are timed in the loop of ``SlimTrainer``, whose
batches come from a ``DataLoader`` over a ``StoreDataset`` of packed 8-bit rows.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch

import slimkernels as sk
from bench import records
from bench.machine import machine
from slimkernels.models.make_student import make_student
from slimkernels.store import StoreDataset, StoreWriter
from slimkernels.trainer import SlimConfig, SlimTrainer

# The first steps are not timed: workers start up and pages of the store are read for the first time.
WARM_UP_STEPS = 3


class TimedTrainer(SlimTrainer):
    """A trainer that records when every step began and how long it waited for its batches."""

    def get_batch_samples(self, *args):
        start = time.perf_counter()
        self.starts.append(start)
        batches = super().get_batch_samples(*args)
        self.waits.append(time.perf_counter() - start)
        return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="workers of the DataLoader")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary size")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per document")
    parser.add_argument("--batch", type=int, default=4, help="documents per step")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the student")
    parser.add_argument("--layers", type=int, default=4, help="layers of the student")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store", args)
        rows = [measure(Path(folder), args, workers) for workers in args.workers]
    for row in rows:
        print(f"{row['workers']} workers: {row['step_ms']:.1f} ms per step, {100 * row['waiting']:.2f} % of it waiting")
    records.append(args.out, [row | machine() for row in rows])


def write_store(path: Path, args: argparse.Namespace) -> None:
    """Writes documents of random tokens and logits, enough that none is read twice."""
    generator = torch.Generator().manual_seed(0)
    top_k = math.ceil(args.vocab / 20)
    settings = {"tokenizer_fingerprint": "", "teacher": {}, "selection": {"top_k": top_k}}
    with StoreWriter(path, vocab_size=args.vocab, **settings) as writer:
        for _ in range(args.batch * (args.steps + WARM_UP_STEPS + 1)):
            ids = torch.randint(args.vocab, (args.tokens,), generator=generator)
            logits = 3 * torch.randn(args.tokens - 1, args.vocab, generator=generator)
            writer.add(ids, range(1, args.tokens), sk.topk_logits(logits, top_k, target=ids[1:]))


def measure(folder: Path, args: argparse.Namespace, workers: int) -> dict:
    """Trains once with a number of workers and returns the fields of its row."""
    student = make_student(
        vocab_size=args.vocab, hidden_size=args.hidden, num_layers=args.layers, max_length=args.tokens
    )
    config = SlimConfig(
        output_dir=str(folder / f"out-{workers}"),
        method="slim",
        max_steps=args.steps + WARM_UP_STEPS + 1,
        per_device_train_batch_size=args.batch,
        dataloader_num_workers=workers,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=args.device == "cpu",
    )
    trainer = TimedTrainer(model=student, args=config, train_dataset=StoreDataset(folder / "store"))
    trainer.starts, trainer.waits = [], []
    trainer.train()
    # Steps are timed from start to start. On a GPU only the mean is meaningful, because launches are asynchronous.
    seconds = trainer.starts[-1] - trainer.starts[WARM_UP_STEPS]
    waited = sum(trainer.waits[WARM_UP_STEPS:-1])
    return {
        "op": "loader",
        "shape": {name: getattr(args, name) for name in ("vocab", "tokens", "batch", "hidden", "layers")},
        "workers": workers,
        "step_ms": 1e3 * seconds / args.steps,
        "wait_ms": 1e3 * waited / args.steps,
        "waiting": waited / seconds,
    }


if __name__ == "__main__":
    main()
