"""TRL's ``DistillationTrainer`` and ``GKDTrainer`` with sparse teachers and the divergences of ``linear_slim_loss``."""

# The classes use attributes of transformers.Trainer, which declares wider types for them.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from slimkernels._checks import as_temperature
from slimkernels.models.head_loss import IGNORE_INDEX
from slimkernels.store import MixedStores, Store, StoreDataset
from slimkernels.trainer.checkpoint import documents_per_step
from slimkernels.trainer.mixin import SlimLossMixin, opened_rows
from slimkernels.trainer.objective import SlimObjective
from slimkernels.trainer.teacher_server import TeacherServer

try:
    from trl import DistillationConfig
    from trl import DistillationTrainer as _DistillationTrainer

    with warnings.catch_warnings():
        # TRL warns that this trainer is experimental.
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDConfig
        from trl.experimental.gkd import GKDTrainer as _GKDTrainer
except ImportError as error:
    raise ImportError(
        "slimkernels.integrations.trl needs TRL 1.15 or later with DistillationTrainer and GKDTrainer: "
        "pip install 'slimkernels[trl]'"
    ) from error

# Entries of a batch of DistillationTrainer that no model is given.
_GENERATED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
_GENERATED += ("num_items_in_batch", "num_images", "num_tiles")
# Entries of a batch of GKDTrainer from which text is generated, or that its loss does not read.
_FOR_GENERATION = (
    "prompts",
    "prompt_attention_mask",
    "byte_offsets",
    "original_prompt_text",
    "original_completion_text",
)

logger = logging.getLogger(__name__)


class _SlimDistillation(SlimLossMixin):
    """A base class of both trainers, which reads an objective from TRL's arguments and refuses what has no effect."""

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: nn.Module | str | os.PathLike[str] | None,
        args: Any,
        *,
        objective: SlimObjective | str | None,
        temperature: float,
        **kwargs: Any,
    ) -> None:
        if objective is None:
            objective = _objective_of(args.beta, as_temperature(temperature))
        elif args.beta != (default := _default_of(args, "beta")):
            raise ValueError(
                f"beta of {type(args).__name__} has no effect with an objective, which says the divergence, got "
                f"{args.beta}: leave it at {default}, or leave out the objective"
            )
        if args.teacher_model_init_kwargs is not None or getattr(args, "teacher_model_revision", None) is not None:
            raise ValueError(
                "teacher_model_init_kwargs and teacher_model_revision must be None, as this trainer loads no teacher "
                "from a hub: load it, and pass the model as teacher_model"
            )
        super().__init__(model, args=args, teacher_model=teacher_model, objective=objective, **kwargs)
        sees_images = isinstance(self.processing_class, ProcessorMixin)
        if sees_images and self.online_teacher is None:
            raise ValueError(
                "processing_class must be a tokenizer with a teacher_store or teacher_server, which hold no images, "
                f"got {type(self.processing_class).__name__}: pass a teacher_model, which is given the images"
            )

    def _warn_of_own_words(self) -> None:
        if self.objective.loss_options["ce_weight"]:
            logger.warning(
                "ce_weight is not 0, and so the student learns from its own words as if they were labels: set "
                "SlimObjective(..., ce_weight=0)"
            )


class DistillationTrainer(_SlimDistillation, _DistillationTrainer):
    """TRL's ``DistillationTrainer`` with a teacher in a store, behind a server, or whose logits are never whole.

    The student writes completions of the prompts, by transformers or vLLM as TRL's arguments say, and learns from the
    teacher's rows of them. Only the loss is another one::

        from slimkernels.integrations.trl import DistillationTrainer   # in place of: from trl import ...

        trainer = DistillationTrainer(model, args=DistillationConfig(...), train_dataset=prompts,
            teacher_server=sk.TeacherServer("http://localhost:8000/v1", model="teacher", store="rows"))

    Equivalent to, with K = V, TRL's own loss, whose divergence ``beta`` chooses: the forward KL divergence at 0, the
    reverse at 1, else the Jensen-Shannon divergence between them, at ``temperature``, without its square as a factor.
    With K < V the mass outside the kept ids is one outcome, ``rest="ghost"``, for teacher and student alike.

    With a ``teacher_store`` the student writes nothing: prompts and completions are those of the store's documents, of
    which each part that has teacher's rows is learned from.

    A ``teacher_model`` is kept whole on every device. The means of ``SlimLossMixin`` are logged with what TRL logs;
    ``entropy``, a name of both, is the student's at temperature 1. TRL's limits remain: no adapter on the head, no
    learned prompts.

    Args:
        model: The student, as for TRL.
        teacher_model: A causal language model with the same vocabulary, or its folder or name.
        args: ``trl.DistillationConfig``.
        objective: Training objective in place of the one that ``beta`` and ``temperature`` mean; ``temperature`` then
            only samples. Its labels are the student's own words unless there is a store: set ``ce_weight=0``.
        teacher_store: A ``Store``, its path, or a ``MixedStores`` without shares, in place of ``train_dataset``.
        teacher_server: ``TeacherServer``, asked for all completions of an optimizer step at once. They are not stored,
            as no later step has the same.
        **kwargs: Arguments of TRL's trainer, such as ``train_dataset``, ``processing_class`` and ``peft_config``.

    Raises:
        TypeError: ``args`` is not a ``DistillationConfig``.
        ValueError: As ``SlimLossMixin``; or an argument of TRL would have no effect.

    Supports: one process, DDP; float32 and bf16 mixed precision; adapters of PEFT.

    References: arXiv 2306.13649.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: nn.Module | str | os.PathLike[str] | None = None,
        args: DistillationConfig | None = None,
        *,
        objective: SlimObjective | str | None = None,
        teacher_store: Store | StoreDataset | MixedStores | str | os.PathLike[str] | None = None,
        teacher_server: TeacherServer | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, DistillationConfig):
            raise TypeError(f"args must be trl's DistillationConfig, got {type(args).__name__}")
        if hasattr(args, "teacher_model_server_url"):
            raise ValueError(
                "args must be a DistillationConfig, got a ServerDistillationConfig, whose loss and teacher would have "
                "no effect: pass teacher_server=slimkernels.trainer.TeacherServer(...), for any K and any divergence"
            )
        if teacher_store is not None:
            teacher_store = opened_rows(teacher_store)
            given = [name for name in ("train_dataset", "eval_dataset", "tools") if kwargs.get(name)]
            if given or args.use_vllm:
                raise ValueError(
                    "a teacher_store holds the prompts and completions that are learned from, and nothing is written, "
                    f"got {given} and use_vllm={args.use_vllm}: leave them out; or, for completions of other prompts, "
                    "pass a teacher_model or teacher_server in place of the store"
                )
            if len(teacher_store) < documents_per_step(args):
                raise ValueError(
                    f"teacher_store must hold the {documents_per_step(args)} documents of a step at least (batch size "
                    f"x accumulation steps x processes), as TRL leaves out a step that is not full, got "
                    f"{len(teacher_store)}: set a smaller per_device_train_batch_size"
                )
            kwargs["train_dataset"] = Dataset.from_dict({"prompt": range(len(teacher_store))})
        super().__init__(
            model,
            teacher_model,
            args,
            objective=objective,
            temperature=args.temperature,
            teacher_store=teacher_store,
            teacher_server=teacher_server,
            **kwargs,
        )
        if teacher_store is None:
            self._warn_of_own_words()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Computes the loss of prompts (B, P) and completions (B, C), divided by all labels of an optimizer step."""
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        batch = {name: value for name, value in inputs.items() if name not in _GENERATED}
        batch |= _joined(inputs)
        no_labels = torch.full_like(inputs["prompt_ids"], IGNORE_INDEX)
        batch["labels"] = torch.cat([no_labels, inputs["completion_ids"].masked_fill(~mask, IGNORE_INDEX)], dim=1)
        # transformers has counted labels before there were any; TRL counts those of all processes.
        num_items_in_batch = inputs["num_items_in_batch"] if self.model.training else None
        if num_items_in_batch is not None and not self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        generated = super()._generate_and_score_completions(inputs)
        if self.served_teacher is not None and not self._scores_ids:
            # The server scores the later micro-batches while the student learns from the first.
            self.served_teacher.ask(_joined(generated), keep=False)
        return generated

    def _generate(self, prompts: list):
        if self.stored_teacher is None or self.served_teacher is not None:
            return super()._generate(prompts)
        # Prompts are numbers of documents. TRL makes tensors of the arrays; of an empty list it would make floats.
        prompt_ids, completion_ids, label_masks = [], [], []
        for document in (self.stored_teacher.store[number] for number in prompts):
            ids, positions = document.input_ids, document.positions
            end = max(1, document.prompt_length or min(positions.tolist(), default=len(ids)))
            prompt_ids.append(ids[:end].numpy())
            completion_ids.append(ids[end:].numpy())
            label_masks.append(torch.isin(torch.arange(end, len(ids)), positions).long().numpy())
        return prompt_ids, completion_ids, label_masks, None, []

    def _student_writes(self, step: int, number: int) -> bool:
        return True


class _GKDTrainerAlone(_GKDTrainer):
    """TRL's trainer without the teacher that it requires, as ``SlimLossMixin`` keeps the teacher."""

    def __init__(self, model: PreTrainedModel | str, **kwargs: Any) -> None:
        super().__init__(model, teacher_model=_TeacherOfNone(self), **kwargs)
        self.teacher_model = None


class GKDTrainer(_SlimDistillation, _GKDTrainerAlone):
    """TRL's ``GKDTrainer`` with a teacher in a store, behind a server, or whose logits are never whole.

    In a share ``lmbda`` of the micro-batches the student writes the completions, in the others they are those of the
    data set; the teacher's rows of them replace the whole distributions of TRL. Only the loss is another one::

        from slimkernels.integrations.trl import GKDTrainer   # in place of: from trl.experimental.gkd import ...

    Equivalent to, with K = V, TRL's own loss, whose divergence ``beta`` chooses as in ``DistillationTrainer``. As
    there, its temperature is 1 whatever ``temperature`` says, which only samples, and the sum over the labels of a step
    is divided by the number of labels in its data, also where the student has written others. On several processes
    TRL's loss is smaller by their number, which this one is not.

    Batches may be packed by a collator that gives ``position_ids``, with ``lmbda=0``; TRL's own loss ignores them.

    Args:
        model: The student, as for TRL.
        teacher_model: A causal language model with the same vocabulary, or its folder or name.
        args: ``trl.experimental.gkd.GKDConfig``.
        objective: Training objective in place of the one that ``beta`` means.
        teacher_store: A ``Store`` of the data set's documents, tokenised as they are in the batches, its path, or a
            ``MixedStores`` without shares; with ``lmbda=0`` only.
        teacher_server: ``TeacherServer``; text that the student has written is not stored.
        **kwargs: Arguments of TRL's trainer, such as ``train_dataset``, ``processing_class`` and ``peft_config``.

    Raises:
        TypeError: ``args`` is not a ``GKDConfig``.
        ValueError: As ``SlimLossMixin``; or an argument of TRL would have no effect.

    Supports: one process, DDP; float32 and bf16 mixed precision; adapters of PEFT. Not FSDP and
    DeepSpeed, with which TRL prepares a teacher of its own.

    References: arXiv 2306.13649.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: nn.Module | str | os.PathLike[str] | None = None,
        args: GKDConfig | None = None,
        *,
        objective: SlimObjective | str | None = None,
        teacher_store: Store | StoreDataset | MixedStores | str | os.PathLike[str] | None = None,
        teacher_server: TeacherServer | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, GKDConfig):
            raise TypeError(f"args must be trl's GKDConfig, got {type(args).__name__}")
        if args.packing or args.padding_free:
            raise ValueError(
                "packing and padding_free must be False, as GKDTrainer's own collator does neither: pass a "
                "data_collator that packs, such as trl's DataCollatorForLanguageModeling(padding_free=True), with "
                "lmbda=0"
            )
        if args.lmbda and teacher_store is not None:
            raise ValueError(
                f"lmbda must be 0 with a teacher_store, which holds no text that the student writes, got {args.lmbda}: "
                "set it to 0, or pass a teacher_model or teacher_server"
            )
        if args.seq_kd and teacher_model is None:
            raise ValueError(
                "seq_kd needs a teacher_model, which writes the completions, got none: pass one, or train on "
                "completions that the teacher has written, with seq_kd=False"
            )
        if args.deepspeed or args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "GKDTrainer prepares a teacher of its own with FSDP and DeepSpeed: train with DDP, with "
                "DistillationTrainer, or with SlimTrainer(args=SlimConfig(method='gkd'))"
            )
        super().__init__(
            model,
            teacher_model,
            args,
            objective=objective,
            temperature=1.0,
            teacher_store=teacher_store,
            teacher_server=teacher_server,
            **kwargs,
        )
        if self.online_teacher is not None:
            # With seq_kd this model writes the completions.
            self.teacher_model = self.online_teacher.model
        if args.lmbda:
            self._warn_of_own_words()

    def generate_on_policy_outputs(self, model: nn.Module, inputs: dict[str, Any], generation_config: Any):
        """Generates as TRL does, and asks a server for the teacher's rows of the text; returns ids, mask and labels."""
        if "prompts" not in inputs or "position_ids" in inputs:
            raise ValueError(
                "lmbda and seq_kd must be 0 and False with batches that have position_ids or lack prompts, from which "
                f"no completion can be generated, got a batch of {sorted(inputs)}"
            )
        ids, mask, labels = super().generate_on_policy_outputs(model, inputs, generation_config)
        if self.served_teacher is not None and not self._scores_ids:
            self.served_teacher.ask({"input_ids": ids, "attention_mask": mask}, keep=False)
        return ids, mask, labels

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """Computes the loss of a batch of TRL's collator or of one that gives ``position_ids``."""
        batch = {name: value for name, value in inputs.items() if name not in _FOR_GENERATION}
        return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

    def _student_writes(self, step: int, number: int) -> bool:
        # TRL decides within the step.
        return self.lmbda > 0 or self.seq_kd


class _TeacherOfNone(nn.Module):
    """A module without parameters, with the configuration of a trainer's student, in place of a teacher."""

    def __init__(self, trainer: _GKDTrainer) -> None:
        super().__init__()
        self._trainer = (trainer,)  # in a tuple, so that it is no part of this module

    @property
    def config(self) -> Any:
        return self._trainer[0].model.config


def _joined(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns ``input_ids`` and ``attention_mask`` (B, P + C) of prompts (B, P) and completions (B, C)."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }


def _objective_of(beta: float, temperature: float) -> SlimObjective:
    """Returns the objective that is TRL's generalised Jensen-Shannon divergence where all logits are kept."""
    divergence = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
    return SlimObjective(
        "kd",
        divergence=divergence,
        beta=beta if divergence == "jsd" else None,
        rest="ghost",
        ce_weight=0.0,
        # linear_slim_loss multiplies by the squared temperature, TRL does not.
        kd_weight=temperature**-2,
        temperature=temperature,
    )


def _default_of(args: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(args) if field.name == name)
