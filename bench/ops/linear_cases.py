"""Lists the cases that start from hidden states, most of whose time goes into one or three matrix products."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import slimkernels as sk
from bench.ops import cuda_peers, peers
from bench.ops.case import (
    OURS,
    Case,
    Work,
    five_per_cent,
    generator,
    gradient_check,
    random_logits,
    random_rows,
    random_target,
    require,
    require_close,
    training_step,
)
from slimkernels import reference

# Error of a gradient relative to its largest entry. The peers round all logits to half precision before the softmax.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
HAS_HEAD_TEACHER = hasattr(sk, "HeadTeacher")
TWO_CALLS = "linear_topk_logits, linear_slim_loss"
CHUNKED, TUNED = "F.linear_cross_entropy chunked", "F.linear_cross_entropy tuned"


def linear_cases(shrink: int = 1) -> list[Case]:
    """Returns every case with an lm_head; tests use ``shrink``, which divides N, D and V."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    narrow = (1024 // shrink, 2048 // shrink, 32000 // shrink)
    wide = (512 // shrink, 2048 // shrink, 128256 // shrink)
    cases = [
        linear_topk_case(*narrow, bfloat16),
        linear_slim_loss_case(*narrow, float32, compiled=True),
        linear_slim_loss_case(*narrow, bfloat16, compiled=True, fused=(TUNED, CHUNKED)),
        # With its own chunking, a call of torch takes most of a minute here, so only the tuned peer takes part.
        linear_slim_loss_case(*wide, bfloat16, fused=(TUNED,)),
        linear_cross_entropy_case(*wide, bfloat16),
    ]
    if HAS_HEAD_TEACHER:
        cases += [head_teacher_case(*narrow, bfloat16, fraction) for fraction in (0.05, 1.0)]
    return cases


def _head(num_rows, hidden_size, vocab_size, dtype) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = random_rows(num_rows, hidden_size, dtype, 3)
    weight = torch.randn(vocab_size, hidden_size, generator=generator(4))
    return hidden, weight.mul_(hidden_size**-0.5).to(dtype)


def linear_topk_case(num_rows, hidden_size, vocab_size, dtype) -> Case:
    """Returns a case of the teacher's side: top-k of an lm_head's output."""
    top_k = five_per_cent(vocab_size)

    def build() -> Work:
        hidden, weight = _head(num_rows, hidden_size, vocab_size, dtype)
        logits = hidden.float() @ weight.float().T
        least, lse = logits.topk(top_k, -1).values[:, -1:], torch.logsumexp(logits, -1)

        def check(provider: str, result) -> None:
            ids = result.ids.long() if provider == OURS else result.indices
            values = logits.gather(-1, ids)
            # Logits are rounded to half precision before or after the selection, so ids near the threshold may differ.
            slack = 2e-2 * least.abs().max()
            require(bool((values > least - slack).all()), "an id far below the k-th largest")
            require(bool((ids.sort(-1).values.diff() > 0).all()), "a duplicated id")
            if provider == OURS:
                require_close(result.lse[:, 0], lse, 5e-3, "lse")  # half a unit in the last place of bfloat16
                require_close(result.logits, values, 1e-2, "kept logits")

        providers = {
            OURS: lambda: sk.linear_topk_logits(hidden, weight, top_k),
            "matmul + torch.topk": lambda: (hidden @ weight.T).topk(top_k, -1, sorted=False),
        }
        return Work(providers, check)

    return Case(
        op="linear_topk_logits",
        mode="fwd",
        dtype=dtype,
        sizes={"N": num_rows, "D": hidden_size, "V": vocab_size, "K": top_k},
        floor_bytes=(num_rows + vocab_size) * hidden_size * dtype.itemsize + num_rows * top_k * (4 + dtype.itemsize),
        floor_flops=2 * num_rows * hidden_size * vocab_size,
        build=build,
        peers=("matmul + torch.topk",),
    )


def linear_slim_loss_case(num_rows, hidden_size, vocab_size, dtype, *, compiled=False, fused=()) -> Case:
    """Returns a case of the default loss of an lm_head's output.

    Args:
        num_rows: N.
        hidden_size: D.
        vocab_size: V.
        dtype: Dtype of hidden states and weight.
        compiled: Whether torch.compile is a peer.
        fused: Names of torch's fused ops that are peers, which compute the cross entropy only.
    """
    top_k = five_per_cent(vocab_size)
    fused = fused if peers.HAS_LINEAR_CROSS_ENTROPY else ()

    def build() -> Work:
        target = random_target(num_rows, vocab_size)
        teacher = sk.topk_logits(random_logits(num_rows, vocab_size, dtype, 2), top_k, target=target)
        hidden, weight = leaves = _head(num_rows, hidden_size, vocab_size, dtype)
        for leaf in leaves:
            leaf.requires_grad_()
        steps = {
            OURS: lambda: sk.linear_slim_loss(hidden, weight, target, teacher).loss,
            "torch eager": lambda: peers.linear_slim_loss(hidden, weight, target, teacher),
        }
        if compiled:
            function = peers.compiled(peers.linear_slim_loss)
            steps["torch.compile"] = lambda: function(hidden, weight, target, teacher)
        providers = {name: training_step(leaves, loss) for name, loss in steps.items()}
        providers |= _fused_steps(fused, hidden, weight, target, suffix=" (CE only)")

        def exact(copies):
            return reference.linear_slim_loss(*copies, target, teacher).loss

        def exact_cross_entropy(copies):
            return F.cross_entropy(copies[0] @ copies[1].T, target)

        check = gradient_check(leaves, exact, torch.float32, TOLERANCE[dtype])
        if not fused:
            return Work(providers, check, leaves)
        cross_entropy_check = gradient_check(leaves, exact_cross_entropy, torch.float32, TOLERANCE[dtype])

        def check_each(provider: str, loss) -> None:
            (check if provider in steps else cross_entropy_check)(provider, loss)

        return Work(providers, check_each, leaves)

    extra = (*(("torch.compile",) if compiled else ()), *(f"{name} (CE only)" for name in fused))
    return Case(
        op="linear_slim_loss",
        mode="fwd+bwd",
        dtype=dtype,
        sizes={"N": num_rows, "D": hidden_size, "V": vocab_size, "K": top_k},
        floor_bytes=_head_bytes(num_rows, hidden_size, vocab_size, dtype) + num_rows * top_k * (4 + dtype.itemsize),
        floor_flops=3 * 2 * num_rows * hidden_size * vocab_size,
        build=build,
        peers=("torch eager", *extra),
    )


def head_teacher_case(num_rows, hidden_size, vocab_size, dtype, top_fraction) -> Case:
    """Returns a case from the hidden states of both models to the gradient: a step with an online teacher."""
    top_k = math.ceil(top_fraction * vocab_size)

    def build() -> Work:
        target = random_target(num_rows, vocab_size)
        teacher_hidden = random_rows(num_rows, hidden_size, dtype, 5)
        hidden, weight = leaves = _head(num_rows, hidden_size, vocab_size, dtype)
        teacher_weight = weight.flip(0)
        for leaf in leaves:
            leaf.requires_grad_()
        teacher = sk.HeadTeacher(teacher_hidden, teacher_weight, top_k)

        def two_calls():
            rows = sk.linear_topk_logits(teacher_hidden, teacher_weight, top_k, target=target)
            return sk.linear_slim_loss(hidden, weight, target, rows).loss

        def exact(copies):
            rows = reference.linear_topk_logits(teacher_hidden.float(), teacher_weight.float(), top_k, target=target)
            return reference.linear_slim_loss(*copies, target, rows).loss

        steps = {
            OURS: lambda: sk.linear_slim_loss(hidden, weight, target, teacher).loss,
            TWO_CALLS: two_calls,
            "torch eager": lambda: peers.topk_slim_loss(
                hidden @ weight.T, target, teacher_hidden @ teacher_weight.T, top_k
            ),
        }
        providers = {name: training_step(leaves, loss) for name, loss in steps.items()}
        return Work(providers, gradient_check(leaves, exact, torch.float32, TOLERANCE[dtype]), leaves)

    return Case(
        op="linear_slim_loss (HeadTeacher)",
        mode="fwd+bwd",
        dtype=dtype,
        sizes={"N": num_rows, "D": hidden_size, "V": vocab_size, "K": top_k},
        floor_bytes=3 * _head_bytes(num_rows, hidden_size, vocab_size, dtype) // 2,
        floor_flops=4 * 2 * num_rows * hidden_size * vocab_size,
        build=build,
        peers=(TWO_CALLS, "torch eager"),
    )


def linear_cross_entropy_case(num_rows, hidden_size, vocab_size, dtype) -> Case:
    """Returns a case of the loss of an lm_head's output without a teacher."""
    fused = (TUNED,) if peers.HAS_LINEAR_CROSS_ENTROPY else ()
    on_cuda = cuda_peers.linear_cross_entropies()

    def build() -> Work:
        target = random_target(num_rows, vocab_size)
        hidden, weight = leaves = _head(num_rows, hidden_size, vocab_size, dtype)
        for leaf in leaves:
            leaf.requires_grad_()
        steps = {
            OURS: lambda: sk.linear_slim_loss(hidden, weight, target).loss,
            "torch eager": lambda: peers.linear_cross_entropy(hidden, weight, target),
        }
        if peers.HAS_LINEAR_CROSS_ENTROPY:
            steps["F.linear_cross_entropy"] = lambda: F.linear_cross_entropy(hidden, weight, target)
        providers = {name: training_step(leaves, loss) for name, loss in steps.items()}
        providers |= _fused_steps(fused, hidden, weight, target)
        for name, function in on_cuda.items():
            providers[name] = training_step(leaves, lambda f=function: f(hidden, weight, target))

        def exact(copies):
            return F.cross_entropy(copies[0] @ copies[1].T, target)

        return Work(providers, gradient_check(leaves, exact, torch.float32, TOLERANCE[dtype]), leaves)

    return Case(
        op="linear_slim_loss (CE only)",
        mode="fwd+bwd",
        dtype=dtype,
        sizes={"N": num_rows, "D": hidden_size, "V": vocab_size},
        floor_bytes=_head_bytes(num_rows, hidden_size, vocab_size, dtype),
        floor_flops=3 * 2 * num_rows * hidden_size * vocab_size,
        build=build,
        peers=(
            "torch eager",
            *(("F.linear_cross_entropy", *fused) if peers.HAS_LINEAR_CROSS_ENTROPY else ()),
            *on_cuda,
        ),
        optional_peers=tuple(on_cuda),
    )


def _head_bytes(num_rows, hidden_size, vocab_size, dtype) -> int:
    """Returns the bytes of reading hidden states and weight once and writing their gradients once."""
    return 2 * (num_rows + vocab_size) * hidden_size * dtype.itemsize


def _fused_steps(names, hidden, weight, target, suffix: str = "") -> dict:
    functions = {CHUNKED: peers.chunked_cross_entropy, TUNED: peers.tuned_cross_entropy}
    return {
        name + suffix: training_step((hidden, weight), lambda f=functions[name]: f(hidden, weight, target))
        for name in names
    }
