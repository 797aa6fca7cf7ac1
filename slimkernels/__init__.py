"""Kernels for learning from and searching with large-vocabulary logits.

Operators: :func:`topk_logits`, :func:`linear_topk_logits`, :func:`sparse_softmax`, :func:`slim_loss`,
:func:`linear_slim_loss`, over :class:`SparseLogits`; :func:`decode_logits` of :class:`PackedLogits`;
:func:`sample_logits`, :func:`sample_distinct`, :func:`sample_targets`, :func:`mixed_targets`. The store, the trainer,
:func:`patch_model` and the tree search (:mod:`slimkernels.search`) load on first use.
"""

from typing import TYPE_CHECKING

from slimkernels.ops.decode_logits import decode_logits
from slimkernels.ops.linear_slim_loss import linear_slim_loss
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.ops.mixed_targets import mixed_targets
from slimkernels.ops.sample_logits import Sampled, sample_distinct, sample_logits
from slimkernels.ops.sample_targets import sample_targets
from slimkernels.ops.slim_loss import slim_loss
from slimkernels.ops.slim_result import SlimLoss
from slimkernels.ops.sparse_softmax import SparseProbs, sparse_softmax
from slimkernels.ops.topk_logits import topk_logits
from slimkernels.packed_logits import PackedLogits
from slimkernels.sparse_logits import SparseLogits

if TYPE_CHECKING:
    from slimkernels.models.patch import patch_model, unpatch_model
    from slimkernels.search import PathFinder
    from slimkernels.store import Store
    from slimkernels.trainer import SlimConfig, SlimTrainer
    from slimkernels.trainer.mixin import SlimLossMixin
    from slimkernels.trainer.objective import SlimObjective

__version__ = "0.1.0"

_LAZY = {
    "PathFinder": "slimkernels.search",
    "SlimConfig": "slimkernels.trainer",
    "SlimLossMixin": "slimkernels.trainer.mixin",
    "SlimObjective": "slimkernels.trainer.objective",
    "SlimTrainer": "slimkernels.trainer",
    "Store": "slimkernels.store",
    "patch_model": "slimkernels.models.patch",
    "unpatch_model": "slimkernels.models.patch",
}

__all__ = [
    "PackedLogits",
    "PathFinder",
    "Sampled",
    "SlimConfig",
    "SlimLoss",
    "SlimLossMixin",
    "SlimObjective",
    "SlimTrainer",
    "SparseLogits",
    "SparseProbs",
    "Store",
    "decode_logits",
    "linear_slim_loss",
    "linear_topk_logits",
    "mixed_targets",
    "patch_model",
    "sample_distinct",
    "sample_logits",
    "sample_targets",
    "slim_loss",
    "sparse_softmax",
    "topk_logits",
    "unpatch_model",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'slimkernels' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
