"""One training of the demonstration, measured on the held-out store before, during and after."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from slimkernels.demo.settings import DemoSettings
from slimkernels.models.evaluation import evaluation_mode
from slimkernels.models.heldout import evaluate_store
from slimkernels.store import Store
from slimkernels.teacher import generate_documents
from slimkernels.trainer import SlimConfig, SlimTrainer


def train_and_measure(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stores: tuple[Store, Store],
    output_dir: Path,
    *,
    evaluations: int,
    progress: Callable[[int, int], None],
    **options: Any,
) -> dict[str, Any]:
    """Trains a student, saves it, and returns its held-out curve.

    Args:
        student: Model to train.
        tokenizer: Its tokenizer.
        stores: Store to learn from, and the held-out one.
        output_dir: Folder of the trained student.
        evaluations: Measurements after the one before the first step, evenly spread.
        progress: Function called after each step with the number of steps done and of all.
        **options: Fields of ``SlimConfig``.

    Returns:
        ``curve``, ``train_seconds`` without the measurements, ``train_tokens_per_second``, ``parameters``,
        ``kd_weight``, the mean over the steps of the factor of a token's divergence, and the trainer's ``logs``.
    """
    store, heldout = stores
    config = SlimConfig(
        output_dir=str(output_dir),
        **options,
        logging_steps=1,
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=True,
        report_to="none",
    )
    curve = _HeldoutCurve(heldout, evaluations, config.bf16, progress)
    trainer = SlimTrainer(
        model=student, args=config, train_dataset=store, processing_class=tokenizer, callbacks=[curve]
    )
    # This callback would print every log; the result holds them.
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    factor = config.loss_options["kd_weight"]
    return {
        "curve": curve.points,
        "train_seconds": curve.train_seconds,
        "train_tokens_per_second": curve.points[-1]["tokens_seen"] / curve.train_seconds,
        "parameters": student.num_parameters(),
        "kd_weight": factor * statistics.fmean(entry["weight"] for entry in logs) if factor else 0.0,
        "logs": logs,
    }


def measure(model: PreTrainedModel, heldout: Store, bf16: bool) -> dict[str, float]:
    """Returns the metrics of ``evaluate_store``, in the arithmetic in which the model is trained."""
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        return evaluate_store(model, heldout, batch_size=16)


def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: DemoSettings) -> str:
    """Returns a prompt and its continuation, drawn as the teacher wrote; every model gets the same random numbers."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "document.jsonl")
        with evaluation_mode(model):
            generate_documents(
                model,
                tokenizer,
                [prompt],
                text,
                num_documents=1,
                max_new_tokens=settings.shown_tokens,
                temperature=settings.sampling_temperature,
                top_k=settings.sampling_top_k,
                seed=settings.seed,
            )
        return json.loads(text.read_text())["text"]


class _HeldoutCurve(TrainerCallback):
    """Callback that measures the student on the held-out store before, during and after training.

    Attributes:
        points: Metrics of ``evaluate_store`` with the step and the tokens seen, one entry per measurement.
        train_seconds: Wall time of the training without the measurements.
    """

    def __init__(self, heldout: Store, evaluations: int, bf16: bool, update: Callable[[int, int], None]) -> None:
        self.heldout, self.evaluations, self.bf16, self.update = heldout, evaluations, bf16, update
        self.points: list[dict[str, float]] = []
        self.train_seconds = 0.0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        """Measures the untrained student."""
        self._measure(state, model)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Measures where the next of the evenly spread measurements is due, last after the last step."""
        self.update(state.global_step, state.max_steps)
        if len(self.points) * state.max_steps <= state.global_step * self.evaluations:
            self.train_seconds += time.perf_counter() - self._start
            self._measure(state, model)
            self._start = time.perf_counter()

    def _measure(self, state, model) -> None:
        metrics = measure(model, self.heldout, self.bf16)
        self.points.append({"step": state.global_step, "tokens_seen": int(state.num_input_tokens_seen)} | metrics)
