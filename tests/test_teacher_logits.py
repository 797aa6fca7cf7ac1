"""Logits from elsewhere: every shape and file they come in gives the store that ``topk_logits`` gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import teachers

from slimkernels import topk_logits
from slimkernels.cli import main
from slimkernels.store import Store
from slimkernels.teacher import CaptureReport, TokenizedDocument, capture, capture_logits

# One document is longer than what is read at a time.
LENGTHS = [5, 2, 300, 17]
VOCAB = 300
OPTIONS = {"name": "elsewhere", "top_k": 9, "codec": "float32", "temperatures": (1.0, 2.0)}


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


@pytest.fixture
def documents() -> list[list[int]]:
    return [torch.randint(VOCAB, (length,)).tolist() for length in LENGTHS]


@pytest.fixture
def logits() -> list[torch.Tensor]:
    return [torch.randn(length, VOCAB) * 4 for length in LENGTHS]


def check(path, documents, logits) -> None:
    store = Store(path)
    assert len(store) == len(documents)
    for document, ids, rows in zip(store, documents, logits, strict=True):
        labels = torch.tensor(ids[1:])
        expected = topk_logits(rows[: len(labels)], 9, target=labels, temperatures=(1.0, 2.0))
        assert document.input_ids.tolist() == ids
        assert document.positions.tolist() == list(range(1, len(ids)))
        for field in ("ids", "logits", "lse", "target_logit"):
            assert torch.equal(
                getattr(document.teacher, field), getattr(expected, field).to(getattr(document.teacher, field).dtype)
            )


@pytest.mark.parametrize("last_row", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", ["file", "array"])
def test_one_numpy_array_for_all_documents(form, dtype, last_row, tokenizer, documents, logits, tmp_path) -> None:
    rows = [part.numpy().astype(dtype)[: None if last_row else -1] for part in logits]
    flat = np.concatenate(rows)
    source = flat
    if form == "file":
        source = tmp_path / "logits.npy"
        np.save(source, flat)
    report = capture_logits(source, tokenizer, documents, tmp_path / "store", **OPTIONS)
    assert report == CaptureReport(4, sum(LENGTHS), 0)
    check(tmp_path / "store", documents, [torch.from_numpy(part) for part in rows])


@pytest.mark.parametrize("form", ["npy", "safetensors", "tensor"])
def test_a_padded_batch(form, tokenizer, documents, logits, tmp_path) -> None:
    batch = torch.full((4, 300, VOCAB), torch.nan)
    for row, part in zip(batch, logits, strict=True):
        row[: len(part)] = part
    source = tmp_path / f"logits.{form}"
    if form == "npy":
        np.save(source, batch.numpy())
    elif form == "safetensors":
        save_file({"logits": batch}, source)
    else:
        source = batch
    capture_logits(source, tokenizer, documents, tmp_path / "store", **OPTIONS)
    check(tmp_path / "store", documents, logits)


@pytest.mark.parametrize("names", ["{}", "logits.{}"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_per_document(names, dtype, tokenizer, documents, logits, tmp_path) -> None:
    """Eleven of them, so that the order of names is not that of numbers."""
    documents = documents + [[7, number] for number in range(7)]
    logits = [part.to(dtype) for part in logits + [torch.randn(1, VOCAB) for _ in range(7)]]
    save_file({names.format(number): part for number, part in enumerate(logits)}, tmp_path / "logits.safetensors")
    capture_logits(tmp_path / "logits.safetensors", tokenizer, documents, tmp_path / "store", **OPTIONS)
    check(tmp_path / "store", documents, logits)


def test_arrays_one_after_the_other_and_resumption(tokenizer, documents, logits, tmp_path) -> None:
    def broken():
        yield from logits[:2]
        raise RuntimeError("the disk was pulled out")

    with pytest.raises(RuntimeError, match="pulled out"):
        capture_logits(broken(), tokenizer, documents, tmp_path, **OPTIONS)
    assert len(Store(tmp_path)) == 2

    class Unread(torch.Tensor):
        def __getitem__(self, index):
            raise AssertionError("the logits of a document that is stored are not read again")

    rest = [logits[0].as_subclass(Unread), logits[1].as_subclass(Unread), *logits[2:]]
    assert capture_logits(rest, tokenizer, documents, tmp_path, **OPTIONS) == CaptureReport(2, 317, 2)
    check(tmp_path, documents, logits)


def test_the_logits_of_a_model_give_what_capture_gives(tokenizer, tmp_path) -> None:
    model = teachers.make_teacher()
    documents = [torch.randint(VOCAB, (length,)).tolist() for length in (9, 7, 6)]
    with torch.inference_mode():
        logits = [model(torch.tensor(ids)[None]).logits[0] for ids in documents]
    options = {"top_fraction": 0.1, "codec": "float32"}
    capture(model, tokenizer, documents, tmp_path / "model", **options)
    capture_logits(logits, tokenizer, documents, tmp_path / "logits", name="a", **options)
    for expected, actual in zip(Store(tmp_path / "model"), Store(tmp_path / "logits"), strict=True):
        assert torch.equal(expected.input_ids, actual.input_ids)
        assert torch.equal(expected.teacher.ids, actual.teacher.ids)
        assert torch.allclose(expected.teacher.logits, actual.teacher.logits, atol=1e-4)
        assert torch.allclose(expected.teacher.lse, actual.teacher.lse, atol=1e-4)


class TestRefused:
    def refused(self, message, source, tokenizer, documents, path, error=ValueError) -> None:
        with pytest.raises(error, match=message):
            capture_logits(source, tokenizer, documents, path, **OPTIONS)

    def test_shapes(self, tokenizer, documents, logits, tmp_path) -> None:
        flat = torch.cat(logits)
        self.refused(r"must have 324 or 320 rows for 4 documents", flat[:-1], tokenizer, documents, tmp_path / "a")
        self.refused(r"must have shape \(B, T, V\) for 4 documents", flat[None], tokenizer, documents, tmp_path / "b")
        self.refused("dtype float32, bfloat16", flat.long(), tokenizer, documents, tmp_path / "c")
        self.refused("got .300,. float32", flat[0], tokenizer, documents, tmp_path / "d")
        self.refused("300 tokens, but the logits have 299", flat[:, 1:], tokenizer, documents, tmp_path / "e")
        swapped = [logits[1], logits[0], *logits[2:]]
        self.refused("document 0 has 5 tokens, so 5 or 4 rows", swapped, tokenizer, documents, tmp_path / "f")
        self.refused("one array per document, got 3 for 4", logits[:3], tokenizer, documents, tmp_path / "g")
        self.refused("more than the 3 documents", logits, tokenizer, documents[:3], tmp_path / "h")
        wide = [logits[0], torch.randn(2, 301)]
        self.refused("document 1 has logits of 301 columns", wide, tokenizer, documents[:2], tmp_path / "i")
        self.refused("at least one document, got none", [], tokenizer, documents, tmp_path / "j")

    def test_documents(self, tokenizer, logits, tmp_path) -> None:
        self.refused("at least one document", logits, tokenizer, [], tmp_path / "a")
        self.refused("at least 2 tokens, got 1 in document 1", logits, tokenizer, [[1, 2], [3]], tmp_path / "b")
        self.refused(r"must lie in \[0, 300\)", [logits[1]], tokenizer, [[1, 300]], tmp_path / "c")

    def test_values(self, tokenizer, documents, logits, tmp_path) -> None:
        logits[2][270] = torch.nan
        error = FloatingPointError
        self.refused("document 2 are not finite in rows 256 to 298", logits, tokenizer, documents, tmp_path, error)
        assert len(Store(tmp_path)) == 2

    def test_files(self, tokenizer, documents, logits, tmp_path) -> None:
        self.refused("there is no file", tmp_path / "no.npy", tokenizer, documents, tmp_path / "s", FileNotFoundError)
        for name in ("a.bin", "a.npy", "a.safetensors"):
            (tmp_path / name).write_bytes(b"no logits")
        self.refused("must be a .npy or a .safetensors", tmp_path / "a.bin", tokenizer, documents, tmp_path / "s")
        self.refused("cannot be read as a .npy", tmp_path / "a.npy", tokenizer, documents, tmp_path / "s")
        self.refused("cannot be read as a .safe", tmp_path / "a.safetensors", tokenizer, documents, tmp_path / "s")
        np.save(tmp_path / "pickled.npy", np.array([{}]), allow_pickle=True)
        self.refused("cannot be read as a .npy", tmp_path / "pickled.npy", tokenizer, documents, tmp_path / "s")
        save_file({"first": logits[0], "second": logits[1]}, tmp_path / "named.safetensors")
        self.refused("named by its number from 0", tmp_path / "named.safetensors", tokenizer, documents, tmp_path / "s")


def test_command_line(tokenizer, documents, logits, tmp_path, capsys) -> None:
    teachers.save_teacher(tmp_path / "model")
    np.save(tmp_path / "logits.npy", torch.cat(logits).numpy())
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in documents))
    command = f"""capture --logits {tmp_path}/logits.npy --model elsewhere --tokenizer {tmp_path}/model
        --text {tmp_path}/documents.jsonl --text-field ids --top-k 9 --temperatures 1 2 --codec float32
        --out {tmp_path}/store""".split()
    assert main(command) == 0
    assert "added 4 documents, 324 tokens; skipped 0" in " ".join(capsys.readouterr().out.split())
    check(tmp_path / "store", documents, logits)
    assert main([*command, "--concurrency", "2"]) == 2
    assert "--concurrency has no meaning with --logits" in capsys.readouterr().err
    assert (
        main(
            [argument for argument in command if argument != "--model"][:1]
            + command[1:3]
            + ["--prompts", "--model", "a", "--tokenizer", "b", "--out", "c"]
        )
        == 2
    )
    assert "--logits needs the documents" in " ".join(capsys.readouterr().err.split())


def test_columns_that_pad_the_head_are_not_read(tmp_path) -> None:
    tokenizer, documents = teachers.make_tokenizer(), [[5, 6, 7, 8], [9, 10, 11]]
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(len(ids), 328, generator=generator) + 5 * (torch.arange(328) >= 300) for ids in documents]
    capture_logits(logits, tokenizer, documents, tmp_path / "padded", name="a", codec="float32")
    narrow = [rows[:, :300] for rows in logits]
    capture_logits(narrow, tokenizer, documents, tmp_path / "narrow", name="a", codec="float32")
    assert (tmp_path / "padded" / "manifest.json").read_bytes() == (tmp_path / "narrow" / "manifest.json").read_bytes()


def test_labels_of_a_document_alone_get_rows(tmp_path) -> None:
    tokenizer = teachers.make_tokenizer()
    document = TokenizedDocument([5, 6, 7, 8, 9], positions=[2, 4], prompt_length=2)
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    capture_logits([logits], tokenizer, [document], tmp_path, name="a", top_k=3, codec="float32")
    (stored,) = Store(tmp_path)
    assert (stored.positions.tolist(), stored.prompt_length) == ([2, 4], 2)
    torch.testing.assert_close(stored.teacher.lse[:, 0], logits[[1, 3]].logsumexp(-1))
