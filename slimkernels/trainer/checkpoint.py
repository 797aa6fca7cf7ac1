"""Checkpoints to continue from: the newest whole one of a run, and whether it belongs to the same run."""

from __future__ import annotations

import enum
import json
import logging
import zipfile
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from slimkernels.durable import write_json
from slimkernels.models.fingerprints import weights_fingerprint
from slimkernels.models.sharding import is_partitioned
from slimkernels.trainer.stored_rows import mixture_of, stores_of
from slimkernels.trainer.unscored_documents import UnscoredDocuments

SETTINGS_NAME = "slim_run.json"

_OPTIMISER = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16", "fp16"),
    *("optim_target_modules", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last"),
)
# The learning rates of a schedule do not depend on the number of steps that are still to come.
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau")

logger = logging.getLogger(__name__)


def run_identity(args: TrainingArguments, method: dict[str, Any], train_dataset: Any) -> dict[str, Any]:
    """Returns what a run is: two runs with equal entries take the same steps from the same student.

    Args:
        args: Arguments of the trainer.
        method: Options of the method, and fingerprints of its models; JSON values.
        train_dataset: Data set of the run; stores under it, and documents without rows, count by their content.

    Returns:
        JSON values by name. A length that the schedule does not depend on is not among them, so that such a run can be
        made longer.
    """
    stores, mixture = stores_of(train_dataset), mixture_of(train_dataset)
    documents = [store.rows_fingerprint for store in stores]
    if isinstance(train_dataset, UnscoredDocuments):
        documents = [train_dataset.fingerprint]
    identity = method | {
        "documents": len(train_dataset) if isinstance(train_dataset, Sized) else None,
        "documents_per_step": documents_per_step(args),
        "seed": args.seed,
        "data_seed": args.data_seed,
        # Both parts of the fingerprint: checkpoints of version 0.1.0 hold the first only, and it is compared alone.
        "store": " ".join(documents) or None,
        "store_weights": None if mixture is None else mixture.weights,
        "store_shares": None if mixture is None else mixture.shares,
        "prompt_lengths": " ".join(store.prompts_fingerprint or "unknown" for store in stores) or None,
    }
    identity |= {name: _plain(getattr(args, name)) for name in _OPTIMISER}
    if identity["lr_scheduler_type"] not in _ENDLESS_SCHEDULES or 0 < args.warmup_steps < 1:
        identity |= {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
    return identity


def model_identity(model: nn.Module) -> str | None:
    """Returns a fingerprint of a model's weights, the same on all processes, or None where they are partitioned.

    Adapters of PEFT, which are initialised at random and loaded from the checkpoint, do not count; the weights below
    them do, which no checkpoint holds.
    """
    if is_partitioned(model):
        return None
    found: list[str | None] = [None]
    is_shared = dist.is_available() and dist.is_initialized()
    # Only the first process of some layouts has loaded the weights.
    if not is_shared or dist.get_rank() == 0:
        found = [weights_fingerprint(model, only_frozen=hasattr(model, "peft_config"))]
    if is_shared:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Returns the newest ``checkpoint-STEP`` folder that was written completely, or None.

    ``trainer_state.json`` is the last file of a checkpoint. A power cut can damage a file that was written before it,
    so the lengths of the other files are checked as well. A folder that is passed over is named in a warning.
    """
    found = []
    for folder in Path(output_dir).glob("checkpoint-*"):
        try:
            step = json.loads((folder / TRAINER_STATE_NAME).read_text())["global_step"]
        except (OSError, ValueError, KeyError, TypeError):
            if folder.is_dir():
                logger.warning("%s was not written completely and is not continued from", folder)
            continue
        found.append((step, folder))
    for _, folder in sorted(found, reverse=True):
        damaged = next(_damaged_files(folder), None)
        if damaged is None:
            return str(folder)
        logger.warning("%s is damaged in %s and is not continued from", folder, damaged.name)
    return None


def checkpoint_to_resume(
    resume_from_checkpoint: str | bool | None,
    output_dir: str,
    settings: dict[str, Any],
    model: nn.Module | None = None,
) -> str | bool | None:
    """Resolves the argument of ``Trainer.train`` and checks that the checkpoint belongs to the same run.

    Args:
        resume_from_checkpoint: A checkpoint's folder, True for the newest complete one in ``output_dir``, or None or
            False to start from the beginning.
        output_dir: Folder of the run's checkpoints.
        settings: Settings of the run, JSON values. ``student``, a fingerprint, may also be that of the checkpoint.
        model: The student, whose shapes the checkpoint's weights must have; None for no check.

    Returns:
        The folder to resume from, or a false value to start from the beginning.

    Raises:
        ValueError: The checkpoint is damaged, or is of another run.
    """
    if resume_from_checkpoint is True:
        resume_from_checkpoint = last_complete_checkpoint(output_dir)
    if resume_from_checkpoint:
        folder = Path(resume_from_checkpoint)
        damaged = next(_damaged_files(folder), None)
        if damaged is not None:
            raise ValueError(
                f"resume_from_checkpoint must be a whole checkpoint, got {folder}, whose {damaged.name} is damaged: "
                "pass an older one, or True for the newest whole one"
            )
        if model is not None:
            _check_shapes(folder, model)
        _check_same_run(folder, settings, model)
    return resume_from_checkpoint


def documents_per_step(args: TrainingArguments) -> int:
    """Returns the number of documents in an optimizer step, over all micro-batches and processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _plain(value: Any) -> Any:
    """Returns a field of the arguments as the JSON value that is read back."""
    return json.loads(json.dumps(value.value if isinstance(value, enum.Enum) else value, default=str))


def _damaged_files(checkpoint: Path) -> Iterator[Path]:
    """Yields the files of a checkpoint that are shorter than they were written."""
    for path in sorted(checkpoint.glob("*")):
        if path.suffix == ".safetensors":
            try:
                # Opening compares the header's offsets with the length of the file.
                with safe_open(path, "pt"):
                    pass
            except (SafetensorError, OSError):
                yield path
        # The directory of a zip archive, the form that torch.save writes, is at its end.
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            yield path


def _weights_of(checkpoint: Path, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Yields the name, the parameter and the slice in the checkpoint of the weights that both have."""
    parameters = dict(model.named_parameters())
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 -- safe_open is no mapping
                if name in parameters:
                    yield name, parameters[name], file.get_slice(name)


def _check_shapes(checkpoint: Path, model: nn.Module) -> None:
    if is_partitioned(model):
        return
    for name, parameter, stored in _weights_of(checkpoint, model):
        if tuple(stored.get_shape()) != tuple(parameter.shape):
            raise ValueError(
                f"resume_from_checkpoint must be a checkpoint of the same student, {checkpoint} holds {name} of "
                f"shape {tuple(stored.get_shape())}, got {tuple(parameter.shape)} here: give this run an output_dir "
                "of its own"
            )


def _holds_weights_of(checkpoint: Path, model: nn.Module | None) -> bool:
    """Returns whether a student was loaded from the checkpoint itself."""
    if model is None or is_partitioned(model):
        return False
    same = [
        torch.equal(stored[:].to(parameter.dtype), parameter.detach().cpu())
        for _, parameter, stored in _weights_of(checkpoint, model)
    ]
    return bool(same) and all(same)


def _check_same_run(checkpoint: Path, settings: dict[str, Any], model: nn.Module | None) -> None:
    """Compares the settings recorded in a checkpoint, if it has any, with those of the run that continues it.

    What the release that wrote the checkpoint did not record is not compared.

    Raises:
        ValueError: Settings differ; the message names each.
    """
    recorded = checkpoint / SETTINGS_NAME
    if not recorded.exists():
        return
    before = json.loads(recorded.read_text())
    differ = [name for name, value in settings.items() if name in before and before[name] != value]
    if "student" in differ and (before["student"] is None or _holds_weights_of(checkpoint, model)):
        differ.remove("student")
    if differ:
        changed = "; ".join(f"{name}={before[name]!r} there, {settings[name]!r} here" for name in differ)
        raise ValueError(
            f"resume_from_checkpoint must be a checkpoint of the same run, {checkpoint} differs: {changed}; "
            "give this run an output_dir of its own"
        )


# The class that comes after a mixin's is known only where it is mixed in.
_AnyTrainer: Any = object


class StopsAtLength(_AnyTrainer):
    """A base class, placed before a ``transformers.Trainer``, that takes no step more in a run which is finished.

    The ``Trainer`` compares the number of steps with ``max_steps`` only after a step, so that a finished run which is
    resumed within an epoch would take one more.
    """

    def _run_epoch(self, **options: Any) -> None:
        if 0 < self.args.max_steps <= self.state.global_step:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)


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
