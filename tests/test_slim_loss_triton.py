"""The Triton kernel of slim_loss, without a GPU."""

from __future__ import annotations

import pytest
import torch
from support.helpers import assert_slim_loss_of_rows, random_problem
from support.triton_checks import (
    ARCHITECTURES,
    assert_compiles,
    assert_tests_pass_interpreted,
    compile_for,
    on_architectures,
)

import slimkernels as sk
from slimkernels import reference
from slimkernels.ops._slim_options import resolve_options
from slimkernels.ops.slim_result import NUM_STATS

DEFAULTS = {
    "temperature": 1.0,
    "rest": "renorm",
    "divergence": "forward_kl",
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
    "logit_scale": 1.0,
    "ignore_index": -100,
    "statistics": False,
}
GHOST = {"rest": "ghost", "temperature": 2.0}
VARIANTS = {
    "default": {},
    "cross entropy": {"teacher": None},
    "ghost jsd": {"rest": "ghost", "divergence": "jsd", "detach_weight": False},
    "zero_logit, smoothed": {"rest": "zero_logit", "label_smoothing": 0.1},
    "capped at a temperature": {"rest": "renorm_both", "divergence": "reverse_kl", "temperature": 2.0, "softcap": 30.0},
    # Those that the assembler fits into 64 registers at the price of spills, unless it may use more.
    "ghost without a gradient": {**GHOST, "gradient": False},
    "ghost skew_kl without a gradient": {**GHOST, "divergence": "skew_kl", "gradient": False},
    "renorm_both jsd without a gradient": {"rest": "renorm_both", "divergence": "jsd", "gradient": False},
    "zero_logit without a gradient": {"rest": "zero_logit", "gradient": False},
    "renorm_both": {"rest": "renorm_both"},
    "ghost soft_ce": {**GHOST, "divergence": "soft_ce"},
    "ghost gated": {**GHOST, "divergence": "gated", "teacher_blend": 0.5, "tail_weight": 2.0},
    "renorm_both ab": {"rest": "renorm_both", "divergence": "ab", "teacher_blend": 0.5},
    "ghost skew_reverse_kl without a gradient": {**GHOST, "divergence": "skew_reverse_kl", "gradient": False},
    "renorm_both tvd without a gradient": {"rest": "renorm_both", "divergence": "tvd", "gradient": False},
    "all statistics": {"statistics": True},
    "ghost jsd, statistics": {**GHOST, "divergence": "jsd", "statistics": "without_overlap"},
    "cross entropy, statistics": {"teacher": None, "softcap": 30.0, "statistics": True},
    "ghost statistics without a gradient": {**GHOST, "statistics": True, "gradient": False},
}


@pytest.mark.interpret
def test_slim_loss_passes_its_tests_interpreted():
    assert_tests_pass_interpreted(
        "test_slim_loss.py::test_slim_loss_divergence_hand_worked",
        "test_slim_loss.py::test_slim_loss_of_rows_whose_target_logit_is_not_known",
        "test_slim_loss.py::test_slim_loss_tails_do_not_cancel[80.0]",
        "test_slim_loss.py::test_slim_loss_of_small_and_large_logits[dtype0-30000.0]",
        *(
            f"test_slim_loss_operator.py::test_slim_loss_of_any_layout[none-row strided-dtype{index}]"
            for index in range(2)
        ),
        *(
            f"test_slim_loss.py::test_slim_loss_edges[dtype0-{shape}-{rest}]"
            for shape in ("-inf off the support", "empty row", "q = 0 in ids")
            for rest in ("ghost-forward_kl", "zero_logit-soft_ce", "renorm_both-reverse_kl", "zero-forward_kl")
        ),
        "test_slim_loss_tails.py::test_slim_loss_leaves_out_only_outcomes_that_the_teacher_excludes",
        *(
            f"test_slim_loss_tails.py::test_slim_loss_of_a_teacher_row_without_mass[{rest}-{top_k}]"
            for rest, top_k in (
                ("ghost-forward_kl", 3),
                ("ghost-jsd", 3),
                ("zero-soft_ce", 3),
                ("zero_logit-soft_ce", 9),
            )
        ),
        "test_slim_loss_triton.py::test_every_option",
        "test_slim_loss_triton.py::test_rows_that_end_a_block_or_have_no_rest",
        "test_slim_loss_triton.py::test_a_bad_row_is_nan_and_the_others_are_not",
    )


@pytest.mark.interpret
def test_slim_statistics_pass_their_tests_interpreted():
    assert_tests_pass_interpreted(
        *(
            f"test_slim_statistics.py::test_{name}"
            for name in (
                "statistics_hand_worked",
                "statistics_of_hostile_rows[0-130-129-dtype0]",
                "statistics_of_hostile_rows[7-130-129-dtype1]",
                "statistics_match_the_reference[True-ghost-dtype1]",
                "statistics_with_options[dtype0-softcap at a temperature]",
                "statistics_of_small_and_large_logits[dtype0-30000.0]",
                "statistics_keep_the_entropy_of_a_peaked_teacher",
                "ties_go_to_the_lowest_id",
                "a_row_that_keeps_nothing_has_no_overlap",
                "statistics_of_ignored_rows_are_zero[renorm-forward_kl]",
            )
        )
    )


@pytest.mark.slow
@pytest.mark.interpret
def test_slim_loss_passes_more_of_its_tests_interpreted():
    assert_tests_pass_interpreted(
        "test_slim_loss.py::test_slim_loss_options",
        "test_slim_loss.py::test_slim_loss_edges",
        "test_slim_loss_operator.py::test_slim_loss_of_any_layout",
        *(f"test_slim_statistics.py::test_statistics_of_hostile_rows[7-301-16-dtype{index}]" for index in range(4)),
        timeout=10800,
    )


@pytest.mark.parametrize(
    ("architecture", "dtype", "variant"), on_architectures([torch.bfloat16, torch.float32, torch.float64], VARIANTS)
)
def test_slim_loss_compiles_for(architecture, dtype, variant):
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    # The oldest supported release spills up to 14 registers of two variants.
    is_known = triton.__version__.startswith("3.6.") and (architecture, variant[:9]) == ("sm_100", "ghost jsd")
    # float64 serves the checking of gradients, not training.
    may_spill = dtype == torch.float64 or is_known
    assert_compiles(lambda: launch_slim_loss(128256, dtype, VARIANTS[variant]), architecture, may_spill=may_spill)


@pytest.mark.slow  # with every supported Triton: make test-triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("vocab_size", [50257, 151937])
def test_slim_loss_compiles_for_an_odd_vocabulary(architecture, vocab_size):
    assert_compiles(lambda: launch_slim_loss(vocab_size, torch.bfloat16, {}), architecture)


@pytest.mark.parametrize("vocab_size", [128256, pytest.param(262144, marks=pytest.mark.slow)])
def test_slim_loss_moves_16_bytes_at_a_time_and_keeps_what_it_rewrites(vocab_size):
    compiled = compile_for("sm_90", lambda: launch_slim_loss(vocab_size, torch.bfloat16, {}), "slim_loss_kernel")
    logits, gradient = compiled.parameters("logits_ptr", "dlogits_ptr")
    # The passes over the row; the kept ids and the label are gathered and scattered, two bytes each.
    assert {access.num_bytes for access in compiled.of("ld", logits)} == {2, 16}
    assert {access.num_bytes for access in compiled.of("st", gradient)} == {2, 16}
    # What is scattered would otherwise read the written sectors back from memory.
    assert not any("evict_first" in access.opcode for access in compiled.of("st", gradient))


def launch_slim_loss(vocab_size, dtype, settings, top_k=6413):
    from slimkernels.ops.triton.slim_loss import slim_loss_rows

    settings = {"token_weight": "teacher_over_student", "softcap": None, **DEFAULTS, **settings}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.empty(2, vocab_size, dtype=dtype)
    top_k = min(top_k, vocab_size // 20)
    teacher = sk.SparseLogits(
        torch.zeros(2, top_k, dtype=torch.int32),
        torch.zeros(2, top_k, dtype=dtype),
        torch.zeros(2, 2, dtype=wide),
        temperatures=(1.0, 2.0),
        target_logit=torch.zeros(2, dtype=wide),
        rest_lse=torch.zeros(2, 2, dtype=wide),
    )
    dlogits = torch.empty_like(logits) if settings.pop("gradient", True) else None
    teacher = settings.pop("teacher", teacher)
    options = resolve_options(logits, "logits", teacher, **settings)
    stats = torch.empty(NUM_STATS[options.statistics], 2, dtype=wide)
    target, scale = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=wide)
    slim_loss_rows(logits, dlogits, stats, target, scale, *options)


EVERY_OPTION = {"softcap": 4.0, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss_weight": 0.1, "ce_weight": 0.4}


@pytest.mark.parametrize(
    "options",
    [
        {"rest": "ghost", "divergence": "jsd", "beta": 0.9, "temperature": 1.7, "num_items": 9},
        {"rest": "ghost", "divergence": "skew_kl", "alpha": 0.6, "token_weight": "student_over_teacher"},
        {"rest": "renorm_both", "divergence": "reverse_kl", "temperature": 0.6, "reduction": "none"},
        {"rest": "ghost", "divergence": "gated", "entropy_threshold": 0.5, "teacher_blend": 0.4, "tail_weight": 3.0},
        {"rest": "renorm_both", "divergence": "ab", "temperature": 1.7, "teacher_blend": 0.6},
        {"rest": "ghost", "divergence": "skew_reverse_kl", "alpha": 0.3, "tail_weight": 0.0},
        {"rest": "ghost", "divergence": "tvd"},
        {"rest": "zero_logit", "divergence": "forward_kl", "temperature": 2.0, "reduction": "none"},
    ],
    ids=lambda options: f"{options['rest']}-{options['divergence']}",
)
def test_every_option(options):
    logits, target, teacher = random_problem(4, 45, 6, temperature=options.get("temperature", 1.0))
    upstream = torch.tensor([-1.0, 0.5, 3.0, 2.0]) if options.get("reduction") == "none" else 3.0
    options = {"detach_weight": False, **EVERY_OPTION, **options}
    # Logits of both signs, on both sides of where tanh bends.
    assert (logits.abs() > 4).any()
    assert_slim_loss_of_rows(logits, target, teacher, upstream=upstream, **options)
    if "reduction" in options:
        weight = torch.tensor([0.1, 2.0, 0.5, 0.0])
        assert_slim_loss_of_rows(
            logits, target, teacher, upstream=upstream, token_weight=weight, rest=options["rest"], reduction="none"
        )


def test_rows_that_end_a_block_or_have_no_rest():
    # The label is in the first of two blocks of kept ids.
    logits, target, teacher = random_problem(1, 2100, 1100, ignored=(), with_target_logit=False)
    target[0] = teacher.ids[0, 3].long()
    assert_slim_loss_of_rows(logits, target, teacher, rest="ghost")
    # Everything is kept, with a known rest and without.
    assert_slim_loss_of_rows(*random_problem(3, 13, 13, ignored=()), rest="ghost")
    assert_slim_loss_of_rows(*random_problem(3, 13, 13, ignored=(), with_target_logit=False), rest="ghost")
    # The student rules out all that the teacher keeps, or the teacher keeps only what has no probability.
    logits, target, teacher = random_problem(3, 13, 3, ignored=())
    outside = torch.tensor([v for v in range(13) if v not in teacher.ids[1].tolist()])
    target[1] = outside[0]
    student = logits.index_put((torch.tensor(1), teacher.ids[1].long()), torch.tensor(-torch.inf))
    assert_slim_loss_of_rows(student, target, teacher, rest="renorm", divergence="soft_ce", kd_weight=0.0)
    teacher.logits[2], teacher.lse[2] = -torch.inf, 0.0
    for rest in ("renorm", "ghost", "zero"):
        assert_slim_loss_of_rows(logits, target, teacher, rest=rest)
    # A teacher without any mass has a finite loss.
    teacher.rest_lse[2] = -torch.inf
    actual, expected = (f(logits, target, teacher, rest="ghost").kd for f in (sk.slim_loss, reference.slim_loss))
    torch.testing.assert_close(actual, expected)


def test_a_bad_row_is_nan_and_the_others_are_not(request):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("the CPU kernel raises")
    logits, target, teacher = random_problem(num_rows=5, ignored=())
    logits.requires_grad_()
    options = {"reduction": "none", "statistics": True}
    expected = sk.slim_loss(logits, target, teacher, **options)
    target[1], teacher.ids[3, 2] = logits.shape[1], teacher.ids[3, 1]
    actual = sk.slim_loss(logits, target, teacher, **options)
    (grad,) = torch.autograd.grad(actual.loss.nansum(), logits)
    for row, broken in enumerate([False, True, False, True, False]):
        assert all(field[row].isnan() == broken for field in actual)
        assert grad[row].isnan().all() == broken
        assert broken or torch.equal(actual.loss[row], expected.loss[row])
