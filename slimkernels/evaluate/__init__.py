"""How good models and decoders are: held-out metrics, answers to questions, and a report that compares them.

``metrics.py`` measures a student on a store. The rest compares models and decoders side by side: ``tasks.py`` reads the
questions and ``heldout.py`` the documents, ``runner.py`` has them answered, ``answers.py`` finds the answers in what
was written, ``judge.py`` has it rated, ``records.py`` keeps everything, ``summary.py`` and ``statistics.py`` compare,
``report.py`` writes it up.
"""

import importlib
from typing import TYPE_CHECKING

from slimkernels.evaluate.answers import Extraction, extract, same_answer
from slimkernels.evaluate.statistics import Difference, paired_difference

if TYPE_CHECKING:
    from slimkernels.models.heldout import evaluate_store

# What needs transformers is loaded on first use.
_LAZY = {"evaluate_store": "slimkernels.models.heldout"}

__all__ = ["Difference", "Extraction", "evaluate_store", "extract", "paired_difference", "same_answer"]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'slimkernels.evaluate' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
