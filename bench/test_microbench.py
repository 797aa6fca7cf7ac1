"""Runs the short cases under pytest-benchmark: ``pytest bench --benchmark-json out.json``."""

from __future__ import annotations

import pytest

from bench.ops.case import OURS
from bench.ops.cases import all_cases

CASES = {case.name: case for case in all_cases() if case.quick}
PAIRS = [(name, provider) for name, case in CASES.items() for provider in (OURS, *case.peers)]


@pytest.fixture(scope="module")
def gated_work(request):
    """Builds the tensors of a case, shared by its providers; no provider is timed unless all give the right result."""
    return CASES[request.param].gated_work()


@pytest.mark.parametrize(
    ("gated_work", "name", "provider"),
    [(name, name, provider) for name, provider in PAIRS],
    ids=[f"{name}-{provider.replace(' ', '_')}" for name, provider in PAIRS],
    indirect=["gated_work"],
)
def test_provider(gated_work, name, provider, benchmark):
    case = CASES[name]
    benchmark.group = name
    benchmark.extra_info.update(
        op=case.op,
        provider=provider,
        mode=case.mode,
        shape=case.shape,
        dtype=case.dtype_name,
        floor_bytes=case.floor_bytes,
        floor_flops=case.floor_flops,
    )
    benchmark(gated_work.providers[provider])
