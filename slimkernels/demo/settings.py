"""Sizes and options of the demonstration."""

from __future__ import annotations

import dataclasses

# Methods that are compared, in the order of the table.
STUDENTS = ("sft", "kd", "slim")


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes and options of the demonstration; the defaults take a few minutes on two CPU cores.

    Attributes:
        teacher: Name or folder, as ``load_teacher`` takes it.
        teacher_dtype: Dtype of the teacher's weights and of the students' arithmetic, whose weights are float32; "auto"
            is bfloat16 on processors with bfloat16 instructions, where it halves the time, and float32 on others, where
            bfloat16 takes four times as long.
        layers: Indices of the teacher's layers that the students keep.
        prompts: Number of shipped prompts to use, from the first; the first 40 open stories.
        heldout_every: Distance between held-out prompts: one prompt in so many, with all its documents, is held out.
        tokens: Number of tokens that the teacher writes, those held out among them; None for as many as ``seconds``
            have room for, by a measurement of ten seconds.
        seconds: Time for the teacher's text, its store and the training of all students together; it has no effect
            where ``tokens`` is given.
        max_new_tokens: Longest continuation of a prompt, in tokens.
        sampling_temperature: Temperature at which the teacher writes.
        sampling_top_k: Number of most probable tokens from which the teacher samples.
        top_fraction: Share of the vocabulary whose logits are kept in each row of the teacher.
        epochs: Passes over the training documents, the same for every method.
        batch_size: Documents per optimizer step.
        learning_rate: Peak learning rate, the same for every method; reached by a linear warm-up over a tenth of the
            steps and followed by a cosine decay.
        evaluations: Measurements on the held-out documents, spread evenly over each training.
        shown_tokens: Number of tokens by which every model continues the first held-out prompt.
        seed: Random seed of the teacher's sampling and of the order of the documents.
    """

    teacher: str = "smollm2-135m-instruct"
    teacher_dtype: str = "auto"
    layers: tuple[int, ...] = (0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 29)
    prompts: int = 40
    heldout_every: int = 8
    tokens: int | None = None
    seconds: float = 170.0
    max_new_tokens: int = 120
    sampling_temperature: float = 0.8
    sampling_top_k: int = 40
    top_fraction: float = 0.05
    epochs: int = 2
    batch_size: int = 8
    learning_rate: float = 5e-4
    evaluations: int = 4
    shown_tokens: int = 40
    seed: int = 0


QUICK = DemoSettings(tokens=1500, max_new_tokens=40, epochs=1, evaluations=1, shown_tokens=16)
