"""The same cases under pytest-benchmark: ``pytest bench --benchmark-json out.json``."""

import pytest

from bench.cases import all_cases

CASES = list(all_cases(quick=True))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_case(index, benchmark):
    case = CASES[index]()
    case.check()
    benchmark.extra_info.update(op=case.op, shape=case.shape, dtype=case.dtype, floor_bytes=case.floor_bytes)
    benchmark(case.providers["slimkernels"])
