"""Lists the cases timed on a CPU: every op and its peers, and the points of the growth curves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

import slimkernels as sk
from bench.ops import cuda_peers, peers
from bench.ops.case import (
    OURS,
    Case,
    Work,
    exact_dtype,
    five_per_cent,
    gradient_check,
    random_logits,
    random_target,
    require,
    require_close,
    training_step,
)
from bench.ops.linear_cases import linear_cases
from slimkernels import reference, reference_sampling
from slimkernels.store import codec

# Error of a gradient relative to its largest entry; half-precision gradients are rounded.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
HAS_SAMPLING, HAS_GATHER = hasattr(sk, "sample_logits"), hasattr(sk, "gather_logits")
UNMASKED = "without a mask"
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def all_cases(shrink: int = 1) -> list[Case]:
    """Returns every case, slow ones last; tests use ``shrink``, which divides N, D and V."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    rows, vocab = 256 // shrink, 32000 // shrink
    kept = five_per_cent(vocab)
    cases = []
    for dtype in (float32, bfloat16):
        cases.append(topk_case(rows, vocab, kept, dtype, quick=True))
        for num_rows, vocab_size in ((64 // shrink, 128256 // shrink), (32 // shrink, 262144 // shrink)):
            cases.append(topk_case(num_rows, vocab_size, five_per_cent(vocab_size), dtype))
    cases += [
        slim_loss_case(rows, vocab, kept, dtype, quick=dtype != float16) for dtype in (float32, bfloat16, float16)
    ]
    cases += [topk_slim_loss_case(rows, vocab, kept, dtype, quick=dtype == bfloat16) for dtype in (float32, bfloat16)]
    cases += [cross_entropy_case(rows, vocab, dtype) for dtype in (float32, bfloat16)]
    cases += [sample_case(rows, vocab, 40, bfloat16, quick=True)] if HAS_SAMPLING else []
    cases += [gather_case(rows, vocab, kept, dtype, quick=True) for dtype in (float32, bfloat16)] if HAS_GATHER else []
    cases.append(store_case(vocab, kept))
    for case, top_k in ((topk_case, 1600), (slim_loss_case, 1600), (sample_case, 40)):
        if case is not sample_case or HAS_SAMPLING:
            cases += sweep_cases(case, 64 // shrink, 128256 // shrink, top_k // min(shrink, 4))
    cases += [
        masked_case(topk_case, rows, vocab, kept),
        masked_case(slim_loss_case, rows, vocab, kept),
        masked_case(cross_entropy_case, rows, vocab),
    ]
    cases += [masked_case(sample_case, rows, vocab, 40)] if HAS_SAMPLING else []
    return cases + linear_cases(shrink)


def masked_case(case: Callable[..., Case], *sizes: int) -> Case:
    """Returns a case of rows of which half is -inf, whose peer is the same op on rows without a mask.

    Both are written to the same tensors in turn: times on two sets of tensors differ by where their pages lie.
    """
    plain, masked = (case(*sizes, torch.float32, masked=mask) for mask in (False, True))

    def build() -> Work:
        works = {OURS: masked.build(), UNMASKED: plain.build()}
        shared, run = works[OURS].inputs, works[OURS].providers[OURS]
        contents = {name: [tensor.detach().clone() for tensor in work.inputs] for name, work in works.items()}

        def prepare(provider: str) -> None:
            with torch.no_grad():
                for tensor, content in zip(shared, contents[provider], strict=True):
                    tensor.copy_(content)

        def check(provider: str, result) -> None:
            for leaf, written in zip(works[provider].leaves, works[OURS].leaves, strict=True):
                leaf.grad = written.grad
            works[provider].check(OURS, result)

        return Work(dict.fromkeys(works, run), check, works[OURS].leaves, shared, prepare)

    op = f"{plain.op} (masked)"
    return dataclasses.replace(
        plain, op=op, build=build, peers=(UNMASKED,), optional_peers=(), quick=False, masked=True
    )


def sweep_cases(case: Callable[..., Case], num_rows: int, vocab_size: int, top_k: int) -> list[Case]:
    """Returns three points each along N, V and K, with the other two sizes fixed at the middle."""
    middle = {"N": num_rows, "V": vocab_size, "K": top_k}
    points = []
    for letter, size in middle.items():
        for point in (max(size // 4, 1), size, 4 * size):
            sizes = middle | {letter: point}
            points.append(case(sizes["N"], sizes["V"], sizes["K"], torch.bfloat16, sweep=letter))
    return points


def gather_case(num_rows, vocab_size, top_k, dtype, *, quick=False) -> Case:
    """Returns a case of reading given ids of whole rows; the peer computes both log-sum-exps in torch."""
    plain = "torch.gather, scatter, logsumexp"

    def build() -> Work:
        logits = random_logits(num_rows, vocab_size, dtype, 0)
        ids = sk.topk_logits(random_logits(num_rows, vocab_size, dtype, 1), top_k).ids
        expected = reference.gather_logits(logits.double(), ids)

        def in_torch():
            index = ids.long()
            rest = logits.float().scatter(-1, index, -math.inf)
            return logits.gather(-1, index), torch.logsumexp(logits.float(), -1), torch.logsumexp(rest, -1)

        def check(provider: str, result) -> None:
            if provider == OURS:
                require(torch.equal(result.ids, ids), "other ids than were given")
            values, lse, rest_lse = (
                (result.logits, result.lse[:, 0], result.rest_lse[:, 0]) if provider == OURS else result
            )
            require(torch.equal(values, expected.logits.to(dtype)), "logits of the wrong ids")
            require_close(lse, expected.lse[:, 0], 1e-6, "lse")
            require_close(rest_lse, expected.rest_lse[:, 0], 1e-5, "rest_lse")

        return Work({OURS: lambda: sk.gather_logits(logits, ids), plain: in_torch}, check)

    return Case(
        op="gather_logits",
        mode="fwd",
        dtype=dtype,
        sizes={"N": num_rows, "V": vocab_size, "K": top_k},
        floor_bytes=num_rows * (vocab_size * dtype.itemsize + top_k * (4 + dtype.itemsize) + 8),
        build=build,
        peers=(plain,),
        quick=quick,
    )


def topk_case(num_rows, vocab_size, top_k, dtype, *, sweep=None, quick=False, masked=False) -> Case:
    """Returns a case of top-k of whole rows; the peers do not compute the log-sum-exp."""
    other = ("torch.topk", "torch.topk sorted")
    if dtype == torch.float32 and torch.get_default_device().type == "cpu":  # numpy has no bfloat16
        other += ("numpy.argpartition",)
    fused = cuda_peers.topks()
    other += tuple(fused)

    def build() -> Work:
        logits = random_logits(num_rows, vocab_size, dtype, 0, masked=masked)
        expected = reference.topk_logits(logits.double(), top_k)
        kept_values = expected.logits.to(dtype).sort(-1).values
        providers = {OURS: lambda: sk.topk_logits(logits, top_k)}
        if not sweep:
            providers["torch.topk"] = lambda: logits.topk(top_k, -1, sorted=False)
            providers["torch.topk sorted"] = lambda: logits.topk(top_k, -1, sorted=True)
            for name, top_k_ids in fused.items():
                providers[name] = lambda f=top_k_ids: f(logits, top_k)
        if "numpy.argpartition" in other and not sweep:
            array = logits.numpy()
            providers["numpy.argpartition"] = lambda: np.argpartition(array, vocab_size - top_k, -1)[:, -top_k:]

        def check(provider: str, result) -> None:
            if provider == OURS:
                require(torch.equal(result.ids, expected.ids), "ids differ from the reference")
                require(torch.equal(result.logits, logits.gather(-1, result.ids.long())), "logits of the wrong ids")
                require_close(result.lse, expected.lse, 1e-6, "lse")
                return
            ids = torch.from_numpy(result) if provider == "numpy.argpartition" else result
            ids = result.indices if provider.startswith("torch.") else ids
            require(torch.equal(logits.gather(-1, ids.long()).sort(-1).values, kept_values), "not the largest values")

        return Work(providers, check, inputs=(logits,))

    return Case(
        op="topk_logits",
        mode="fwd",
        dtype=dtype,
        sizes={"N": num_rows, "V": vocab_size, "K": top_k},
        floor_bytes=num_rows * (vocab_size * dtype.itemsize + top_k * (4 + dtype.itemsize) + 4),
        build=build,
        peers=() if sweep else other,
        optional_peers=tuple(fused),
        sweep=sweep,
        quick=quick,
    )


def slim_loss_case(num_rows, vocab_size, top_k, dtype, *, sweep=None, quick=False, masked=False) -> Case:
    """Returns a case of the default loss on student logits and a captured teacher."""

    def build() -> Work:
        target = random_target(num_rows, vocab_size, masked=masked)
        teacher_logits = random_logits(num_rows, vocab_size, dtype, 2, masked=masked)
        teacher = sk.topk_logits(teacher_logits, top_k, target=target)
        logits = random_logits(num_rows, vocab_size, dtype, 3, masked=masked).requires_grad_()
        steps = {OURS: lambda: sk.slim_loss(logits, target, teacher).loss}
        if not sweep:
            compiled = peers.compiled(peers.slim_loss)
            steps["torch eager"] = lambda: peers.slim_loss(logits, target, teacher)
            steps["torch.compile"] = lambda: compiled(logits, target, teacher)

        def exact(leaves):
            return reference.slim_loss(leaves[0], target, teacher).loss

        return Work(
            {name: training_step((logits,), loss) for name, loss in steps.items()},
            gradient_check((logits,), exact, exact_dtype(), TOLERANCE[dtype]),
            (logits,),
            (logits, target, *(field for field in vars(teacher).values() if isinstance(field, torch.Tensor))),
        )

    return Case(
        op="slim_loss",
        mode="fwd+bwd",
        dtype=dtype,
        sizes={"N": num_rows, "V": vocab_size, "K": top_k},
        floor_bytes=num_rows * (2 * vocab_size * dtype.itemsize + top_k * (4 + dtype.itemsize)),
        build=build,
        peers=() if sweep else ("torch eager", "torch.compile"),
        sweep=sweep,
        quick=quick,
    )


def topk_slim_loss_case(num_rows, vocab_size, top_k, dtype, *, quick=False) -> Case:
    """Returns a case from whole rows of both models to the gradient: the cost of a step without a store."""

    def build() -> Work:
        target = random_target(num_rows, vocab_size)
        teacher_logits = random_logits(num_rows, vocab_size, dtype, 2)
        logits = random_logits(num_rows, vocab_size, dtype, 3).requires_grad_()
        compiled = peers.compiled(peers.topk_slim_loss)

        def ours():
            return sk.slim_loss(logits, target, sk.topk_logits(teacher_logits, top_k, target=target)).loss

        def exact(leaves):
            teacher = reference.topk_logits(teacher_logits.double(), top_k, target=target)
            return reference.slim_loss(leaves[0], target, teacher).loss

        steps = {
            OURS: ours,
            "torch eager": lambda: peers.topk_slim_loss(logits, target, teacher_logits, top_k),
            "torch.compile": lambda: compiled(logits, target, teacher_logits, top_k),
        }
        return Work(
            {name: training_step((logits,), loss) for name, loss in steps.items()},
            gradient_check((logits,), exact, exact_dtype(), TOLERANCE[dtype]),
            (logits,),
        )

    return Case(
        op="topk_logits + slim_loss",
        mode="fwd+bwd",
        dtype=dtype,
        sizes={"N": num_rows, "V": vocab_size, "K": top_k},
        # The kept logits between the two ops do not count, because a fused op would never write them.
        floor_bytes=3 * num_rows * vocab_size * dtype.itemsize,
        build=build,
        peers=("torch eager", "torch.compile"),
        quick=quick,
    )


def cross_entropy_case(num_rows, vocab_size, dtype, *, masked=False) -> Case:
    """Returns a case of the loss without a teacher."""

    def build() -> Work:
        target = random_target(num_rows, vocab_size, masked=masked)
        logits = random_logits(num_rows, vocab_size, dtype, 3, masked=masked).requires_grad_()
        compiled = peers.compiled(F.cross_entropy)
        steps = {
            OURS: lambda: sk.slim_loss(logits, target).loss,
            "F.cross_entropy": lambda: F.cross_entropy(logits, target),
            "torch.compile": lambda: compiled(logits, target),
        }

        def exact(leaves):
            return reference.slim_loss(leaves[0], target).loss

        return Work(
            {name: training_step((logits,), loss) for name, loss in steps.items()},
            gradient_check((logits,), exact, exact_dtype(), TOLERANCE[dtype]),
            (logits,),
            (logits, target),
        )

    return Case(
        op="slim_loss (CE only)",
        mode="fwd+bwd",
        dtype=dtype,
        sizes={"N": num_rows, "V": vocab_size},
        floor_bytes=2 * num_rows * vocab_size * dtype.itemsize,
        build=build,
        peers=("F.cross_entropy", "torch.compile"),
        quick=True,
    )


def sample_case(num_rows, vocab_size, top_k, dtype, *, sweep=None, quick=False, masked=False) -> Case:
    """Returns a case of one token per row, drawn at a temperature after top-k and top-p."""
    fused = cuda_peers.samplers()

    def build() -> Work:
        logits = random_logits(num_rows, vocab_size, dtype, 0, masked=masked)
        options = {"seed": 7, "position": torch.arange(num_rows), "top_k": top_k, "min_p": 0.0, **SAMPLING}
        expected = reference_sampling.sample_logits(logits.double(), **options).token
        least = logits.topk(top_k, -1).values[:, -1]
        providers = {OURS: lambda: sk.sample_logits(logits, **options)}
        if not sweep:
            providers["transformers warpers"] = peers.warpers_sample(logits, top_k=top_k, **SAMPLING)
            for name, sample in fused.items():
                providers[name] = lambda f=sample: f(logits, SAMPLING["temperature"], top_k, SAMPLING["top_p"])

        def check(provider: str, result) -> None:
            token = result.token if provider == OURS else result
            kept = logits.gather(-1, token[:, None])[:, 0] >= least
            require(bool(kept.all()), "a token outside the top-k")
            if provider == OURS:
                # Tokens may differ where two perturbed scores tie within float32 rounding.
                same = (token == expected).double().mean().item()
                require(same >= 0.99, f"only {same:.1%} of the tokens agree with the reference")

        return Work(providers, check, inputs=(logits,))

    return Case(
        op="sample_logits",
        mode="fwd",
        dtype=dtype,
        sizes={"N": num_rows, "V": vocab_size, "K": top_k},
        floor_bytes=num_rows * (vocab_size * dtype.itemsize + 8 + 3 * 4),
        build=build,
        peers=() if sweep else ("transformers warpers", *fused),
        optional_peers=tuple(fused),
        sweep=sweep,
        quick=quick,
    )


def store_case(vocab_size, top_k) -> Case:
    """Returns a case of decoding one row of a store to ids and logits, with its checksum verified."""
    # The words of the ids, a byte per logit, then affine, lse, target_logit and checksum.
    encoded_bytes = 4 * codec.row_words(vocab_size, top_k) + top_k + 8 + 4 + 4 + 8
    pair_bytes = 8 * top_k

    def build() -> Work:
        sparse = sk.topk_logits(random_logits(1, vocab_size, torch.float32, 0), top_k)
        rows = codec.encode_rows(
            sparse.ids.numpy(),
            sparse.logits.numpy(),
            sparse.lse.numpy(),
            np.zeros(1, np.float32),
            vocab_size=vocab_size,
            codec="affine8",
            first_row=0,
        )
        arrays = {name: getattr(rows, name) for name in ("id_words", "values", "affine", "lse", "target_logit")}
        arrays["row_checksums"] = rows.checksums
        step = float(sparse.logits.max() - sparse.logits.min()) / 255

        def decode():
            return codec.decode_rows(
                vocab_size=vocab_size,
                codec="affine8",
                top_k=top_k,
                first_row=0,
                num_rows=1,
                width=top_k,
                arrays=arrays,
                file="memory",
                document=0,
            )

        def check(_provider: str, result) -> None:
            ids, logits = (torch.from_numpy(array) for array in result)
            require(torch.equal(ids, sparse.ids), "ids differ from those stored")
            require(bool(((logits - sparse.logits).abs() <= 0.51 * step).all()), "logits off by more than half a step")

        return Work({OURS: decode}, check)

    return Case(
        op="store decode",
        mode="one row, one core",
        dtype=torch.float32,
        sizes={"N": 1, "V": vocab_size, "K": top_k},
        floor_bytes=encoded_bytes + pair_bytes,
        build=build,
        rate_bytes=pair_bytes,
        quick=True,
    )
