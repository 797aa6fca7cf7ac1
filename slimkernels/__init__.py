"""Kernels for learning from and searching with large-vocabulary logits.

Operators: :func:`topk_logits`, :func:`linear_topk_logits`, :func:`gather_logits`, :func:`linear_gather_logits`,
:func:`sparse_softmax`, :func:`slim_loss`, :func:`linear_slim_loss`, over :class:`SparseLogits` or a
:class:`HeadTeacher`; :func:`decode_logits` of :class:`PackedLogits`; :func:`sample_logits`, :func:`sample_distinct`,
:func:`sample_targets`, :func:`mixed_targets`; :func:`build_info` says which kernels serve them. Tools above them:
:class:`Store`, :class:`SlimTrainer`, :class:`SlimLossMixin`, :func:`patch_model` and the tree search,
:class:`PathFinder` (:mod:`slimkernels.search`).

``import slimkernels`` imports no other package, not even torch: each name loads its module on first use. The operators
behind ``torch.ops.slimkernels`` are registered on the first use of an operator's name, or by
``import slimkernels.ops``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimkernels.models.patch import patch_model, unpatch_model
    from slimkernels.ops.build_info import build_info
    from slimkernels.ops.decode_logits import decode_logits
    from slimkernels.ops.gather_logits import gather_logits
    from slimkernels.ops.head_teacher import HeadTeacher
    from slimkernels.ops.linear_gather_logits import linear_gather_logits
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
    from slimkernels.search import PathFinder
    from slimkernels.sparse_logits import SparseLogits
    from slimkernels.store import Store
    from slimkernels.trainer import SlimConfig, SlimLossMixin, SlimObjective, SlimTrainer

__version__ = "0.1.0"

__all__ = [
    "HeadTeacher",
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
    "build_info",
    "decode_logits",
    "gather_logits",
    "linear_gather_logits",
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

# The imports above as data, since Python does not execute them.
_MODULES = {
    "HeadTeacher": "ops.head_teacher",
    "PackedLogits": "packed_logits",
    "PathFinder": "search",
    "Sampled": "ops.sample_logits",
    "SlimConfig": "trainer",
    "SlimLoss": "ops.slim_result",
    "SlimLossMixin": "trainer",
    "SlimObjective": "trainer",
    "SlimTrainer": "trainer",
    "SparseLogits": "sparse_logits",
    "SparseProbs": "ops.sparse_softmax",
    "Store": "store",
    "build_info": "ops.build_info",
    "decode_logits": "ops.decode_logits",
    "gather_logits": "ops.gather_logits",
    "linear_gather_logits": "ops.linear_gather_logits",
    "linear_slim_loss": "ops.linear_slim_loss",
    "linear_topk_logits": "ops.linear_topk_logits",
    "mixed_targets": "ops.mixed_targets",
    "patch_model": "models.patch",
    "sample_distinct": "ops.sample_logits",
    "sample_logits": "ops.sample_logits",
    "sample_targets": "ops.sample_targets",
    "slim_loss": "ops.slim_loss",
    "sparse_softmax": "ops.sparse_softmax",
    "topk_logits": "ops.topk_logits",
    "unpatch_model": "models.patch",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'slimkernels' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"slimkernels.{_MODULES[name]}"), name)
    globals()[name] = value  # later uses bypass __getattr__
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
