"""``slim_loss`` and ``linear_slim_loss`` where every rank holds a slice of the vocabulary.

A row's gradient is a scalar of the row times softmax, plus a constant, plus corrections at the kept ids and the label,
whatever the divergence. So the ranks exchange only a few numbers of each row: one all-gather of 10, the sums over each
slice (13 with ``statistics``), and then one all-reduce of 2, the divergence's terms over the kept ids, which depend on
the gathered sums.

Megatron-LM (arXiv 1909.08053) computes the cross entropy with two all-reduces in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from slimkernels.ops._chunks import resolve_chunk_rows, row_chunks
from slimkernels.ops._head_gradients import HeadGradients
from slimkernels.ops._library import check_transforms, run_on_rows
from slimkernels.ops._slim_options import SlimOptions
from slimkernels.ops.scale_gradient import differentiable_once, scale_gradients
from slimkernels.ops.slim_result import SlimLoss, pack_result, scale_in_forward
from slimkernels.ops.vocab_parallel.gradient import RowGradients
from slimkernels.ops.vocab_parallel.rows import VocabRows
from slimkernels.ops.vocab_parallel.slice import VocabSlice


# The same as torch.compiler.disable, which would import the compiler with this module.
@_disable_dynamo
def vocab_parallel_loss(
    source: LogitsSource,
    target: Tensor,
    row_scale: Tensor | None,
    options: SlimOptions,
    vocab: VocabSlice,
    leading_shape: torch.Size,
) -> SlimLoss:
    """Computes the loss of the rows of ``source``, whose logits are this rank's slice; equal on all ranks."""
    if options.statistics == "all":
        raise ValueError(
            "statistics must be False or 'without_overlap' where a rank holds a slice of the vocabulary (group=, or a "
            "DTensor), got True: the overlap is a selection from whole rows"
        )
    check_transforms("the vocabulary-parallel loss", *source.inputs)
    rows = VocabRows(source.dtype, target, options, vocab)
    scale = scale_in_forward(row_scale, source.dtype)
    loss, stats = run_on_rows(
        _VocabParallelLoss.apply, leading_shape, source, rows, scale, torch.is_grad_enabled(), *source.inputs
    )
    return pack_result(loss, stats, row_scale, leading_shape)


class LogitsSource(Protocol):
    """The source of the logits (N, V_local), made a chunk of rows at a time, and of the gradients of its inputs."""

    dtype: torch.dtype

    @property
    def inputs(self) -> Sequence[Tensor | None]:
        """The tensors that the logits are computed from."""
        ...

    @property
    def partial(self) -> Sequence[bool]:
        """Whether the gradient of each input is a sum over the ranks."""
        ...

    def chunks(self, *, again: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yields rows and their logits, which the next chunk may overwrite. With ``again`` a second walk follows."""
        ...

    def gradients(self, gradient: RowGradients, row_scale: Tensor, needs: list[bool]) -> list[Tensor | None]:
        """Computes the gradients of the ``inputs`` that need one; of a ``partial`` input this rank's summand."""
        ...


class GivenLogits:
    """Logits that exist already; with ``over_logits`` the gradient is written over them."""

    partial = (False,)

    def __init__(self, logits: Tensor, over_logits: bool = False) -> None:
        self.inputs = (logits,)
        self.dtype = logits.dtype
        self._over_logits = over_logits
        self._chunk_rows = resolve_chunk_rows(0, logits, logits.shape[1])

    def chunks(self, *, again: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yields views of the logits."""
        logits = self.inputs[0].detach()
        for begin in range(0, logits.shape[0], self._chunk_rows):
            rows = slice(begin, min(begin + self._chunk_rows, logits.shape[0]))
            yield rows, logits[rows]

    def gradients(self, gradient: RowGradients, row_scale: Tensor, needs: list[bool]) -> list[Tensor | None]:
        """Computes the gradient of the slice's logits."""
        logits = self.inputs[0].detach()
        dlogits = logits if self._over_logits else logits.new_empty(logits.shape)
        for chunk, chunk_logits in self.chunks(again=False):
            gradient.write(chunk, chunk_logits, dlogits[chunk], row_scale[chunk])
        if self._over_logits:
            # A higher version makes autograd raise if another op saved the logits for its backward pass.
            torch.autograd.graph.increment_version(logits)
        return [dlogits]


class HeadLogits:
    """The logits of a slice of the lm_head, made for each walk, or once for both where there is only one chunk."""

    partial = (True, False, False)

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> None:
        self.inputs = (hidden, weight, bias)
        self.dtype = hidden.dtype
        self._chunk_rows = resolve_chunk_rows(chunk_rows, hidden, weight.shape[0])
        self._only_chunk: Tensor | None = None

    def chunks(self, *, again: bool) -> Iterator[tuple[slice, Tensor]]:
        """Yields the contents of one buffer, which keeps an only chunk for the second walk."""
        hidden, weight, bias = self._detached()
        if self._only_chunk is not None:
            yield slice(0, hidden.shape[0]), self._only_chunk
            self._only_chunk = None
            return
        for rows, logits in row_chunks(hidden, weight, bias, self._chunk_rows):
            if again and hidden.shape[0] <= self._chunk_rows:
                self._only_chunk = logits
            yield rows, logits

    def gradients(self, gradient: RowGradients, row_scale: Tensor, needs: list[bool]) -> list[Tensor | None]:
        """Computes the gradients of hidden (this slice's summand), weight and bias; overwrites each chunk's logits."""
        hidden, weight, _ = self._detached()
        dinputs = [
            torch.empty_like(t) if t is not None and needed else None
            for t, needed in zip(self.inputs, needs, strict=True)
        ]
        products = HeadGradients(
            *dinputs, hidden=hidden, weight=weight, ignored=~gradient.active, chunk_rows=self._chunk_rows
        )
        for chunk, logits in self.chunks(again=False):
            gradient.write(chunk, logits, logits, row_scale[chunk])
            products.add(chunk, logits)
        products.finish()
        return dinputs

    def _detached(self) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden, weight, bias = self.inputs
        return hidden.detach(), weight.detach(), None if bias is None else bias.detach()


class _VocabParallelLoss(torch.autograd.Function):
    """The loss of all rows; its gradient is made in ``forward`` if the loss is reduced there, else in ``backward``."""

    @staticmethod
    def forward(ctx, source, rows: VocabRows, scale: Tensor | None, grad_enabled: bool, *inputs: Tensor | None):
        needs = [grad_enabled and t is not None and t.requires_grad for t in inputs]
        makes_gradient = scale is not None and any(needs)
        for chunk, logits in source.chunks(again=makes_gradient):
            rows.read(chunk, logits)
        loss, stats, gradient = rows.settle()
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.reduced, ctx.group, ctx.partial = needs, scale is not None, gradient.vocab.group, source.partial
        if scale is not None:
            gradients = source.gradients(gradient, scale, needs) if makes_gradient else [None] * len(inputs)
            loss = (loss * scale).sum()
            ctx.save_for_backward(loss, *gradients)
            return loss, stats
        ctx.source, ctx.gradient = source, gradient
        ctx.save_for_backward(*inputs)
        return loss, stats

    @staticmethod
    def backward(ctx, grad_loss: Tensor | None, _grad_stats):
        absent = (None,) * 4
        if grad_loss is None:
            return *absent, *(None for _ in ctx.needs)
        # Raises if an input was modified after the forward pass.
        saved = ctx.saved_tensors
        with torch.no_grad():
            if ctx.reduced:
                loss, *saved = saved
                sources = [loss]
                scaled = scale_gradients([g for g in saved if g is not None], grad_loss)
            else:
                sources = list(saved)
                computed = ctx.source.gradients(ctx.gradient, grad_loss.contiguous(), ctx.needs)
                scaled = [gradient for gradient in computed if gradient is not None]
            for gradient, partial in zip(scaled, itertools.compress(ctx.partial, ctx.needs), strict=True):
                if partial:
                    dist.all_reduce(gradient, group=ctx.group)
        once = iter(differentiable_once("the vocabulary-parallel loss", scaled, *sources, grad_loss))
        return *absent, *(next(once) if needed else None for needed in ctx.needs)
