"""The options of a student's training: ``transformers.TrainingArguments`` and those of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import TrainingArguments

# What each method sets where the configuration says None.
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"kd_weight": 0.0, "token_weight": "none"},
    "kd": {"kd_weight": 1.0, "token_weight": "none"},
    "slim": {"kd_weight": 1.0, "token_weight": "teacher_over_student"},
}


@dataclasses.dataclass
class SlimConfig(TrainingArguments):
    """``transformers.TrainingArguments`` and the options of ``linear_slim_loss``.

    ``method`` chooses what the two options left at None become; everything else is the same for all methods:

    - ``"sft"``: the labels alone. kd_weight 0; the teacher's logits are neither collated nor moved.
    - ``"kd"``: CE + KL on the teacher's kept logits, every token alike. kd_weight 1, token_weight "none".
    - ``"slim"``: CE + w * KL, w = 1 - exp(-t_y / s_y), high where the teacher is surer of the label than the
      student. kd_weight 1, token_weight "teacher_over_student".

    Attributes:
        method: "sft" | "kd" | "slim".
        rest: The teacher outside its kept ids: "renorm" | "zero" | "ghost" | "zero_logit" | "renorm_both".
        divergence: "forward_kl" | "soft_ce" | "reverse_kl" | "jsd" | "skew_kl"; the last three need rest "ghost"
            or "renorm_both".
        token_weight: "teacher_over_student" | "student_over_teacher" | "none"; None: the method's.
        detach_weight: False lets the gradient through w.
        kd_weight: Factor of the divergence, >= 0; None: the method's.
        ce_weight: Factor of the cross-entropy, >= 0.
        temperature: Of the divergence, > 0; the store must have been captured at it for rest "zero" and "ghost".
        beta: The teacher's share in "jsd".
        alpha: The teacher's share in "skew_kl".
        label_smoothing: Of the cross-entropy, in [0, 1); in place of ``label_smoothing_factor``.
        z_loss_weight: Factor of the squared log-sum-exp.

    Raises:
        ValueError: An unknown method, teacher options with "sft", or a ``TrainingArguments`` option that would
            silently do nothing here.
    """

    method: str = "slim"
    rest: str = "renorm"
    divergence: str = "forward_kl"
    token_weight: str | None = None
    detach_weight: bool = True
    kd_weight: float | None = None
    ce_weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0

    logging_steps: float = 10
    # Documents are not dictionaries of columns, and a non-finite loss is reported, not averaged away: the
    # filter would also synchronise with the device at every step.
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = dataclasses.field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {tuple(METHODS)}, got {self.method!r}")
        if self.method == "sft" and self.kd_weight:
            raise ValueError(
                f"kd_weight must stay None or 0 with method 'sft', which has no teacher, got {self.kd_weight}: use "
                "method 'kd' or 'slim'"
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {self.label_smoothing_factor}: use label_smoothing, which "
                "works without logits"
            )
        if self.torch_compile:
            raise ValueError(
                "torch_compile must be False: it compiles model.forward, which is never called here; compile the "
                "decoder instead: model.model.compile()"
            )
        super().__post_init__()

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher's logits."""
        return self.loss_options["kd_weight"] != 0

    @property
    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of ``linear_slim_loss``, with the method's defaults filled in."""
        names = (
            *("rest", "divergence", "token_weight", "detach_weight", "kd_weight", "ce_weight", "temperature"),
            *("beta", "alpha", "label_smoothing", "z_loss_weight"),
        )
        options = {name: getattr(self, name) for name in names}
        return options | {name: value for name, value in METHODS[self.method].items() if options[name] is None}
