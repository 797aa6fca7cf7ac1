"""Evaluation of models and decoders: held-out metrics, answered questions, and a report that compares them.

``evaluate_store`` measures one student on a store. Everything else compares models and decoders side by side, and data
flows one way: samples (``tasks``, ``heldout``, ``choices``) -> answers of models and decoders (``runner``) -> records
-> comparisons (``summary``, ``statistics``) -> ``report``.
"""

import importlib
from typing import TYPE_CHECKING

from slimkernels.evaluate.answers import Extraction, extract, same_answer
from slimkernels.evaluate.statistics import Difference, paired_difference

if TYPE_CHECKING:
    from slimkernels.models.heldout import evaluate_store

# Names whose modules need transformers are loaded on first use.
_LAZY = {"evaluate_store": "slimkernels.models.heldout"}

__all__ = ["Difference", "Extraction", "evaluate_store", "extract", "paired_difference", "same_answer"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'slimkernels.evaluate' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
