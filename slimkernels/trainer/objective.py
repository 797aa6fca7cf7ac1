"""``SlimObjective``, the method and loss options of a training, and ``SlimConfig``, with the options of the trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from slimkernels import _checks
from slimkernels.models.make_student import has_new_weights
from slimkernels.ops._divergences import PROPER_DIVERGENCES, default_parameters
from slimkernels.ops.slim_loss import slim_loss
from slimkernels.trainer.document_order import ORDERS
from slimkernels.trainer.schedules import Schedule, parse_schedule

# Values that each method gives to options left at None. Options that the method does not name get _DEFAULTS. The
# factors of the divergence are those that trials chose for each method (docs/reproduced.md).
METHODS: dict[str, dict[str, Any]] = {
    "sft": {"kd_weight": 0.0},
    "kd": {"kd_weight": 3.0},
    "slim": {"token_weight": "teacher_over_student", "kd_weight": 3.0},
    "sampled": {"kd_weight": 3.0},
    "reverse_kl": {"divergence": "reverse_kl"},
    "jsd": {"divergence": "jsd", "kd_weight": 3.0},
    "gkd": {"divergence": "jsd", "ce_weight": 0.0},
}
_DEFAULTS = {"kd_weight": 1.0, "ce_weight": 1.0, "token_weight": "none", "divergence": "forward_kl"}
# Sets of ids on which teacher and student are compared.
SUPPORTS = ("teacher", "student", "union", "intersection")
_LOSS_OPTIONS = (
    *("rest", "divergence", "token_weight", "detach_weight", "kd_weight", "ce_weight", "temperature"),
    *("beta", "alpha", "forward_weight", "entropy_threshold", "teacher_blend", "tail_weight"),
    *("label_smoothing", "z_loss_weight"),
)
# Numbers of the loss that mean something without a teacher.
_OF_THE_LABELS = ("ce_weight", "label_smoothing", "z_loss_weight")


@dataclasses.dataclass
class SlimObjective:
    """A training objective: a method by name, and the options of ``linear_slim_loss``.

    ``method`` only chooses the values of options left at None. The teacher is a store's rows (offline) or a model
    that runs in the training process (online):

    - ``"sft"``: The cross-entropy of the labels; no teacher. kd_weight 0.
    - ``"kd"``: CE + 3 KL(teacher || student), with equal weight for every token. Offline on the kept logits; online on
      the whole vocabulary, unless ``teacher_top_k`` or ``teacher_top_fraction`` is set. kd_weight 3.
    - ``"slim"``: CE + 3 w KL, w = 1 - exp(-t_y / s_y), high where the teacher is more confident of the label than the
      student. Online on the largest 5 % of the vocabulary. token_weight "teacher_over_student", kd_weight 3; the
      paper's is 1.
    - ``"sampled"``: The loss of "kd" on draws from the teacher (arXiv 2503.16870): a store of draws, or
      ``teacher_rounds`` draws from an online teacher.
    - ``"reverse_kl"``: CE + KL(student || teacher). kd_weight 1.
    - ``"jsd"``: CE + 3 times the generalised Jensen-Shannon divergence. kd_weight 3.
    - ``"gkd"``: The generalised Jensen-Shannon divergence alone. In a share ``on_policy_fraction`` of the
      micro-batches the student continues the documents' prompts, and an online teacher scores what it wrote
      (arXiv 2306.13649). ce_weight 0.

    Attributes:
        method: Name of the method, "sft" | "kd" | "slim" | "sampled" | "reverse_kl" | "jsd" | "gkd". The default, "kd",
            made better students than "slim" where both were tuned alike (docs/reproduced.md).
        rest: Treatment of the teacher's mass outside its kept ids, "renorm" | "zero" | "ghost" | "zero_logit" |
            "renorm_both"; None for "ghost" with an option that needs it, which is any divergence but the first two, a
            teacher_blend or a tail_weight, else "renorm".
        divergence: Divergence, "forward_kl" | "soft_ce" | "reverse_kl" | "jsd" | "skew_kl" | "skew_reverse_kl" |
            "tvd" | "ab" | "gated", of which all but the first two need rest "ghost" or "renorm_both"; None for the
            method's.
        token_weight: Weight of each token's divergence, "teacher_over_student" | "student_over_teacher" | "none"; None
            for the method's.
        detach_weight: False to let the gradient through w.
        kd_weight: Factor of the divergence, >= 0; None for the method's, which six trainings chose on a development
            set for students of SmolLM2-135M-Instruct that learn from 25,000 labels (docs/reproduced.md).
        ce_weight: Factor of the cross-entropy, >= 0; None for the method's.
        temperature: Temperature of the divergence, > 0; with rest "zero" or "ghost", a store must have been captured
            at this temperature.
        beta: Share of the teacher in "jsd", None for 0.5; or the student's exponent in "ab", None for 0.7.
        alpha: Share of the first distribution in "skew_kl" or "skew_reverse_kl", None for 0.1; or the teacher's
            exponent in "ab", None for 0.2.
        forward_weight: Factor of the forward KL in "gated".
        entropy_threshold: Entropy of the teacher, in nats, above which "gated" has the forward KL.
        teacher_blend: Exponent in (0, 1] of the teacher in its mixture with the student that the student learns from.
        tail_weight: Factor of the share that all ids outside the kept ones have in a KL divergence.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1); replaces ``label_smoothing_factor``.
        z_loss_weight: Factor of the squared log-sum-exp.
        teacher_top_k: Number of an online teacher's largest logits to keep.
        teacher_top_fraction: Share of the vocabulary to keep of an online teacher's largest logits.
        teacher_in_chunks: True to make an online teacher's largest logits within the loss, for one chunk of rows after
            the other, so that they are never held; the logs then lack ``label_kept``. An online teacher of the whole
            vocabulary always makes them so.
        support: Ids on which teacher and student are compared: the largest logits of the "teacher" or the "student",
            the "union" or the "intersection" of both. The others are the rest, of which ``rest`` speaks. A store holds
            the teacher's logits at its own ids only, which allows "teacher" and "intersection".
        student_top_k: Number of the student's largest logits with another support than "teacher"; None for as many as
            the teacher keeps.
        teacher_rounds: Number of draws from an online teacher with method "sampled"; None for 50.
        on_policy_fraction: Probability that the student writes a micro-batch with method "gkd".
        max_new_tokens: Largest number of tokens that the student writes after a prompt.
        sampling_temperature: Sampling temperature of the student, > 0.
        log_overlap: True to log ``overlap`` too, the share of the teacher's K kept ids that are among the student's K
            largest logits. It costs a selection of K logits for every label.
        schedules: Schedules of options of the loss that are numbers, by name, in place of one value for the whole
            training: "linear:FROM:TO", "cosine:FROM:TO" or "taid:FROM:TO", from the first to the last optimizer step,
            or a number. The last follows TAID's rule (arXiv 2501.16937): the faster the divergence falls, the
            faster the value grows. None for none.

    Raises:
        ValueError: The method is unknown, an option is out of its range, or has no effect with the method.
    """

    method: str = "kd"
    rest: str | None = None
    divergence: str | None = None
    token_weight: str | None = None
    detach_weight: bool = True
    kd_weight: float | None = None
    ce_weight: float | None = None
    temperature: float = 1.0
    beta: float | None = None
    alpha: float | None = None
    forward_weight: float = 1.0
    entropy_threshold: float = 0.8
    teacher_blend: float = 1.0
    tail_weight: float = 1.0
    label_smoothing: float = 0.0
    z_loss_weight: float = 0.0
    teacher_top_k: int | None = None
    teacher_top_fraction: float | None = None
    teacher_in_chunks: bool = False
    support: str = "teacher"
    student_top_k: int | None = None
    teacher_rounds: int | None = None
    on_policy_fraction: float = 0.5
    max_new_tokens: int = 128
    sampling_temperature: float = 1.0
    log_overlap: bool = False
    schedules: dict[str, str | float] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {tuple(METHODS)}, got {self.method!r}")
        if self.method == "sft" and self.kd_weight:
            raise ValueError(
                f"kd_weight must stay None or 0 with method 'sft', which has no teacher, got {self.kd_weight}: use "
                "method 'kd' or 'slim'"
            )
        if self.teacher_rounds is not None and self.method != "sampled":
            raise ValueError(f"teacher_rounds must stay None with method {self.method!r}, got {self.teacher_rounds}")
        kept = (self.teacher_top_k, self.teacher_top_fraction)
        if kept != (None, None) and (self.method in ("sft", "sampled") or None not in kept):
            raise ValueError(
                "teacher_top_k and teacher_top_fraction select an online teacher's largest logits: set one or the "
                f"other, and not with method 'sft' or 'sampled', got {kept} with method {self.method!r}"
            )
        self._check_sizes()
        self._check_support()
        if not 0 <= _checks.as_float(self.on_policy_fraction, "on_policy_fraction") <= 1:
            raise ValueError(f"on_policy_fraction must be in [0, 1], got {self.on_policy_fraction}")
        if _checks.as_integer(self.max_new_tokens, "max_new_tokens") < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        for name in ("temperature", "sampling_temperature"):
            _checks.as_temperature(getattr(self, name), name)
        self._check_schedules()
        self._check_loss_options()

    def _check_sizes(self) -> None:
        """Checks the numbers of logits as far as that needs no vocabulary."""
        for name in ("teacher_top_k", "student_top_k", "teacher_rounds"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        share = self.teacher_top_fraction
        if share is not None and not 0 < _checks.as_float(share, "teacher_top_fraction") <= 1:
            raise ValueError(f"teacher_top_fraction must be in (0, 1], got {share}")

    def _check_schedules(self) -> None:
        given = self.schedules or {}
        for name in given.keys() - set(SCHEDULED):
            raise ValueError(f"schedules must name numbers of the loss, {', '.join(SCHEDULED)}, got {name!r}")
        defaults = {field.name: field.default for field in dataclasses.fields(SlimObjective)}
        for name, schedule in self.parsed_schedules.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name} must not be given with a schedule of it, got {getattr(self, name)} and {given[name]!r}: "
                    "leave it out"
                )
            is_of_teacher = name not in _OF_THE_LABELS or schedule.kind == "taid"
            if is_of_teacher and (self.method == "sft" or not self.needs_teacher):
                raise ValueError(
                    f"schedules must be of {', '.join(_OF_THE_LABELS)} and not 'taid' with method {self.method!r}, "
                    f"which has no teacher, got {name!r}: {given[name]!r}"
                )

    def _check_loss_options(self) -> None:
        """Computes a loss, and one at both ends of every schedule, which checks the ranges of all its options."""
        logits, target = torch.zeros(1, 2, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu")
        common = self._fixed_options({}) | {"rest": self.loss_options["rest"]}
        slim_loss(logits, target, **common)
        for name, schedule in self.parsed_schedules.items():
            for value in (schedule.start, schedule.end):
                options: dict[str, Any] = common | {name: value}
                try:
                    slim_loss(logits, target, **options)
                except ValueError as error:
                    raise ValueError(f"the schedule of {name} leaves its range: {error}") from error

    def _check_support(self) -> None:
        if self.support not in SUPPORTS:
            raise ValueError(f"support must be one of {SUPPORTS}, got {self.support!r}")
        if self.support == "teacher":
            if self.student_top_k is not None:
                raise ValueError(f"student_top_k must stay None with support 'teacher', got {self.student_top_k}")
            return
        if self.method in ("sft", "sampled"):
            raise ValueError(
                f"support must stay 'teacher' with method {self.method!r}, which compares no largest logits, got "
                f"{self.support!r}"
            )
        if self.teacher_in_chunks:
            raise ValueError(f"teacher_in_chunks must be False with support {self.support!r}, whose rows are held")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss reads the teacher's logits."""
        return any(options["kd_weight"] != 0 for options in self._options_at_ends())

    @property
    def parsed_schedules(self) -> dict[str, Schedule]:
        """The schedules by the names of their options."""
        return {name: parse_schedule(text, name) for name, text in (self.schedules or {}).items()}

    @property
    def statistics(self) -> bool | str:
        """The argument ``statistics`` of ``linear_slim_loss``, for what the logs say."""
        return True if self.log_overlap and self.needs_teacher else "without_overlap"

    @property
    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments of ``linear_slim_loss``, with the method's defaults, and the first values of schedules."""
        first, last = self._options_at_ends()
        # One treatment of the rest for the whole training: that of the end which needs another than the default.
        return first | {"rest": last["rest"] if first["rest"] == "renorm" else first["rest"]}

    def _options_at_ends(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the loss options with the first and with the last values of the schedules."""
        schedules = self.parsed_schedules
        first = {name: schedule.start for name, schedule in schedules.items()}
        last = {name: schedule.end for name, schedule in schedules.items()}
        return self._fixed_options(first), self._fixed_options(last)

    def _fixed_options(self, scheduled: Mapping[str, float]) -> dict[str, Any]:
        options: dict[str, Any] = {name: scheduled.get(name, getattr(self, name)) for name in _LOSS_OPTIONS}
        defaults = _DEFAULTS | METHODS[self.method]
        options |= {name: value for name, value in defaults.items() if options[name] is None}
        parameters = default_parameters(options["divergence"])
        options |= {name: value for name, value in parameters.items() if options[name] is None}
        if options["rest"] is None:
            is_proper = options["divergence"] in PROPER_DIVERGENCES
            needs_ghost = is_proper or options["teacher_blend"] != 1 or options["tail_weight"] != 1
            options["rest"] = "ghost" if needs_ghost else "renorm"
        return options


# Options that can have a schedule: the numbers among those of the loss.
SCHEDULED = tuple(
    field.name
    for field in dataclasses.fields(SlimObjective)
    if field.name in _LOSS_OPTIONS and str(field.type).startswith("float")
)


class _DefaultRate(float):
    """A learning rate that the user did not give; any other trainer reads it as the number."""


def learning_rate_of(student: PreTrainedModel, args: TrainingArguments) -> float:
    """Returns the given learning rate, or the default for a student.

    That of transformers is for pretrained weights. New ones need a higher rate, inversely proportional to their width
    (Yang et al. 2022, arXiv 2203.03466); at width 128 the demonstration's is 6e-3.
    """
    is_given = not isinstance(args.learning_rate, _DefaultRate)
    # DeepSpeed's configuration was filled with the rate when the arguments were made.
    if is_given or args.deepspeed or not has_new_weights(student):
        return float(args.learning_rate)
    width = student.config.get_text_config(decoder=True).hidden_size
    return 6e-3 * min(1.0, 128 / width)


@dataclasses.dataclass
class SlimConfig(SlimObjective, TrainingArguments):
    """Fields of ``transformers.TrainingArguments`` and of ``SlimObjective``.

    Attributes:
        learning_rate: Peak learning rate. If it is not given, ``SlimTrainer`` takes 5e-5 for a pretrained student, and
            6e-3 * min(1, 128 / hidden size) for one that starts from random weights.
        document_order: Order of the documents in every epoch, "random" or "easy-first": in ten buckets of the teacher's
            mean entropy, from the lowest to the highest, and random within each.

    Raises:
        ValueError: As ``SlimObjective``, and for a ``TrainingArguments`` option that would have no effect here.
    """

    learning_rate: float = _DefaultRate(5e-5)
    document_order: str = "random"
    logging_steps: float = 10
    # Documents are not dictionaries of columns. The NaN filter would hide a loss that is not finite, which is reported
    # here, and would synchronise with the device at every step.
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = dataclasses.field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        SlimObjective.__post_init__(self)
        check_training_arguments(self)
        _checks.check_one_of(self.document_order, "document_order", ORDERS)
        if self.document_order != "random" and self.train_sampling_strategy != "random":
            raise ValueError(
                f"document_order and train_sampling_strategy must not both be given, got {self.document_order!r} and "
                f"{self.train_sampling_strategy!r}: leave one of them out"
            )
        self._check_numbers()
        TrainingArguments.__post_init__(self)

    def _check_numbers(self) -> None:
        """Checks numbers that transformers gives to the optimizer and to the generators once the model is there."""
        for name in ("learning_rate", "num_train_epochs", "weight_decay", "adam_epsilon"):
            _checks.as_at_least_zero(getattr(self, name), name)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= _checks.as_float(getattr(self, name), name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        # numpy's generator takes 32 bits.
        if not 0 <= _checks.as_integer(self.seed, "seed") < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")


def check_training_arguments(args: TrainingArguments) -> None:
    """Rejects options of the trainer that need the logits or would have no effect.

    Raises:
        ValueError: ``label_smoothing_factor`` or ``torch_compile`` is set.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: use label_smoothing, which "
            "works without logits"
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile must be False: it compiles model.forward, which the loss replaces; compile the decoder "
            "instead: model.get_decoder().compile()"
        )
