"""Finds the peers that exist on CUDA only; each is optional and used if it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

import slimkernels.ops  # noqa: F401 -- registers the operators


def linear_cross_entropies() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Returns the functions (hidden, weight, target) -> cross entropy of ``hidden @ weight.T``, by name."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    if (liger := _installed("liger_kernel.transformers")) is not None:
        liger_loss = liger.LigerFusedLinearCrossEntropyLoss()
        found["Liger fused CE"] = lambda hidden, weight, target: liger_loss(weight, hidden, target)
    if (cut := _installed("cut_cross_entropy")) is not None:
        found["cut-cross-entropy"] = cut.linear_cross_entropy
    if (quack := _installed("quack.linear_cross_entropy")) is not None:
        found["QuACK chunked CE"] = quack.chunked_linear_cross_entropy
    return found


def topks() -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Returns the functions (logits, top_k) -> unsorted ids, by name; one is this package's Triton kernel."""
    found: dict[str, Callable[[Tensor, int], Tensor]] = {}
    flashinfer = _installed("flashinfer")
    if flashinfer is not None and hasattr(flashinfer, "top_k"):
        found["FlashInfer top_k"] = lambda logits, top_k: flashinfer.top_k(logits, top_k)[1]
    if torch.get_default_device().type == "cuda" and hasattr(torch.ops.slimkernels, "topk_logits_rows_triton"):
        found["Triton kernel"] = _topk_logits_rows_triton
    return found


def _topk_logits_rows_triton(logits: Tensor, top_k: int) -> Tensor:
    """Runs the Triton kernel, which computes the log-sum-exp too, and returns the ids."""
    values = logits.new_empty(len(logits), top_k)
    ids = torch.empty_like(values, dtype=torch.int32)
    lse = logits.new_empty(len(logits), 1, dtype=torch.float32)
    rest_lse = torch.empty_like(lse)
    torch.ops.slimkernels.topk_logits_rows_triton(logits, top_k, None, [1.0], values, ids, lse, rest_lse, None)
    return ids


def samplers() -> dict[str, Callable[[Tensor, float, int, float], Tensor]]:
    """Returns the functions (logits, temperature, top_k, top_p) -> sampled tokens, by name."""
    flashinfer = _installed("flashinfer.sampling")
    if flashinfer is None:
        return {}

    def sample(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
        return flashinfer.top_k_top_p_sampling_from_logits(logits.float() / temperature, top_k, top_p).long()

    return {"FlashInfer sampling": sample}


def _installed(module: str):
    """Returns the module, or None if the default device is a CPU or the module is missing or does not load."""
    if torch.get_default_device().type != "cuda":
        return None
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return None
