"""The form of a case: what is timed, what it cannot avoid, and how its results are judged."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OURS = "slimkernels"


@dataclasses.dataclass
class Work:
    """A case's tensors.

    Attributes:
        providers: Does the whole job once; ours first, then ``Case.peers``.
        check: Raises AssertionError when a provider's result, just returned, is wrong.
        leaves: What gets a gradient, with the gradient of the last provider that ran.
    """

    providers: dict[str, Callable[[], Any]]
    check: Callable[[str, Any], None]
    leaves: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape; nothing is allocated before ``build``.

    Attributes:
        sizes: The letters of the shape, in order: N rows, D hidden, V vocabulary, K kept.
        peers: The other providers; ratios are taken to the first.
        floor_bytes: Every input read once and every output written once.
        floor_flops: The multiply-adds of the matrix products, twice.
        sweep: The letter that varies, where the case is a point of a growth curve.
        rate_bytes: The bytes of results per call, where the figure is a rate and not a time.
        optional_peers: The peers from other packages, which are left out where they fail.
        quick: Whether it belongs to the short selection: the smallest shape of every op without a matrix product.
    """

    op: str
    mode: str
    dtype: torch.dtype
    sizes: dict[str, int]
    floor_bytes: int
    build: Callable[[], Work]
    peers: tuple[str, ...] = ()
    floor_flops: int = 0
    sweep: str | None = None
    rate_bytes: int = 0
    quick: bool = False
    optional_peers: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """256x32000 K=1600."""
        dense = "x".join(str(size) for letter, size in self.sizes.items() if letter != "K")
        return dense + (f" K={self.sizes['K']}" if "K" in self.sizes else "")

    @property
    def dtype_name(self) -> str:
        """bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """One word that names the case, for selecting it."""
        parts = [self.op.replace(" ", "_"), self.shape.replace(" ", "_"), self.dtype_name]
        return "-".join([*parts, f"sweep{self.sweep}"] if self.sweep else parts)

    @property
    def has_memory(self) -> bool:
        """Whether its peak memory says something: not for another point of a curve, not for a call of microseconds."""
        return self.sweep is None and not self.rate_bytes

    @property
    def single_core(self) -> bool:
        """Whether more threads change nothing."""
        return bool(self.rate_bytes)

    @property
    def metric(self) -> str:
        """What its figures are."""
        return "throughput" if self.rate_bytes else "time"

    @property
    def unit(self) -> str:
        """The unit of its figures."""
        return "GB/s" if self.rate_bytes else "ms"

    def figure(self, seconds: float) -> float:
        """A call's duration in ``unit``."""
        return self.rate_bytes / seconds / 1e9 if self.rate_bytes else 1e3 * seconds

    def gated_work(self, ours_only: bool = False) -> Work:
        """The tensors, after every provider ran once and gave the right result; optional peers that did not are out.

        Args:
            ours_only: Leaves the peers out.

        Raises:
            AssertionError: A provider gave a wrong one.
        """
        work = self.build()
        if tuple(work.providers) != (OURS, *self.peers):
            raise ValueError(f"{self.name} declares {self.peers} beside {OURS}, but builds {tuple(work.providers)}")
        if ours_only:
            work.providers = {OURS: work.providers[OURS]}
        for provider, run in list(work.providers.items()):
            try:
                work.check(provider, run())
            except Exception as error:
                if provider in self.optional_peers:
                    del work.providers[provider]
                    print(f"{self.name}: {provider} is left out, {error}", file=sys.stderr, flush=True)
                elif isinstance(error, AssertionError):
                    raise AssertionError(f"{provider}: {error}") from None
                else:
                    raise
        return work


def random_rows(num_rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal rows with the spread of a language model's logits."""
    return (3 * torch.randn(num_rows, width, generator=generator(seed))).to(dtype)


def random_target(num_rows: int, vocab_size: int) -> Tensor:
    """Labels (N,)."""
    return torch.randint(vocab_size, (num_rows,), generator=generator(1))


def generator(seed: int) -> torch.Generator:
    """Of the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def exact_dtype() -> torch.dtype:
    """What gradients are judged by: float64, but for a GPU's large cases, which would not fit."""
    return torch.float64 if torch.get_default_device().type == "cpu" else torch.float32


def five_per_cent(vocab_size: int) -> int:
    """The K that SLIM keeps."""
    return math.ceil(vocab_size / 20)


def require(right: bool, what: str) -> None:
    """Raises unless ``right``."""
    if not right:
        raise AssertionError(f"wrong result: {what}")


def require_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raises unless the largest error is below ``tolerance`` times the largest expected value."""
    error = (actual.to(expected.dtype) - expected).abs().max() / expected.abs().max()
    require(bool(error < tolerance), f"{what} with relative error {error:.2e}, not below {tolerance:.0e}")


def training_step(leaves: tuple[Tensor, ...], loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Forward and backward; the gradients are left in the leaves, as an optimiser finds them."""

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss()
        value.backward()
        return value.detach()

    return step


def gradient_check(
    leaves: tuple[Tensor, ...], exact: Callable[[tuple[Tensor, ...]], Tensor], dtype: torch.dtype, tolerance: float
) -> Callable[[str, Tensor], None]:
    """Judges a training step by the loss and the gradients of ``exact``, computed in ``dtype``."""
    copies = tuple(leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    expected = training_step(copies, lambda: exact(copies))()
    gradients = [copy.grad for copy in copies]

    def check(_provider: str, loss: Tensor) -> None:
        require_close(loss, expected, tolerance, "the loss")
        for leaf, gradient in zip(leaves, gradients, strict=True):
            require_close(leaf.grad, gradient, tolerance, f"the gradient of {tuple(leaf.shape)}")

    return check
