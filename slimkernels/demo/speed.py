"""The measurement of ten seconds from which the number of the demonstration's tokens follows."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback

from slimkernels.store import Store
from slimkernels.teacher import capture, generate_documents
from slimkernels.trainer import SlimConfig, SlimTrainer

# Sizes of the measurement: documents that the teacher writes side by side, tokens of each, seconds of training.
_DOCUMENTS, _NEW_TOKENS, _SECONDS = 64, 24, 4.0
# With fewer tokens the numbers would mean little; with more, the same few prompts would be continued too often.
LEAST_TOKENS, MOST_TOKENS, _STEP = 3_000, 50_000, 500


class Speed(NamedTuple):
    """Tokens per second of the demonstration's work on this machine.

    Attributes:
        writes: Tokens that the teacher writes.
        scores: Tokens whose logits the teacher gives to the store.
        trains: Tokens that a student learns from.
    """

    writes: float
    scores: float
    trains: float

    def tokens_in(self, seconds: float, *, trained: float, measured: float) -> int:
        """Returns how many tokens there is time for, within bounds that keep the demonstration meaningful.

        Args:
            seconds: Time for everything.
            trained: Number of times that a student learns from a token, on average over all tokens, held-out ones too.
            measured: Number of times that a student is measured on a token, on average; half of a teacher's layers
                take no longer than the teacher.
        """
        cost = 1 / self.writes + (1 + measured) / self.scores + trained / self.trains
        return min(max(int(seconds / cost) // _STEP * _STEP, LEAST_TOKENS), MOST_TOKENS)


def measure_speed(
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    student: PreTrainedModel,
    prompts: Sequence[str],
    *,
    document_tokens: int,
    top_fraction: float,
    recipe: dict[str, Any],
) -> Speed:
    """Measures the teacher's and the student's speed on a little of the work that is ahead.

    Args:
        teacher: The teacher.
        tokenizer: Its tokenizer.
        student: A student, which is trained for a few steps and of no use afterwards.
        prompts: Prompts that the teacher continues.
        document_tokens: Length of the documents that the student learns from, in tokens.
        top_fraction: Share of the vocabulary whose logits are kept.
        recipe: Fields of ``SlimConfig`` of the trainings that are ahead.

    Returns:
        Speed.
    """
    with tempfile.TemporaryDirectory() as folder:
        text, store = Path(folder, "documents.jsonl"), Path(folder, "store")
        start = time.perf_counter()
        written = generate_documents(
            teacher, tokenizer, prompts, text, num_documents=_DOCUMENTS, max_new_tokens=_NEW_TOKENS
        )
        writes = written.tokens / (time.perf_counter() - start)
        ids = list(itertools.chain(*(json.loads(line)["input_ids"] for line in text.read_text().splitlines())))
        documents = [ids[first : first + document_tokens] for first in range(0, len(ids), document_tokens)]
        start = time.perf_counter()
        capture(teacher, tokenizer, documents, store, top_fraction=top_fraction)
        scores = len(ids) / (time.perf_counter() - start)
        options: dict[str, Any] = recipe | {"max_steps": 1000, "dataloader_drop_last": True}
        options["per_device_train_batch_size"] = min(recipe["per_device_train_batch_size"], len(documents) - 1)
        config = SlimConfig(
            output_dir=folder,
            method="slim",
            **options,
            include_num_input_tokens_seen="non_padding",
            disable_tqdm=True,
            report_to="none",
        )
        clock = _Clock()
        trainer = SlimTrainer(model=student, args=config, train_dataset=Store(store), callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Speed(writes, scores, clock.tokens / clock.seconds)


class _Clock(TrainerCallback):
    """Callback that ends a training after some seconds, without the first step, which also allocates its memory.

    Attributes:
        tokens: Number of tokens of the steps that were timed.
        seconds: Their time.
    """

    tokens, seconds = 0, 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Starts the clock after the first step, and stops the training once the time is over."""
        now, seen = time.perf_counter(), int(state.num_input_tokens_seen)
        if state.global_step == 1:
            self._start, self._seen = now, seen
            return
        self.seconds, self.tokens = now - self._start, seen - self._seen
        control.should_training_stop = self.seconds >= _SECONDS
