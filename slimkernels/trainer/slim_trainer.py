"""Trains a student on a store: ``transformers.Trainer`` with the loss taken from hidden states, never from logits."""

# transformers.Trainer declares its attributes (args, model, datasets) wider than they are in this subclass.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from slimkernels.models.batch import SlimCollator, check_tokenizer, teacher_rows
from slimkernels.models.head import LanguageModelHead, check_head
from slimkernels.models.head_loss import IGNORE_INDEX, is_partitioned, loss_of_batch
from slimkernels.models.heldout import evaluate_store
from slimkernels.models.make_student import make_student
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import StoreDataset
from slimkernels.trainer.checkpoint import SlimRun, check_same_run, last_complete_checkpoint
from slimkernels.trainer.mixin import SlimLossMixin, Step
from slimkernels.trainer.objective import METHODS, SlimConfig
from slimkernels.trainer.on_policy import continue_prompts

__all__ = ["METHODS", "SlimCollator", "SlimConfig", "SlimTrainer", "last_complete_checkpoint", "make_student", "train"]


class SlimTrainer(SlimLossMixin, Trainer):
    """A ``transformers.Trainer`` whose loss is ``linear_slim_loss`` of the decoder's hidden states.

    Equivalent to, per step over all its micro-batches::

        hidden = model.get_decoder()(input_ids, attention_mask).last_hidden_state[labelled rows]
        loss = slim_loss(head(hidden), target, teacher, **args.loss_options, reduction="sum") / num_labels

    but the student's (N, V) logits never exist: peak extra memory is that of ``linear_slim_loss``.

    The loss is normalised by the number of labels in the whole accumulated batch, over all processes. With every
    logged loss come the terms of ``LossLog.means``; the device is not synchronised between logs. ``evaluate`` reports
    ``eval_loss`` (mean -log s_y), ``eval_perplexity`` and ``eval_kl_ghost``.

    Args:
        model: A causal language model whose head is one linear layer, with softcap or scale as its config says.
        args: A ``SlimConfig``.
        data_collator: By default a ``SlimCollator`` for this model and method.
        train_dataset: A ``StoreDataset`` or ``Store``, or any map-style dataset of its documents.
        eval_dataset: The same, to evaluate on.
        processing_class: The student's tokenizer: saved with every checkpoint, and checked against the store's.
        teacher_model: Scores the documents as they come, in place of the store's rows, which are then not read.
        **kwargs: Passed on to ``transformers.Trainer``.

    Raises:
        TypeError: ``args`` is not a ``SlimConfig``.
        ValueError: Student and store disagree on the vocabulary or the tokenizer, the model's logits cannot be
            computed from its hidden states, the method needs another teacher, or the process layout is not supported.

    Supports: one process, or one process per device under torchrun or ``accelerate launch``: DDP, FSDP2, DeepSpeed
    ZeRO up to stage 3; float32, bfloat16 and fp16/bf16 mixed precision. A sharded head is gathered while its loss is
    computed, V x D of memory on each device. Not FSDP1 or ``DataParallel``.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: SlimConfig | None = None,
        data_collator: Callable[[Sequence], dict[str, Any]] | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        teacher_model: PreTrainedModel | None = None,
        **kwargs,
    ) -> None:
        if not isinstance(args, SlimConfig):
            raise TypeError(f"args must be a SlimConfig, got {type(args).__name__}: SlimConfig(output_dir=..., ...)")
        # Past SlimLossMixin.__init__, whose batches have labels in place of rows.
        super(SlimLossMixin, self).__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._check_layout()
        if not is_partitioned(self.model):
            check_head(self.model)
        self._set_objective(args, teacher_model)
        self._check_teacher()
        evaluations = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for dataset in (self.train_dataset, *evaluations):
            self._check_store(dataset)
        if data_collator is None:
            pad = getattr(self.processing_class, "pad_token_id", None)
            self.data_collator = SlimCollator(
                pad_token_id=0 if pad is None else pad,
                vocab_size=LanguageModelHead.of(self.model).vocab_size,
                max_length=getattr(self.model.config, "max_position_embeddings", None),
                with_teacher=args.needs_teacher and teacher_model is None,
            )
        self.add_callback(SlimRun(self._settings, self.check_finite))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """``Trainer.train``; True resumes from the newest complete checkpoint, or starts where there is none.

        A killed run can leave a checkpoint half written; ``True`` passes over it.

        Raises:
            ValueError: The checkpoint is of a run with another loss, data set, batch size or seed.
            FloatingPointError: The loss became NaN or infinite; raised before the next log or checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            check_same_run(resume_from_checkpoint, self._settings())
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one optimizer step, and the number of labels in all of them (0-dim tensor)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        if self.args.method == "gkd":
            batches = [self._maybe_continue(batch, number) for number, batch in enumerate(batches)]
        num_items = sum(batch["target"].ne(IGNORE_INDEX).sum() for batch in batches).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_items = self.accelerator.gather(num_items).sum()
        return batches, num_items

    def _maybe_continue(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """The batch, or with probability ``on_policy_fraction`` the student's continuations of its prompts."""
        args, pad = self.args, getattr(self.processing_class, "pad_token_id", None)
        # Named by their place in the run: a resumed run restores the global generator only after it has its batches.
        place = f"{args.seed} {self.state.global_step} {args.process_index} {number}"
        with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "big"))
            if float(torch.rand(())) >= args.on_policy_fraction:
                return batch
            return continue_prompts(
                self.model,
                batch,
                max_new_tokens=args.max_new_tokens,
                temperature=args.sampling_temperature,
                pad_token_id=0 if pad is None else pad,
                max_length=getattr(self.model.config, "max_position_embeddings", None),
            )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """``evaluate_store`` on the dataloader's documents; every process measures all of them."""
        metrics = evaluate_store(self.model, dataloader.dataset, batch_size=self.args.eval_batch_size)
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(dataloader.dataset),
        )

    def check_finite(self) -> None:
        """Synchronises with the device and raises if any loss so far was NaN or infinite.

        Raises:
            FloatingPointError: Names the first such step.
        """
        step = self.loss_log.first_bad_step()
        if step is not None:
            raise FloatingPointError(
                f"the loss became NaN or infinite at optimizer step {step} of {self.state.max_steps}; no checkpoint "
                "was written since. Lower learning_rate or max_grad_norm, or look for damage with "
                "slimkernels.store.verify"
            )

    def _report_bad_step(self) -> None:
        self.check_finite()

    def _step(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | None) -> Step:
        teacher = self._teacher_of(inputs)
        with self.accelerator.autocast():
            result = loss_of_batch(
                model,
                inputs,
                student=self.accelerator.unwrap_model(model),
                teacher=teacher,
                num_items=num_items,
                **self.args.loss_options,
            )
        return Step(result.loss, result, inputs["target"], teacher, result)

    def _teacher_of(self, inputs: dict[str, Any]) -> SparseLogits | None:
        if not self.args.needs_teacher:
            return None
        if self.online_teacher is None:
            return teacher_rows(inputs["teacher"])
        hidden = self.online_teacher.hidden({name: inputs[name] for name in ("input_ids", "attention_mask")})
        return self.online_teacher.rows(hidden.flatten(0, 1).index_select(0, inputs["rows"]), inputs["target"])

    def _settings(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that continues it."""
        args = self.args
        online = None
        if self.online_teacher is not None:
            names = ("method", "teacher_top_k", "teacher_top_fraction", "teacher_rounds", "on_policy_fraction")
            names += ("max_new_tokens", "sampling_temperature")
            online = {name: getattr(args, name) for name in names}
        return args.loss_options | {
            "online_teacher": online,
            "documents": len(self.train_dataset),
            "documents_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            "data_seed": args.data_seed,
        }

    def _check_layout(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"SlimTrainer runs one process per device, got DataParallel on {self.args.n_gpu} devices: start it "
                "with torchrun, or set CUDA_VISIBLE_DEVICES to one device"
            )
        asks_for_fsdp = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asks_for_fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "FSDP must stay off on CPUs, where accelerate would leave it out without a word: train with DDP, or "
                "shard in your own loop, patch_model(model) and then fully_shard(model)"
            )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "SlimTrainer shards with FSDP2, got version 1: set fsdp_version: 2 in the configuration of accelerate, "
                'or fsdp_config={"version": 2}'
            )
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded and self.args.method == "gkd" and self.args.on_policy_fraction > 0:
            raise ValueError(
                "method 'gkd' lets the student write on every process by itself, which a sharded one cannot: train it "
                "with DDP, or set on_policy_fraction=0"
            )
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "SlimTrainer reads the decoder's hidden states, and would not train PEFT's prompts: use SlimLossMixin"
            )

    def _check_teacher(self) -> None:
        args, online = self.args, self.online_teacher
        if online is not None and not args.needs_teacher:
            raise ValueError(f"method {args.method!r} has no teacher: leave teacher_model out")
        if online is None and (args.method == "gkd" and args.on_policy_fraction > 0):
            raise ValueError(
                "method 'gkd' needs a teacher_model to score what the student writes: pass one, or set "
                "on_policy_fraction=0 to learn from the store alone"
            )
        if online is None and (args.teacher_top_k, args.teacher_top_fraction, args.teacher_rounds) != (None,) * 3:
            raise ValueError(
                "teacher_top_k, teacher_top_fraction and teacher_rounds choose what is kept of a teacher_model, got "
                "none: a store keeps what it was captured with"
            )

    def _check_store(self, dataset) -> None:
        rows = LanguageModelHead.of(self.model).vocab_size
        vocab_size = getattr(dataset, "vocab_size", rows)
        if vocab_size != rows:
            raise ValueError(
                f"the student's head must have as many rows as the teacher's vocabulary in the store, {vocab_size}, "
                f"got {rows}; make the student with vocab_size={vocab_size} or call "
                f"model.resize_token_embeddings({vocab_size})"
            )
        manifest = getattr(getattr(dataset, "store", dataset), "manifest", {})
        kind = manifest.get("selection", {}).get("kind")
        if self.online_teacher is not None:
            kind = None
        elif self.args.method == "sampled" and manifest and kind not in ("sample", "mixed"):
            raise ValueError(
                f"method 'sampled' needs a store of draws, captured with select='sample' or 'mixed', got one of "
                f"{kind!r}: use method 'kd', or pass a teacher_model"
            )
        if kind in ("sample", "mixed") and self.args.needs_teacher and self.args.temperature != 1:
            raise ValueError(
                f"temperature must be 1 with a store of select={kind!r}, whose rows are shares of draws at temperature "
                f"1, got {self.args.temperature}; capture the largest logits to train at another temperature"
            )
        check_tokenizer(dataset, self.processing_class)


def trainer_of(method: str) -> tuple[Any, Any]:
    """The trainer of a method and the class of its configuration.

    Raises:
        ImportError: Method "minillm" without the extra of that name.
    """
    if method != "minillm":
        return SlimTrainer, SlimConfig
    from slimkernels.trainer.minillm import MiniLLMConfig, MiniLLMTrainer

    return MiniLLMTrainer, MiniLLMConfig


def train(
    store_path: str | os.PathLike,
    student: PreTrainedModel | str | None,
    method: str,
    output_dir: str | os.PathLike,
    *,
    tokenizer=None,
    teacher_model: PreTrainedModel | None = None,
    eval_store_path: str | os.PathLike | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options,
) -> dict[str, float]:
    """Trains a student on a store, continuing a run that was stopped, and saves it in ``output_dir``.

    Args:
        store_path: The store to learn from.
        student: A model, the folder of one, or None for ``make_student(vocab_size=the store's)``.
        method: Of ``SlimObjective``, or "minillm": TRL's ``MiniLLMTrainer`` on the prompts of the store's documents.
        output_dir: Gets the checkpoints and, at the end, the student; a run of the same settings is continued.
        tokenizer: The student's tokenizer, or its folder; checked against the store and saved with the student.
        teacher_model: Scores the store's documents, in place of its rows; methods "gkd" and "minillm" need one.
        eval_store_path: A held-out store to measure the trained student on.
        callbacks: Passed to the trainer.
        **options: Fields of ``SlimConfig``; with method "minillm" of TRL's ``MiniLLMConfig``.

    Returns:
        The trainer's metrics (``train_loss``, ``train_runtime``, ...) and, with ``eval_store_path``, the
        ``eval_``-metrics of ``evaluate_store``.

    Raises:
        ValueError: As ``SlimTrainer`` and ``SlimTrainer.train``.
        ImportError: Method "minillm" without the extra of that name.
    """
    store = StoreDataset(store_path)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if not isinstance(student, PreTrainedModel):
        student = make_student(student, tokenizer=tokenizer, vocab_size=store.vocab_size)
    trainer_class, config_class = trainer_of(method)
    trainer = trainer_class(
        model=student,
        args=config_class(output_dir=str(output_dir), method=method, **{"save_total_limit": 2} | options),
        train_dataset=store,
        eval_dataset=None if eval_store_path is None else StoreDataset(eval_store_path),
        processing_class=tokenizer,
        teacher_model=teacher_model,
        callbacks=callbacks,
    )
    metrics = trainer.train(resume_from_checkpoint=True).metrics
    trainer.save_model()
    return metrics if eval_store_path is None else metrics | trainer.evaluate()
