"""Reads and writes rows of a results file and groups them by case."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

from bench.ops.case import OURS
from slimkernels.durable import Journal

CASE_FIELDS = ("op", "mode", "shape", "dtype", "sweep")
MACHINE_FIELDS = ("commit", "device", "isa", "torch")
MEMORY = "peak_extra_memory"


def read(path: Path) -> list[dict]:
    """Returns the rows of a JSONL file, without an unfinished last line; no rows if the file does not exist.

    Raises:
        ValueError: A line is no JSON object.
    """
    if not path.exists():
        return []
    rows = []
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                rows.append(_row(line, f"{path}, line {number},"))
    return rows


def _row(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {line.strip()[:40]!r}: remove the line")
    return row


def arguments_rows(parser: argparse.ArgumentParser, path: Path, *fields: str) -> list[dict]:
    """Returns the rows of the file ``--out``; a file that holds anything else is an error of the arguments.

    Args:
        parser: Parser that reports the error and exits.
        path: The file, which may be missing.
        fields: Fields that every row has.
    """
    try:
        rows = read(path)
    except (OSError, ValueError) as error:
        parser.error(f"--out must be a JSONL file of rows: {error}")
    for row in rows:
        if missing := [field for field in fields if field not in row]:
            parser.error(
                f"--out must be a file of this experiment's rows, got {path}, in which one has no {missing[0]}"
            )
    return rows


def append(path: Path, rows: Iterable[dict]) -> None:
    """Appends rows to a JSONL file in one write, so that an interrupted run leaves no part of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))


def add(path: Path, row: dict) -> None:
    """Appends a row to a JSONL file that several runs share: it is only held for as long as that takes."""
    with Journal(path, wait_s=60) as journal:
        journal.append(json.dumps(row).encode() + b"\n")


def case_of(row: dict) -> tuple:
    """Returns the fields that identify the case of a row."""
    return tuple(row.get(field) for field in CASE_FIELDS)


def measured(rows: Iterable[dict], machine: dict, metrics: tuple[str, ...]) -> set[tuple]:
    """Returns the cases that already have one of ``metrics`` from the same commit, machine and thread count.

    Rows from a modified working tree never count, because the tree may have changed since.
    """
    if machine["commit"] == "unknown" or machine["commit"].endswith("-dirty"):
        return set()
    fields = (*MACHINE_FIELDS, "threads")
    wanted = tuple(machine[field] for field in fields)
    return {
        case_of(row) for row in rows if row["metric"] in metrics and tuple(row.get(field) for field in fields) == wanted
    }


class CaseRecord:
    """The newest rows of one case: all rows of the commit and the machine that timed our op last.

    Attributes:
        row: The last time of our op; all rows share its case, commit and machine.
        threads: Thread counts our op was timed on, ascending.
        peers: Names of the other providers that were timed.
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
        """Returns the row with a provider's time or throughput; None if it was not timed."""
        return self._rows.get((provider, self.row["metric"], threads))

    def speedup(self, provider: str, threads: int) -> float | None:
        """Returns how many times as long as ours a provider takes; None if either was not timed."""
        ours, theirs = self.timing(OURS, threads), self.timing(provider, threads)
        return theirs["p50"] / ours["p50"] if ours and theirs else None

    def over_floor(self, threads: int) -> float | None:
        """Returns how many times as long as the floor ours takes; None without a time or a floor."""
        ours = self.timing(OURS, threads)
        if ours is None or not ours.get("floor"):
            return None
        ratio = ours["p50"] / ours["floor"]
        return ratio if ours["metric"] == "time" else 1 / ratio

    def peak_bytes(self, provider: str) -> float | None:
        """Returns the peak extra memory, from the largest thread count it was measured with; None if it was not."""
        found = {key[2]: row["p50"] for key, row in self._rows.items() if key[:2] == (provider, MEMORY)}
        return found[max(found)] if found else None


def newest_cases(rows: Iterable[dict]) -> list[CaseRecord]:
    """Returns one record per case that our op was timed on, in the order in which the cases first appear."""
    grouped: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["op"] != "demo":
            grouped.setdefault(case_of(row), []).append(row)
    return [CaseRecord(group) for group in grouped.values() if any(map(_is_time_of_ours, group))]


def _is_time_of_ours(row: dict) -> bool:
    return row["provider"] == OURS and row["metric"] != MEMORY


def fitted_exponent(points: list[tuple[float, float]]) -> float:
    """Returns the least-squares slope of log(y) over log(x)."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)
