"""Runs the tests of the GPU kernels in many processes within a time limit, and leaves their results in a folder.

python tests/scripts/run_on_gpu.py --out DIR [--processes 16] [--minutes 7] [--rehearse]

Each process runs every n-th test (``--shard``) of the ops' test files on the CUDA kernels and writes
``DIR/shard-*.{xml,log}``; one more runs ``test_gpu.py``. Processes that are not done in time are interrupted, so that
pytest still writes what it has. ``DIR/summary.json`` holds the counts and the exit status of each process.

--rehearse shows on a machine without a GPU that everything starts, is split and is written: the tests run on the CPU's
kernels, and those that need a device are skipped. The summary then says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
# Files whose tests run on any kernels.
OP_TESTS = (
    "test_topk_logits.py",
    "test_sparse_softmax.py",
    "test_slim_loss.py",
    "test_slim_loss_operator.py",
    "test_slim_loss_tails.py",
    "test_slim_statistics.py",
    "test_decode_logits.py",
    "test_sample_logits.py",
    "test_sample_targets.py",
    "test_gather_logits.py",
)
# Those left out take minutes of compiling, or repeat on a GPU what they show on a CPU.
SUBSET = (
    "hand_worked or hostile or layout or edges or tails or extremes or ties or strided or repeatable or batch or nan "
    "or divergence or statistics or padding or shapes or empty"
)
REHEARSAL = "rehearsal, no device: the CPU's kernels ran"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=7, help="time after which processes are interrupted")
    parser.add_argument("--subset", default=SUBSET, help="pytest -k expression of the ops' tests")
    parser.add_argument("--rehearse", action="store_true", help="run without a device")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; use --rehearse to try the runner without one")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    kernels = "cpu" if args.rehearse else "cuda"
    files = [str(TESTS / name) for name in OP_TESTS]
    commands = {
        f"shard-{index:02}": [*files, f"--kernels={kernels}", f"--shard={index}/{args.processes}", "-k", args.subset]
        for index in range(args.processes)
    }
    # The ops' own tests are those of the other processes.
    commands["device"] = [str(TESTS / "test_gpu.py"), "-k", "not the_tests_of_an_op"]
    processes = {name: start(name, options, args.out) for name, options in commands.items()}
    interrupted = wait(processes, deadline)
    results = {name: result_of(args.out / f"{name}.xml") for name in processes}
    for name, process in processes.items():
        results[name] |= {"status": process.returncode, "interrupted": name in interrupted}
    summary = {
        "device": REHEARSAL if args.rehearse else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "total": {what: sum(result[what] for result in results.values()) for what in ("tests", "failures", "skipped")},
        "processes": results,
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({key: summary[key] for key in ("device", "total")}))  # noqa: T201 -- a script
    # Status 5: no test of the subset fell to the process, or all are skipped.
    bad = [name for name, process in processes.items() if process.returncode not in (0, 5)]
    if bad:
        sys.exit(f"failed or interrupted: {', '.join(bad)}; see {args.out}/NAME.log")


def start(name: str, options: list[str], out: Path) -> subprocess.Popen:
    """Starts pytest in a process group of its own."""
    arguments = ["-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={out.resolve() / name}.xml", *options]
    with (out / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=TESTS.parent,
            env=os.environ | {"PYTHONPATH": str(TESTS.parent)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait(processes: dict[str, subprocess.Popen], deadline: float) -> set[str]:
    """Waits for the processes, interrupts those that miss the deadline, and returns their names."""
    interrupted = set()
    for name, process in processes.items():
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            interrupted.add(name)
            os.killpg(process.pid, signal.SIGINT)
    for name in interrupted:
        try:
            processes[name].wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(processes[name].pid, signal.SIGKILL)
            processes[name].wait()
    return interrupted


def result_of(report: Path) -> dict[str, int]:
    """Returns the counts of a process, 0 where it wrote no report."""
    counts = {"tests": 0, "failures": 0, "skipped": 0}
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):  # noqa: S314 -- pytest wrote it
            counts["tests"] += int(suite.get("tests", 0))
            counts["failures"] += int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            counts["skipped"] += int(suite.get("skipped", 0))
    return counts


if __name__ == "__main__":
    main()
