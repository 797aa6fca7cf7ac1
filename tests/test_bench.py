"""Tests of the benchmark suite: its cases and their checks, its arithmetic, resuming, comparing and tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import blocks, codecs, compare, machine, overview, records, table, training_step
from bench.ops import peers, worker
from bench.ops.case import OURS, Case, Work, random_logits
from bench.ops.cases import all_cases
from bench.ops.cuda_cases import cuda_cases
from bench.ops.measure import peak_extra_bytes, percentiles, rounds_for, time_providers

ROOT = Path(__file__).parents[1]
SMALL = all_cases(shrink=32)
SMALL_CUDA = cuda_cases(shrink=64)
WHERE = {"device": "cpu", "isa": "avx512", "threads": 1, "torch": "2.13.0", "commit": "abc", "date": "2026-01-02T03"}


def row(provider=OURS, p50=2.0, **fields) -> dict:
    base = {"op": "op", "mode": "fwd", "shape": "4x8", "dtype": "float32", "sizes": {"N": 4, "V": 8}, "sweep": None}
    base |= {"provider": provider, "metric": "time", "unit": "ms", "p20": p50, "p50": p50, "p80": p50, "floor": 1.0}
    return base | {"peer": "peer"} | WHERE | fields


@pytest.mark.parametrize("case", SMALL + SMALL_CUDA, ids=lambda case: case.name)
def test_bench_case_builds_and_passes_its_check(case):
    work = case.build()
    assert tuple(work.providers) == (OURS, *case.peers)
    for provider, run in work.providers.items():
        if provider != "torch.compile":  # compiling takes longer than all the rest
            work.prepare(provider)
            work.check(provider, run())


@pytest.mark.parametrize("case", [case for case in SMALL if case.sweep is None], ids=lambda case: case.name)
def test_bench_check_finds_a_wrong_result(case):
    work = case.build()
    result = work.providers[OURS]()
    for leaf in work.leaves:
        leaf.grad.mul_(1.5)
    with pytest.raises(AssertionError, match="wrong result"):
        work.check(OURS, _spoilt(result))


def _spoilt(result):
    if isinstance(result, torch.Tensor):  # a loss, whose gradient was spoilt
        return result
    if isinstance(result, tuple) and hasattr(result, "token"):
        return result._replace(token=result.token.flip(0).roll(1))
    if isinstance(result, tuple):
        return result[0], result[1] + 1
    ids = result.ids.clone()
    ids[:, 0] = result.ids[:, 1]
    return dataclasses.replace(result, ids=ids)


@pytest.mark.parametrize("case", [case for case in SMALL if case.masked], ids=lambda case: case.name)
def test_bench_masked_rows_are_in_the_same_memory_as_others(case):
    work = case.build()
    ours, other = work.providers
    assert work.providers[ours] is work.providers[other]
    logits, addresses = work.inputs[0], [tensor.data_ptr() for tensor in work.inputs]
    for provider in (ours, other, ours):
        work.prepare(provider)
        expected = 0.5 if provider == ours else 0.0
        assert (logits == -math.inf).double().mean().item() == expected
        assert [tensor.data_ptr() for tensor in work.inputs] == addresses
        work.check(provider, work.providers[provider]())
    # Both are written to the memory before each time is taken, and the check sees what was written last.
    work.prepare(other)
    with pytest.raises(AssertionError, match="wrong result"):
        work.check(ours, work.providers[ours]())
    prepared = []
    time_providers(case, dataclasses.replace(work, prepare=prepared.append), rounds=3)
    assert prepared == [ours, other] * 4


@pytest.mark.parametrize("list_cases", [all_cases, cuda_cases])
def test_bench_names_are_unique_and_sweeps_have_three_points(list_cases):
    cases = list_cases()
    assert len({case.name for case in cases}) == len(cases)
    points: dict[tuple, set] = {}
    for case in cases:
        if case.sweep:
            points.setdefault((case.op, case.sweep), set()).add(case.sizes[case.sweep])
    assert {letter for _, letter in points} == {"N", "V", "K"}
    assert all(len(sizes) == 3 for sizes in points.values())


def test_bench_percentiles_by_hand():
    assert percentiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == {"p20": 2.0, "p50": 3.0, "p80": 5.0}
    assert percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


@pytest.mark.parametrize(
    ("seconds", "compared", "expected"),
    [(0.5, True, 9), (0.5, False, 9), (2, True, 5), (2, False, 3), (4, True, 3), (4, False, 2)],
)
def test_bench_slow_providers_get_fewer_rounds(seconds, compared, expected):
    assert rounds_for(seconds, 9, compared) == expected


def test_bench_providers_take_turns():
    order = []
    case = Case("op", "fwd", torch.float32, {"N": 1}, 8, lambda: None, peers=("peer",))
    slow = {name: lambda name=name: (order.append(name), sum(range(200_000))) for name in (OURS, "peer")}
    times = time_providers(case, Work(slow, lambda *_: None), rounds=5)
    assert [len(values) for values in times.values()] == [5, 5]
    assert order[:2] == [OURS, "peer"]
    timed = [name for i, name in enumerate(order[2:]) if i == 0 or name != order[1 + i]]
    assert timed == [OURS, "peer"] * 5


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_bench_peak_memory_counts_what_is_not_a_gradient():
    leaf = torch.ones(2**20, requires_grad=True)

    def run():
        held = torch.ones(2**24)
        leaf.grad = torch.ones_like(leaf)
        return held

    work = Work({OURS: run}, lambda *_: None, (leaf,))
    assert 60 * 2**20 < peak_extra_bytes(work, run) < 68 * 2**20


def test_bench_rate_and_time_are_the_same_figure():
    case = Case("op", "fwd", torch.float32, {"N": 1}, 8, lambda: None)
    assert case.figure(0.002) == 2.0
    assert dataclasses.replace(case, rate_bytes=4_000_000).figure(0.002) == 2.0


def test_bench_gate_stops_a_wrong_provider():
    def check(provider, result):
        if result != 4:
            raise AssertionError("wrong result: not 4")

    case = Case("op", "fwd", torch.float32, {"N": 1}, 8, lambda: Work({OURS: lambda: 5}, check))
    with pytest.raises(AssertionError, match="slimkernels: wrong result: not 4"):
        case.gated_work()


def test_bench_gate_skips_an_optional_peer_that_fails(capsys):
    def fails():
        raise RuntimeError("built for another torch")

    def check(provider, result):
        assert result == 4, "wrong result"

    providers = {OURS: lambda: 4, "wrong": lambda: 5, "broken": fails, "right": lambda: 4}
    case = Case("op", "fwd", torch.float32, {"N": 1}, 8, lambda: Work(dict(providers), check))
    case = dataclasses.replace(case, peers=("wrong", "broken", "right"), optional_peers=("wrong", "broken"))
    assert list(case.gated_work().providers) == [OURS, "right"]
    assert "broken is skipped, built for another torch" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another torch"):
        dataclasses.replace(case, optional_peers=("wrong",)).gated_work()


@pytest.mark.parametrize(
    ("change", "skipped"),
    [
        ({}, True),
        ({"commit": "def"}, False),
        ({"threads": 2}, False),
        ({"device": "other"}, False),
        ({"isa": "avx2"}, False),
        ({"commit": "abc-dirty"}, False),
    ],
)
def test_bench_resume_skips_what_is_measured(change, skipped):
    case = SMALL[0]
    where = WHERE | change
    measured = worker.row_of(case, OURS, WHERE, {"metric": "time"})
    if change.get("commit") == "abc-dirty":
        measured |= change
    assert (worker.pending([case], [measured], where, "time") == []) == skipped


def test_bench_resume_goes_by_case_and_metric():
    measured = worker.row_of(SMALL[0], OURS, WHERE, {"metric": "time"})
    assert worker.pending(SMALL[:2], [measured], WHERE, "time") == SMALL[1:2]
    assert worker.pending(SMALL[:2], [measured], WHERE, "memory") == SMALL[:2]


def test_bench_selection():
    def names(*options):
        return {case.op for case in worker.selected(SMALL, *options)}

    assert names("linear", False, "time", 2) == {case.op for case in SMALL if case.op.startswith("linear")}
    assert "store decode" in names("", True, "time", 1)
    assert "store decode" not in names("", True, "time", 2)
    assert "store decode" not in names("", True, "memory", 1)
    assert not any(case.sweep for case in worker.selected(SMALL, "", False, "memory", 2))


def test_bench_commit_ignores_results_and_sees_code(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = [shutil.which("git"), "-C", str(tmp_path), *identity, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name in ("code.py", "README.md", "docs/speed.md", "bench/results/cpu.jsonl"):
        (tmp_path / name).write_text("one")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    first = machine.commit(tmp_path)
    assert len(first) == 12
    (tmp_path / "bench/results/cpu.jsonl").write_text("two")
    (tmp_path / "README.md").write_text("two")
    (tmp_path / "docs/speed.md").write_text("two")
    assert machine.commit(tmp_path) == first
    (tmp_path / "code.py").write_text("two")
    assert machine.commit(tmp_path) == f"{first}-dirty"


def test_bench_exponent_of_a_power_law():
    assert records.fitted_exponent([(n, 3 * n**1.5) for n in (16, 64, 256)]) == pytest.approx(1.5)
    assert records.fitted_exponent([(1, 2.0), (10, 2.0), (100, 2.0)]) == pytest.approx(0)


def test_bench_table_by_hand():
    rows = [
        row(p50=9.0, commit="old"),
        row(provider="peer", p50=90.0, commit="old", threads=2),
        row(p50=4.0),
        row(p50=2.0),
        row(provider="peer", p50=5.0),
        row(p50=1.0, threads=2, floor=0.5),
        row(provider="peer", p50=3.0, threads=2),
        row(p50=2**20, metric=records.MEMORY, unit="bytes", threads=2),
        row(provider="peer", p50=2**23, metric=records.MEMORY, unit="bytes", threads=2),
        row(op="decode", p50=2.0, metric="throughput", unit="GB/s", floor=20.0, peer=None, commit="old"),
        row(p50=7.0, sweep="N"),
    ]
    lines = table.speed_table(rows).splitlines()
    assert lines[2] == "| `op` fwd | 4x8 | float32 | 2.0 / 1.0 ms | peer | 2.5 / 3.0x | 2.0 / 2.0x | 1 / 8 MiB |"
    assert lines[3] == "| `decode` fwd | 4x8 | float32 | 2.0 / - GB/s |  |  | 10.0 / -x |  |"
    assert lines[4] == ""
    assert "commits abc (1 cases), old (1 cases)" in lines[5]


def test_bench_table_shows_the_host_time_where_a_row_has_it():
    on_gpu = row(isa="sm_90", host_ms=0.0715)
    assert "host time" not in table.speed_table([row()])
    lines = table.speed_table([on_gpu, row(op="decode", isa="sm_90")]).splitlines()
    assert lines[0] == "| op | shape | dtype | time | peer | time over its lower bound | host time to launch it |"
    assert lines[2] == "| `op` fwd | 4x8 | float32 | 2.0 ms | peer | 2.0x | 71.5 \N{MICRO SIGN}s |"
    assert lines[3].endswith("| 2.0x |  |")


def test_bench_table_check_finds_another_number(tmp_path):
    (tmp_path / "cpu.jsonl").write_text(json.dumps(row()) + "\n" + json.dumps(row("peer", 6.0)) + "\n")
    (tmp_path / "demo.jsonl").write_bytes((ROOT / "bench/results/demo.jsonl").read_bytes())
    readme, speed = tmp_path / "README.md", tmp_path / "docs/speed.md"
    speed.parent.mkdir()
    for document, names in ((readme, ("demo",)), (speed, ("ops", "bench"))):
        document.write_text("\n".join(f"<!-- {name}:begin --><!-- {name}:end -->" for name in names))
    command = [sys.executable, "-m", "bench.table", "--results", str(tmp_path), "--documents", str(readme), str(speed)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "| 3.0x |" in speed.read_text()
    assert "| 3.0x |" not in readme.read_text()
    assert "make demo" in readme.read_text()
    subprocess.run([*command, "--check"], cwd=ROOT, check=True)
    speed.write_text(speed.read_text().replace("3.0x", "4.0x"))
    done = subprocess.run([*command, "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "run `make plots`" in done.stderr


def test_bench_overview_spans_machines_and_takes_the_newest_commit_of_each():
    rows = [
        row(p50=1.0, commit="old"),
        row("peer", 50.0, commit="old"),
        row(p50=2.0),
        row("peer", 6.0),
        row(p50=1.0, device="other"),
        row("peer", 8.0, device="other"),
        row(p50=1.0, sweep="N"),
        row("peer", 99.0, sweep="N"),
    ]
    cases = overview.Results({"cpu": rows}).cases("op")
    assert overview.ratios_of(cases) == [3.0, 8.0]
    assert overview._typical([3.0, 8.0, 4.0]) == "4.0 (3.0 to 8.0)"
    assert overview._typical([]) == ""


def test_bench_overview_figure_has_every_comparison():
    mpl = pytest.importorskip("matplotlib")
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results = overview.Results.read(ROOT / "bench/results")
    lines = overview.comparisons(results)
    assert len(lines) <= 8
    figure = overview.overview_figure(results)
    memory, speed, learning = figure.axes
    assert len(memory.patches) == 2 * len(results.cases(overview.LOSS))
    assert len(speed.get_yticklabels()) == sum(bool(line.ratios) for line in lines)
    assert len(learning.get_legend().get_texts()) == 3
    plt.close(figure)


def test_bench_comparison_of_commits_by_hand():
    pairs = [([row(p50=old), row(op="gone")], [row(p50=2.0), row(op="new")]) for old in (6.0, 2.0, 4.0, 3.0, 5.0, 4.0)]
    lines = compare.report(pairs, "old", "new").splitlines()
    assert len(lines) == 2
    assert lines[1].startswith(" 2.000x [1.000, 3.000]  op 4x8 float32, 1 threads: 2 ms now")


def test_bench_interval_of_a_median():
    # P(Bin(n, 1/2) <= rank) is 0.0156 for (6, 0), 0.0207 for (20, 5) and 0.0113 for (24, 6); one rank more is too many.
    for count, rank in ((6, 0), (20, 5), (24, 6)):
        values = [float(value) for value in reversed(range(count))]
        assert compare.interval_of_median(values) == (rank, count - 1 - rank)
    with pytest.raises(ValueError, match="values must be at least 6, got 5"):
        compare.interval_of_median([1.0] * 5)


def test_bench_loader_accounts_for_every_step(tmp_path):
    sizes = ["--vocab", "400", "--tokens", "16", "--batch", "2", "--hidden", "32", "--layers", "1", "--steps", "3"]
    command = [sys.executable, "-m", "bench.loader", "--out", str(tmp_path / "loader.jsonl"), "--workers", "0", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *sizes], cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "loader.jsonl").read_text().splitlines()]
    assert [entry["workers"] for entry in rows] == [0, 1]
    for entry in rows:
        assert 0 < entry["wait_ms"] < entry["step_ms"]
        assert entry["waiting"] == pytest.approx(entry["wait_ms"] / entry["step_ms"])
        assert entry["shape"] == {"vocab": 400, "tokens": 16, "batch": 2, "hidden": 32, "layers": 1}


def test_bench_served_teacher_trains_on_the_replayed_answers(tmp_path):
    out = tmp_path / "served.jsonl"
    sizes = ["--tokens", "16", "--batch", "2", "--top-k", "3", "--hidden", "32", "--layers", "1", "--steps", "3"]
    command = [sys.executable, "-m", "bench.served_teacher", "--out", str(out), "--ahead", "0", "1", *sizes]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [entry["ahead"] for entry in rows] == [0, 1]
    for entry in rows:
        assert 0 < entry["wait_ms"] < entry["step_ms"]
        assert entry["waiting"] == pytest.approx(entry["wait_ms"] / entry["step_ms"])
    # An answer that is asked for in its step cannot be there sooner than the server sends it.
    assert rows[0]["wait_ms"] >= rows[0]["answer_ms"]


STEP = argparse.Namespace(vocab=400, hidden=36, batch=2, tokens=12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_training_steps_agree_and_a_wrong_one_is_found(dtype, monkeypatch):
    steps = training_step.Steps(STEP, 2, dtype)
    before = [parameter.clone() for parameter in steps.model.parameters()]
    for mode in training_step.PROVIDERS:
        steps.check(mode)
    assert all(torch.equal(p, old) for p, old in zip(steps.model.parameters(), before, strict=True))
    figures = training_step.times(steps, rounds=2)
    assert [name for _, name in figures] == [OURS, "torch eager", OURS, "transformers"]
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in figures.values())
    assert not any(torch.equal(p, old) for p, old in zip(steps.model.parameters(), before, strict=True))

    def steeper(*arguments, eager=peers.slim_loss):
        loss = eager(*arguments)
        return 1.2 * loss - 0.2 * loss.detach()

    monkeypatch.setattr(peers, "slim_loss", steeper)
    with pytest.raises(AssertionError, match="wrong result: slim: the gradient of model"):
        steps.check("slim")


def test_bench_training_step_table_by_hand():
    def line(provider, metric, p50, mode="slim"):
        shape = {"layers": 30, "vocab": 400, "hidden": 36, "batch": 2, "tokens": 12}
        fields = {"mode": mode, "provider": provider, "metric": metric, "p50": p50, "dtype": "float32", "shape": shape}
        return fields | WHERE

    rows = [line(OURS, "time", 9000.0)]  # an earlier run's
    rows += [line("torch eager", "time", 3000.0), line(OURS, "time", 2000.0)]
    rows += [line(OURS, records.MEMORY, 2**20), line("torch eager", records.MEMORY, 2**22)]
    table_lines = blocks.training_step_table(rows).splitlines()
    assert table_lines[2] == "| SLIM, peer: eager loss | 30 | float32 | 2.00 / 3.00 s | 1.50x | 1 / 4 MiB |"
    assert "on 2 x 12 tokens" in table_lines[4]


LOGPROBS = np.array([-0.5, -9.0, -1.25, -2.0, -40.0])


@pytest.mark.parametrize(
    ("encode", "row_bytes", "error"),
    [
        (codecs.packed_24_bits, 15, 0.5 * 39.5 / 127),
        (codecs.arrays, 30, 0.125),
        (codecs.text, 5 * len('"token_id:1":-,') + len("-0.5-9.0-1.25-2.0-40.0") - 5 + 1, 0),
    ],
)
def test_bench_layouts_of_others_by_hand(encode, row_bytes, error):
    size, read = encode(np.arange(1, 6), LOGPROBS, 1000)
    assert size == row_bytes
    assert np.abs(read - LOGPROBS).max() <= error + 1e-12


def test_bench_polynomial_layout_follows_a_long_row():
    logprobs = np.random.default_rng(0).permutation(-1.5 * np.log(np.arange(1, 2001)))
    size, read = codecs.polynomial(np.arange(2000), logprobs, 32000)
    assert size == (2000 * 15 + 7) // 8 + 32 * 2 + 6 * 4 + 2 + (1968 * 4 + 7) // 8
    assert np.abs(read - logprobs).max() < 0.2
    assert 0 <= codecs.kl(logprobs, read) < 1e-3


def test_bench_kl_by_hand():
    before, after = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    assert codecs.kl(before + 3.0, after) == pytest.approx(0.5 * math.log(4 / 3))


def test_random_logits_have_the_offset_and_the_tail_of_a_model():
    rows = random_logits(4, 50000, torch.bfloat16, 0).float()
    assert ((rows.mean(-1) - 11.2).abs() < 0.1).all()
    # The mass of the K = 5 % largest lies between that of a flat row and that of a single id.
    kept = rows.softmax(-1).sort(-1, descending=True).values[:, :2500].sum(-1)
    assert ((kept > 0.85) & (kept < 0.999)).all()
    # In bfloat16 the values are as few as in a real row, so many logits tie.
    assert all(len(row.unique()) < 400 for row in rows)
