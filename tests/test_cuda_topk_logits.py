"""The CUDA C++ kernel of topk_logits on an emulated GPU, and the plan by which it would be launched on real ones."""

from __future__ import annotations

import faulthandler
import math
import os
import resource
from pathlib import Path

import pytest
import torch
from support.emulated_cuda import (
    A100,
    DTYPES,
    GPUS,
    H100,
    Gpu,
    Launch,
    Plan,
    compile_emulated,
    needs_emulator,
    removed_barriers,
)
from support.emulated_topk_logits import EmulatedTopkLogits
from support.helpers import LAYOUTS, assert_same_bits, explain, hostile_rows, sparse_fields
from test_topk_logits import assert_topk_matches

from slimkernels import SparseLogits, reference

INF, NAN = math.inf, math.nan

pytestmark = needs_emulator

LAUNCHES = {
    "one block": Launch(),
    "cluster of 2": Launch(blocks=2, seed=1),
    "cluster of 4, through L2": Launch(blocks=4, staged=False, seed=2),
    "one block, through L2, no list": Launch(staged=False, list_capacity=0, seed=3),
    "cluster of 8, short list": Launch(blocks=8, list_capacity=40, seed=4),
    "one block of 256 threads": Launch(threads=256, seed=6),
    "cluster of 2 with 256 threads": Launch(blocks=2, threads=256, seed=8),
}


def assert_kernel_matches(actual: SparseLogits, logits: torch.Tensor, top_k: int, **options) -> None:
    assert_topk_matches(actual, logits, top_k, **options)
    truth = reference.topk_logits(logits.double(), top_k, **options).rest_lse
    # A float32 level, divided by a small temperature, rounds like the quotient.
    torch.testing.assert_close(actual.rest_lse.double(), truth, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return compile_emulated("topk_logits", tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def emulated(library) -> EmulatedTopkLogits:
    return EmulatedTopkLogits(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_cuda_topk_logits_of_hostile_rows(emulated, launch, dtype):
    for vocab_size in (37, 4099) if launch.blocks < 8 else (8209,):
        batch = torch.stack(list(hostile_rows(vocab_size, dtype).values()))
        for top_k in (1, math.ceil(0.05 * vocab_size), vocab_size):
            with explain(f"V={vocab_size}, K={top_k}"):
                assert_kernel_matches(emulated.topk_logits(batch, top_k, launch), batch, top_k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_topk_logits_of_every_small_size(emulated, dtype):
    # Groups have 8 elements, tiles 2048 or, in float32, 1024.
    for vocab_size in (*range(1, 20), 1023, 1024, 1025, 2047, 2049):
        logits = torch.randn(2, vocab_size).to(dtype)
        for top_k in {1, vocab_size // 3 + 1, vocab_size}:
            for launch in (Launch(), Launch(blocks=2)):
                with explain(f"V={vocab_size}, K={top_k}, {launch}"):
                    assert_kernel_matches(emulated.topk_logits(logits, top_k, launch), logits, top_k)


def test_cuda_topk_logits_is_the_same_however_it_is_launched(emulated):
    ordinary = torch.randn(2, 4100)
    for dtype in DTYPES:
        rows = torch.cat([torch.stack(list(hostile_rows(4100, dtype).values())), ordinary.to(dtype)])
        expected = sparse_fields(emulated.topk_logits(rows, 205, temperatures=(1.0, 1.5)))
        for name, launch in LAUNCHES.items():
            again = launch._replace(seed=launch.seed + 10)
            actual = emulated.topk_logits(rows, 205, again, temperatures=(1.0, 1.5))
            with explain(f"{name}, {dtype}"):
                assert_same_bits(sparse_fields(actual), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_topk_logits_lse_at_temperatures(emulated, dtype):
    temperatures = (1.0, 0.25, 3.0, 0.01, 1000.0)
    limit = 6e4 if dtype == torch.float16 else 1e30
    logits = torch.full((6, 2100), -limit)
    logits[0, 1700] = limit
    logits[1] = limit
    logits[3, :1050] = -INF
    logits[4] = torch.linspace(-40, 40, 2100)
    logits[5] = 4 * torch.randn(2100)
    logits = logits.to(dtype)
    for launch in (Launch(), Launch(blocks=2, staged=False, list_capacity=0)):
        actual = emulated.topk_logits(logits, 4, launch, temperatures=temperatures)
        assert_kernel_matches(actual, logits, 4, temperatures=temperatures)


@pytest.mark.parametrize("kept", [204, 205, 206, 300])
def test_cuda_topk_logits_rest_lse_across_a_gap(emulated, kept):
    # K = 205. Relative to the largest logits, the exponentials of the others are 0 in float32 and in fixed point.
    noise, order = torch.randn(2, 4099), torch.rand(2, 4099).argsort(-1).argsort(-1)
    rows = torch.where(order < kept, 400 + noise, noise)
    for launch in (Launch(), Launch(blocks=2, seed=1), Launch(staged=False, list_capacity=0)):
        actual = emulated.topk_logits(rows, 205, launch, temperatures=(1.0, 0.5, 2.0))
        assert_kernel_matches(actual, rows, 205, temperatures=(1.0, 0.5, 2.0))


def test_cuda_topk_logits_lse_at_the_least_and_the_largest_temperature(emulated):
    # Of equal logits that are zero the sum is V at any temperature.
    temperatures = (1.0, 2.0**-126, 2.0**126)
    actual = emulated.topk_logits(torch.zeros(1, 1500), 1, temperatures=temperatures)
    torch.testing.assert_close(actual.lse, torch.full((1, 3), math.log(1500.0)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("launch", [Launch(), Launch(blocks=4)], ids=["one block", "cluster of 4"])
def test_cuda_topk_logits_target(emulated, launch):
    logits = torch.randn(8, 4099).bfloat16()
    logits[6, 4098] = -INF
    target = torch.tensor([0, 4098, 17, -1, -100, 4099, 4098, 2**32 + 5])
    actual = emulated.topk_logits(logits, 10, launch, target=target).target_logit
    expected = torch.tensor([*(logits[n, v].item() for n, v in ((0, 0), (1, 4098), (2, 17))), NAN, NAN, NAN, -INF, NAN])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["row strided", "misaligned"])
def test_cuda_topk_logits_of_any_layout(emulated, layout, dtype):
    logits, target = torch.randn(5, 2111).to(dtype), torch.randint(2111, (5,))
    expected = sparse_fields(emulated.topk_logits(logits, 106, target=target))
    for launch in (Launch(), Launch(blocks=2), Launch(staged=False)):
        actual = emulated.topk_logits(LAYOUTS[layout](logits), 106, launch, target=target)
        assert_same_bits(sparse_fields(actual), expected)


def test_cuda_topk_logits_of_a_row_behind_2_to_the_31_elements(emulated, tmp_path):
    # A file without pages between the two rows. A product in 32 bits would be negative.
    stride = (1 << 31) + 8
    memory = torch.from_file(str(tmp_path / "rows"), shared=True, size=stride + 2048, dtype=torch.bfloat16)
    rows = memory.as_strided((2, 2048), (stride, 1))
    rows.copy_(torch.randn(2, 2048))
    expected = emulated.topk_logits(rows.clone(memory_format=torch.contiguous_format), 100)
    assert_same_bits(sparse_fields(emulated.topk_logits(rows, 100)), sparse_fields(expected))


def misleading_rows(launch: Launch) -> torch.Tensor:
    """Rows (2, V) whose sample is all large, so that too few pass, and all small, so that too many do."""
    vocab_size = 8192
    stride = 5  # 1024 groups of 8, of which at most 256 are sampled, at an odd stride
    sampled = torch.arange(vocab_size) // 8 % stride == 0
    noise = torch.randn(vocab_size)
    return torch.stack([torch.where(sampled, 20.0, 0.0) + noise, torch.where(sampled, -20.0, 0.0) + noise])


MISLED = (Launch(list_capacity=1000), Launch(blocks=2, list_capacity=1000, seed=1))


@pytest.mark.parametrize("launch", MISLED, ids=["one block", "cluster of 2"])
def test_cuda_topk_logits_where_the_sample_misleads(emulated, launch):
    rows = misleading_rows(launch)
    # More than the sampled groups have; as many as a list that is not full would hold.
    for top_k in (400, 700):
        assert_kernel_matches(emulated.topk_logits(rows, top_k, launch), rows, top_k)


@pytest.mark.parametrize(
    ("old", "new", "row"),
    [
        ("state.found_in_row > uint32_t(args.top_k)", "true", 0),
        ("is_enough && state.is_listed", "is_enough", 1),
    ],
    ids=["too few", "too many"],
)
def test_cuda_topk_logits_without_its_fallback_is_wrong(tmp_path, old, new, row):
    # The rows above do mislead: what counts them in full is needed.
    broken = EmulatedTopkLogits(compile_emulated("topk_logits", tmp_path, old=old, new=new))
    launch = MISLED[0]
    rows = misleading_rows(launch)[row : row + 1]
    child = os.fork()  # because a thread may write anywhere
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            assert_kernel_matches(broken.topk_logits(rows, 400, launch), rows, 400)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] != 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_cuda_topk_logits_needs_its_barriers(library):
    # Shows that the emulator finds a missing one. What nobody needs in these launches: a threshold guessed from half of
    # the sample, or from a histogram that was not empty, is as right as another. In one block no other block reads a
    # histogram that is cleared, or anything at the end; without lists nobody uses the first histogram.
    launches = removed_barriers("topk_logits", library, 0, 1, 2, 3)
    assert len(launches) == 4
    for (barriers, unnoticed), needless in zip(launches, ({0, 1, 7, 11, -1}, {0}, {0}, {0, 7}), strict=True):
        assert barriers >= 16
        assert set(unnoticed) <= {index % barriers for index in needless}


@pytest.mark.parametrize(
    ("gpu", "dtype", "shape", "top_k", "blocks", "staged", "listed"),
    [
        (H100, torch.bfloat16, (8192, 32000), 1600, 1, True, True),
        (H100, torch.bfloat16, (4096, 128256), 6413, 4, True, True),
        (H100, torch.bfloat16, (2048, 262144), 13108, 8, True, True),
        (H100, torch.float32, (4096, 128256), 6413, 8, True, True),
        # Few rows: as many blocks as there are multiprocessors for.
        (H100, torch.bfloat16, (16, 32000), 1600, 8, True, True),
        (H100, torch.bfloat16, (64, 32000), 1600, 2, True, True),
        # A row that fits into no cluster is read through L2; half of the vocabulary is not worth a list.
        (H100, torch.float32, (4, 2**20), 52429, 8, False, True),
        (H100, torch.bfloat16, (4096, 128256), 64128, 4, True, False),
        # Without clusters.
        (A100, torch.bfloat16, (8192, 32000), 1600, 1, True, True),
        (A100, torch.bfloat16, (4096, 128256), 6413, 1, False, True),
        (A100, torch.float32, (4, 2**20), 52429, 1, False, False),
        (H100, torch.bfloat16, (1, 5), 5, 1, True, False),
    ],
)
def test_cuda_topk_logits_plan_by_hand(emulated, gpu, dtype, shape, top_k, blocks, staged, listed):
    plan = emulated.plan(dtype, *shape, gpu, top_k)
    assert (plan.blocks, plan.staged, plan.list_capacity > 0) == (blocks, staged, listed)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_cuda_topk_logits_plan_fits_the_device(emulated, gpu):
    for dtype in DTYPES:
        for vocab_size in (1, 1024, 1025, 32000, 50257, 128256, 262144, 2**20, 2**21):
            for top_k in {1, min(40, vocab_size), math.ceil(vocab_size / 20), vocab_size // 2 + 1, vocab_size}:
                for num_rows in (1, 16, 4096):
                    plan = emulated.plan(dtype, num_rows, vocab_size, gpu, top_k)
                    with explain(f"{dtype}, N={num_rows}, V={vocab_size}, K={top_k}: {plan}"):
                        assert_plan_fits(plan, dtype, vocab_size, gpu)


def assert_plan_fits(plan: Plan, dtype: torch.dtype, vocab_size: int, gpu: Gpu) -> None:
    assert plan.blocks in ((1, 2, 4, 8) if gpu.has_clusters else (1,))
    tile = 4096 // dtype.itemsize
    assert plan.slice % tile == 0
    assert vocab_size <= plan.slice * plan.blocks < vocab_size + tile * plan.blocks
    assert 0 <= plan.list_capacity <= plan.slice
    assert plan.bytes <= gpu.block_bytes
    if plan.staged:
        assert plan.bytes >= plan.slice * dtype.itemsize
    else:
        largest = 8 if gpu.has_clusters else 1
        assert plan.blocks == largest
        assert vocab_size * dtype.itemsize > largest * gpu.block_bytes * 0.7


@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
def test_cuda_topk_logits_as_planned(emulated, gpu):
    for dtype, (num_rows, vocab_size) in ((torch.bfloat16, (2, 32000)), (torch.float32, (1, 60000))):
        rows = (4.0 * torch.randn(num_rows, vocab_size)).to(dtype)
        top_k = math.ceil(vocab_size / 20)
        # As for many rows: the fewest blocks.
        plan = emulated.plan(dtype, 4096, vocab_size, gpu, top_k)
        launch = Launch(plan.blocks, plan.staged, plan.list_capacity, threads=256, seed=9)
        target = torch.randint(vocab_size, (num_rows,))
        actual = emulated.topk_logits(rows, top_k, launch, target=target, temperatures=(1.0, 2.0))
        assert_kernel_matches(actual, rows, top_k, target=target, temperatures=(1.0, 2.0))
