"""Options of ``slimkernels train`` that follow its progress: schedules, and the order of the documents."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from slimkernels.cli.options import FieldOptions

ORDERS = ("random", "easy-first")


def _schedule(text: str) -> tuple[str, str]:
    """Parses NAME=SCHEDULE."""
    name, found, schedule = text.partition("=")
    if not (found and name.isidentifier() and schedule):
        raise argparse.ArgumentTypeError(f"must be NAME=SCHEDULE, as in kd_weight=linear:0:1, got {text!r}")
    return name, schedule


# Fields of SlimConfig.
PROGRESS_FIELDS: FieldOptions = {
    "schedules": (
        "--schedule",
        {"type": _schedule, "action": "append", "metavar": "NAME=SCHEDULE"},
        "a number of the loss over the training, as in kd_weight=linear:0:1 or temperature=cosine:4:1 (kinds: linear, "
        "cosine, taid); may be repeated (default: none)",
    ),
    "document_order": (
        "--order",
        {"choices": ORDERS},
        "order of the documents in every epoch; easy-first: by the teacher's mean entropy, in ten buckets (default: "
        "random)",
    ),
}


def schedules_by_name(given: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Returns the schedules of ``--schedule`` by the names of their options.

    Raises:
        ValueError: A name was given twice.
    """
    schedules: dict[str, str] = {}
    for name, schedule in given:
        if name in schedules:
            raise ValueError(f"--schedule must name an option once, got {name!r} twice: leave one of them out")
        schedules[name] = schedule
    return schedules
