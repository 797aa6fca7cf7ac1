"""Defines a benchmark case: what is timed, its lower bounds, and the check of its results."""

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
    """The tensors of a case, bound in the functions that are timed.

    Attributes:
        providers: Functions that do the whole job once, by name; ours first, then ``Case.peers``.
        check: Function that raises AssertionError if the result that a provider just returned is wrong.
        leaves: Tensors that get a gradient; they hold that of the last provider that ran.
        inputs: Tensors that our provider reads, where cases with other contents are to use the same memory.
        prepare: Function that makes the inputs ready for a provider, before it is checked and outside of its time.
    """

    providers: dict[str, Callable[[], Any]]
    check: Callable[[str, Any], None]
    leaves: tuple[Tensor, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    prepare: Callable[[str], None] = lambda _provider: None


@dataclasses.dataclass(frozen=True)
class Case:
    """One op on one shape; nothing is allocated before ``build``.

    Attributes:
        op: Name of the op.
        mode: Part of the op that is timed, such as "fwd" or "fwd+bwd".
        dtype: Dtype of the logits or of the head.
        sizes: Sizes by letter, in order: N rows, D hidden, V vocabulary, K kept.
        floor_bytes: Bytes that must move: every input read once and every output written once.
        build: Function that allocates the tensors.
        peers: Names of the other providers; the reported ratio is to the first.
        floor_flops: Twice the number of multiply-adds of the matrix products.
        sweep: Letter that varies if the case is a point of a growth curve.
        rate_bytes: Bytes of results per call if the figure is a rate; 0 if it is a time.
        quick: Whether the case belongs to the short selection: the smallest shape of every op without a matrix product.
        optional_peers: Peers from other packages, which are skipped if they fail.
        masked: Whether every second logit is -inf and the peer is our op on rows without a mask.
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
    masked: bool = False

    @property
    def shape(self) -> str:
        """The sizes in short form, such as 256x32000 K=1600."""
        dense = "x".join(str(size) for letter, size in self.sizes.items() if letter != "K")
        return dense + (f" K={self.sizes['K']}" if "K" in self.sizes else "")

    @property
    def dtype_name(self) -> str:
        """The dtype without its module, such as bfloat16."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """A unique name without spaces, by which ``--only`` selects the case."""
        parts = [self.op.replace(" ", "_"), self.shape.replace(" ", "_"), self.dtype_name]
        return "-".join([*parts, f"sweep{self.sweep}"] if self.sweep else parts)

    @property
    def has_memory(self) -> bool:
        """Whether peak memory is measured: not for points of a growth curve, masked rows, or calls of microseconds."""
        return self.sweep is None and not self.masked and not self.rate_bytes

    @property
    def single_core(self) -> bool:
        """Whether more threads change nothing."""
        return bool(self.rate_bytes)

    @property
    def metric(self) -> str:
        """The kind of the figures: "throughput" or "time"."""
        return "throughput" if self.rate_bytes else "time"

    @property
    def unit(self) -> str:
        """The unit of the figures."""
        return "GB/s" if self.rate_bytes else "ms"

    def figure(self, seconds: float) -> float:
        """Converts the duration of a call to ``unit``."""
        return self.rate_bytes / seconds / 1e9 if self.rate_bytes else 1e3 * seconds

    def gated_work(self, ours_only: bool = False) -> Work:
        """Builds the tensors, runs every provider once and checks its result; optional peers that fail are dropped.

        Args:
            ours_only: Whether to skip the peers.

        Raises:
            AssertionError: A provider gave a wrong result.
        """
        work = self.build()
        if tuple(work.providers) != (OURS, *self.peers):
            raise ValueError(f"{self.name} declares {OURS} and {self.peers}, but builds {tuple(work.providers)}")
        if ours_only:
            work.providers = {OURS: work.providers[OURS]}
        for provider, run in list(work.providers.items()):
            try:
                work.prepare(provider)
                work.check(provider, run())
            except Exception as error:
                if provider in self.optional_peers:
                    del work.providers[provider]
                    print(f"{self.name}: {provider} is skipped, {error}", file=sys.stderr, flush=True)
                elif isinstance(error, AssertionError):
                    raise AssertionError(f"{provider}: {error}") from None
                else:
                    raise
        return work


def random_rows(num_rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Draws normal rows with about the spread of hidden states."""
    return (3 * torch.randn(num_rows, width, generator=generator(seed))).to(dtype)


def random_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, seed: int, *, masked: bool = False) -> Tensor:
    """Draws rows like a language model's logits; a mask sets those of odd ids to -inf.

    A real row has an offset, a bulk that is about normal, and a heavy upper tail: its largest probabilities follow a
    power law, so its largest logits are exponentially distributed. The offset costs bfloat16 its resolution: between 8
    and 16 its numbers are 1/16 apart, so many logits are equal, as in a real row and not in a normal one around 0.
    """
    source = generator(seed)
    tail = torch.empty(num_rows, vocab_size).exponential_(generator=source)
    rows = (10 + 2 * torch.randn(num_rows, vocab_size, generator=source) + 1.2 * tail).to(dtype)
    if masked:
        rows[:, 1::2] = -math.inf
    return rows


def random_target(num_rows: int, vocab_size: int, *, masked: bool = False) -> Tensor:
    """Draws labels (N,), with a mask only even ones."""
    target = torch.randint(vocab_size, (num_rows,), generator=generator(1))
    return target - target % 2 if masked else target


def generator(seed: int) -> torch.Generator:
    """Returns a seeded generator on the default device."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def exact_dtype() -> torch.dtype:
    """Returns the dtype of exact gradients: float64, or float32 on a GPU, where float64 would not fit into memory."""
    return torch.float64 if torch.get_default_device().type == "cpu" else torch.float32


def five_per_cent(vocab_size: int) -> int:
    """Returns K = 5 % of the vocabulary, as SLIM keeps."""
    return math.ceil(vocab_size / 20)


def require(right: bool, what: str) -> None:
    """Raises AssertionError unless ``right``."""
    if not right:
        raise AssertionError(f"wrong result: {what}")


def require_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Raises AssertionError unless the largest error is below ``tolerance`` times the largest expected value."""
    error = (actual.to(expected.dtype) - expected).abs().max() / expected.abs().max()
    require(bool(error < tolerance), f"{what} with relative error {error:.2e}, not below {tolerance:.0e}")


def training_step(leaves: tuple[Tensor, ...], loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Returns a function that runs forward and backward and leaves the gradients in the leaves."""

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
    """Returns a check of a training step's loss and gradients against those of ``exact``, computed in ``dtype``."""
    copies = tuple(leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    expected = training_step(copies, lambda: exact(copies))()
    gradients = [copy.grad for copy in copies]

    def check(_provider: str, loss: Tensor) -> None:
        require_close(loss, expected, tolerance, "the loss")
        for leaf, gradient in zip(leaves, gradients, strict=True):
            require_close(leaf.grad, gradient, tolerance, f"the gradient of {tuple(leaf.shape)}")

    return check
