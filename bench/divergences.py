"""Measures what each divergence of ``slim_loss`` costs in comparison with forward KL, forward and backward.

python -m bench.divergences --out bench/results/divergences.jsonl

The two are timed in turn, and a row holds the median of their ratios. A teacher keeps 5 % of the vocabulary.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path

import torch

import slimkernels as sk
from bench import records
from bench.machine import machine

# The options of each line of the table; all have rest "ghost".
OPTIONS = {
    "soft_ce": {"divergence": "soft_ce"},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd"},
    "skew_kl": {"divergence": "skew_kl"},
    "skew_reverse_kl": {"divergence": "skew_reverse_kl"},
    "tvd": {"divergence": "tvd"},
    "ab": {"divergence": "ab"},
    "gated": {"divergence": "gated"},
    "forward_kl, teacher_blend": {"teacher_blend": 0.5},
    "forward_kl, tail_weight": {"tail_weight": 2.0},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_ROUNDS = 2


def main() -> None:
    """Measures every line and appends a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/divergences.jsonl"), help="JSONL to append to")
    parser.add_argument("--rows", type=int, default=64, help="rows of logits")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary size")
    parser.add_argument("--rounds", type=int, default=20, help="timed pairs")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for dtype in DTYPES for row in measure(args, dtype)]
    for row in rows:
        print(f"{row['dtype']:>9} {row['options']:<26} {row['ratio']:.2f} times the time of forward_kl")
    records.append(args.out, [row | machine() for row in rows])


def measure(args: argparse.Namespace, dtype: str) -> list[dict]:
    """Returns the fields of the rows of one dtype."""
    generator = torch.Generator().manual_seed(0)
    student, teacher_logits = (3 * torch.randn(2, args.rows, args.vocab, generator=generator)).to(DTYPES[dtype])
    target = torch.randint(args.vocab, (args.rows,), generator=generator)
    teacher = sk.topk_logits(teacher_logits, math.ceil(args.vocab / 20), target=target)
    student.requires_grad_()

    def seconds(options: dict) -> float:
        student.grad = None
        start = time.perf_counter()
        sk.slim_loss(student, target, teacher, rest="ghost", **options).loss.backward()
        return time.perf_counter() - start

    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIONS}
    for _ in range(WARM_UP_ROUNDS + args.rounds):
        for name, options in OPTIONS.items():
            pairs[name].append((seconds(options), seconds({"divergence": "forward_kl"})))
    shape = {"rows": args.rows, "vocab": args.vocab, "top_k": teacher.top_k}
    return [
        {
            "op": "divergences",
            "options": name,
            "dtype": dtype,
            "shape": shape,
            "ratio": statistics.median(ours / base for ours, base in timed[WARM_UP_ROUNDS:]),
            "ms": 1e3 * statistics.median(ours for ours, _ in timed[WARM_UP_ROUNDS:]),
        }
        for name, timed in pairs.items()
    ]


if __name__ == "__main__":
    main()
