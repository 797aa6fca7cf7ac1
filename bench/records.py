"""Rows of a results file: which belong together, and what they say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from bench.ops.case import OURS
from slimkernels.durable import whole_lines

CASE_FIELDS = ("op", "mode", "shape", "dtype", "sweep")
MACHINE_FIELDS = ("commit", "device", "isa", "torch")
MEMORY = "peak_extra_memory"


def read(path: Path) -> list[dict]:
    """The rows of a JSONL file, none where it does not exist."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [json.loads(line) for line in whole_lines(file)]


def case_of(row: dict) -> tuple:
    """What names the case of a row."""
    return tuple(row.get(field) for field in CASE_FIELDS)


def measured(rows: Iterable[dict], machine: dict, metrics: tuple[str, ...]) -> set[tuple]:
    """The cases that have one of ``metrics`` from the same commit, machine and threads.

    Of a working tree that differs from its commit nothing counts: the next one may differ otherwise.
    """
    if machine["commit"] == "unknown" or machine["commit"].endswith("-dirty"):
        return set()
    fields = (*MACHINE_FIELDS, "threads")
    wanted = tuple(machine[field] for field in fields)
    return {
        case_of(row) for row in rows if row["metric"] in metrics and tuple(row.get(field) for field in fields) == wanted
    }


class CaseRecord:
    """The newest rows of one case: all of the commit and the machine that timed ours last.

    Attributes:
        row: One of ours, for what all rows share.
        threads: The thread counts it was timed on, ascending.
        peers: The other providers that were timed.
    """

    def __init__(self, rows: list[dict]) -> None:
        last = [row for row in rows if _is_time_of_ours(row)][-1]
        newest = [last[field] for field in MACHINE_FIELDS]
        self._rows = {
            (row["provider"], row["metric"], row["threads"]): row
            for row in rows
            if [row[field] for field in MACHINE_FIELDS] == newest
        }
        timed = [row for row in self._rows.values() if row["metric"] != MEMORY]
        self.threads = sorted({row["threads"] for row in timed if row["provider"] == OURS})
        self.row = last
        self.peers = [name for name in dict.fromkeys(row["provider"] for row in timed) if name != OURS]

    def timing(self, provider: str, threads: int) -> dict | None:
        """The row with a provider's time, or throughput."""
        return self._rows.get((provider, self.row["metric"], threads))

    def speedup(self, provider: str, threads: int) -> float | None:
        """How many times longer than ours a provider takes."""
        ours, theirs = self.timing(OURS, threads), self.timing(provider, threads)
        return theirs["p50"] / ours["p50"] if ours and theirs else None

    def over_floor(self, threads: int) -> float | None:
        """How many times longer than the floor ours takes."""
        ours = self.timing(OURS, threads)
        if ours is None or not ours.get("floor"):
            return None
        ratio = ours["p50"] / ours["floor"]
        return ratio if ours["metric"] == "time" else 1 / ratio

    def peak_bytes(self, provider: str) -> float | None:
        """The peak extra memory, on the most threads it was measured on."""
        found = {key[2]: row["p50"] for key, row in self._rows.items() if key[:2] == (provider, MEMORY)}
        return found[max(found)] if found else None


def newest_cases(rows: Iterable[dict]) -> list[CaseRecord]:
    """One record per case, in the order in which the cases first appear; cases without a time of ours are left out."""
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["op"] != "demo":
            grouped.setdefault(case_of(row), []).append(row)
    return [CaseRecord(group) for group in grouped.values() if any(map(_is_time_of_ours, group))]


def _is_time_of_ours(row: dict) -> bool:
    return row["provider"] == OURS and row["metric"] != MEMORY


def fitted_exponent(points: list[tuple[float, float]]) -> float:
    """The least-squares slope of log(y) over log(x)."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)
