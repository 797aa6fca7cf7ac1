"""The runner of the tests on a GPU, without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scripts import run_on_gpu

ROOT = Path(__file__).parents[1]


def test_processes_that_miss_the_deadline_are_interrupted():
    sleeping = [sys.executable, "-c", "import time; time.sleep(3600)"]
    processes = {
        "done": subprocess.Popen(["true"], start_new_session=True),
        "slow": subprocess.Popen(sleeping, start_new_session=True, stderr=subprocess.DEVNULL),
    }
    begin = time.monotonic()
    assert run_on_gpu.wait(processes, begin + 0.5) == {"slow"}
    assert time.monotonic() - begin < 900
    assert processes["done"].returncode == 0
    assert processes["slow"].returncode not in (0, None)


def test_a_process_without_a_report_counts_as_nothing(tmp_path):
    assert run_on_gpu.result_of(tmp_path / "none.xml") == {"tests": 0, "failures": 0, "skipped": 0}
    report = '<testsuites><testsuite tests="5" failures="1" errors="2" skipped="1"/></testsuites>'
    (tmp_path / "some.xml").write_text(report)
    assert run_on_gpu.result_of(tmp_path / "some.xml") == {"tests": 5, "failures": 3, "skipped": 1}


def test_every_file_of_the_runner_exists():
    assert all((ROOT / "tests" / name).is_file() for name in run_on_gpu.OP_TESTS)


@pytest.mark.slow  # three processes that collect the tests of every op
def test_a_rehearsal_splits_the_tests_and_says_that_there_is_no_device(tmp_path):
    runner = [sys.executable, str(ROOT / "tests/scripts/run_on_gpu.py"), "--out", str(tmp_path), "--rehearse"]
    options = ["--processes", "2", "--subset", "topk_logits_hand_worked"]
    done = subprocess.run([*runner, *options], env=os.environ, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["device"].startswith("rehearsal, no device")
    ran = [set(re.findall(r"^\S+::(\S+) PASSED", (tmp_path / f"shard-{i:02}.log").read_text(), re.M)) for i in range(2)]
    assert all(ran)
    assert not ran[0] & ran[1]
    assert summary["total"]["tests"] >= len(ran[0] | ran[1])
