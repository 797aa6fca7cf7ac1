"""Checkpoints to continue from: the newest complete one of a run, and whether it belongs to the same run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from slimkernels.durable import write_json

SETTINGS_NAME = "slim_run.json"


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Returns the newest ``checkpoint-STEP`` folder that was written completely, or None.

    ``trainer_state.json`` is the last file of a checkpoint, so a folder in which it parses is complete.
    """
    found = []
    for state in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
        with contextlib.suppress(ValueError):
            found.append((json.loads(state.read_text())["global_step"], str(state.parent)))
    return max(found, default=(0, None))[1]


def checkpoint_to_resume(
    resume_from_checkpoint: str | bool | None, output_dir: str, settings: dict[str, Any]
) -> str | bool | None:
    """Resolves the argument of ``Trainer.train`` and checks that the checkpoint belongs to the same run.

    Args:
        resume_from_checkpoint: A checkpoint's folder, True for the newest complete one in ``output_dir``, or None or
            False to start from the beginning.
        output_dir: Folder of the run's checkpoints.
        settings: Settings of the run, JSON values.

    Returns:
        The folder to resume from, or a false value to start from the beginning.

    Raises:
        ValueError: The checkpoint's settings differ.
    """
    if resume_from_checkpoint is True:
        resume_from_checkpoint = last_complete_checkpoint(output_dir)
    if resume_from_checkpoint:
        _check_same_run(resume_from_checkpoint, settings)
    return resume_from_checkpoint


def documents_per_step(args: TrainingArguments) -> int:
    """Returns the number of documents in an optimizer step, over all micro-batches and processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _check_same_run(checkpoint: str, settings: dict[str, Any]) -> None:
    """Compares the settings recorded in a checkpoint, if it has any, with those of the run that continues it.

    Raises:
        ValueError: Settings differ; the message names each.
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
    """A callback that records the run's settings in every checkpoint, and checks the loss before it is used.

    The loss is checked only where the Trainer synchronises with the device anyway.

    Args:
        settings: Function that returns the settings which ``checkpoint_to_resume`` compares, JSON values.
        check_finite: Function that raises if a loss was not finite; called before every log, evaluation, checkpoint
            and end of training.
    """

    def __init__(self, settings: Callable[[], dict[str, Any]], check_finite: Callable[[], None]) -> None:
        self.settings = settings
        self.check_finite = check_finite

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Checks the loss where the trainer is about to log, evaluate, save or stop."""
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.check_finite()

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        """Checks the loss once an epoch."""
        self.check_finite()

    def on_save(self, args, state, control, **kwargs) -> None:
        """Writes the run's settings into the checkpoint."""
        checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
        if args.should_save and checkpoint.is_dir():
            write_json(checkpoint / SETTINGS_NAME, self.settings())
