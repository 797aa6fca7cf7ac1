"""The Triton kernel of decode_logits, without a GPU."""

from __future__ import annotations

import pytest
import torch
from support.packed_cases import VALUE_DTYPES, pack, random_ids
from support.triton_checks import assert_compiles, assert_tests_pass_interpreted, on_architectures

import slimkernels as sk
from slimkernels.packed_logits import row_words


@pytest.mark.interpret
def test_decode_logits_passes_its_tests_interpreted():
    names = (
        "hand_worked",
        "of_ragged_rows[32000-counts1-affine8]",
        "of_uniform_rows[1003-129-bfloat16]",
        "of_uniform_rows[1003-100-affine8]",
        "of_broken_rows",
        "of_counts_that_do_not_fit",
    )
    assert_tests_pass_interpreted(
        *(f"test_decode_logits.py::test_decode_logits_{name}" for name in names),
        "test_decode_logits_triton.py::test_broken_rows_make_nan",
    )


@pytest.mark.slow
@pytest.mark.interpret
def test_decode_logits_passes_all_its_tests_interpreted():
    assert_tests_pass_interpreted("test_decode_logits.py")


@pytest.mark.parametrize(
    ("architecture", "dtype", "ragged"), on_architectures(sorted(set(VALUE_DTYPES.values()), key=str), [False, True])
)
def test_decode_logits_compiles_for(architecture, dtype, ragged):
    for vocab_size, top_k in ((32000, 1600), (128256, 6413), (1, 1)):
        assert_compiles(lambda: launch(vocab_size, top_k, dtype, ragged), architecture)  # noqa: B023


def launch(vocab_size: int, top_k: int, dtype: torch.dtype, ragged: bool) -> None:
    from slimkernels.ops.triton.decode_logits import decode_logits_rows

    decode_logits_rows(
        torch.empty(2, row_words(vocab_size, top_k), dtype=torch.int32),
        torch.empty(2, top_k, dtype=dtype),
        torch.empty(2, 2) if dtype == torch.uint8 else None,
        torch.empty(2, dtype=torch.int32) if ragged else None,
        vocab_size,
        torch.empty(2, top_k, dtype=torch.int32),
        torch.empty(2, top_k),
    )


def test_broken_rows_make_nan(request):
    if request.config.getoption("--kernels") == "cpu":
        pytest.skip("the CPU kernel raises")
    packed = pack(random_ids(1003, [129, 60, 129, 5]), 1003, "affine8")
    whole = sk.decode_logits(packed)
    packed.id_words[0, 12] = 0  # the fourth of the bitmap, in its second block
    packed.counts[1] = 61
    broken = sk.decode_logits(packed)
    for row in (0, 1):
        assert (broken.ids[row] == -2).all()
        assert broken.logits[row].isnan().all()
        # Neither an id nor padding: no op takes the row for one that keeps little.
        probs = sk.sparse_softmax(broken, vocab_size=1003)
        assert probs.logprobs[row].isnan().all()
        with pytest.raises(ValueError, match=r"row \[0\] of the SparseLogits holds an id outside"):
            broken.validate(1003)
    assert torch.equal(broken.ids[2:], whole.ids[2:])
    assert torch.equal(broken.logits[2:], whole.logits[2:])
