"""Every instruction set of this machine passes the tests of every op, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slimkernels import _C

HERE = Path(__file__).parent
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
# The tests that compare an op with the oracle over dtypes, sizes and values; the others do not depend on the kernel.
CORE = (
    "test_topk_logits.py::test_topk_logits_hand_worked",
    "test_topk_logits.py::test_topk_logits_of_hostile_rows",
    "test_topk_logits.py::test_topk_logits_of_every_small_size",
    "test_topk_logits.py::test_topk_logits_lse_of_extremes",
    "test_topk_logits.py::test_topk_logits_of_masked_and_tied_rows",
    "test_topk_logits.py::test_topk_logits_of_any_layout",
    "test_topk_logits.py::test_topk_logits_is_bitwise_repeatable_and_batch_invariant",
    "test_gather_logits.py::test_gather_logits_of_hostile_rows",
    "test_gather_logits.py::test_gather_logits_of_every_small_size",
    "test_gather_logits.py::test_gather_logits_rest_lse_does_not_cancel",
    "test_sparse_softmax.py::test_sparse_softmax_matches_the_reference",
    "test_sparse_softmax.py::test_sparse_softmax_never_reads_padding",
    "test_slim_loss.py::test_slim_loss_divergence_hand_worked",
    "test_slim_loss.py::test_slim_loss_shapes",
    "test_slim_loss.py::test_slim_loss_options",
    "test_slim_loss.py::test_slim_loss_edges",
    "test_slim_loss.py::test_slim_loss_of_small_and_large_logits",
    "test_slim_loss.py::test_slim_loss_gradient_below_the_smallest_normal_number_is_zero",
    "test_slim_loss.py::test_slim_loss_makes_no_denormal_gradient",
    "test_slim_loss.py::test_slim_loss_of_masked_rows",
    "test_slim_loss_operator.py::test_slim_loss_of_any_layout",
    "test_slim_statistics.py::test_statistics_of_hostile_rows",
    "test_slim_statistics.py::test_statistics_with_options",
    "test_softmax_gradient.py::test_softmax_gradient_below_the_smallest_normal_number_is_zero",
    "test_sample_logits.py::test_sample_logits_hand_worked",
    "test_sample_logits.py::test_sample_logits_options_of_every_row",
    "test_sample_logits.py::test_sample_logits_of_every_small_size",
    *(f"test_sample_logits.py::test_sample_logits_of_hostile_rows[37-dtype{index}]" for index in range(4)),
    "test_sample_logits.py::test_sample_logits_of_hostile_rows[8209-dtype0]",
    "test_sample_logits.py::test_sample_logits_of_masked_rows",
    "test_sample_logits.py::test_sample_logits_at_extreme_temperatures",
    "test_sample_logits.py::test_sample_logits_takes_all_64_bits_of_seed_and_position",
    "test_sample_logits.py::test_sample_logits_is_bitwise_repeatable_and_batch_invariant",
    "test_sample_logits.py::test_sample_distinct_matches_the_reference",
    *(f"test_sample_targets.py::test_sample_targets_matches_the_reference[16-dtype{index}]" for index in range(4)),
    "test_sample_targets.py::test_sample_targets_of_hostile_rows",
    "test_sample_targets.py::test_sample_targets_of_draw_version_2_are_these",
    "test_sample_targets.py::test_sample_targets_at_extreme_temperatures",
    "test_linear_slim_loss.py::test_linear_slim_loss_shapes",
    "test_linear_topk_logits.py::test_linear_topk_logits_shapes",
)
# Every test file of an op, which `make test-isa` runs.
WHOLE = tuple(dict.fromkeys(test.split("::")[0] for test in CORE))


def run(*arguments: str, isa: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "SLIMKERNELS_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "tests", [pytest.param(CORE, id="core"), pytest.param(WHOLE, id="whole", marks=pytest.mark.slow)]
)
def test_every_isa_passes_the_tests(isa, tests):
    if isa not in _C.supported_cpu_isas():
        pytest.skip(f"this build or machine has no {isa}")
    if isa == _C.cpu_isa():
        pytest.skip(f"the other tests of this process run on {isa}")
    used = run("-c", "import torch; from slimkernels import _C; print(_C.cpu_isa())", isa=isa)
    assert used.stdout.strip() == isa, used.stderr
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / test) for test in tests), isa=isa)
    assert done.returncode == 0, done.stdout[-6000:]


def test_the_best_isa_is_chosen_and_an_unknown_one_refused():
    environment = {name: value for name, value in os.environ.items() if name != "SLIMKERNELS_CPU_ISA"}
    command = [sys.executable, "-c", "import torch; from slimkernels import _C; print(_C.cpu_isa())"]
    chosen = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert chosen.stdout.strip() == _C.supported_cpu_isas()[0]
    refused = run("-c", "import torch, slimkernels; slimkernels.topk_logits(torch.zeros(1, 3), 1)", isa="sse9")
    assert refused.returncode != 0
    assert "SLIMKERNELS_CPU_ISA" in refused.stderr
    assert "sse9" in refused.stderr
