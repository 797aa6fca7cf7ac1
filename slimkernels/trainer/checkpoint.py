"""Which checkpoint a stopped run continues from, and whether it is one of the same run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from slimkernels.durable import write_json

SETTINGS_NAME = "slim_run.json"


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest ``checkpoint-STEP`` folder that was written to its end, or None.

    ``trainer_state.json`` is the last file of a checkpoint, so a folder in which it parses is complete.
    """
    found = []
    for state in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        with contextlib.suppress(ValueError):
            found.append((json.loads(state.read_text())["global_step"], str(state.parent)))
    return max(found, default=(0, None))[1]


def check_same_run(checkpoint: str, settings: dict[str, Any]) -> None:
    """Compares the settings recorded in a checkpoint with those of the run that wants to continue it.

    A checkpoint that was not written by ``SlimTrainer`` records none and passes.

    Raises:
        ValueError: Some differ; the message names each.
    """
    recorded = Path(checkpoint, SETTINGS_NAME)
    if not recorded.exists():
        return
    before = json.loads(recorded.read_text())
    changed = [
        f"{name}={before.get(name)!r} there, {value!r} here"
        for name, value in settings.items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint of the same run, {checkpoint} differs: {'; '.join(changed)}; "
            "give this run an output_dir of its own"
        )


class SlimRun(TrainerCallback):
    """Records in every checkpoint what the run was, and looks at its loss where the Trainer synchronises anyway.

    Args:
        settings: Gives what ``check_same_run`` compares, JSON values.
        check_finite: Raises where the loss was not finite; called before every log, evaluation, checkpoint and end.
    """

    def __init__(self, settings: Callable[[], dict[str, Any]], check_finite: Callable[[], None]) -> None:
        self.settings = settings
        self.check_finite = check_finite

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Looks at the loss where the trainer is about to read or keep something."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.check_finite()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Looks at the loss once an epoch."""
        self.check_finite()

    def on_save(self, args, state, control, **kwargs) -> None:
        """Marks the checkpoint as complete, with the settings it belongs to."""
        checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and checkpoint.is_dir():
            write_json(checkpoint / SETTINGS_NAME, self.settings())
