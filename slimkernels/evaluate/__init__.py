"""How good a student is: held-out metrics against the labels and against the teacher."""

from slimkernels.evaluate.metrics import evaluate_store

__all__ = ["evaluate_store"]
