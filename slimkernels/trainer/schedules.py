"""Options of the loss that change over a training: by its progress, or as TAID's blend does by the divergence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

# The key of the state in a checkpoint's trainer_state.json.
STATE_NAME = "slimkernels.schedules"
_FORMS = "a number, 'linear:FROM:TO', 'cosine:FROM:TO' or 'taid:FROM:TO', as in 'linear:0:1'"
# Numbers after the kind: the least and the most of them.
_COUNTS = {"constant": (1, 1), "linear": (2, 2), "cosine": (2, 2), "taid": (2, 4)}
# Keeps the relative change finite where the divergence was 0, as in the authors' code.
_LEAST_DIVERGENCE = 1e-15


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number over the progress of a training.

    Attributes:
        kind: "constant", "linear", "cosine" (half a period, flat at both ends) or "taid".
        start: Value of the first optimizer step.
        end: Value of the last one; "taid" reaches it then at the latest.
        alpha: Step size of "taid".
        beta: Momentum of "taid".
    """

    kind: str
    start: float
    end: float
    alpha: float = 5e-4
    beta: float = 0.99

    def at(self, progress: float) -> float:
        """Returns the value at a progress in [0, 1]; of "taid" the least one that it may have there."""
        share = (1 - math.cos(math.pi * progress)) / 2 if self.kind == "cosine" else progress
        return self.start * (1 - share) + self.end * share


def parse_schedule(text: str | float, name: str) -> Schedule:
    """Reads a schedule.

    Args:
        text: A number, which stays as it is; or "constant:VALUE", "linear:FROM:TO", "cosine:FROM:TO" or "taid:FROM:TO",
            the last also with its step size and momentum, "taid:FROM:TO:ALPHA:BETA".
        name: Name of the option, for errors.

    Raises:
        ValueError: The text has another form, or a number is out of range.
    """
    kind, *words = text.split(":") if isinstance(text, str) and ":" in text else ("constant", text)
    try:
        numbers = [float(word) for word in words]
    except (TypeError, ValueError):
        numbers = []
    least, most = _COUNTS.get(kind, (1, 0))
    if isinstance(text, bool) or not least <= len(numbers) <= most or not all(map(math.isfinite, numbers)):
        raise ValueError(f"the schedule of {name} must be {_FORMS}, got {text!r}")
    schedule = Schedule(kind, numbers[0], numbers[min(1, len(numbers) - 1)], *numbers[2:])
    if kind != "taid":
        return schedule
    if not 0 <= schedule.start < schedule.end <= 1:
        raise ValueError(f"the schedule of {name} must grow within [0, 1] with 'taid:FROM:TO', got {text!r}")
    if not (0 <= schedule.alpha <= 1 and 0 <= schedule.beta < 1):
        raise ValueError(
            f"the schedule of {name} must have ALPHA in [0, 1] and BETA in [0, 1) with 'taid:FROM:TO:ALPHA:BETA', "
            f"got {text!r}"
        )
    return schedule


@dataclasses.dataclass
class _Adapted:
    """The state of a schedule of kind "taid": its value, and the divergence and the momentum of the last step."""

    value: float
    divergence: float | None = None
    momentum: float = 0.0


class Schedules:
    """The scheduled options of one training.

    Args:
        schedules: Schedules by the names of the options.

    Attributes:
        last: Values of the last training step.
    """

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        self._schedules = dict(schedules)
        self._adapted: dict[str, _Adapted] = {}
        self.last: dict[str, float] = {}
        self.load_state_dict(None)

    @property
    def adapt(self) -> bool:
        """Whether one of them follows the divergence, so that it has a state."""
        return bool(self._adapted)

    def values(self, step: int, num_steps: int) -> dict[str, float]:
        """Returns the values at optimizer step ``step`` of ``num_steps``, counted from 0."""
        progress = _progress(step, num_steps)
        return {
            name: self._adapted[name].value if name in self._adapted else schedule.at(progress)
            for name, schedule in self._schedules.items()
        }

    def observe(self, divergence: float, step: int, num_steps: int) -> None:
        """Moves the schedules of kind "taid" on, to step ``step``.

        Equivalent to, with J the mean divergence of a step (Shing et al. 2025, arXiv 2501.16937, algorithm 1)::

            momentum = beta * momentum + (1 - beta) * (last_J - J) / last_J
            t = min(end, max(linear(start, end), t + alpha * sigmoid(momentum) * (1 - t)))

        A divergence that is not finite changes nothing.
        """
        if not math.isfinite(divergence):
            return
        for name, now in self._adapted.items():
            schedule = self._schedules[name]
            if now.divergence is not None:
                change = (now.divergence - divergence) / (now.divergence + _LEAST_DIVERGENCE)
                now.momentum = schedule.beta * now.momentum + (1 - schedule.beta) * change
                # The sigmoid, in a form that does not overflow.
                growth = (1 + math.tanh(now.momentum / 2)) / 2
                grown = now.value + schedule.alpha * growth * (1 - now.value)
                now.value = min(schedule.end, max(schedule.at(_progress(step, num_steps)), grown))
            now.divergence = divergence

    def state_dict(self) -> dict[str, dict[str, float | None]]:
        """Returns the state, JSON values."""
        return {name: dataclasses.asdict(now) for name, now in self._adapted.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]] | None) -> None:
        """Continues from the result of ``state_dict``; None starts again."""
        adapting = {name: schedule for name, schedule in self._schedules.items() if schedule.kind == "taid"}
        self._adapted = {
            name: _Adapted(schedule.start) if state is None else _Adapted(**state[name])
            for name, schedule in adapting.items()
        }


def _progress(step: int, num_steps: int) -> float:
    return min(step / max(num_steps - 1, 1), 1.0)


class AdaptSchedules(TrainerCallback):
    """A callback that moves schedules on by the divergence of every step, and keeps their state in checkpoints.

    A step's divergence is the mean over its labels; reading it waits for the device.

    Args:
        schedules: The schedules.
        device: Device of the divergences.
        over_processes: Function that sums a tensor over the processes that train together.
    """

    def __init__(self, schedules: Schedules, device: torch.device, over_processes: Callable[[Tensor], Tensor]) -> None:
        self._schedules, self._over_processes = schedules, over_processes
        self._sums = torch.zeros(2, device=device, dtype=torch.float64)

    def add(self, divergence: Tensor, target: Tensor) -> None:
        """Adds the divergences (N,) of a micro-batch, whose ignored labels are negative."""
        self._sums += torch.stack([divergence.detach().double().sum(), (target >= 0).sum()]).to(self._sums.device)

    def on_train_begin(self, args, state: Any, control, **kwargs) -> None:
        """Continues from the state of the checkpoint that the training continues from.

        Raises:
            ValueError: The checkpoint has none.
        """
        kept = state.stateful_callbacks.get(STATE_NAME)
        if kept is None and state.global_step > 0:
            raise ValueError(
                "resume_from_checkpoint must be a checkpoint with the state of the schedules, got one without: give "
                "this run an output_dir of its own"
            )
        self._schedules.load_state_dict(kept)
        self._sums.zero_()

    def on_step_end(self, args, state: Any, control, **kwargs) -> None:
        """Moves the schedules on."""
        divergence, num_labels = self._over_processes(self._sums).tolist()
        self._sums.zero_()
        if num_labels:
            self._schedules.observe(divergence / num_labels, state.global_step, state.max_steps)
        state.stateful_callbacks[STATE_NAME] = self._schedules.state_dict()
