"""``train``, which trains a student on a store, or on text, with the trainer of a method and saves it."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from slimkernels.models.make_student import make_student
from slimkernels.store import MixedStores, Store, StoreDataset
from slimkernels.trainer.objective import SlimConfig, SlimObjective
from slimkernels.trainer.slim_trainer import SlimTrainer
from slimkernels.trainer.stored_rows import check_is_scored, check_selection
from slimkernels.trainer.teacher_server import TeacherServer
from slimkernels.trainer.unscored_documents import UnscoredDocuments

logger = logging.getLogger(__name__)


class _StepCount(TrainerCallback):
    """A callback that counts the optimizer steps of this process' call of ``train``."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Counts a step."""
        self.steps += 1


def trainer_of(method: str) -> tuple[Any, Any]:
    """Returns the trainer of a method and the class of its configuration.

    Raises:
        ImportError: The method is "minillm", and the extra of that name is not installed.
    """
    if method != "minillm":
        return SlimTrainer, SlimConfig
    # TRL is an extra.
    from slimkernels.trainer.minillm import MiniLLMConfig, MiniLLMTrainer

    return MiniLLMTrainer, MiniLLMConfig


def check_options(
    method: str, output_dir: str | os.PathLike, stores: Sequence[str | os.PathLike], is_scored: bool, **options: Any
) -> None:
    """Checks options of ``train`` before a student is loaded: their ranges, and whether they fit each other.

    Args:
        method: Method of the training.
        output_dir: Folder of the checkpoints.
        stores: Folders of the stores to learn from.
        is_scored: Whether a model or a server scores the documents, in place of the rows of the stores.
        **options: Fields of the method's configuration.

    Raises:
        ValueError: An option is out of its range, or does not fit the method or the rows of a store.
        TypeError: An option is unknown, or of another type.
        ImportError: The method is "minillm", and the extra of that name is not installed.
    """
    # The object is dropped: while one exists that enables DeepSpeed ZeRO-3, models are partitioned as they are loaded.
    _config_of(method, output_dir, options)
    if method == "minillm":
        return
    of_objective = {field.name for field in dataclasses.fields(SlimObjective)} & options.keys()
    objective = SlimObjective(method, **{name: options[name] for name in of_objective})
    check_is_scored(objective, is_scored)
    if objective.needs_teacher and not is_scored:
        for path in stores:
            check_selection(_opened(path, objective.temperature), objective)


def _config_of(method: str, output_dir: str | os.PathLike, options: dict[str, Any]) -> Any:
    return trainer_of(method)[1](output_dir=str(output_dir), method=method, **{"save_total_limit": 2} | options)


def _opened(path: str | os.PathLike, temperature: float) -> Store:
    """Opens a store; the rows of hidden states are made with the log-sum-exp at the training's temperature too."""
    store = Store(path)
    if store.settings.hidden is None or temperature in store.temperatures:
        return store
    return Store(path, temperatures=(*store.temperatures, temperature))


def _paths_of(
    given: str | os.PathLike | Sequence[str | os.PathLike] | UnscoredDocuments,
) -> Sequence[str | os.PathLike]:
    """Returns the paths of the stores that ``train`` was given."""
    if isinstance(given, UnscoredDocuments):
        return ()
    return [given] if isinstance(given, str | os.PathLike) else given


def _check_mixture(
    given: str | os.PathLike | Sequence[str | os.PathLike] | UnscoredDocuments,
    method: str,
    weights: Sequence[float] | None,
    shares: Sequence[float] | None,
) -> None:
    """Checks that weights and shares of stores fit what ``train`` was given."""
    is_mixed = (weights, shares) != (None, None)
    if isinstance(given, UnscoredDocuments) and (method == "minillm" or is_mixed):
        raise ValueError(
            "documents without rows need another method than 'minillm', and store_weights and store_shares of "
            f"None, got {method!r}, {weights} and {shares}: pass a store"
        )
    number = len(_paths_of(given))
    if is_mixed and (method == "minillm" or number == 1):
        raise ValueError(
            "store_weights and store_shares must be None with one store, and with method 'minillm', which reads "
            f"prompts in its own order, got {weights} and {shares} with {number} stores and {method!r}"
        )


def _dataset_of(
    given: str | os.PathLike | Sequence[str | os.PathLike] | UnscoredDocuments,
    temperature: float,
    weights: Sequence[float] | None,
    shares: Sequence[float] | None,
) -> StoreDataset | MixedStores | UnscoredDocuments:
    """Returns the data set that ``train`` learns from."""
    if isinstance(given, UnscoredDocuments):
        return given
    stores = [_opened(path, temperature) for path in _paths_of(given)]
    return StoreDataset(stores[0]) if len(stores) == 1 else MixedStores(stores, weights=weights, shares=shares)


def train(
    store_path: str | os.PathLike | Sequence[str | os.PathLike] | UnscoredDocuments,
    student: PreTrainedModel | PreTrainedConfig | str | None,
    method: str,
    output_dir: str | os.PathLike,
    *,
    store_weights: Sequence[float] | None = None,
    store_shares: Sequence[float] | None = None,
    tokenizer=None,
    teacher_model: PreTrainedModel | None = None,
    teacher_server: TeacherServer | None = None,
    eval_store_path: str | os.PathLike | None = None,
    callbacks: list[TrainerCallback] | None = None,
    printer: TrainerCallback | None = None,
    **options,
) -> dict[str, float]:
    """Trains a student on a store, or on documents, and saves it in ``output_dir``; continues a run that was stopped.

    A run that is finished is not trained any further, which a warning says; its student is saved again.

    Args:
        store_path: Store to learn from, or several, or documents without rows: for method "sft", or for a teacher
            that scores them; not with method "minillm".
        student: A model, its folder or name or the folder of an adapter of PEFT, a configuration of a new model, which
            is initialised at random, or None for the small new one of ``make_student`` with the store's vocabulary
            size.
        method: Method of ``SlimObjective``, or "minillm" for TRL's ``MiniLLMTrainer`` on the prompts of the store's
            documents.
        output_dir: Folder of the checkpoints and, at the end, the student; a run of the same settings is continued.
        store_weights: Weight of each store where several hold a document, as in ``MixedStores``; None reads the first.
        store_shares: Share of each store in the documents of an epoch, as in ``MixedStores``; None reads all once. Not
            with method "minillm".
        tokenizer: The student's tokenizer, or its folder; checked against the store and saved with the student.
        teacher_model: Model that scores the store's documents in place of its rows; methods "gkd" and "minillm" need
            one.
        teacher_server: Server that scores the store's documents in place of its rows; not with method "minillm".
        eval_store_path: Held-out store on which the trained student is measured.
        callbacks: Callbacks of the trainer.
        printer: Callback in place of the one that prints the trainer's logs or shows its progress; None keeps that.
        **options: Fields of ``SlimConfig``, or of TRL's ``MiniLLMConfig`` with method "minillm".

    Returns:
        The trainer's metrics (``train_loss``, ``train_runtime``, ...; of a run that was finished only ``epoch``) and,
        with ``eval_store_path``, those of ``evaluate_store`` with the prefix ``eval_``.

    Raises:
        ValueError: As ``SlimTrainer`` and ``SlimTrainer.train``.
        ImportError: The method is "minillm", and the extra of that name is not installed.
    """
    is_scored = teacher_model is not None or teacher_server is not None
    _check_mixture(store_path, method, store_weights, store_shares)
    check_options(method, output_dir, _paths_of(store_path), is_scored, **options)
    dataset = _dataset_of(store_path, options.get("temperature", 1.0), store_weights, store_shares)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    # A student with adapters is a model of PEFT, which is none of transformers.
    if not isinstance(student, nn.Module):
        vocab_size = None if isinstance(dataset, UnscoredDocuments) else dataset.vocab_size
        student = make_student(student, tokenizer=tokenizer, vocab_size=vocab_size)
    taken = _StepCount()
    served = {} if teacher_server is None else {"teacher_server": teacher_server}
    trainer = trainer_of(method)[0](
        model=student,
        args=_config_of(method, output_dir, options),
        train_dataset=dataset,
        eval_dataset=None if eval_store_path is None else StoreDataset(eval_store_path),
        processing_class=tokenizer,
        teacher_model=teacher_model,
        callbacks=[*(callbacks or ()), taken],
        **served,
    )
    if printer is not None:
        for usual in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(usual)
        trainer.add_callback(printer)
    metrics = trainer.train(resume_from_checkpoint=True).metrics
    if taken.steps == 0 and trainer.state.global_step > 0:
        if trainer.is_world_process_zero():
            logger.warning(
                "the training in %s is finished, after %d steps: nothing was trained",
                output_dir,
                trainer.state.global_step,
            )
        metrics = {name: value for name, value in metrics.items() if name == "epoch"}
    trainer.save_model()
    return metrics if eval_store_path is None else metrics | trainer.evaluate()
