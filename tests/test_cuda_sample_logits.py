"""The CUDA C++ kernel of sample_logits on an emulated GPU, and the plan by which it would be launched on real ones."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.emulated_cuda import (
    A100,
    DTYPES,
    GPUS,
    H100,
    RTX_5090,
    Launch,
    assert_tests_pass_emulated,
    compile_emulated,
    needs_emulator,
    removed_barriers,
)
from support.emulated_sample_logits import LAUNCHES, EmulatedSampleLogits
from support.helpers import LAYOUTS, assert_same_bits, explain, hostile_rows
from torch import Tensor

import slimkernels as sk

pytestmark = needs_emulator

NAN = math.nan

# Each takes another way through the kernel: bounds from the threads' largest logits, from the histogram, from min-p,
# and none; candidates of one warp, of one block and of all.
VARIANTS = {
    "whole": {},
    "at a temperature": {"temperature": 0.7},
    "argmax": {"temperature": 0.0},
    "top-k": {"top_k": 20},
    "top-k, top-p and min-p": {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01},
    "large top-k": {"top_k": 400, "top_p": 0.9},
    "top-p": {"temperature": 1.5, "top_p": 0.8},
    "top-p 0": {"top_p": 0.0},
    "min-p": {"min_p": 0.05},
    "top-p and min-p": {"temperature": 0.5, "top_p": 0.9, "min_p": 0.02},
}
OPTIONS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def sample(operator, logits: Tensor, m: int = 1, seed: int | Tensor = 3, position=None, **options) -> sk.Sampled:
    """Calls an implementation of ``sample_logits_rows``."""
    num_rows = len(logits)
    position = torch.arange(num_rows) if position is None else position
    pairs = []
    for value, dtype in zip(
        (seed, position, *{**OPTIONS, **options}.values()),
        (torch.int64, torch.int64, torch.float64, torch.int64, torch.float64, torch.float64),
        strict=True,
    ):
        # An option is a number and a tensor in its place.
        number = 0.0 if dtype.is_floating_point else 0
        pairs += [number, value.to(dtype)] if isinstance(value, Tensor) else [value, None]
    drawn = sk.Sampled(
        torch.empty(num_rows, m, dtype=torch.int64),
        torch.empty(num_rows, m),
        torch.empty(num_rows, m),
        torch.empty(num_rows),
    )
    operator(logits, m, *pairs, *drawn)
    return drawn


def run(kernel: EmulatedSampleLogits, launch: Launch, logits: Tensor, m: int = 1, **options) -> sk.Sampled:
    kernel.launches = iter([launch])
    return sample(kernel.sample_logits_rows, logits, m, **options)


def assert_kernel_matches(actual: sk.Sampled, logits: Tensor, m: int = 1, **options) -> None:
    """The ids of the CPU's kernel, and its other fields within a few roundings."""
    expected = sample(torch.ops.slimkernels.sample_logits_rows, logits, m, **options)
    assert torch.equal(actual.token, expected.token)
    for name in actual._fields[1:]:
        with explain(name):
            one, other = getattr(actual, name), getattr(expected, name)
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return compile_emulated("sample_logits", tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def kernel(library) -> EmulatedSampleLogits:
    return EmulatedSampleLogits(library)


@pytest.mark.slow  # hundreds of draws on an emulated GPU
@pytest.mark.parametrize(
    "file",
    [
        "test_sample_logits.py",
        "test_sample_logits_triton.py::test_more_draws_than_a_block",
        "test_sample_logits_triton.py::test_noise_of_any_seed_and_position",
        "test_sample_logits_triton.py::test_options_out_of_range_make_nan",
        "test_sample_logits_triton.py::test_draws_are_batch_invariant",
        "test_sample_logits_triton.py::test_draws_among_candidates",
    ],
)
def test_cuda_sample_logits_passes_tests_of_the_op(library, file):
    # Rows of a real vocabulary take minutes each.
    assert_tests_pass_emulated("sample_logits", library, file, deselected=("real_vocabulary", "memory"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in DTYPES[::2])])
@pytest.mark.parametrize(
    ("name", "m", "which"),
    [
        ("whole", 1, 1),
        ("top-k, top-p and min-p", 4, 0),
        *(pytest.param(name, m, which, marks=pytest.mark.slow) for name in VARIANTS for m, which in ((1, 3), (4, 4))),
    ],
)
def test_cuda_sample_logits_of_hostile_rows(kernel, name, m, which, dtype):
    rows = torch.stack(list(hostile_rows(2300, dtype).values()))
    assert_kernel_matches(run(kernel, LAUNCHES[which], rows, m, **VARIANTS[name]), rows, m, **VARIANTS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_cuda_sample_logits_is_the_same_however_it_is_launched(kernel, name):
    # V is odd, so that every row is aligned in another way.
    logits = (3 * torch.randn(2, 5003)).bfloat16()
    first = run(kernel, LAUNCHES[0], logits, 2, **VARIANTS[name])
    assert_kernel_matches(first, logits, 2, **VARIANTS[name])
    for launch in LAUNCHES[1:]:
        with explain(str(launch)):
            again = launch._replace(seed=launch.seed + 10)
            assert_same_bits(run(kernel, again, logits, 2, **VARIANTS[name]), first)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["row strided", "misaligned"])
def test_cuda_sample_logits_of_layouts(kernel, dtype, layout):
    logits = (3 * torch.randn(3, 4099)).to(dtype)
    for launch in LAUNCHES[:3]:
        for options in ({}, VARIANTS["top-k, top-p and min-p"]):
            given = LAYOUTS[layout](logits)
            assert_same_bits(run(kernel, launch, given, **options), run(kernel, launch, logits, **options))


def test_cuda_sample_logits_of_options_per_row(kernel):
    logits = 3 * torch.randn(6, 1030)
    options = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, NAN, 2.0, 1.0]),
        "top_k": torch.tensor([0, 5, 40, 0, -1, 3000]),
        "top_p": torch.tensor([0.9, 1.0, 0.95, 0.9, 0.9, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.01, 0.0, 0.0, 0.1]),
    }
    drawn = run(kernel, LAUNCHES[1], logits, 2, seed=torch.arange(6) - 3, **options)
    wrong = torch.tensor([False, False, False, True, True, False])
    assert (drawn.token[wrong] == -1).all()
    assert torch.stack([drawn.entropy, *drawn.logprob.T, *drawn.truncated_logprob.T])[:, wrong].isnan().all()
    for row in (~wrong).nonzero().flatten().tolist():
        # One seed is that of row 0 as it is.
        alone = {name: value[row : row + 1] for name, value in options.items()}
        one = logits[row : row + 1]
        expected = sample(
            torch.ops.slimkernels.sample_logits_rows, one, 2, seed=row - 3, position=torch.tensor([row]), **alone
        )
        assert torch.equal(drawn.token[row : row + 1], expected.token)


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize(
    ("which", "needless"),
    [
        # The second barrier after the list is for the memory of other blocks.
        pytest.param(0, {4}, id="one block, top-p"),
        pytest.param(1, set(), id="cluster of 2, whole row"),
        pytest.param(2, set(), id="cluster of 4, top-k"),
        pytest.param(3, set(), id="cluster of 2, no list"),
    ],
)
def test_cuda_sample_logits_needs_its_barriers(library, which, needless):
    ((barriers, unnoticed),) = removed_barriers("sample_logits", library, which)
    assert barriers >= 6
    assert set(unnoticed) <= needless


@pytest.mark.parametrize(
    ("gpu", "dtype", "shape", "blocks", "staged"),
    [
        (H100, torch.bfloat16, (512, 32000), 1, True),
        (H100, torch.bfloat16, (512, 50257), 2, True),
        (H100, torch.bfloat16, (512, 131072), 4, True),
        (H100, torch.bfloat16, (512, 151937), 4, True),
        (H100, torch.bfloat16, (512, 262144), 8, True),
        (H100, torch.float32, (512, 131072), 8, True),
        # Few rows: as many blocks as there are multiprocessors for.
        (H100, torch.bfloat16, (1, 131072), 8, True),
        (H100, torch.bfloat16, (64, 32000), 2, True),
        # Without clusters, or with too little shared memory in them.
        (A100, torch.bfloat16, (512, 50257), 1, True),
        (A100, torch.bfloat16, (512, 131072), 1, False),
        (RTX_5090, torch.float32, (4, 262144), 8, False),
        (H100, torch.bfloat16, (1, 5), 1, True),
    ],
)
def test_cuda_sample_logits_plan_by_hand(kernel, gpu, dtype, shape, blocks, staged):
    plan = kernel.plan(dtype, *shape, gpu)
    assert (plan.blocks, plan.staged) == (blocks, staged)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_cuda_sample_logits_plan_fits_the_device(kernel, gpu):
    for dtype in DTYPES:
        for vocab_size in (1, 2048, 2049, 32000, 50257, 128256, 151937, 262144, 2**31 - 2**15):
            for num_rows in (1, 16, 4096):
                plan = kernel.plan(dtype, num_rows, vocab_size, gpu)
                with explain(f"{dtype}, N={num_rows}, V={vocab_size}: {plan}"):
                    assert plan.blocks in (1, 2, 4, 8)
                    assert plan.blocks == 1 or gpu.has_clusters
                    assert plan.slice % 2048 == 0
                    assert vocab_size <= plan.slice * plan.blocks < vocab_size + 2048 * plan.blocks
                    assert plan.bytes <= gpu.block_bytes
                    assert plan.staged == (plan.bytes >= plan.slice * dtype.itemsize)


@pytest.mark.slow  # as many threads and elements as on a GPU
@pytest.mark.parametrize("vocab_size", [32000, 50257])
def test_cuda_sample_logits_as_planned(kernel, vocab_size):
    logits = (10 + 3 * torch.randn(2, vocab_size)).bfloat16()
    plan = kernel.plan(torch.bfloat16, 512, vocab_size, H100)
    launch = Launch(plan.blocks, plan.staged, plan.list_capacity, threads=256, seed=9)
    for options in VARIANTS.values():
        with explain(str(options)):
            assert_kernel_matches(run(kernel, launch, logits, **options), logits, **options)
