"""Times whole training steps of a student shaped like SmolLM2-135M, with our losses and with the usual ones.

python -m bench.training_step --out bench/results/training_step.jsonl [--layers 30] [--dtype float32 bfloat16]

A step is forward, loss, backward, AdamW and ``zero_grad`` of a Llama with V = 49152 and D = 576, in float32 or under
bfloat16 autocast. Mode ``slim`` compares ``SlimTrainer``'s path from hidden states with the eager loss of
docs/training.md, both given the teacher's kept logits. Mode ``sft`` compares ``patch_model`` with the loss of
transformers. Before anything is timed, both providers must give the same loss and the same gradient of every parameter.

Times are taken in one process per dtype, where providers take turns on one student. Peak memory, without weights and
optimizer state, is taken in a fresh process per provider.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import slimkernels as sk
from bench import records
from bench.machine import machine, one_at_a_time
from bench.ops import peers
from bench.ops.case import OURS, five_per_cent, generator, random_logits, require, require_close
from bench.ops.clock import clock
from bench.ops.measure import percentiles
from bench.ops.processes import KEEP_PAGES, RETURN_PAGES, run_module
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.hidden_states import hidden_states
from slimkernels.models.make_student import make_student

PROVIDERS = {"slim": (OURS, "torch eager"), "sft": (OURS, "transformers")}
# Relative error of the loss, and of every parameter's gradient in the Euclidean norm. Peers round all logits to half
# precision.
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


class Steps:
    """A student, its batch and its optimizer, and the steps that train it.

    Args:
        args: Sizes ``vocab``, ``hidden``, ``batch`` and ``tokens``.
        layers: Number of layers of the student.
        dtype: "float32", or "bfloat16" for autocast.
    """

    def __init__(self, args: argparse.Namespace, layers: int, dtype: str) -> None:
        self.model = smollm2_student(args.vocab, args.hidden, layers, args.tokens)
        # A patched module that shares its parameters with the original.
        self.patched = sk.patch_model(shared_copy(self.model))
        self.dtype = dtype
        ids = torch.randint(args.vocab, (args.batch, args.tokens), generator=generator(1))
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.target = ids[:, 1:].flatten()
        logits = random_logits(len(self.target), args.vocab, torch.float32, 2)
        self.teacher = sk.topk_logits(logits, five_per_cent(args.vocab), target=self.target)
        self.rows = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def loss(self, mode: str, provider: str) -> Tensor:
        """Computes the loss of one forward pass."""
        with self._autocast():
            return self._losses()[mode, provider]()

    def run(self, mode: str, provider: str) -> Callable[[], Tensor]:
        """Returns a function that takes one training step."""

        def step() -> Tensor:
            loss = self.loss(mode, provider)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss.detach()

        return step

    def check(self, mode: str) -> None:
        """Raises AssertionError unless both providers agree on the loss and on every gradient."""
        ours, theirs = PROVIDERS[mode]
        expected, gradients = self._loss_and_gradients(mode, theirs)
        loss, ours = self._loss_and_gradients(mode, ours)
        require_close(loss, expected, TOLERANCE[self.dtype], f"the loss of {mode}")
        require(ours.keys() == gradients.keys(), f"{mode} trains {len(ours)} parameters, not {len(gradients)}")
        for name, gradient in gradients.items():
            error = float((ours[name] - gradient).norm() / gradient.norm())
            require(error < TOLERANCE[self.dtype], f"{mode}: the gradient of {name} with relative error {error:.2e}")

    def _loss_and_gradients(self, mode: str, provider: str) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.loss(mode, provider)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return loss.detach(), gradients

    def _losses(self) -> dict[tuple[str, str], Callable[[], Tensor]]:
        return {
            ("slim", OURS): self._ours,
            ("slim", "torch eager"): self._eager,
            ("sft", OURS): lambda: self.patched(**self.inputs, labels=self.inputs["input_ids"]).loss,
            ("sft", "transformers"): lambda: self.model(**self.inputs, labels=self.inputs["input_ids"]).loss,
        }

    def _ours(self) -> Tensor:
        hidden = hidden_states(self.model, self.inputs | {"rows": self.rows})
        if self.dtype == "bfloat16":
            hidden = hidden.bfloat16()
        head = LanguageModelHead.of(self.model).arguments(hidden)
        return sk.linear_slim_loss(target=self.target, teacher=self.teacher, **head).loss

    def _eager(self) -> Tensor:
        logits = self.model(**self.inputs).logits[:, :-1]
        return peers.slim_loss(logits.flatten(0, 1), self.target, self.teacher)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        device = self.target.device.type
        return torch.autocast(device, torch.bfloat16) if self.dtype == "bfloat16" else contextlib.nullcontext()


def smollm2_student(vocab: int, hidden: int, layers: int, tokens: int) -> PreTrainedModel:
    """Builds a random student shaped like SmolLM2-135M: 9 attention heads, 3 key-value heads, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return make_student(config)


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Returns another module that shares its parameters with ``model``."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.model, twin.lm_head = model.model, model.lm_head
    return twin.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--layers", type=int, nargs="+", default=[30], help="numbers of layers of the student")
    parser.add_argument("--dtype", choices=TOLERANCE, nargs="+", default=list(TOLERANCE), help="bfloat16 is autocast")
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary size")
    parser.add_argument("--hidden", type=int, default=576, help="hidden size, divisible by 18")
    parser.add_argument("--batch", type=int, default=4, help="documents per step")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per document")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per provider")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--check", action="store_true", help="only compare losses and gradients")
    parser.add_argument("--worker", choices=("time", *PROVIDERS), help=argparse.SUPPRESS)
    parser.add_argument("--provider", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    with one_at_a_time():
        for layers, dtype in itertools.product(args.layers, args.dtype):
            start_worker(args, layers, dtype, "time", KEEP_PAGES)
            for mode, providers in PROVIDERS.items() if not args.check else ():
                for provider in providers:
                    start_worker(args, layers, dtype, mode, RETURN_PAGES, provider)


def start_worker(args, layers: int, dtype: str, worker: str, pages: dict[str, str], provider: str = "") -> None:
    """Runs this module in a fresh process, for the times or for one provider's peak memory."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("vocab", "hidden", "batch", "tokens", "rounds", "threads")]
    options = ["--out", str(args.out.resolve()), *sizes, *(["--check"] if args.check else [])]
    options += ["--layers", str(layers), "--dtype", dtype, "--worker", worker, "--provider", provider]
    run_module("bench.training_step", options, threads=args.threads, pages=pages)


def work(args: argparse.Namespace) -> None:
    """Measures in a process that ``start_worker`` started, and appends the rows."""
    torch.set_num_threads(args.threads)
    (layers,), (dtype,) = args.layers, args.dtype
    steps = Steps(args, layers, dtype)
    if args.worker == "time":
        for mode in PROVIDERS:
            steps.check(mode)
            print(f"{mode}, {layers} layers, {dtype}: loss and gradients agree", flush=True)
        if args.check:
            return
        figures = times(steps, args.rounds)
    else:
        figures = {(args.worker, args.provider): peak(steps, args.worker, args.provider)}
    names = ("vocab", "hidden", "batch", "tokens")
    shape = {"layers": layers} | {name: getattr(args, name) for name in names}
    for (mode, provider), fields in figures.items():
        print(f"{mode}, {layers} layers, {dtype}, {provider}: {fields['p50']:.4g} {fields['unit']}", flush=True)
        row = {"op": "training_step", "mode": mode, "provider": provider, "dtype": dtype, "shape": shape}
        records.append(args.out, [row | fields | machine()])


def times(steps: Steps, rounds: int) -> dict[tuple[str, str], dict]:
    """Returns percentiles of every provider's step time; providers take turns, after an untimed first step each."""
    runs = {(mode, provider): steps.run(mode, provider) for mode in PROVIDERS for provider in PROVIDERS[mode]}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = clock().seconds(run)
            if turn:
                seconds[name].append(taken)
    return {
        name: {"metric": "time", "unit": "ms", "rounds": rounds} | percentiles([1e3 * value for value in values])
        for name, values in seconds.items()
    }


def peak(steps: Steps, mode: str, provider: str) -> dict:
    """Measures the peak memory of a second step, so without weights and optimizer state, which the first step makes."""
    run = steps.run(mode, provider)
    run()
    return {"metric": records.MEMORY, "unit": "bytes", "p50": clock().peak_bytes(run)}


if __name__ == "__main__":
    main()
