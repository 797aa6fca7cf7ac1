"""The CPU kernels with NEON, compiled for aarch64 and run in an emulator on rows whose results the reference knows.

There is no torch in the emulator: a plain C++ program calls the kernel table.
"""

from __future__ import annotations

import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from support.helpers import (
    DTYPES,
    assert_as_accurate,
    assert_rows_match,
    assert_same_bits,
    explain,
    hostile_rows,
    loss_and_grads,
    random_problem,
    to_dtype,
)

import slimkernels as sk
from slimkernels import reference, reference_sampling

ROOT = Path(__file__).parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
# The enumerators of csrc/slim_loss/args.h, in their order.
DTYPE_ORDER = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RESTS = ("renorm", "zero", "ghost", "zero_logit", "renorm_both")
DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "ab", "gated")

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")
        for program in (COMPILER, EMULATOR)
    ),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("aarch64") / "kernel_table"
    sources = ("tests/support/kernel_table/main.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/isa.cpp")
    flags = ("-std=c++17", "-O3", "-static", "-Icsrc", "-DSK_ISA=baseline", "-Wall", "-Wextra", "-Werror")
    quiet = ("-Wno-psabi", "-Wno-maybe-uninitialized")
    subprocess.run([COMPILER, *flags, *quiet, *sources, "-o", str(program)], cwd=ROOT, check=True)
    return program


def run(program: Path, kernel: str, logits: torch.Tensor, **entries) -> dict[str, torch.Tensor]:
    """Calls a kernel on rows (N, V); returns the entries that are tensors, outputs filled in."""
    entries = {
        "logits": logits,
        "num_rows": len(logits),
        "dtype": DTYPE_ORDER.index(logits.dtype),
        **entries,
    }
    entries.setdefault("vocab_size", logits.shape[-1])
    folder = program.parent
    with open(folder / "input", "wb") as file:
        for name, value in {"kernel": kernel.encode(), **entries}.items():
            if isinstance(value, torch.Tensor):
                value = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            elif not isinstance(value, bytes):
                value = struct.pack("<d" if isinstance(value, float) else "<q", value)
            file.write(struct.pack("<qq", len(name), len(value)) + name.encode() + value)
    done = subprocess.run([EMULATOR, program, folder / "input", folder / "output"], capture_output=True, check=True)
    assert done.stdout == b"baseline\n"
    data, out, at = (folder / "output").read_bytes(), {}, 0
    while at < len(data):
        name_size, size = struct.unpack_from("<qq", data, at)
        at += 16
        name, value = data[at : at + name_size].decode(), data[at + name_size : at + name_size + size]
        at += name_size + size
        before = entries.get(name)
        if isinstance(before, torch.Tensor):
            out[name] = torch.frombuffer(bytearray(value), dtype=before.dtype).reshape(before.shape)
        elif name == "fault":
            assert struct.unpack("<q", value) == (0,)
    return out


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns an output that a kernel has to overwrite."""
    return torch.full(shape, math.nan if dtype.is_floating_point else -7, dtype=dtype)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def all_rows(vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    noise = 3 * torch.randn(3, vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.stack([*hostile_rows(vocab_size, dtype).values(), *noise.to(dtype)])


def run_topk(program, kernel, logits, top_k, temperatures, ids=None) -> sk.SparseLogits:
    acc, num_rows = accumulated(logits.dtype), len(logits)
    sums = poisoned(num_rows, len(temperatures), dtype=acc)
    out = run(
        program,
        kernel,
        logits,
        top_k=top_k,
        target=torch.arange(num_rows),
        temperatures=torch.tensor(temperatures, dtype=torch.float64),
        num_temperatures=len(temperatures),
        ids=poisoned(num_rows, top_k, dtype=torch.int32) if ids is None else ids,
        values=poisoned(num_rows, top_k, dtype=logits.dtype),
        lse=sums,
        rest_lse=sums,
        target_logit=poisoned(num_rows, dtype=acc),
    )
    return sk.SparseLogits(out["ids"], out["values"], out["lse"], temperatures, out["target_logit"], out["rest_lse"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [37, 1039, 8209])
def test_topk_and_gather_logits(program, dtype, vocab_size):
    # The truth of float64 is in float64 too, and no better than the rounding of the logits divided by T.
    logits, temperatures = all_rows(vocab_size, dtype), (1.0,) if dtype == torch.float64 else (1.0, 0.5)
    options = {"target": torch.arange(len(logits)), "temperatures": temperatures}
    for top_k in (1, vocab_size // 20 + 1, vocab_size):
        expected = reference.topk_logits(logits, top_k, **options)
        truth = reference.topk_logits(logits.double(), top_k, **options)
        with explain(f"K={top_k}"):
            assert_rows_match(run_topk(program, "topk_logits", logits, top_k, temperatures), expected, truth, logits)
            ids = expected.ids.roll(1, 0)
            expected = reference.gather_logits(logits, ids, **options)
            truth = reference.gather_logits(logits.double(), ids, **options)
            actual = run_topk(program, "gather_logits", logits, top_k, temperatures, ids)
            assert_rows_match(actual, expected, truth, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 20, "temperature": 0.5}, {"min_p": 0.05}, {"temperature": 1.5}], ids=str
)
def test_sample_logits(program, dtype, options):
    logits = all_rows(1039, dtype)
    num_rows, num_distinct, acc = len(logits), 5, accumulated(dtype)
    seed, position = torch.arange(num_rows) * 2**33 - 3, torch.arange(num_rows) + 2**32
    logprob = poisoned(num_rows, num_distinct, dtype=acc)
    out = run(
        program,
        "sample_logits",
        logits,
        num_distinct=num_distinct,
        seed=seed,
        position=position,
        **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options},
        token=poisoned(num_rows, num_distinct, dtype=torch.int64),
        logprob=logprob,
        truncated_logprob=logprob,
        entropy=poisoned(num_rows, dtype=acc),
    )
    expected = reference_sampling.sample_distinct(logits, num_distinct, seed=seed, position=position, **options)
    assert torch.equal(out["token"], expected.token)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for name in ("logprob", "truncated_logprob", "entropy"):
        torch.testing.assert_close(
            out[name].double(), getattr(expected, name).double(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_targets(program, dtype):
    logits = all_rows(1000, dtype)
    num_rows, rounds, acc = len(logits), 50, accumulated(dtype)
    seed, position = torch.arange(num_rows) - 2, torch.arange(num_rows)
    out = run(
        program,
        "sample_targets",
        logits,
        rounds=rounds,
        temperature=0.7,
        seed=seed,
        position=position,
        ids=poisoned(num_rows, rounds, dtype=torch.int32),
        log_shares=poisoned(num_rows, rounds, dtype=acc),
    )
    expected = reference_sampling.sample_targets(logits, rounds, seed, position=position, temperature=0.7)
    assert torch.equal(out["ids"], expected.ids)
    kept = expected.ids >= 0
    torch.testing.assert_close(out["log_shares"][kept], expected.logits[kept], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rest", ["renorm", "zero", "ghost", "zero_logit"])
def test_sparse_softmax(program, dtype, rest):
    sparse = random_problem(5, 203, 17, dtype=dtype).teacher
    acc = accumulated(dtype)
    out = run(
        program,
        "sparse_softmax",
        sparse.logits,
        ids=sparse.ids,
        lse=sparse.lse[:, 0],
        rest_lse=sparse.rest_lse[:, 0],
        top_k=17,
        vocab_size=203,
        temperature=1.0,
        rest=RESTS.index(rest),
        logprobs=poisoned(5, 17, dtype=acc),
        tail_logprob=poisoned(5, dtype=acc),
    )
    expected = reference.sparse_softmax(sparse, rest=rest, vocab_size=203)
    truth = reference.sparse_softmax(to_dtype(sparse, torch.float64), rest=rest, vocab_size=203)
    for name in ("logprobs", "tail_logprob"):
        assert_as_accurate(out[name], getattr(expected, name), getattr(truth, name), at_least=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("divergence", "options"),
    [
        ("forward_kl", {}),
        ("forward_kl", {"temperature": 2.0, "softcap": 8.0}),
        ("soft_ce", {"label_smoothing": 0.1}),
        ("reverse_kl", {}),
        ("jsd", {"beta": 0.3}),
        ("skew_kl", {"alpha": 0.2, "temperature": 2.0}),
        ("skew_reverse_kl", {"alpha": 0.1}),
        ("tvd", {}),
        ("ab", {"alpha": 0.4, "beta": 0.5}),
        ("gated", {}),
    ],
)
def test_slim_loss(program, dtype, divergence, options):
    temperature = options.get("temperature", 1.0)
    logits, target, teacher = random_problem(7, 1039, 53, dtype=dtype, temperature=temperature)
    acc = accumulated(dtype)
    out = run(
        program,
        "slim_loss",
        logits,
        dlogits=poisoned(7, 1039, dtype=dtype),
        stats=poisoned(13, 7, dtype=acc),
        target=target,
        ids=teacher.ids,
        teacher_logits=teacher.logits,
        teacher_dtype=DTYPE_ORDER.index(dtype),
        top_k=53,
        teacher_lse=teacher.lse[:, -1],
        teacher_lse_one=teacher.lse[:, 0],
        teacher_rest_lse=teacher.rest_lse[:, -1],
        target_logit=teacher.target_logit,
        rest=RESTS.index("ghost"),
        divergence=DIVERGENCES.index(divergence),
        **{"temperature": temperature, **options},
    )
    options = {"rest": "ghost", "divergence": divergence, "reduction": "none", "statistics": True, **options}
    theirs, (their_gradient,) = loss_and_grads(reference.slim_loss, (logits,), 1.0, target, teacher, **options)
    wide = to_dtype(teacher, torch.float64)
    truth, (gradient,) = loss_and_grads(reference.slim_loss, (logits.double(),), 1.0, target, wide, **options)
    assert_as_accurate(out["dlogits"], their_gradient, gradient)
    for name, column in zip(truth._fields, out["stats"], strict=True):
        with explain(name):
            assert_as_accurate(column, getattr(theirs, name), getattr(truth, name), at_least=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_gradient(program, dtype):
    logits = (3 * torch.randn(4, 203, generator=torch.Generator().manual_seed(2))).to(dtype)
    numbers = torch.rand(5, 4, dtype=accumulated(dtype))
    out = run(
        program,
        "softmax_gradient",
        logits,
        gradient=poisoned(4, 203, dtype=dtype),
        numbers=numbers,
        temperature=2.5,
        softcap=0.0,
        logit_scale=1.0,
    )

    def in_torch(z, numbers):
        factor, level, factor_one, level_one, constant = numbers.unsqueeze(-1)
        return factor * ((z - level) / 2.5).exp() + factor_one * (z - level_one).exp() + constant

    same_dtype = in_torch(logits.to(numbers.dtype), numbers).to(dtype)
    assert_as_accurate(out["gradient"], same_dtype, in_torch(logits.double(), numbers.double()))


def test_bits_are_those_of_this_machine_where_they_are_promised(program):
    logits = all_rows(1039, torch.bfloat16)
    actual = run_topk(program, "topk_logits", logits, 52, (1.0,))
    here = sk.topk_logits(logits, 52)
    assert_same_bits([actual.ids, actual.logits], [here.ids, here.logits])
