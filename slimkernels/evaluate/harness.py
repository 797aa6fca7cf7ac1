"""Old import path, kept for one release with a DeprecationWarning: now ``slimkernels.evaluate.lm_eval.tasks``."""

from slimkernels._moved import moved

_NAMES = (
    "ChoiceEvaluation",
    "ChoiceQuestions",
    "ChoiceSample",
    "ChoiceScores",
    "evaluate_multiple_choice",
    "read_multiple_choice",
)
__getattr__ = moved(__name__, dict.fromkeys(_NAMES, "slimkernels.evaluate.lm_eval.tasks"))
