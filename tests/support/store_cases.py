"""Makes teachers, documents and stores for the tests of the store."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels import SparseLogits
from slimkernels.store import Document, StoreWriter
from slimkernels.store.format import StoreSettings
from slimkernels.store.manifest import manifest_content, seal_manifest

SETTINGS = {
    "vocab_size": 97,
    "tokenizer_fingerprint": "tokenizer-1",
    "teacher": {"name": "teacher", "revision": "main", "dtype": "bfloat16"},
    "selection": {"kind": "top_k", "value": 6, "top_k": 6},
    "temperatures": (1.0, 2.0),
}


class Case(NamedTuple):
    """The arguments of ``StoreWriter.add``."""

    input_ids: Tensor
    positions: Tensor
    teacher: SparseLogits


def random_teacher(
    num_rows: int,
    vocab_size: int,
    top_k: int,
    generator: torch.Generator,
    *,
    ragged: bool = False,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    spread: float = 3.0,
    rest: bool = True,
) -> SparseLogits:
    """Makes rows of normal logits that keep their top_k, or between 1 and top_k of them if ragged; ``rest`` or not."""
    row = torch.randn(num_rows, vocab_size, generator=generator) * spread
    logits, ids = row.topk(top_k)
    if ragged:
        kept = torch.randint(1, top_k + 1, (num_rows, 1), generator=generator)
        ids = ids.masked_fill(torch.arange(top_k) >= kept, vocab_size)
    ids, order = ids.sort(-1)
    # The padding is scattered into an extra column.
    others = torch.nn.functional.pad(row, (0, 1), value=-torch.inf).scatter(-1, ids, -torch.inf)
    return SparseLogits(
        ids=ids.masked_fill(ids == vocab_size, -1).int(),
        logits=logits.gather(-1, order),
        lse=torch.stack([(row / t).logsumexp(-1) for t in temperatures], -1),
        temperatures=temperatures,
        target_logit=row[:, 0].clone(),
        rest_lse=torch.stack([(others / t).logsumexp(-1) for t in temperatures], -1) if rest else None,
    )


def random_case(
    num_tokens: int, num_rows: int, generator: torch.Generator, *, vocab_size: int = 97, top_k: int = 6, **options
) -> Case:
    """Makes a document of random ids with rows at random positions."""
    positions = torch.randperm(num_tokens - 1, generator=generator)[:num_rows].sort().values + 1
    return Case(
        torch.randint(0, vocab_size, (num_tokens,), generator=generator),
        positions,
        random_teacher(num_rows, vocab_size, top_k, generator, **options),
    )


def begin_store(path: Path, version: int, **settings) -> None:
    """Makes an empty store of a version of the format, which writers then continue."""
    path.mkdir(parents=True)
    content = manifest_content(StoreSettings(**{"codec": "affine8"} | SETTINGS | settings), (), version)
    (path / "manifest.json").write_bytes(seal_manifest(content))


def write_store(path: Path, shards: list[list[Case]], **settings) -> None:
    """Writes each list of cases as one shard."""
    with StoreWriter(path, **SETTINGS | settings) as writer:
        for cases in shards:
            for case in cases:
                writer.add(*case)
            writer.flush()


def assert_stored(document: Document, case: Case, codec: str = "affine8") -> None:
    """Checks that a document is equal to a case: ids exactly, logits within the error of the codec."""
    assert torch.equal(document.input_ids, case.input_ids.long())
    assert torch.equal(document.positions, case.positions.long())
    width = document.teacher.top_k
    kept = case.teacher.ids >= 0
    assert width == int(kept.sum(-1).max()) if len(case.positions) else width >= 1
    assert torch.equal(document.teacher.ids, case.teacher.ids[:, :width])
    assert torch.equal(document.teacher.lse, case.teacher.lse.float())
    rest_lse = document.teacher.rest_lse
    if case.teacher.rest_lse is None or not len(case.positions):
        assert rest_lse is None or rest_lse.isnan().all()
    else:
        assert rest_lse is not None
        assert torch.equal(rest_lse, case.teacher.rest_lse.float())
    if case.teacher.target_logit is not None:
        torch.testing.assert_close(
            document.teacher.target_logit, case.teacher.target_logit.float(), rtol=0, atol=0, equal_nan=True
        )
    assert document.teacher.temperatures == case.teacher.temperatures
    assert_logits(document.teacher.logits, case.teacher.logits[:, :width].float(), kept[:, :width], codec)


def assert_logits(actual: Tensor, expected: Tensor, kept: Tensor, codec: str) -> None:
    """Checks logits: exact, as bfloat16, or within half a step of (max - min) / 255 or 63 plus float32 rounding."""
    assert (actual[~kept] == 0).all()
    if codec == "float32":
        assert torch.equal(actual[kept], expected[kept])
    elif codec == "bfloat16":
        assert torch.equal(actual[kept], expected.bfloat16().float()[kept])
    elif expected.numel():
        last_value = {"affine8": 255, "affine6": 63}[codec]
        span = expected.masked_fill(~kept, -torch.inf).amax(-1) - expected.masked_fill(~kept, torch.inf).amin(-1)
        # 2^-16: the scale is rounded to 16 bits. 2^-23: zero and the sum are each rounded to float32.
        # A row without entries has a span of -inf.
        bound = (
            span.clamp(min=0) / (2 * last_value) * (1 + 2.0**-16)
            + expected.abs().masked_fill(~kept, 0).amax(-1) * 2.0**-23
        )
        error = (actual - expected).abs().masked_fill(~kept, 0).amax(-1)
        assert (error <= bound).all(), f"error {error.max()} is above {bound[error.argmax()]}"
