"""The table of the ops, read from their docstrings; ``tests/test_docs.py`` checks that it is true."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import slimkernels as sk

OPS = (
    "topk_logits",
    "linear_topk_logits",
    "gather_logits",
    "linear_gather_logits",
    "sparse_softmax",
    "slim_loss",
    "linear_slim_loss",
    "sample_logits",
    "sample_distinct",
    "sample_targets",
    "mixed_targets",
    "decode_logits",
)
_SUPPORTS = re.compile(
    r"Supports: (?P<devices>[\w ]+) x \((?P<dtypes>[^)]*)\) x (?P<backward>no backward|backward(?: \([^)]*\))?) x"
    r" (?P<deterministic>deterministic)"
)


class Support(NamedTuple):
    """Devices, dtypes, backward pass and determinism of an op."""

    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    backward: str
    deterministic: bool


def support_of(op: str) -> Support:
    """Reads the "Supports:" line of an op's docstring.

    Raises:
        ValueError: There is no such line.
    """
    text = " ".join(inspect.getdoc(getattr(sk, op)).split())
    found = _SUPPORTS.search(text)
    if found is None:
        raise ValueError(f"the docstring of {op} has no line `Supports: devices x (dtypes) x backward x deterministic`")
    backward = found["backward"].removeprefix("backward").strip(" ()") or "yes"
    return Support(
        tuple(found["devices"].split(" and ")),
        tuple(found["dtypes"].split(", ")),
        "no" if found["backward"] == "no backward" else backward,
        found["deterministic"] == "deterministic",
    )


def ops_table() -> str:
    """Returns one line per op."""
    lines = ["| op | devices | dtypes | backward | deterministic |", "|---|---|---|---|---|"]
    for op in OPS:
        support = support_of(op)
        cells = (
            f"`sk.{op}`",
            ", ".join(support.devices),
            ", ".join(support.dtypes),
            support.backward,
            "yes" if support.deterministic else "no",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
