"""What only a GPU can show; the ops' own tests also run there, in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.helpers import assert_same_bits, sparse_fields

import slimkernels as sk
import slimkernels.ops  # registers the operators

HERE = Path(__file__).parent
OP_TESTS = (
    "test_topk_logits.py",
    "test_sparse_softmax.py",
    "test_slim_loss.py",
    "test_slim_loss_operator.py",
    "test_decode_logits.py",
    "test_sample_logits.py",
    "test_sample_targets.py",
)

pytestmark = pytest.mark.gpu
needs_cuda_library = pytest.mark.skipif(
    not hasattr(torch.ops.slimkernels, "topk_logits_rows_triton"),
    reason="slimkernels/_C_cuda.so is not built: it needs nvcc, see setup.py",
)


@pytest.fixture
def no_sync():
    """An error where the host waits for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns, once, that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def problem(num_rows=64, vocab_size=32000, hidden_size=256, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight, teacher_logits = (
        torch.randn(*shape, generator=generator, device="cuda")
        for shape in ((num_rows, hidden_size), (vocab_size, hidden_size), (num_rows, vocab_size))
    )
    target = torch.randint(vocab_size, (num_rows,), generator=generator, device="cuda")
    teacher = sk.topk_logits(3 * teacher_logits.to(dtype), top_fraction=0.05, target=target)
    leaves = (hidden.to(dtype).requires_grad_(), (weight / 8).to(dtype).requires_grad_())
    return leaves, target, teacher


@pytest.mark.parametrize("tests", OP_TESTS)
def test_the_tests_of_an_op_pass_on_cuda(tests):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--kernels=cuda", str(HERE / tests)],
        env=dict(os.environ),
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_a_training_step_never_waits_for_the_device(no_sync):
    (hidden, weight), target, teacher = problem()
    sk.linear_slim_loss(hidden, weight, target, teacher).loss.backward()
    logits = (hidden @ weight.T).detach().requires_grad_()
    sk.slim_loss(logits, target, teacher).loss.backward()
    sk.sparse_softmax(teacher, rest="ghost")
    assert hidden.grad is not None


def test_a_training_step_in_a_cuda_graph_repeats_bit_for_bit():
    (hidden, weight), target, teacher = problem()

    def step():
        hidden.grad = weight.grad = None
        result = sk.linear_slim_loss(hidden, weight, target, teacher)
        result.loss.backward()
        return result.loss.detach(), hidden.grad, weight.grad

    expected = [tensor.clone() for tensor in step()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected)


def test_fullgraph_compile_on_cuda_equals_eager():
    (hidden, weight), target, teacher = problem()

    def loss(hidden, weight):
        return sk.linear_slim_loss(hidden, weight, target, teacher).loss

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    assert_same_bits(actual, expected)


def test_rows_beyond_32_bit_offsets():
    vocab_size, num_rows = 262144, 2**31 // 262144 + 3
    logits = torch.zeros(num_rows, vocab_size, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[-4:] = last.cuda()
    target = torch.full((num_rows,), 5, device="cuda")
    actual = sk.topk_logits(logits, 1000, target=target)
    expected = sk.topk_logits(last, 1000, target=target[-4:].cpu())
    assert torch.equal(actual.ids[-4:].cpu(), expected.ids)
    torch.testing.assert_close(actual.lse[-4:].cpu(), expected.lse)
    result = sk.slim_loss(logits.requires_grad_(), target, actual, reduction="sum")
    result.loss.backward()
    small = last.clone().requires_grad_()
    sk.slim_loss(small, target[-4:].cpu(), expected, reduction="sum").loss.backward()
    torch.testing.assert_close(logits.grad[-4:].cpu(), small.grad)


def test_linear_slim_loss_holds_one_chunk_and_no_float32_copy():
    (hidden, weight), target, teacher = problem(num_rows=2048, hidden_size=2048)
    vocab_size, chunk_rows = len(weight), 256
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sk.linear_slim_loss(hidden, weight, target, teacher, chunk_rows=chunk_rows).loss.backward()
    made = hidden.grad.nbytes + weight.grad.nbytes
    extra = torch.cuda.max_memory_allocated() - before - made
    chunk = chunk_rows * vocab_size * 2
    panel = 16384 * len(hidden) * 2
    kept = chunk_rows * teacher.top_k * 2
    assert extra < chunk + panel + kept + 2**23


def test_another_device_and_another_stream():
    (hidden, weight), target, _ = problem()
    logits = (hidden @ weight.T).detach()
    expected = sk.topk_logits(logits, 100, target=target)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = sk.topk_logits(logits, 100, target=target)
    stream.synchronize()
    assert_same_bits(sparse_fields(actual), sparse_fields(expected))
    if torch.cuda.device_count() > 1:
        moved = sk.topk_logits(logits.to("cuda:1"), 100, target=target.to("cuda:1"))
        assert torch.equal(moved.ids.cpu(), expected.ids.cpu())


@needs_cuda_library
def test_cuda_cpp_topk_logits_matches_the_reference():
    check_cuda_cpp_topk_logits()


@needs_cuda_library
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_cuda_cpp_topk_logits_under_compute_sanitizer(tool):
    sanitizer = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
    check_cuda_cpp_topk_logits(*sanitizer, options=("--small",), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def check_cuda_cpp_topk_logits(*runner: str, options: tuple[str, ...] = (), **environment: str) -> None:
    """In a process of its own: an error of a kernel would spoil the device for the tests that follow."""
    done = subprocess.run(
        [*runner, sys.executable, str(HERE / "scripts/cuda_check_topk_logits.py"), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])} | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@needs_cuda_library
def test_cuda_cpp_topk_logits_never_waits_for_the_device(no_sync):
    logits = torch.zeros(4, 5000, device="cuda")
    values, ids = logits.new_empty(4, 7), torch.empty(4, 7, dtype=torch.int32, device="cuda")
    lse, rest_lse = logits.new_empty(2, 4, 1)
    torch.ops.slimkernels.topk_logits_rows(logits, 7, None, [1.0], values, ids, lse, rest_lse, None)
    torch.cuda.set_sync_debug_mode("default")  # looking at the result waits
    assert ids.tolist() == [list(range(7))] * 4
