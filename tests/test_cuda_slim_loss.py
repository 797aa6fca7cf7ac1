"""The CUDA C++ kernel of slim_loss on an emulated GPU, and the plan by which it would be launched on real ones."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from support.emulated_cuda import (
    A100,
    DTYPES,
    GPUS,
    H100,
    RTX_5090,
    Gpu,
    Launch,
    Plan,
    assert_tests_pass_emulated,
    compile_emulated,
    needs_emulator,
    removed_barriers,
)
from support.emulated_slim_loss import LAUNCHES, EmulatedSlimLoss
from support.helpers import (
    LAYOUTS,
    RESTS_AND_DIVERGENCES,
    assert_as_accurate,
    assert_same_bits,
    explain,
    hostile_rows,
    random_problem,
    to_dtype,
)
from torch import Tensor

from slimkernels import SlimLoss, SparseLogits, reference
from slimkernels.ops._slim_options import resolve_options
from slimkernels.ops.slim_result import NUM_STATS

pytestmark = needs_emulator

INF, NAN = math.inf, math.nan

DEFAULTS = {
    "temperature": 1.0,
    "rest": "renorm",
    "divergence": "forward_kl",
    "token_weight": "teacher_over_student",
    "detach_weight": True,
    "beta": None,
    "alpha": None,
    "forward_weight": 1.0,
    "entropy_threshold": 0.8,
    "teacher_blend": 1.0,
    "tail_weight": 1.0,
    "ce_weight": 1.0,
    "kd_weight": 1.0,
    "label_smoothing": 0.0,
    "z_loss_weight": 0.0,
    "softcap": None,
    "logit_scale": 1.0,
    "ignore_index": -100,
    "statistics": False,
}
# Each takes another way through the kernel, and together they use every option.
VARIANTS = {
    "default": {},
    "cross entropy": {"teacher": None, "z_loss_weight": 0.1},
    "zero_logit": {"rest": "zero_logit", "label_smoothing": 0.1, "temperature": 1.7},
    "softcap": {"rest": "zero", "softcap": 4.0, "logit_scale": 0.7, "detach_weight": False},
    "gated": {"rest": "ghost", "divergence": "gated", "temperature": 1.7, "statistics": True, "tail_weight": 3.0},
    "blended": {"rest": "ghost", "divergence": "jsd", "beta": 0.9, "teacher_blend": 0.4},
    "blended on the support": {"rest": "renorm_both", "divergence": "ab", "teacher_blend": 0.6, "temperature": 0.6},
    "all statistics": {"rest": "ghost", "token_weight": "student_over_teacher", "statistics": True},
}


def run(
    kernel: EmulatedSlimLoss,
    launch: Launch,
    logits: Tensor,
    target: Tensor,
    teacher: SparseLogits | None,
    *,
    row_scale: Tensor | None = None,
    over_logits: bool = False,
    **options,
) -> tuple[SlimLoss, Tensor]:
    """Returns the fields per row, and the gradient in the layout of the logits or written over them."""
    options = resolve_options(logits, "logits", teacher, **{**DEFAULTS, **options})
    stats = torch.full((NUM_STATS[options.statistics], len(logits)), -7.0)
    # Memory of the same layout, in which nothing may stay as it was.
    storage = torch.full((logits.untyped_storage().nbytes() // logits.element_size(),), 7.0, dtype=logits.dtype)
    dlogits = logits if over_logits else storage.as_strided(logits.shape, logits.stride(), logits.storage_offset())
    kernel.launches = iter([launch])
    kernel.slim_loss_rows(logits, dlogits, stats, target, row_scale, *options)
    return SlimLoss(*stats), dlogits


def expected(logits: Tensor, target: Tensor, teacher: SparseLogits | None, **options) -> tuple[SlimLoss, Tensor]:
    """Returns the reference's fields per row, and its gradient, in the dtype of ``logits``."""
    leaf = logits.detach().clone().requires_grad_()
    result = reference.slim_loss(leaf, target, teacher, reduction="none", **options)
    (gradient,) = torch.autograd.grad(result.loss, leaf, torch.ones_like(result.loss))
    return type(result)(*(field if field is None else field.detach() for field in result)), gradient


def assert_kernel_matches(actual: tuple[SlimLoss, Tensor], logits: Tensor, target, teacher, **options) -> None:
    theirs = expected(logits, target, teacher, **options)
    wide = None if teacher is None else to_dtype(teacher, torch.float64)
    truth = expected(logits.double(), target, wide, **options)
    for n in range(len(logits)):
        for name, ours, same, true in zip(SlimLoss._fields, actual[0], theirs[0], truth[0], strict=True):
            if true is not None:
                with explain(f"row {n}, {name}"):
                    assert_as_accurate(ours[n], same[n], true[n], at_least=1.0)
        with explain(f"row {n}, gradient"):
            if truth[0].loss[n].isnan():
                # The reference has NaN only where autograd meets one.
                assert actual[1][n].isnan().all()
                continue
            assert_as_accurate(actual[1][n], theirs[1][n], truth[1][n])


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    return compile_emulated("slim_loss", tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def kernel(library) -> EmulatedSlimLoss:
    return EmulatedSlimLoss(library)


def test_cuda_slim_loss_passes_tests_of_the_op(library):
    assert_tests_pass_emulated(
        "slim_loss",
        library,
        "test_slim_loss.py::test_slim_loss_divergence_hand_worked",
        "test_slim_loss.py::test_slim_loss_of_rows_whose_target_logit_is_not_known",
        "test_slim_loss.py::test_slim_loss_tails_do_not_cancel",
        "test_slim_loss.py::test_slim_loss_of_a_student_with_nan_off_the_support",
        "test_slim_loss.py::test_slim_loss_without_kd_is_that_without_a_teacher",
        *(
            f"test_slim_loss.py::test_slim_loss_edges[dtype0-{shape}-{rest}]"
            for shape in ("-inf off the support", "empty row", "q = 0 in ids")
            for rest in ("ghost-forward_kl", "zero_logit-soft_ce", "renorm_both-reverse_kl", "zero-forward_kl")
        ),
        "test_slim_loss_tails.py::test_slim_loss_leaves_out_only_outcomes_that_the_teacher_excludes",
        "test_slim_loss_triton.py::test_every_option",
        "test_slim_loss_triton.py::test_rows_that_end_a_block_or_have_no_rest",
        "test_slim_loss_triton.py::test_a_bad_row_is_nan_and_the_others_are_not",
        "test_slim_statistics.py::test_statistics_hand_worked",
        # Statistics change no bit of the loss.
        *(
            f"test_slim_statistics.py::test_statistics_match_the_reference[False-{rest}-dtype0]"
            for rest in ("renorm", "zero", "ghost")
        ),
        "test_slim_statistics.py::test_ties_go_to_the_lowest_id",
        "test_slim_statistics.py::test_entropy_of_a_teacher_with_masked_logits",
    )


@pytest.mark.slow  # some two thousand tests on an emulated GPU take minutes
@pytest.mark.parametrize(
    "file", ["test_slim_loss.py", "test_slim_loss_tails.py", "test_slim_statistics.py", "test_slim_loss_operator.py"]
)
def test_cuda_slim_loss_passes_all_tests_of_the_op(library, file):
    # Denormal numbers cost a GPU nothing, so it makes them.
    deselected = ("denormal", "smallest_normal_number_is_zero")
    assert_tests_pass_emulated("slim_loss", library, file, deselected=deselected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_cuda_slim_loss_matches_the_reference_over_several_tiles(kernel, variant, dtype):
    options = dict(variant)
    problem = random_problem(2, 2111, 106, dtype=dtype, temperature=options.get("temperature", 1.0), ignored=())
    teacher = options.pop("teacher", problem.teacher)
    for launch in LAUNCHES if dtype == torch.bfloat16 else LAUNCHES[:2]:
        with explain(f"{launch.blocks} blocks, staged={launch.staged}"):
            actual = run(kernel, launch, problem.logits, problem.target, teacher, **options)
            assert_kernel_matches(actual, problem.logits, problem.target, teacher, **options)


@pytest.mark.slow  # every pair and dtype, several times
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rest", "divergence"), RESTS_AND_DIVERGENCES)
def test_cuda_slim_loss_matches_the_reference(kernel, rest, divergence, dtype):
    for seed, (vocab_size, top_k) in enumerate([(1024, 40), (1025, 1), (3073, 700), (2049, 2049), (5, 2), (1, 1)]):
        options = {"rest": rest, "divergence": divergence, "temperature": (1.0, 2.0)[seed % 2], "statistics": True}
        logits, target, teacher = random_problem(
            3, vocab_size, top_k, dtype=dtype, temperature=options["temperature"], seed=seed, ragged=seed % 3 == 0
        )
        for launch in LAUNCHES:
            with explain(f"V={vocab_size}, K={top_k}, {launch.blocks} blocks, staged={launch.staged}"):
                actual = run(kernel, launch, logits, target, teacher, **options)
                assert_kernel_matches(actual, logits, target, teacher, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in DTYPES[::2])])
def test_cuda_slim_loss_of_hostile_rows(kernel, dtype):
    named = hostile_rows(2051, dtype)
    infinite = [name for name, row in named.items() if (row == INF).any()]
    rows = torch.stack([row for name, row in named.items() if name not in infinite])
    _, target, teacher = random_problem(len(rows), 2051, 103, dtype=dtype, ignored=())
    for launch, options in ((LAUNCHES[0], {}), (LAUNCHES[3], {"rest": "ghost", "statistics": True})):
        with explain(f"{options}"):
            actual = run(kernel, launch, rows, target, teacher, **options)
            assert_kernel_matches(actual, rows, target, teacher, **options)
    # As on a CPU; the reference has a few numbers that are not NaN.
    assert infinite
    for name in infinite:
        problem = random_problem(1, 2051, 103, dtype=dtype, ignored=())
        fields, gradient = run(kernel, LAUNCHES[1], named[name][None], problem.target, problem.teacher)
        assert fields.loss.isnan().all()
        assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["zero_logit", "all statistics"])
def test_cuda_slim_loss_is_the_same_however_it_is_launched(kernel, name, dtype):
    options = VARIANTS[name]
    logits, target, teacher = random_problem(2, 2111, 106, dtype=dtype, temperature=options.get("temperature", 1.0))
    first = run(kernel, LAUNCHES[0], logits, target, teacher, **options)
    for launch in LAUNCHES:
        for layout in (None, *(("row strided", "misaligned") if launch.blocks == 2 else ())):
            again = launch._replace(seed=launch.seed + 10)
            given = logits if layout is None else LAYOUTS[layout](logits)
            with explain(f"{launch.blocks} blocks, staged={launch.staged}, {layout}"):
                assert_same_bits(run(kernel, again, given, target, teacher, **options), first)


def test_cuda_slim_loss_of_a_row_does_not_depend_on_the_others(kernel):
    # V is odd, so that every row is aligned in another way.
    logits, target, teacher = random_problem(9, 1029, 51, dtype=torch.bfloat16, ignored=())
    fields, gradient = run(kernel, LAUNCHES[1], logits, target, teacher, statistics=True)
    for n in range(len(logits)):
        row = SparseLogits(
            teacher.ids[n : n + 1],
            teacher.logits[n : n + 1],
            teacher.lse[n : n + 1],
            teacher.temperatures,
            teacher.target_logit[n : n + 1],
            teacher.rest_lse[n : n + 1],
        )
        alone = run(kernel, LAUNCHES[0], logits[n : n + 1].clone(), target[n : n + 1], row, statistics=True)
        assert_same_bits(SlimLoss(*(field[n : n + 1] for field in fields)), alone[0])
        assert_same_bits(gradient[n : n + 1], alone[1])


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.blocks}-{launch.staged}")
def test_cuda_slim_loss_writes_over_the_logits(kernel, launch):
    for layout in (lambda rows: rows.clone(), LAYOUTS["misaligned"]):
        logits, target, teacher = random_problem(3, 2111, 106, dtype=torch.bfloat16)
        scale = torch.tensor([0.5, 1.0, 2.0])
        first = run(kernel, launch, logits, target, teacher, row_scale=scale)
        rows = layout(logits)
        assert_same_bits(run(kernel, launch, rows, target, teacher, row_scale=scale, over_logits=True), first)


@pytest.mark.parametrize("launch", LAUNCHES[1:3], ids=lambda launch: f"{launch.blocks}-{launch.staged}")
def test_cuda_slim_loss_of_a_row_behind_2_to_the_31_elements(kernel, launch, tmp_path):
    # The last row of many begins behind 2 ** 32 logits and 2 ** 31 ids. The files of the others have no pages.
    num_rows = (1 << 21) + 1
    problem = random_problem(1, 2048, 1024, dtype=torch.bfloat16, ignored=())
    fields, gradient = run(kernel, launch, *problem)
    options = resolve_options(problem.logits, "logits", problem.teacher, **DEFAULTS)

    def last_of_many(row: Tensor) -> Tensor:
        shape = (num_rows, *row.shape[1:])
        file = tmp_path / str(len(list(tmp_path.iterdir())))
        rows = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=row.dtype).view(shape)
        rows[-1] = row[0]
        return rows

    stats = torch.empty(NUM_STATS["none"], num_rows)
    logits, target = last_of_many(problem.logits), last_of_many(problem.target)
    options = [last_of_many(each) if isinstance(each, Tensor) else each for each in options]
    kernel.launches = iter([launch._replace(first_row=num_rows - 1)])
    kernel.slim_loss_rows(logits, logits, stats, target, None, *options)
    assert_same_bits(SlimLoss(*stats[:, -1:]), fields)
    assert_same_bits(logits[-1:], gradient)


@pytest.mark.parametrize("launch", LAUNCHES[:3], ids=lambda launch: f"{launch.blocks}-{launch.staged}")
def test_cuda_slim_loss_of_bad_and_ignored_rows(kernel, launch):
    logits, target, teacher = random_problem(8, 2111, 106, ignored=())
    good = run(kernel, launch, logits, target, teacher, statistics=True)
    target[1], target[2], target[3] = 2111, -1, -100
    teacher.ids[4, 7] = teacher.ids[4, 6]
    teacher.ids[5, 105] = 2111
    teacher.ids[6, 50] = -1  # padding before an id
    teacher.ids[6, 0] = 2**30  # far outside of the row's memory
    fields, gradient = run(kernel, launch, logits, target, teacher, statistics=True)
    rows = torch.stack(fields, 1)
    assert rows[[1, 2, 4, 5, 6]].isnan().all()
    assert gradient[[1, 2, 4, 5, 6]].isnan().all()
    assert not rows[3].any()
    assert not gradient[3].any()
    assert_same_bits(rows[[0, 7]], torch.stack(good[0], 1)[[0, 7]])
    assert_same_bits(gradient[[0, 7]], good[1][[0, 7]])


@pytest.mark.slow  # a compilation
def test_cuda_slim_loss_without_its_wait_is_wrong(tmp_path):
    broken = EmulatedSlimLoss(compile_emulated("slim_loss", tmp_path, old="if (kStaged) wait_for_copies();", new=""))
    logits, target, teacher = random_problem(1, 2112, 106, ignored=())
    actual = run(broken, LAUNCHES[0], logits, target, teacher)
    with pytest.raises(AssertionError):
        assert_kernel_matches(actual, logits, target, teacher)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    "which",
    [
        pytest.param(0, id="one block"),
        pytest.param(1, id="cluster of 2, every stage", marks=pytest.mark.slow),
        pytest.param(2, id="cluster of 4, through L2", marks=pytest.mark.slow),
    ],
)
def test_cuda_slim_loss_needs_its_barriers(library, which):
    ((barriers, unnoticed),) = removed_barriers("slim_loss", library, which)
    assert barriers >= 5
    assert not unnoticed


@pytest.mark.parametrize(
    ("gpu", "dtype", "shape", "blocks", "staged"),
    [
        (H100, torch.bfloat16, (8192, 32000), 1, True),
        (H100, torch.bfloat16, (4096, 50257), 1, True),
        (H100, torch.bfloat16, (16384, 151937), 4, True),  # more than 2 ** 31 logits
        (H100, torch.bfloat16, (1, 151937), 8, True),
        (H100, torch.bfloat16, (4096, 128256), 4, True),
        (H100, torch.bfloat16, (2048, 262144), 8, True),
        (H100, torch.float32, (4096, 128256), 8, True),
        # Few rows: as many blocks as there are multiprocessors for.
        (H100, torch.bfloat16, (16, 32000), 8, True),
        (H100, torch.bfloat16, (64, 32000), 2, True),
        # Without clusters, or with too little shared memory in them.
        (A100, torch.bfloat16, (8192, 32000), 1, True),
        (A100, torch.bfloat16, (4096, 50257), 1, True),
        (A100, torch.bfloat16, (4096, 128256), 1, False),
        (RTX_5090, torch.float32, (4, 262144), 8, False),
        (H100, torch.bfloat16, (1, 5), 1, True),
    ],
)
def test_cuda_slim_loss_plan_by_hand(kernel, gpu, dtype, shape, blocks, staged):
    plan = kernel.plan(dtype, *shape, gpu, shape[1] // 20, 0)
    assert (plan.blocks, plan.staged) == (blocks, staged)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_cuda_slim_loss_plan_fits_the_device(kernel, gpu):
    longest = 3 << 17  # kMaxVocabSize
    for dtype in DTYPES:
        for vocab_size in (1, 1024, 1025, 32000, 50257, 128256, 151936, 262144, longest):
            for num_rows, selects in ((1, True), (16, False), (4096, True)):
                plan = kernel.plan(dtype, num_rows, vocab_size, gpu, vocab_size // 20, int(selects))
                with explain(f"{dtype}, N={num_rows}, V={vocab_size}: {plan}"):
                    assert_plan_fits(plan, dtype, vocab_size, gpu)


def assert_plan_fits(plan: Plan, dtype: torch.dtype, vocab_size: int, gpu: Gpu) -> None:
    largest = 8 if gpu.has_clusters else 1
    assert plan.blocks in (1, 2, 4, largest)
    assert plan.slice % 1024 == 0
    assert vocab_size <= plan.slice * plan.blocks < vocab_size + 1024 * plan.blocks
    assert plan.bytes <= gpu.block_bytes
    # The slice, and as many logits as S may have in it.
    needed = (plan.slice + min(vocab_size // 20, plan.slice)) * dtype.itemsize
    if plan.staged:
        assert plan.bytes >= needed
    else:
        assert plan.blocks == largest
        assert needed > gpu.block_bytes * 0.7


@pytest.mark.slow  # as many threads and elements as on a GPU
@pytest.mark.parametrize("gpu", [A100, H100], ids=["A100", "H100"])
def test_cuda_slim_loss_as_planned(kernel, gpu):
    for dtype, vocab_size in ((torch.bfloat16, 32000), (torch.bfloat16, 50257), (torch.float32, 60000)):
        logits, target, teacher = random_problem(2, vocab_size, vocab_size // 20, dtype=dtype)
        # As for many rows: the fewest blocks.
        plan = kernel.plan(dtype, 4096, vocab_size, gpu, vocab_size // 20, 0)
        launch = Launch(plan.blocks, plan.staged, threads=256, seed=9)
        for options in (VARIANTS["default"], VARIANTS["all statistics"]):
            actual = run(kernel, launch, logits, target, teacher, **options)
            assert_kernel_matches(actual, logits, target, teacher, **options)
