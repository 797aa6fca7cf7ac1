"""A loss for torchtitan whose chunks carry the teacher's largest log-probabilities, and a trainer that passes them on.

In a configuration of torchtitan::

    loss=ChunkedLossWrapper.Config(loss_fn=SlimLoss.Config(rest="ghost"))    # of a SlimTrainer.Config
"""

# torchtitan is not installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import BaseLoss
from torchtitan.distributed.spmd_types import spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.trainer import Trainer

from slimkernels.integrations.rows import loss_of_logprobs

_TEACHER = ("teacher_ids", "teacher_logprobs")


class SlimLoss(BaseLoss):
    """``slim_loss`` of a chunk of logits, summed over the labels and divided by those of the whole step.

    The wrapper splits ``teacher_ids`` and ``teacher_logprobs`` (B, T, K) along T as it splits the labels. Row t is the
    teacher's distribution over label t, at temperature 1 and normalised over the vocabulary; negative ids are padding.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Options of ``slim_loss``, with its defaults."""

        rest: str = "renorm"
        divergence: str = "forward_kl"
        token_weight: str = "teacher_over_student"
        temperature: float = 1.0
        ce_weight: float = 1.0
        kd_weight: float = 1.0
        beta: float | None = None

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        if compile_config is not None and compile_config.enable and "loss" in compile_config.components:
            raise ValueError('compile.components must not hold "loss": the loss is one kernel, and nothing to compile')
        names = ("rest", "divergence", "token_weight", "temperature", "ce_weight", "kd_weight", "beta")
        self.options = {name: getattr(config, name) for name in names}

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        *,
        teacher_ids: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Computes the loss of logits (B, T, V), and no metrics.

        Raises:
            ValueError: The chunk has no teacher, or its vocabulary is split in a way that only torchtitan's own losses
                know.
        """
        if teacher_ids is None or teacher_logprobs is None:
            raise ValueError(f"the loss needs {_TEACHER}, (B, T, K) entries of the data loader's dictionaries")
        if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
            raise ValueError(
                'parallelism.spmd_backend must be another than "spmd_types" with tensor parallelism: its logits do not '
                "say which slice of the vocabulary they are"
            )
        result = loss_of_logprobs(labels, teacher_ids, teacher_logprobs, logits=pred, reduction="sum", **self.options)
        return (result.loss if global_valid_tokens is None else result.loss / global_valid_tokens), {}


class SlimTrainer(Trainer):
    """A trainer that gives the teacher's entries of the data loader's dictionaries to the loss, not to the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """The configuration of torchtitan's trainer, which builds this one."""

    def __init__(self, config: Config) -> None:
        if config.parallelism.pipeline_parallel_degree > 1 or config.parallelism.context_parallel_degree > 1:
            raise ValueError("pipeline and context parallel degree must be 1, with which a process has whole rows")
        super().__init__(config)

    def _forward_backward_body(
        self, inputs: Tensor, labels: Tensor, global_valid_tokens: Tensor, extra_kwargs: dict[str, Any]
    ) -> Tensor:
        teacher = {name: extra_kwargs.get(name) for name in _TEACHER}
        if any(rows is None for rows in teacher.values()):
            raise ValueError(
                f"the data loader's dictionaries must have {_TEACHER}, (B, T, K) each, got further entries "
                f"{sorted(extra_kwargs)}: put the teacher's rows of the labels into them"
            )
        others = {name: value for name, value in extra_kwargs.items() if name not in _TEACHER}
        with self.train_context():
            pred = self.model_parts[0](inputs, **others)
            loss, _ = self.loss_fn(pred, labels, global_valid_tokens, **teacher)
            del pred
            loss.backward()
        return loss
