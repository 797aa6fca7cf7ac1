"""``TrlLog``, which gives TRL's trainers the metrics that they would compute from the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimkernels.ops.slim_result import SlimLoss


class TrlLog:
    """TRL's ``entropy``, ``mean_token_accuracy`` and ``num_tokens``, from the statistics of the loss.

    TRL's ``SFTTrainer`` appends the metrics of every micro-batch to its lists, and logs their means. Its own
    ``compute_loss``, which fills the lists, is not called. The sums of a micro-batch stay on the device until
    ``flush``.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {"train": [], "eval": []}

    @staticmethod
    def is_for(trainer: Any) -> bool:
        """Returns whether a trainer is an ``SFTTrainer``, whose lists these are, or a subclass."""
        return any(base.__name__ == "SFTTrainer" for base in type(trainer).__mro__) and hasattr(trainer, "_metrics")

    def add(self, mode: str, result: SlimLoss, target: Tensor, inputs: dict[str, Any]) -> None:
        """Adds a micro-batch.

        Args:
            mode: "train" or "eval".
            result: The loss with its statistics.
            target: (N,) labels; ignored ones are negative.
            inputs: The batch as the trainer was given it.
        """
        if result.entropy is None or result.argmax_correct is None:
            raise ValueError("result must have statistics, got none: compute it with statistics='without_overlap'")
        num_tokens = torch.zeros((), device=target.device)
        if "attention_mask" in inputs:
            num_tokens = inputs["attention_mask"].sum()
        elif "position_ids" in inputs:
            num_tokens = num_tokens + inputs["position_ids"].shape[1]
        sums = (result.entropy.sum(), result.argmax_correct.sum(), (target >= 0).sum(), num_tokens)
        self._sums[mode].append(torch.stack([number.double() for number in sums]))

    def flush(self, trainer: Any, over_processes: Callable[[Tensor], Tensor]) -> None:
        """Appends the metrics of the micro-batches to the trainer's lists, and forgets them.

        Args:
            trainer: Trainer that ``is_for`` accepts.
            over_processes: Function that sums a tensor over the processes that train together.
        """
        for mode, added in self._sums.items():
            if not added:
                continue
            metrics = trainer._metrics[mode]
            for entropy, correct, num_labels, num_tokens in over_processes(torch.stack(added)).tolist():
                metrics["entropy"].append(entropy / max(num_labels, 1.0))
                metrics["mean_token_accuracy"].append(correct / max(num_labels, 1.0))
                if mode == "train":
                    trainer._total_train_tokens += int(num_tokens)
            metrics["num_tokens"] = [trainer._total_train_tokens]
            added.clear()
