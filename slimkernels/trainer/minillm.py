"""MiniLLM, the reverse-KL baseline: TRL's trainer on the prompts of a store, its sums restricted to drawn tokens."""

# transformers.Trainer declares wider types for its attributes (args, model, datasets) than they have here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportMissingImports=false

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from slimkernels.models.evaluation import context_length
from slimkernels.models.fingerprints import check_tokenizer
from slimkernels.models.head import LanguageModelHead, base_model
from slimkernels.models.heldout import evaluate_store
from slimkernels.store import MixedStores, Store, StoreDataset
from slimkernels.trainer.checkpoint import (
    SlimRun,
    StopsAtLength,
    checkpoint_to_resume,
    model_identity,
    run_identity,
)
from slimkernels.trainer.distillation import check_can_be_saved
from slimkernels.trainer.on_policy import warn_of_other_ends
from slimkernels.trainer.stored_rows import opened_store, stores_of

try:
    with warnings.catch_warnings():
        # TRL warns that this trainer is experimental. The extra pins releases that have it.
        warnings.simplefilter("ignore")
        from trl.experimental.minillm import MiniLLMConfig as _MiniLLMConfig
        from trl.experimental.minillm import MiniLLMTrainer as _MiniLLMTrainer
except ImportError as error:
    raise ImportError(
        "method 'minillm' needs TRL's MiniLLMTrainer, which releases from 1.15 on do not have: "
        "pip install 'slimkernels[minillm]'"
    ) from error

_SETTINGS = ("gamma", "length_normalization", "rkl_advantage", "single_step_decomposition", "kd_temperature")
_SETTINGS += ("max_completion_length", "temperature", "num_generations", "learning_rate", "seed", "data_seed")


@dataclasses.dataclass
class MiniLLMConfig(_MiniLLMConfig):
    """TRL's ``MiniLLMConfig`` with the defaults of ``SlimConfig`` and of the paper, where TRL's differ.

    Attributes:
        method: Name of the method, always "minillm".
        gamma: Discount of the rewards of later tokens; with 0 only the next token's reverse KL remains.
        num_generations: Number of continuations of each prompt.
        max_completion_length: Length limit of a continuation, in tokens.
    """

    method: str = "minillm"
    gamma: float = 0.95
    num_generations: int | None = 1
    max_completion_length: int | None = 128
    bf16: bool | None = False
    gradient_checkpointing: bool = False
    logging_nan_inf_filter: bool = False
    dataloader_pin_memory: bool = dataclasses.field(default_factory=torch.cuda.is_available)

    def __post_init__(self) -> None:
        if self.method != "minillm":
            raise ValueError(f"method must be 'minillm', got {self.method!r}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")
        super().__post_init__()


class MiniLLMTrainer(StopsAtLength, _MiniLLMTrainer):
    """TRL's policy-gradient trainer on the reverse KL divergence, KL(student || teacher) (arXiv 2306.08543).

    The student continues each prompt of a store, which is the part of a document before its first label. The reward of
    token t is r_t = log q(y_t) - log p(y_t), teacher minus student, and its advantage is the discounted mean of r_t,
    r_(t+1), .... The loss adds the reverse KL of every next token in closed form. The labels and the store's rows are
    not read.

    TRL's sums include padding, its discount starts at the beginning of the continuation and not at the token, and its
    gradient flows through the advantage. Here the sums run over the drawn tokens, and the advantage is a constant.

    A stopped run continues bit for bit within an epoch. Across epochs it does not, as TRL's sampler starts its order
    again in every run.

    Args:
        model: The student.
        args: A ``MiniLLMConfig``.
        train_dataset: A ``Store``, ``StoreDataset`` or ``MixedStores``; documents without a label are skipped.
        eval_dataset: Held-out store, evaluated as ``SlimTrainer`` does.
        processing_class: Tokenizer of student and store.
        teacher_model: A model with as many tokens as the student.
        **kwargs: Further arguments of TRL's trainer.

    Raises:
        ValueError: Teacher or tokenizer are missing or do not fit, or a prompt leaves no room for
            ``max_completion_length`` tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: MiniLLMConfig,
        train_dataset: Store | StoreDataset | MixedStores,
        eval_dataset: Store | StoreDataset | None = None,
        processing_class=None,
        teacher_model: PreTrainedModel | None = None,
        **kwargs,
    ) -> None:
        if teacher_model is None:
            raise ValueError("method 'minillm' needs a teacher_model (--teacher) to score what the student writes")
        if processing_class is None:
            raise ValueError(
                "method 'minillm' needs the student's tokenizer (--tokenizer), which its prompts go through"
            )
        train_dataset, eval_dataset = opened_store(train_dataset), opened_store(eval_dataset)
        for store in stores_of(train_dataset):
            check_tokenizer(store, processing_class)
        check_can_be_saved(model)
        warn_of_other_ends(model, teacher_model)
        rows = [LanguageModelHead.of(base_model(one)).vocab_size for one in (model, teacher_model)]
        if rows[0] != rows[1]:
            raise ValueError(f"student and teacher must have heads of as many rows, got {rows[0]} and {rows[1]}")
        prompts = _prompts(train_dataset)
        _check_lengths(prompts, args.max_completion_length, model)
        texts = [processing_class.decode(ids) for ids in prompts]
        # TRL's data are texts, and tokenising a text again can give other tokens than the store's.
        self._ids_of = dict(zip(texts, prompts, strict=True))
        self._heldout, self._is_bad = eval_dataset, torch.zeros((), dtype=torch.bool)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(
                model=model,
                teacher_model=teacher_model,
                args=args,
                train_dataset=Dataset.from_dict({"prompt": texts}),
                processing_class=processing_class,
                **kwargs,
            )
        self._identity = {
            "student": model_identity(model),
            "teacher_weights": model_identity(teacher_model),
        }
        self._store = train_dataset
        self.add_callback(SlimRun(self._settings, self.check_finite))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains as ``SlimTrainer.train`` does."""
        checkpoint = checkpoint_to_resume(
            resume_from_checkpoint, str(self.args.output_dir), self._settings(), self.model
        )
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def evaluate(self, *_args, **_kwargs) -> dict[str, float]:
        """Runs ``evaluate_store`` for the student on the held-out store."""
        metrics = evaluate_store(self.model, self._heldout, batch_size=self.args.eval_batch_size)
        return {f"eval_{name}": value for name, value in metrics.items()}

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Runs TRL's step and records whether its loss was finite."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._is_bad = self._is_bad.to(loss.device) | ~torch.isfinite(loss)
        return loss

    def check_finite(self) -> None:
        """Raises if any loss so far was NaN or infinite.

        Raises:
            FloatingPointError: A loss was not finite.
        """
        if self._is_bad:
            raise FloatingPointError(
                f"the loss became NaN or infinite by optimizer step {self.state.global_step} of "
                f"{self.state.max_steps}: lower learning_rate or max_grad_norm"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Computes TRL's loss with both of its terms restricted to the tokens that the student drew."""
        self._written = inputs["completion_mask"].bool()
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _tokenize_prompts(self, prompts: list[str]):
        return [self._ids_of[text] for text in prompts], None, {}

    def _generate_single_turn(self, *args, **kwargs):
        # Autocast casts the weights again for each token unless its context stays open between them.
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    @torch.no_grad()
    def _compute_advantage(self, student_log_probs_on_labels, teacher_log_probs_on_labels, mask=None) -> Tensor:
        """Computes the advantages (B, T), a_t = sum_(i >= t) gamma^(i - t) r_i, of log-probabilities (B, T).

        With ``length_normalization``, a_t is divided by sum_(i >= t) gamma^(i - t).
        """
        written = self._written
        rewards = (teacher_log_probs_on_labels - student_log_probs_on_labels).float().masked_fill(~written, 0.0)
        advantages, total, length = torch.zeros_like(rewards), rewards.new_zeros(len(rewards)), 0.0
        for place in reversed(range(rewards.shape[1])):
            total = rewards[:, place] + self.gamma * total
            length = written[:, place] + self.gamma * length
            advantages[:, place] = total / length.clamp(min=1.0) if self.length_normalization else total
        return advantages

    def _single_step_decomposition_loss(self, student_log_probs, teacher_log_probs, mask=None, **options) -> Tensor:
        loss = super()._single_step_decomposition_loss(student_log_probs, teacher_log_probs, self._written, **options)
        # TRL divides the policy's loss by the number of micro-batches, but not this one.
        return loss / self.current_gradient_accumulation_steps

    def _settings(self) -> dict[str, Any]:
        """Returns the settings that must not change between a checkpoint and the run that continues it."""
        method = {name: getattr(self.args, name) for name in _SETTINGS} | {
            "method": self.args.method,
            "prompts": len(self.train_dataset),
        }
        return run_identity(self.args, method | self._identity, self._store)


def _prompts(dataset: Store | StoreDataset | MixedStores) -> list[list[int]]:
    documents = (dataset[index] for index in range(len(dataset)))
    return [
        doc.input_ids[: doc.prompt_length or int(doc.positions[0])].tolist() for doc in documents if len(doc.positions)
    ]


def _check_lengths(prompts: list[list[int]], max_completion_length: int | None, model: PreTrainedModel) -> None:
    if not prompts:
        raise ValueError("train_dataset must hold a document with a label, got none")
    limit = context_length(model.config)
    longest = max(map(len, prompts))
    if limit is not None and longest + (max_completion_length or 0) > limit:
        raise ValueError(
            f"max_completion_length must leave room for the longest prompt, {longest} tokens, within the student's "
            f"{limit}, got {max_completion_length}"
        )
