"""``SlimTrainer``, a ``transformers.Trainer`` on stores that computes the loss from hidden states, never logits."""

# transformers.Trainer declares wider types for its attributes (args, model, datasets) than they have here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from slimkernels.models.batch import SlimCollator, teacher_rows
from slimkernels.models.evaluation import context_length, evaluation_mode
from slimkernels.models.head import LanguageModelHead, check_head
from slimkernels.models.head_loss import IGNORE_INDEX, BatchTeacher, TeacherRows, loss_of_batch
from slimkernels.models.heldout import evaluate_store
from slimkernels.models.sharding import is_partitioned
from slimkernels.store import DocumentOrder, MixedStores
from slimkernels.trainer.checkpoint import SlimRun, checkpoint_to_resume, model_identity, run_identity
from slimkernels.trainer.distillation import DistillationMixin, Step
from slimkernels.trainer.document_order import easy_first
from slimkernels.trainer.objective import SlimConfig, learning_rate_of
from slimkernels.trainer.on_policy import continue_prompts, warn_of_other_ends
from slimkernels.trainer.stored_rows import check_is_scored, check_stored_rows, mixture_of, opened_store, stores_of
from slimkernels.trainer.teacher_server import TeacherServer


class SlimTrainer(DistillationMixin, Trainer):
    """A ``transformers.Trainer`` whose loss is ``linear_slim_loss`` of the decoder's hidden states.

    Equivalent to, per step over all its micro-batches::

        hidden = model.get_decoder()(input_ids, attention_mask).last_hidden_state[labelled rows]
        loss = slim_loss(head(hidden), target, teacher, **args.loss_options, reduction="sum") / num_labels

    but the student's (N, V) logits never exist: peak extra memory is that of ``linear_slim_loss``.

    The loss is normalised by the number of labels in the whole accumulated batch, over all processes. Every logged
    loss comes with the means of ``LossLog.means``; the device is not synchronised between logs. ``evaluate`` reports
    ``eval_loss`` (mean -log s_y), ``eval_perplexity`` and ``eval_kl_ghost``.

    Args:
        model: A causal language model whose head is one linear layer, with the softcap or scale of its configuration.
        args: A ``SlimConfig``.
        data_collator: Collator of store documents; None for a ``SlimCollator`` for this model and method.
        train_dataset: A ``StoreDataset`` or ``Store``, the path of one, a ``MixedStores`` of several, whose shares set
            the order, or any data set of their documents.
        eval_dataset: Held-out data set of the same kind.
        processing_class: The student's tokenizer, which is checked against the store's and saved with checkpoints.
        teacher_model: Model that scores every batch in place of the store's rows, which are then not read.
        teacher_server: ``TeacherServer`` that scores every document in place of the store's rows; it needs
            ``processing_class``, and is for methods "kd", "slim", "reverse_kl", "jsd" and "gkd".
        **kwargs: Further arguments of ``transformers.Trainer``.

    Raises:
        TypeError: ``args`` is not a ``SlimConfig``.
        ValueError: Student and store differ in vocabulary or tokenizer, the model's logits cannot be computed from its
            hidden states, the method needs another teacher, or the process layout is not supported.

    Supports: one process, or one process per device under torchrun or ``accelerate launch``: DDP, FSDP2, DeepSpeed
    ZeRO up to stage 3; float32, bfloat16 and fp16/bf16 mixed precision. A sharded head is gathered while its loss is
    computed, V x D of memory on each device. Not FSDP1 or ``DataParallel``.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: SlimConfig | None = None,
        data_collator: Callable[[Sequence], dict[str, Any]] | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        teacher_model: PreTrainedModel | None = None,
        teacher_server: TeacherServer | None = None,
        **kwargs,
    ) -> None:
        if not isinstance(args, SlimConfig):
            raise TypeError(f"args must be a SlimConfig, got {type(args).__name__}: SlimConfig(output_dir=..., ...)")
        for name in ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} must be None: SlimTrainer computes the loss and its own metrics, without logits; use "
                    "SlimLossMixin with a transformers.Trainer for metrics of logits"
                )
        # A copy, because the default of the learning rate depends on the student.
        args = copy.copy(args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: opened_store(dataset) for name, dataset in eval_dataset.items()}
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=opened_store(train_dataset),
            eval_dataset=opened_store(eval_dataset),
            processing_class=processing_class,
            **kwargs,
        )
        args.learning_rate = learning_rate_of(self.model, args)
        self._check_layout()
        if not is_partitioned(self.model):
            check_head(self.model)
            _check_no_auxiliary_loss(self.model)
        self._set_objective(args, teacher_model, teacher_server)
        self._check_teacher()
        evaluations = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for dataset in (self.train_dataset, *evaluations):
            is_trained_on = dataset is self.train_dataset and not self._scores_batches
            check_stored_rows(
                dataset,
                args if is_trained_on else None,
                vocab_size=self._vocab_size,
                tokenizer=processing_class,
                max_length=self._max_length(),
            )
        served = self.served_teacher
        self._set_support(stores_of(self.train_dataset) if served is None else [served.store])
        if data_collator is None:
            self.data_collator = SlimCollator(
                pad_token_id=self._pad_token_id(),
                vocab_size=self._vocab_size,
                max_length=self._max_length(),
                with_teacher=args.needs_teacher and not self._scores_batches,
            )
        self._order: DocumentOrder | None = None
        if (mixture := mixture_of(self.train_dataset)) is not None and mixture.shares is not None:
            self._order = self._order_of(mixture)
        if args.document_order == "easy-first":
            if self._order is not None:
                raise ValueError("document_order must be 'random' with shares of the stores, which set the order")
            self._order = easy_first(self.train_dataset, args.seed if args.data_seed is None else args.data_seed)
        self._student = model_identity(self.model)
        self.add_callback(SlimRun(self._settings, self.check_finite))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains as ``Trainer.train``; True resumes from the newest complete checkpoint, or starts if there is none.

        A killed run can leave an incomplete checkpoint, which ``True`` skips.

        Raises:
            ValueError: The checkpoint is of a run with another loss, store, student, teacher, optimizer, schedule,
                batch size or seed; the message names what differs.
            FloatingPointError: The loss became NaN or infinite; raised before the next log or checkpoint.
        """
        checkpoint = checkpoint_to_resume(
            resume_from_checkpoint, str(self.args.output_dir), self._settings(), self.model
        )
        with self._teacher_stopped_after():
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _order_of(self, mixture: MixedStores) -> DocumentOrder:
        args = self.args
        if args.train_sampling_strategy != "random":
            raise ValueError(
                "train_sampling_strategy must be 'random' with shares of the stores, which set the order, got "
                f"{args.train_sampling_strategy!r}: omit one of them"
            )
        # accelerate splits the batches over the processes.
        return mixture.order(seed=args.seed if args.data_seed is None else args.data_seed, rank=0, world_size=1)

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self._order is None else self._order

    def _run_epoch(self, **options: Any) -> None:
        # accelerate does not, where several processes resume within an epoch.
        if self._order is not None:
            self._order.set_epoch(options["epoch"])
        super()._run_epoch(**options)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """Returns the micro-batches of an optimizer step, and the number of labels in all of them (0-dim tensor)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        for number, given in enumerate(batches):
            if self._student_writes(self.state.global_step, number):
                batches[number] = self._continued(given, number)
                if self.served_teacher is not None and not self._scores_ids:
                    # The server scores it while the student writes the next one, which it never does twice alike.
                    self.served_teacher.ask(batches[number], keep=batches[number] is given)
        num_items = sum(batch["target"].ne(IGNORE_INDEX).sum() for batch in batches).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_items = self.accelerator.gather(num_items).sum()
        return batches, num_items

    def _student_writes(self, step: int, number: int) -> bool:
        """Returns whether the student writes micro-batch ``number`` of a step, as it does ``on_policy_fraction``."""
        if self.args.method != "gkd":
            return False
        draw = torch.rand((), generator=torch.Generator().manual_seed(self._seed_of_text(step, number)))
        return float(draw) < self.args.on_policy_fraction

    def _seed_of_text(self, step: int, number: int) -> int:
        # The place in the run, as a resumed run restores the global generator only after it has its batches.
        place = f"{self.args.seed} {step} {self.args.process_index} {number}"
        return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "big")

    def _continued(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """Returns the student's continuations of the prompts of micro-batch ``number`` of the current step."""
        args = self.args
        with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
            torch.manual_seed(self._seed_of_text(self.state.global_step, number))
            # The number that says whether the student writes.
            torch.rand(())
            return continue_prompts(
                self.model,
                batch,
                max_new_tokens=args.max_new_tokens,
                temperature=args.sampling_temperature,
                pad_token_id=self._pad_token_id(),
                max_length=self._max_length(),
            )

    def _pad_token_id(self) -> int:
        pad = getattr(self.processing_class, "pad_token_id", None)
        return 0 if pad is None else pad

    def _max_length(self) -> int | None:
        """Returns the number of tokens that the student can read, or None if its configuration does not say."""
        return context_length(self.model.config)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Runs ``evaluate_store`` on the dataloader's documents; every process measures all of them."""
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
            FloatingPointError: A loss was not finite; the message names the first such step.
        """
        self._report_bad_step()

    def _on_bad_step(self, step: int) -> None:
        raise FloatingPointError(
            f"the loss became NaN or infinite at optimizer step {step} of {self.state.max_steps}; no checkpoint "
            "was written since. Lower learning_rate or max_grad_norm, or look for damage with "
            "slimkernels.store.verify"
        )

    def _compute_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | None, options: dict[str, Any]
    ) -> Step:
        teacher = self._teacher_of(inputs)
        with self.accelerator.autocast():
            result = loss_of_batch(
                model,
                inputs,
                student=self.accelerator.unwrap_model(model),
                teacher=teacher,
                num_items=num_items,
                statistics=self.args.statistics,
                **options,
            )
        rows = teacher.rows if isinstance(teacher, BatchTeacher) else teacher
        return Step(result.loss, result, inputs["target"], rows, result)

    def _teacher_of(self, inputs: dict[str, Any]) -> TeacherRows | BatchTeacher | None:
        if not self.args.needs_teacher:
            return None
        if self._scores_ids:
            return self._on_support(inputs, inputs["rows"], None)
        if self.served_teacher is not None:
            return self._on_support(inputs, inputs["rows"], self.served_teacher.rows(inputs, inputs["rows"]))
        if self.online_teacher is None:
            return self._on_support(inputs, inputs["rows"], teacher_rows(inputs["teacher"]))
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        hidden = self.online_teacher.hidden(given, inputs["rows"])
        if self.args.support == "teacher":
            return self.online_teacher.rows(hidden, inputs["target"])
        return self._scored(hidden)

    def _settings(self) -> dict[str, Any]:
        """Returns the settings that must not change between a checkpoint and the run that continues it."""
        own = {"student": self._student, "document_order": self.args.document_order}
        return run_identity(self.args, self._method() | own, self.train_dataset)

    def _check_layout(self) -> None:
        asks_for_fsdp = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asks_for_fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                "FSDP must stay off on CPUs, where accelerate silently disables it: train with DDP, or shard in your "
                "own loop, patch_model(model) and then fully_shard(model)"
            )
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError(
                "SlimTrainer shards with FSDP2, got version 1: set fsdp_version: 2 in the configuration of accelerate, "
                'or fsdp_config={"version": 2}'
            )
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if is_sharded and self.args.method == "gkd" and self.args.on_policy_fraction > 0:
            raise ValueError(
                "method 'gkd' lets the student of every process write on its own, which a sharded one cannot: train it "
                "with DDP, or set on_policy_fraction=0"
            )
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(
                "SlimTrainer calls only the decoder, and so would not train PEFT's prompts: use SlimLossMixin"
            )

    @property
    def _scores_batches(self) -> bool:
        """Whether a teacher scores the batches, so that the rows of the store are not read."""
        return self.online_teacher is not None or self.served_teacher is not None

    def _check_teacher(self) -> None:
        args, online = self.args, self.online_teacher
        if online is not None and self.served_teacher is not None:
            raise ValueError("there must be one teacher, got teacher_model and teacher_server: pass one of them")
        if online is not None and not args.needs_teacher:
            raise ValueError(f"method {args.method!r} has no teacher: do not pass teacher_model")
        check_is_scored(args, self._scores_batches)
        if online is not None and args.method == "gkd" and args.on_policy_fraction > 0:
            warn_of_other_ends(self.model, online.model)


@torch.no_grad()
def _check_no_auxiliary_loss(model: PreTrainedModel) -> None:
    """Refuses a model that adds a loss of its experts to that of its head, as the decoder alone does not compute it."""
    ids = torch.tensor([[0, 1]], device=LanguageModelHead.of(model).weight.device)
    with evaluation_mode(model):
        auxiliary = getattr(model(input_ids=ids, use_cache=False), "aux_loss", None)
    if auxiliary is not None and getattr(model.config, "router_aux_loss_coef", 1.0):
        raise ValueError(
            f"SlimTrainer calls only the decoder, and so would not train the auxiliary loss of the experts of "
            f"{type(model).__name__}: use SlimLossMixin, or set output_router_logits=False in its configuration"
        )
