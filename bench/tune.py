"""Measures the launch settings of the Triton kernels on this GPU and writes them into the table that is shipped.

python -m bench.tune [--only slim_loss]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench.machine import ROOT
from bench.ops.case import OURS, Case, five_per_cent
from bench.ops.cases import sample_case, slim_loss_case, topk_case
from bench.ops.clock import CudaClock
from slimkernels.ops import _library
from slimkernels.ops.triton import launch
from slimkernels.ops.triton.launch import Settings

TABLE = ROOT / "slimkernels/data/launch_settings.json"
CANDIDATES = [
    Settings(block, warps, max_registers)
    for max_registers in (None, 255)  # as the assembler chooses, or all registers that a thread can have
    for block in (1024, 2048, 4096, 8192, 16384, 32768)
    for warps in (4, 8, 16, 32)
    if 1 <= block // (32 * warps) <= 64
]
ROUNDS = 21


def cases() -> list[Case]:
    """Returns the cases to tune: the row ops on a short and a long vocabulary, with 2-byte and 4-byte entries."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for num_rows, vocab_size in ((4096, 32768), (2048, 131072)):
            kept = five_per_cent(vocab_size)
            found += [
                topk_case(num_rows, vocab_size, kept, dtype, sweep="V"),
                slim_loss_case(num_rows, vocab_size, kept, dtype, sweep="V"),
                sample_case(num_rows, vocab_size, 50, dtype, sweep="V"),
            ]
    return found


def best_of(candidates: Iterable[Settings], seconds_of: Callable[[Settings], float]) -> tuple[Settings, float]:
    """Returns the fastest candidate and its time; candidates that fail, for lack of registers for example, are skipped.

    Raises:
        RuntimeError: Every candidate failed.
    """
    times: dict[Settings, float] = {}
    for candidate in candidates:
        try:
            times[candidate] = seconds_of(candidate)
        except (RuntimeError, AssertionError, ValueError) as error:
            print(f"  {candidate}: skipped, {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    if not times:
        raise RuntimeError("no candidate could be launched")
    best = min(times, key=times.__getitem__)
    return best, times[best]


def tune(case: Case) -> Settings:
    """Returns the fastest settings of a case's op that give the right result."""
    shipped, clock = launch.settings_of, CudaClock()

    def seconds_of(candidate: Settings) -> float:
        launch.settings_of = lambda op, like: candidate if op == case.op else shipped(op, like)
        try:
            run = case.gated_work(ours_only=True).providers[OURS]
            return statistics.median(clock.seconds(run) for _ in range(ROUNDS))
        finally:
            launch.settings_of = shipped

    best, seconds = best_of(CANDIDATES, seconds_of)
    print(f"{case.name}: {best}, {1e3 * seconds:.3f} ms")
    return best


def merged(entries: list[dict], new: dict) -> list[dict]:
    """Returns the table's entries with the one for the same case replaced by ``new``."""
    key = ("op", "architecture", "itemsize", "vocab_size")
    return [entry for entry in entries if any(entry[name] != new[name] for name in key)] + [new]


def write(path: Path, table: dict) -> None:
    """Writes the table as JSON with one line per entry."""
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in table["settings"])
    path.write_text(f'{{\n  "note": {json.dumps(table["note"])},\n  "settings": [\n{lines}\n  ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="tune only cases whose name contains this")
    args = parser.parse_args()
    if "CUDA C++" in _library.cuda_kernels.values():
        raise SystemExit(
            "CUDA C++ kernels have no launch settings: set SLIMKERNELS_CUDA_KERNELS=triton to tune Triton's"
        )
    torch.set_default_device("cuda")
    architecture = launch.architecture_of(torch.device("cuda", torch.cuda.current_device()))
    table = json.loads(TABLE.read_text())
    for case in cases():
        if args.only not in case.name:
            continue
        best = tune(case)
        found = {"op": case.op, "architecture": architecture, "itemsize": case.dtype.itemsize}
        found |= {"vocab_size": case.sizes["V"], "block": best.block, "num_warps": best.num_warps}
        if best.max_registers is not None:
            found["max_registers"] = best.max_registers
        found["source"] = "measured"
        table["settings"] = merged(table["settings"], found)
        write(TABLE, table)


if __name__ == "__main__":
    main()
