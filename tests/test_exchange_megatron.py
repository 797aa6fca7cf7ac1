"""Megatron-LM's cached logits, written here as its documentation and saver describe them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import teachers
from support.exchange_cases import TOP_K, Case, assert_is

from slimkernels.cli import main
from slimkernels.exchange import import_megatron
from slimkernels.store import Store, verify

pyarrow = pytest.importorskip("pyarrow")

LENGTH, MICRO_BATCH, RANKS, TURNS = 16, 2, 3, 2
BATCH = MICRO_BATCH * RANKS * TURNS
SENTINEL = -1e3


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


def make_cases(count: int, seed: int = 0, vocab_size: int = 300) -> list[Case]:
    """Samples of T + 1 tokens, the last of which is a label alone; labels are often among the largest."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for _ in range(count):
        ids = torch.randint(vocab_size, (LENGTH + 1,), generator=generator)
        logits = 2 * torch.randn(LENGTH, vocab_size, generator=generator, dtype=torch.float64)
        logits[torch.arange(LENGTH), ids[1:]] += 4
        cases.append(Case(ids.tolist(), logits.log_softmax(-1).numpy()))
    return cases


def payload(cases: list[Case], dtype: torch.dtype, nucleus: int, borders: list[list[int]] | None) -> bytes:
    """A rank's samples of one iteration, (T, B, K), compressed; rows of even number keep ``nucleus`` entries."""
    ids = np.array([[case.largest(row) for case in cases] for row in range(LENGTH)])
    values = np.array([[case.logprobs[row, ids[row, i]] for i, case in enumerate(cases)] for row in range(LENGTH)])
    values[::2, :, nucleus:] = SENTINEL
    ids[::2, :, nucleus:] = -1
    content = {
        "values": torch.from_numpy(values).to(dtype),
        "indices_low": torch.from_numpy((ids & 0xFFFF).astype(np.uint16)),
        "bit_17": torch.from_numpy(np.packbits(((ids >> 16) & 1).astype(np.uint8).reshape(-1))),
        "cu_seqlens_padded": None if borders is None else torch.tensor(borders, dtype=torch.int32),
        "format_version": 2,
    }
    file = io.BytesIO()
    torch.save(content, file)
    return pyarrow.Codec("zstd").compress(file.getvalue(), asbytes=True)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def meta(**changes) -> bytes:
    saver = {"k": TOP_K, "p": None, "min_k": 1, "save_dtype": "fp32", "format_version": 2}
    saver |= {"mbs_save": MICRO_BATCH, "dp_size_save": RANKS, "gbs_save": BATCH, "cp_size_save": 1}
    return json.dumps({"hash": "x", "identifiers": {}, "saver": saver | changes}).encode()


def write_cache(
    folder: Path,
    cases: list[Case],
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    nucleus: int = TOP_K,
    borders: list[list[int]] | None = None,
    iterations_a_file: int = 2,
) -> None:
    """Samples ``first``, ``first + 1``, ... as every rank saves them, micro-batch after micro-batch."""
    folder.mkdir(exist_ok=True)
    for rank in range(RANKS):
        members: dict[tuple[int, int], bytes] = {}
        for start in range(0, len(cases), BATCH):
            own = [
                (start + (turn * RANKS + rank) * MICRO_BATCH + within)
                for turn in range(TURNS)
                for within in range(MICRO_BATCH)
            ]
            of_own = None if borders is None else [borders[i] for i in own]
            members[first + start, first + start + BATCH] = payload([cases[i] for i in own], dtype, nucleus, of_own)
        ranges = sorted(members)
        for begin in range(0, len(ranges), iterations_a_file):
            group = ranges[begin : begin + iterations_a_file]
            content = {"_meta.json": meta()} | {f"{a}-{b}.pt.zst": members[a, b] for a, b in group}
            write_tar(folder / f"dp{rank}__{group[0][0]}-{group[-1][1]}.tar", content)


def rows_of(case: Case) -> list[int]:
    return list(range(1, len(case.input_ids)))


@pytest.mark.parametrize("last_label", [True, False])
def test_import_of_a_cache(last_label, tokenizer, tmp_path) -> None:
    cases = make_cases(10 * BATCH)
    write_cache(tmp_path / "cache", cases)
    assert len(list((tmp_path / "cache").iterdir())) == 5 * RANKS
    if not last_label:
        cases = [case._replace(input_ids=case.input_ids[:-1]) for case in cases]
    samples = (case.input_ids for case in cases)
    report = import_megatron(
        tmp_path / "cache", tmp_path / "store", tokenizer, samples=samples, codec="float32", teacher="big"
    )
    verify(tmp_path / "store")
    store = Store(tmp_path / "store")
    assert report[:3] == (len(cases), sum(len(rows_of(case)) for case in cases), 0)
    assert report.label_share > 0.5
    assert store.manifest["selection"]["normalised_over"] == "vocabulary"
    for document, case in zip(store, cases, strict=True):
        assert_is(document, case, positions=rows_of(case))


def test_import_of_a_nucleus_in_half_precision(tokenizer, tmp_path) -> None:
    cases = make_cases(BATCH)
    for name, dtype, atol in (("a", torch.float16, 5e-3), ("b", torch.bfloat16, 4e-2)):
        write_cache(tmp_path / name, cases, dtype=dtype, nucleus=3)
        samples = [case.input_ids for case in cases]
        import_megatron(tmp_path / name, tmp_path / f"{name}-store", tokenizer, samples=samples, codec="float32")
        for document, case in zip(Store(tmp_path / f"{name}-store"), cases, strict=True):
            assert (document.teacher.ids >= 0).sum(-1).tolist() == [3, TOP_K] * (LENGTH // 2)
            document.teacher.validate(300)
            mass = document.teacher.logits.double().masked_fill(document.teacher.ids < 0, -torch.inf).logsumexp(-1)
            torch.testing.assert_close(document.teacher.lse[:, 0].double(), mass.clamp(min=0), atol=1e-6, rtol=0)
            # Without the rows that rounding lifted above 1.
            if (mass <= 0).all():
                assert_is(document, case, positions=rows_of(case), atol=atol)


def test_import_of_ids_of_seventeen_bits(tokenizer, tmp_path) -> None:
    cases = make_cases(BATCH, vocab_size=131072)
    assert max(max(case.largest(0)) for case in cases) > 65536
    write_cache(tmp_path / "cache", cases)
    samples = [case.input_ids for case in cases]
    options = {"samples": samples, "codec": "float32", "vocab_size": 131072}
    import_megatron(tmp_path / "cache", tmp_path / "store", tokenizer, **options)
    for document, case in zip(Store(tmp_path / "store"), cases, strict=True):
        assert_is(document, case, positions=rows_of(case))


def test_import_leaves_out_rows_across_documents(tokenizer, tmp_path) -> None:
    cases = make_cases(BATCH)
    borders = [[0, 5, 9, LENGTH, LENGTH] if i % 2 else [0, LENGTH, LENGTH, LENGTH, LENGTH] for i in range(BATCH)]
    write_cache(tmp_path / "cache", cases, borders=borders)
    # Without the label behind the sample, which would be of another document.
    samples = [case.input_ids[:-1] for case in cases]
    import_megatron(tmp_path / "cache", tmp_path / "store", tokenizer, samples=samples)
    for number, document in enumerate(Store(tmp_path / "store")):
        across = {5, 9} if number % 2 else set()
        assert document.positions.tolist() == [p for p in range(1, LENGTH) if p not in across]


def test_import_of_the_part_that_is_there(tokenizer, tmp_path) -> None:
    cases = make_cases(3 * BATCH)
    write_cache(tmp_path / "cache", cases[BATCH:], first=BATCH)
    samples = [case.input_ids for case in cases]
    report = import_megatron(tmp_path / "cache", tmp_path / "store", tokenizer, samples=samples, codec="float32")
    assert report.documents == 2 * BATCH
    for document, case in zip(Store(tmp_path / "store"), cases[BATCH:], strict=True):
        assert_is(document, case, positions=rows_of(case))


def test_import_notices_samples_in_another_order(tokenizer, tmp_path) -> None:
    cases = make_cases(4 * BATCH)
    write_cache(tmp_path / "cache", cases)
    late = [[*case.input_ids[1:], 0] for case in cases]
    for samples, found in (
        (late, "the one before it"),
        ([case.input_ids for case in cases[::-1]], "one from elsewhere in the document"),
    ):
        options = {"samples": samples, "check_alignment": True}
        with pytest.raises(ValueError, match=f"rows are about other tokens: .* keep {found}"):
            import_megatron(tmp_path / "cache", tmp_path / "store", tokenizer, **options)
        assert not (tmp_path / "store").exists()
    options["check_alignment"] = False
    assert import_megatron(tmp_path / "cache", tmp_path / "store", tokenizer, **options).documents == 4 * BATCH


def test_import_megatron_refuses(tokenizer, tmp_path) -> None:
    cases = make_cases(2 * BATCH)
    samples = [case.input_ids for case in cases]

    def refuses(message: str, error: type[Exception] = ValueError, samples=samples) -> None:
        with pytest.raises(error, match=message):
            import_megatron(tmp_path / "cache", tmp_path / "store", tokenizer, samples=samples)

    refuses("there is no folder", FileNotFoundError)
    (tmp_path / "cache").mkdir()
    refuses("must hold the .tar files of ranks 0, 1, ..., got those of")
    (tmp_path / "cache" / "cp0_dp0__12.tar").touch()
    refuses(r"cp0_dp0__12.tar: must be named dp<rank>__<first>-<last>.tar, as caches of version 2 are")
    (tmp_path / "cache" / "cp0_dp0__12.tar").unlink()

    write_cache(tmp_path / "cache", cases, iterations_a_file=1)
    refuses("holds sample 12, but samples has no such sample", samples=samples[:BATCH])
    message = "has 16 rows, so sample 3 must have as many tokens or one more, got 15"
    refuses(message, samples=[*samples[:3], samples[3][:-2], *samples[4:]])
    refuses("sample 1: must be a list of token ids, got 7", samples=[samples[0], 7])
    one = tmp_path / "cache" / "dp1__12-24.tar"
    data = one.read_bytes()
    one.unlink()
    refuses("not every data-parallel rank has the same samples")
    one.write_bytes(data[: len(data) // 2])
    refuses("dp1__12-24.tar")
    good = payload(cases[:4], torch.float32, TOP_K, None)
    pickled = io.BytesIO()
    torch.save({"values": Path("x")}, pickled)
    evil = pyarrow.Codec("zstd").compress(pickled.getvalue(), asbytes=True)
    for members, message in (
        ({"12-24.pt.zst": good}, "must begin with _meta.json"),
        ({"_meta.json": b"{}"}, "must have saver.format_version"),
        ({"_meta.json": meta(format_version=1)}, "format_version must be 2 and mbs_save at least 1, got 1 and 2"),
        ({"_meta.json": meta(dp_size_save=4)}, "was saved by 4 data-parallel ranks, but there are files of 3"),
        ({"_meta.json": meta(), "12-24.pt.zst": good[:-9]}, "12-24.pt.zst: is not a payload of version 2"),
        ({"_meta.json": meta(), "12-24.pt.zst": b"none"}, "12-24.pt.zst: is not a payload of version 2"),
        ({"_meta.json": meta(), "12-24.pt.zst": evil}, "12-24.pt.zst: is not a payload of version 2"),
        (
            {"_meta.json": meta(), "12-24.pt.zst": payload(cases[:3], torch.float32, TOP_K, None)},
            r"its ranks hold \[4, 3, 4\] samples",
        ),
    ):
        write_tar(one, members)
        refuses(message)
    write_tar(one, {"_meta.json": meta(), "12-24.pt.zst": good, "13-25.pt.zst": good})
    refuses("not every data-parallel rank has the same samples")
    # A cache that goes back, as after a run that was resumed.
    for rank in range(RANKS):
        write_tar(tmp_path / "cache" / f"dp{rank}__18-30.tar", {"_meta.json": meta(), "18-30.pt.zst": good})
    one.write_bytes(data)
    refuses("begins at sample 18, but earlier files hold those below 24")


def test_import_megatron_command(tmp_path, capsys) -> None:
    teacher = str(teachers.save_teacher(tmp_path / "tiny"))
    cases = make_cases(BATCH)
    write_cache(tmp_path / "cache", cases)
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"input_ids": case.input_ids}) + "\n" for case in cases))
    command = ["store", "import", "--format", "megatron", str(tmp_path / "cache"), str(tmp_path / "store")]
    assert main([*command, "--tokenizer", teacher, "--samples", str(samples), "--codec", "float32"]) == 0
    assert "added 12 documents" in capsys.readouterr().out
    for document, case in zip(Store(tmp_path / "store"), cases, strict=True):
        assert_is(document, case, positions=rows_of(case))
    assert main([*command, "--tokenizer", teacher]) == 2
    assert "--format megatron needs --samples" in capsys.readouterr().err
    assert main(command) == 2
    assert "--format megatron needs --tokenizer" in capsys.readouterr().err
