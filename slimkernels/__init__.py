"""Kernels for learning from and searching with large-vocabulary logits."""

from slimkernels.sparse_logits import SparseLogits

__all__ = ["SparseLogits"]
