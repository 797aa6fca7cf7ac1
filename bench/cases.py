"""What is timed: an op's inputs, its providers, the bytes and flops it cannot avoid, and the check that gates it.

A provider is a function without arguments that does the whole job once. ``floor_bytes`` counts every input read once
and every output written once; ``floor_flops`` counts the multiply-adds of the matrix products, twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import slimkernels as sk
from slimkernels import reference


@dataclasses.dataclass
class Case:
    """One op on one shape; ``peer`` names the provider that ratios are taken to."""

    op: str
    shape: str
    dtype: str
    mode: str
    providers: dict[str, Callable[[], object]]
    peer: str
    floor_bytes: int
    floor_flops: int
    check: Callable[[], None]
    grads: tuple[Tensor, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype}"


def all_cases(quick: bool = False) -> Iterator[Callable[[], Case]]:
    """Yields builders, so that one case's tensors are gone before the next one's exist."""
    sizes = [(256, 32000)] if quick else [(256, 32000), (64, 128256), (32, 262144)]
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows, vocab_size in sizes:
            yield lambda n=num_rows, v=vocab_size, d=dtype: topk_logits_case(n, v, d)
    for dtype in (torch.float32, torch.bfloat16):
        yield lambda d=dtype: slim_loss_case(256, 32000, d)
        yield lambda d=dtype: cross_entropy_case(256, 32000, d)
    if not quick:
        for dtype in (torch.float32, torch.bfloat16):
            yield lambda d=dtype: linear_slim_loss_case(1024, 2048, 32000, d)


def _rows(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not error < tolerance:
        raise AssertionError(f"wrong result: relative error {error:.2e} is not below {tolerance:.0e}")


def topk_logits_case(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Case:
    logits = _rows(num_rows, vocab_size, dtype, 0)
    top_k = -(-vocab_size // 20)
    providers = {
        "slimkernels": lambda: sk.topk_logits(logits, top_k),
        "torch.topk": lambda: logits.topk(top_k, -1, sorted=False),
    }
    if dtype == torch.float32:
        array = logits.numpy()
        providers["numpy.argpartition"] = lambda: np.argpartition(array, vocab_size - top_k, axis=-1)[:, -top_k:]

    def check() -> None:
        sparse, expected = sk.topk_logits(logits, top_k), reference.topk_logits(logits.double(), top_k)
        if not torch.equal(sparse.ids, expected.ids):
            raise AssertionError("wrong result: other ids than the reference")
        _close(sparse.lse, expected.lse, 1e-6)

    return Case(
        op="topk_logits",
        shape=f"{num_rows}x{vocab_size} K={top_k}",
        dtype=str(dtype).removeprefix("torch."),
        mode="fwd",
        providers=providers,
        peer="torch.topk",
        floor_bytes=logits.nbytes + num_rows * top_k * (4 + logits.itemsize),
        floor_flops=0,
        check=check,
    )


def eager_slim_loss(logits: Tensor, target: Tensor, teacher: sk.SparseLogits) -> Tensor:
    """The default ``slim_loss`` as one would write it in torch."""
    logprobs = torch.log_softmax(logits.float(), -1)
    ce = -logprobs.gather(-1, target[:, None])[:, 0]
    teacher_logprobs = torch.log_softmax(teacher.logits.float(), -1)
    kl = (teacher_logprobs.exp() * (teacher_logprobs - logprobs.gather(-1, teacher.ids.long()))).sum(-1)
    weight = 1 - torch.exp(-(teacher.target_logit - teacher.lse[:, 0]).exp() / (-ce).exp())
    return (ce + weight.detach() * kl).mean()


def _with_grad(leaves: tuple[Tensor, ...], loss: Callable[[], Tensor]) -> Callable[[], None]:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return step


def _grads(step: Callable[[], None], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    step()
    return [leaf.grad for leaf in leaves]


def _check_grads(providers: dict, leaves: tuple[Tensor, ...], peer: str, tolerance: float) -> Callable[[], None]:
    def check() -> None:
        ours, theirs = (_grads(providers[name], leaves) for name in ("slimkernels", peer))
        for actual, expected in zip(ours, theirs, strict=True):
            _close(actual, expected, tolerance)

    return check


def slim_loss_case(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Case:
    top_k = -(-vocab_size // 20)
    target = torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(1))
    teacher = sk.topk_logits(_rows(num_rows, vocab_size, dtype, 2), top_k, target=target)
    logits = _rows(num_rows, vocab_size, dtype, 3).requires_grad_()
    leaves = (logits,)
    compiled = torch.compile(eager_slim_loss, fullgraph=True)
    providers = {
        "slimkernels": _with_grad(leaves, lambda: sk.slim_loss(logits, target, teacher).loss),
        "torch eager": _with_grad(leaves, lambda: eager_slim_loss(logits, target, teacher)),
        "torch.compile": _with_grad(leaves, lambda: compiled(logits, target, teacher)),
    }
    return Case(
        op="slim_loss",
        shape=f"{num_rows}x{vocab_size} K={top_k}",
        dtype=str(dtype).removeprefix("torch."),
        mode="fwd+bwd",
        providers=providers,
        peer="torch eager",
        floor_bytes=2 * logits.nbytes + num_rows * top_k * (4 + teacher.logits.itemsize),
        floor_flops=0,
        check=_check_grads(providers, leaves, "torch eager", 1e-4 if dtype == torch.float32 else 1e-2),
        grads=leaves,
    )


def cross_entropy_case(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Case:
    target = torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(1))
    logits = _rows(num_rows, vocab_size, dtype, 3).requires_grad_()
    leaves = (logits,)
    providers = {
        "slimkernels": _with_grad(leaves, lambda: sk.slim_loss(logits, target).loss),
        "F.cross_entropy": _with_grad(leaves, lambda: torch.nn.functional.cross_entropy(logits, target)),
    }
    return Case(
        op="slim_loss (CE only)",
        shape=f"{num_rows}x{vocab_size}",
        dtype=str(dtype).removeprefix("torch."),
        mode="fwd+bwd",
        providers=providers,
        peer="F.cross_entropy",
        floor_bytes=2 * logits.nbytes,
        floor_flops=0,
        check=_check_grads(providers, leaves, "F.cross_entropy", 1e-4 if dtype == torch.float32 else 1e-2),
        grads=leaves,
    )


def linear_slim_loss_case(num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype) -> Case:
    top_k = -(-vocab_size // 20)
    target = torch.randint(vocab_size, (num_rows,), generator=torch.Generator().manual_seed(1))
    teacher = sk.topk_logits(_rows(num_rows, vocab_size, dtype, 2), top_k, target=target)
    hidden = _rows(num_rows, hidden_size, dtype, 3).requires_grad_()
    weight = (_rows(vocab_size, hidden_size, torch.float32, 4) / hidden_size**0.5).to(dtype).requires_grad_()
    leaves = (hidden, weight)
    providers = {
        "slimkernels": _with_grad(leaves, lambda: sk.linear_slim_loss(hidden, weight, target, teacher).loss),
        "torch eager": _with_grad(leaves, lambda: eager_slim_loss(hidden @ weight.T, target, teacher)),
    }
    return Case(
        op="linear_slim_loss",
        shape=f"{num_rows}x{hidden_size}x{vocab_size} K={top_k}",
        dtype=str(dtype).removeprefix("torch."),
        mode="fwd+bwd",
        providers=providers,
        peer="torch eager",
        floor_bytes=2 * (hidden.nbytes + weight.nbytes) + num_rows * top_k * (4 + teacher.logits.itemsize),
        floor_flops=3 * 2 * num_rows * hidden_size * vocab_size,
        check=_check_grads(providers, leaves, "torch eager", 1e-3 if dtype == torch.float32 else 2e-2),
        grads=leaves,
    )
