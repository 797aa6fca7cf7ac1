"""Import paths that the README, the changelog or the examples of earlier versions showed still work, with a warning."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

MOVED = [
    ("slimkernels.student", "LanguageModelHead", "slimkernels.models.head"),
    ("slimkernels.student", "LowRankAdapter", "slimkernels.models.head"),
    ("slimkernels.student", "SlimCollator", "slimkernels.models.batch"),
    ("slimkernels.student", "check_head", "slimkernels.models.head"),
    ("slimkernels.student", "check_tokenizer", "slimkernels.models.fingerprints"),
    ("slimkernels.student", "drop_layers", "slimkernels.models.make_student"),
    ("slimkernels.student", "hidden_states", "slimkernels.models.hidden_states"),
    ("slimkernels.student", "make_student", "slimkernels.models.make_student"),
    ("slimkernels.student", "teacher_rows", "slimkernels.models.batch"),
    ("slimkernels.trainer_config", "METHODS", "slimkernels.trainer.objective"),
    ("slimkernels.trainer_config", "SlimConfig", "slimkernels.trainer.objective"),
    ("slimkernels.trainer_config", "SlimObjective", "slimkernels.trainer.objective"),
    ("slimkernels.trainer_config", "check_training_arguments", "slimkernels.trainer.objective"),
    ("slimkernels.trainer_teacher", "OnlineTeacher", "slimkernels.trainer.teachers"),
    ("slimkernels.trainer_teacher", "StoredTeacher", "slimkernels.trainer.teachers"),
    ("slimkernels.evaluate.harness", "ChoiceEvaluation", "slimkernels.evaluate.lm_eval.tasks"),
    ("slimkernels.evaluate.harness", "ChoiceQuestions", "slimkernels.evaluate.lm_eval.tasks"),
    ("slimkernels.evaluate.harness", "ChoiceSample", "slimkernels.evaluate.lm_eval.tasks"),
    ("slimkernels.evaluate.harness", "ChoiceScores", "slimkernels.evaluate.lm_eval.tasks"),
    ("slimkernels.evaluate.harness", "evaluate_multiple_choice", "slimkernels.evaluate.lm_eval.tasks"),
    ("slimkernels.evaluate.harness", "read_multiple_choice", "slimkernels.evaluate.lm_eval.tasks"),
]


@pytest.mark.parametrize(("old", "name", "new"), MOVED, ids=lambda value: value.removeprefix("slimkernels."))
def test_old_path_warns_and_has_the_new_object(old, name, new):
    message = f"{old}.{name} has moved to {new}.{name}; the old path will be removed in the next release"
    with pytest.warns(DeprecationWarning, match=f"^{re.escape(message)}$") as caught:
        exec(f"from {old} import {name} as found", namespace := {})  # noqa: S102 -- an import of a name in a table
    assert namespace["found"] is getattr(importlib.import_module(new), name)
    (warning,) = caught
    # The warning points at the import, and not at the machinery behind it.
    assert warning.filename == "<string>"


def test_training_arguments_of_an_earlier_checkpoint_are_unpickled():
    from slimkernels.trainer import SlimConfig

    path = Path(__file__).parent / "data/earlier/training/checkpoint-2/training_args.bin"
    with pytest.warns(DeprecationWarning, match=r"trainer_config\.SlimConfig has moved to"):
        arguments = torch.load(path, weights_only=False)
    assert type(arguments) is SlimConfig


@pytest.mark.parametrize("old", sorted({old for old, _, _ in MOVED}))
def test_importing_the_module_alone_does_not_warn_and_other_names_are_missing(old):
    module = importlib.import_module(old)
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'Absent'"):
        module.Absent  # noqa: B018 -- reading it is the test
