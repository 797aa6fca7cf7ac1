"""Stores of hidden states: readers make the rows that the teacher's own logits give, and notice every damage."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import safetensors.torch
import torch
from support import families, teachers
from torch.utils.data import DataLoader

import slimkernels as sk
from slimkernels.exchange import export_parquet, import_parquet
from slimkernels.models.head import LanguageModelHead
from slimkernels.models.heldout import evaluate_store
from slimkernels.packed_logits import HeadWeights, PackedHidden
from slimkernels.store import RankWriter, Store, StoreDataset, StoreWriter, collate_documents, errors, info, verify
from slimkernels.store.codec import document_hash
from slimkernels.store.hidden import decode_hidden, encode_hidden
from slimkernels.store.manifest import seal_manifest, unseal_manifest
from slimkernels.teacher import capture
from slimkernels.trainer import SlimConfig, SlimTrainer, train
from slimkernels.trainer.teachers import StoredTeacher

V, D, K = 97, 24, 9
CODECS = ("hidden8", "hidden16")
# Relative error of a number of a hidden state: half a step of 127, and the unit roundoff of bfloat16.
ROUNDING = {"hidden8": 1 / 254, "hidden16": 2.0**-8}


def make_head(dtype=torch.float32, **options) -> HeadWeights:
    generator = torch.Generator().manual_seed(1)
    return HeadWeights(torch.randn(V, D, generator=generator).to(dtype), **options)


def settings(head: HeadWeights | None = None, **changed):
    named = {"vocab_size": V, "tokenizer_fingerprint": "t", "teacher": {"name": "t"}, "selection": {"kind": "top_k"}}
    return named | {"head": head or make_head(), "top_k": K, "codec": "hidden16", "temperatures": (1.0, 2.0)} | changed


def make_documents(count: int = 5, seed: int = 0):
    """Token ids, positions and hidden states of some of the tokens of each document."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(count):
        ids = torch.randint(V, (8 + number,), generator=generator)
        positions = torch.randperm(7 + number, generator=generator)[: 3 + number].sort().values + 1
        yield ids, positions, torch.randn(3 + number, D, generator=generator)


def write(path, writer=StoreWriter, documents=None, **options):
    documents = list(make_documents()) if documents is None else documents
    with writer(path, **settings(**options)) as opened:
        for document in documents:
            opened.add(*document)
    return documents


def rows_of(head: HeadWeights, hidden, ids, positions, top_k=K, temperatures=(1.0, 2.0)):
    return sk.linear_topk_logits(
        hidden.to(head.weight.dtype),
        head.weight,
        top_k,
        bias=head.bias,
        target=ids[positions],
        temperatures=temperatures,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def assert_same_rows(found, expected, atol=1e-5):
    assert found.temperatures == expected.temperatures
    assert torch.equal(found.ids, expected.ids)
    for name in ("logits", "lse", "target_logit", "rest_lse"):
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name), getattr(expected, name).float(), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "head",
    [
        make_head(),
        make_head(torch.bfloat16),
        make_head(torch.float16, bias=torch.randn(V).half()),
        make_head(softcap=3.0, logit_scale=0.25),
    ],
    ids=["float32", "bfloat16", "bias", "softcap"],
)
def test_rows_are_those_of_the_stored_hidden_states(tmp_path, codec, head):
    documents = write(tmp_path, codec=codec, head=head)
    verify(tmp_path)
    store = Store(tmp_path)
    assert (store.has_rest_lse, store.temperatures, store.manifest["version"]) == (True, (1.0, 2.0), 3)
    for index, (ids, positions, hidden) in enumerate(documents):
        document, packed = store[index], store.packed(index).teacher
        assert torch.equal(document.input_ids, ids)
        stored = packed.hidden(torch.float32)
        error = (stored - hidden).abs().amax(-1)
        assert (error <= ROUNDING[codec] * hidden.abs().amax(-1) * 1.0001).all()
        expected = rows_of(head, stored, ids, positions)
        assert_same_rows(document.teacher, expected, atol=1e-5 if head.weight.dtype == torch.float32 else 2e-2)
        document.teacher.validate(V)
        at = int(positions[1])
        one = store.row(index, at)
        assert_same_rows(one, expected[1:2], atol=1e-5 if head.weight.dtype == torch.float32 else 2e-2)
        assert store.find(ids) == index


def test_a_reader_may_ask_for_other_rows(tmp_path):
    [(ids, positions, hidden), *_] = write(tmp_path)
    store = Store(tmp_path, top_fraction=0.5, temperatures=(1.0, 3.0))
    expected = rows_of(make_head(), hidden.bfloat16(), ids, positions, 49, (1.0, 3.0))
    assert_same_rows(store[0].teacher, expected)
    assert store.fingerprint != Store(tmp_path).fingerprint
    for options in ({"top_k": V + 1}, {"top_k": 0}, {"top_fraction": 2.0}, {"temperatures": (0.0,)}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Store(tmp_path, **options)


def test_a_store_of_logits_has_its_rows_fixed(tmp_path):
    writer = StoreWriter(tmp_path, **settings(codec="affine8") | {"head": None, "top_k": None})
    writer.close()
    with pytest.raises(ValueError, match="must be None for a store of logits"):
        Store(tmp_path, top_k=3)
    assert "hidden" not in Store(tmp_path).manifest
    assert Store(tmp_path).head is None


@pytest.mark.parametrize("packed", [True, False])
def test_batches_of_a_loader_hold_the_rows_of_its_documents(tmp_path, packed):
    documents = write(tmp_path)
    loader = DataLoader(StoreDataset(tmp_path, packed=packed), 5, num_workers=2 if packed else 0)
    [batch] = list(loader)
    assert isinstance(batch["teacher"], PackedHidden if packed else sk.SparseLogits)
    rows = sk.decode_logits(batch["teacher"]) if packed else batch["teacher"]
    hidden = torch.cat([hidden for *_, hidden in documents]).bfloat16()
    expected = sk.linear_topk_logits(
        hidden.float(), make_head().weight, K, target=batch["target"], temperatures=(1.0, 2.0)
    )
    assert_same_rows(rows, expected)
    assert len(batch["teacher"]) == len(batch["target"])
    if packed:
        assert_same_rows(sk.decode_logits(batch["teacher"][[3, 1]]), expected[[3, 1]])
        assert batch["teacher"].nbytes == len(hidden) * (2 * D + 8)
        with pytest.raises(TypeError, match="decode it with"):
            sk.slim_loss(torch.randn(len(hidden), V), batch["target"], batch["teacher"])


def test_packed_rows_of_other_heads_are_not_joined(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "same")
    write(tmp_path / "other", head=make_head(softcap=5.0))
    one, same, other = (Store(tmp_path / name).packed(0) for name in ("one", "same", "other"))
    assert len(collate_documents([one, same])["teacher"]) == 6
    with pytest.raises(ValueError, match="parts must share head"):
        collate_documents([one, other])
    with pytest.raises(ValueError, match="at least one"):
        PackedHidden.cat([])


def test_packed_hidden_checks_its_fields():
    fields = {"values": torch.zeros(2, 3).bfloat16(), "target": torch.zeros(2, dtype=torch.int64), "head": None}
    sizes = {"vocab_size": 5, "top_k": 2}
    PackedHidden(**fields, **sizes)
    for error, changed in (
        (TypeError, {"values": torch.zeros(2, 3)}),
        (ValueError, {"values": torch.zeros(2, 3, dtype=torch.int8)}),
        (ValueError, {"values": torch.zeros(3).bfloat16()}),
        (ValueError, {"top_k": 6}),
        (TypeError, {"target": torch.zeros(2)}),
        (ValueError, {"target": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, {"scale": torch.zeros(2)}),
    ):
        with pytest.raises(error):
            PackedHidden(**fields | sizes | changed)


@pytest.mark.parametrize("codec", CODECS)
def test_parts_share_the_head_of_their_store(tmp_path, codec):
    documents = list(make_documents(9))
    for rank in range(2):
        with RankWriter(tmp_path, rank=rank, num_ranks=2, num_parts=3, **settings(codec=codec)) as writer:
            for document in documents:
                if writer.part_of(document[0]) is not None:
                    writer.add(*document)
    assert [path.name for path in tmp_path.rglob("head.safetensors*")] == ["head.safetensors"]
    assert not list(tmp_path.glob("part-*/head*"))
    verify(tmp_path)
    store = Store(tmp_path)
    assert len(store) == 9
    for ids, positions, hidden in documents:
        document = store[store.find(ids)]
        if codec == "hidden16":
            assert_same_rows(document.teacher, rows_of(make_head(), hidden.bfloat16(), ids, positions))
    with RankWriter(tmp_path, num_parts=None, **settings(codec=codec)) as writer:
        assert len(writer) == 9
    with pytest.raises(errors.SettingsMismatchError):
        RankWriter(tmp_path, **settings(make_head(softcap=1.0), codec=codec))


def test_a_store_is_continued_with_its_own_head_alone(tmp_path):
    documents = list(make_documents(4))
    write(tmp_path, documents=documents[:2])
    write(tmp_path, documents=documents[2:])
    assert len(Store(tmp_path)) == 4
    for changed in ({"head": make_head(softcap=2.0)}, {"top_k": 5}, {"codec": "hidden8"}, {"temperatures": (1.0,)}):
        with pytest.raises(errors.SettingsMismatchError):
            StoreWriter(tmp_path, **settings(**changed))
    with pytest.raises(errors.SettingsMismatchError):
        StoreWriter(tmp_path, **settings(codec="affine8") | {"head": None, "top_k": None})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head": None}, "head must be given with the codecs"),
        ({"codec": "affine8"}, "head must be given with the codecs"),
        ({"top_k": None}, "top_k must be an int"),
        ({"top_k": V + 1}, "top_k must be an int"),
        ({"vocab_size": V - 1}, "leave out the rows that pad it"),
        ({"head": HeadWeights(torch.zeros(V, D).double())}, "head.weight must have"),
        ({"head": HeadWeights(torch.zeros(V, D), torch.zeros(V).half())}, "head.bias must have"),
        ({"head": HeadWeights(torch.zeros(V, D), softcap=-1.0)}, "head.softcap must be positive"),
        ({"head": HeadWeights(torch.zeros(V, D), logit_scale=float("nan"))}, "head.logit_scale must be positive"),
    ],
)
def test_a_writer_refuses_settings_that_make_no_store(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        StoreWriter(tmp_path, **settings() | changed)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("codec", CODECS)
def test_a_writer_refuses_what_is_no_hidden_state(tmp_path, codec):
    ids, positions, hidden = next(make_documents())
    with StoreWriter(tmp_path, **settings(codec=codec)) as writer:
        bad = hidden.clone()
        bad[1, 3] = torch.nan
        for teacher, message in (
            (hidden[:-1], "must be the hidden states of 3 positions"),
            (rows_of(make_head(), hidden, ids, positions), "must be the hidden states of 3 positions"),
            (hidden[:, :-1], r"shape \(R, 24\)"),
            (hidden.long(), "floating-point dtype"),
            (bad, "row 1 of the teacher's hidden states is not finite"),
            (torch.full_like(hidden, 3.4e38) if codec == "hidden16" else bad, "is not finite"),
        ):
            with pytest.raises(ValueError, match=message):
                writer.add(ids, positions, teacher)
        assert len(writer) == 0
        writer.add(ids, positions, hidden)
    writer = StoreWriter(tmp_path / "logits", **settings(codec="affine8") | {"head": None, "top_k": None})
    with writer, pytest.raises(ValueError, match="need one of the codecs"):
        writer.add(ids, positions, hidden)


def test_eight_bits_of_hostile_hidden_states():
    tiny = torch.finfo(torch.float32).tiny
    hidden = torch.tensor([[0.0] * 4, [tiny / 4, 0, 0, -tiny], [3e38, -3e38, 1.0, 0], [127.0, 1.0, -0.5, 63.5]])
    rows = encode_hidden(hidden, hidden_size=4, codec="hidden8", first_row=3)
    values, scale = decode_hidden(rows.values, rows.scale, rows.checksums, first_row=3, file="", document=0)
    stored = scale[:, None] * values.float()
    assert torch.isfinite(stored).all()
    assert torch.equal(stored[0], torch.zeros(4))
    assert ((stored - hidden).abs().amax(-1) <= (hidden.abs().amax(-1) / 254).clamp(min=tiny) * 1.0001).all()
    assert values[3].tolist() == [127, 1, 0, 64]  # ties to even
    with pytest.raises(errors.RowChecksumError):
        decode_hidden(rows.values, rows.scale, rows.checksums, first_row=0, file="", document=0)


@pytest.mark.parametrize("codec", CODECS)
def test_every_damaged_byte_is_noticed(tmp_path, codec):
    write(tmp_path, codec=codec)
    shard = tmp_path / "shard-000000.safetensors"
    whole = shard.read_bytes()
    generator = np.random.default_rng(0)
    for place in generator.integers(len(whole), size=60).tolist():
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(errors.StoreError):
            verify(tmp_path)
        with pytest.raises(errors.StoreError):
            list(Store(tmp_path))
    shard.write_bytes(whole)
    verify(tmp_path)


def test_a_damaged_row_is_named(tmp_path):
    write(tmp_path)
    shard = tmp_path / "shard-000000.safetensors"
    whole = bytearray(shard.read_bytes())
    whole[-1] ^= 1
    shard.write_bytes(whole)
    store = Store(tmp_path)
    store[0]
    with pytest.raises(errors.RowChecksumError, match="document 4, row 24"):
        store[4]


def test_a_damaged_or_foreign_head_is_noticed(tmp_path):
    write(tmp_path)
    file = tmp_path / "head.safetensors"
    whole = file.read_bytes()
    for place in (0, 9, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(errors.HeadError):
            verify(tmp_path)
        with pytest.raises(errors.HeadError):
            Store(tmp_path).head.read()
    for content in (b"", whole[:-1], whole + b"0", safetensors.torch.save({"x": torch.zeros(1)})):
        file.write_bytes(content)
        with pytest.raises(errors.HeadError, match=r"head\.safetensors"):
            verify(tmp_path)
    file.unlink()
    with pytest.raises(errors.HeadError, match="put it back"):
        verify(tmp_path)
    file.write_bytes(whole)
    verify(tmp_path)


@pytest.mark.parametrize(
    "hidden",
    [
        None,
        5,
        {},
        {"hidden_size": 0},
        {"hidden_size": 2**31},
        {"hidden_size": D + 1},
        {"top_k": 0},
        {"top_k": V + 1},
        {"top_k": True},
        {"head_bytes": -1},
        {"head_checksum": "x" * 32},
        {"more": 1},
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path, hidden):
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    content = unseal_manifest(manifest.read_bytes())
    content["hidden"] = content["hidden"] | hidden if isinstance(hidden, dict) and hidden else hidden
    manifest.write_bytes(seal_manifest(content))
    with pytest.raises(errors.ManifestFieldError):
        Store(tmp_path)


@pytest.mark.parametrize(("version", "codec"), [(3, "affine8"), (2, "hidden16"), (1, "hidden16")])
def test_version_and_codec_belong_together(tmp_path, version, codec):
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    content = unseal_manifest(manifest.read_bytes()) | {"version": version, "codec": codec}
    if version < 3:
        del content["hidden"]
    manifest.write_bytes(seal_manifest(content))
    with pytest.raises(errors.ManifestFieldError):
        Store(tmp_path)


@pytest.mark.parametrize("name", ["entries", "id_words", "top_k", "rest_lse"])
def test_a_shard_with_counts_of_logits_is_refused(tmp_path, name):
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    content = unseal_manifest(manifest.read_bytes())
    content["shards"][0][name] = True if name == "rest_lse" else 1
    manifest.write_bytes(seal_manifest(content))
    with pytest.raises(errors.ManifestFieldError):
        Store(tmp_path)


def test_a_shard_is_what_the_format_says(tmp_path):
    """Reads a shard and the head without the package's readers."""
    documents = write(tmp_path, codec="hidden8", head=make_head(softcap=4.0))
    tensors = safetensors.torch.load_file(tmp_path / "shard-000000.safetensors")
    assert set(tensors) == {
        *("document_row_offsets", "document_token_offsets", "row_checksums", "document_hashes", "positions"),
        *("input_ids", "scale", "hidden"),
    }
    hidden = torch.cat([hidden for *_, hidden in documents])
    assert torch.equal(tensors["scale"], hidden.abs().amax(-1) / 127)
    assert torch.equal(tensors["hidden"], (hidden / tensors["scale"][:, None]).round().to(torch.int8))
    assert tensors["document_hashes"][0].numpy().tobytes() == document_hash(documents[0][0].numpy())
    with safetensors.safe_open(tmp_path / "shard-000000.safetensors", "pt") as file:
        assert file.metadata() == {
            "format": "slimkernels-store",
            "version": "3",
            "vocab_size": str(V),
            "codec": "hidden8",
        }
    with safetensors.safe_open(tmp_path / "head.safetensors", "pt") as file:
        assert file.metadata()["softcap"] == "4.0"
        assert torch.equal(file.get_tensor("weight"), make_head().weight)


def test_info_says_which_codec_is_the_smallest(tmp_path):
    write(tmp_path, codec="hidden8", documents=list(make_documents(200)))
    found = info(tmp_path)
    sizes = {codec: found[f"bytes_per_token_{codec}"] for codec in ("affine8", *CODECS)}
    heads = {"affine8": 0.0} | dict.fromkeys(CODECS, found["head_bytes"] / found["tokens"])
    assert found["smallest_codec"] == min(sizes, key=lambda codec: sizes[codec] + heads[codec])
    assert found["head_bytes"] == (tmp_path / "head.safetensors").stat().st_size
    assert found["rest_lse_rows"] == found["rows"] == Store(tmp_path).num_rows
    assert found["entries"] == K * found["rows"]
    # All but manifest, headers and the index of documents.
    assert sizes["hidden8"] + heads["hidden8"] == pytest.approx(found["bytes_per_token"], rel=0.2)
    json.dumps(found)
    assert sizes["hidden16"] - sizes["hidden8"] == pytest.approx((D - 4) * found["rows"] / found["tokens"])


@pytest.mark.parametrize("codec", CODECS)
def test_info_estimates_the_cost_of_rounding(tmp_path, codec):
    """The estimate is near the error between the rows of the hidden states before and after they were stored."""
    documents = write(tmp_path, codec=codec, documents=list(make_documents(40)), top_k=V)
    store, head = Store(tmp_path), make_head()
    divergences = []
    for index, (*_, hidden) in enumerate(documents):
        before = (hidden @ head.weight.T).double().log_softmax(-1)
        after = store[index].teacher.logits.double().log_softmax(-1)
        divergences.append((before.exp() * (before - after)).sum(-1))
    assert info(tmp_path)["quantisation_kl_nats"] == pytest.approx(float(torch.cat(divergences).mean()), rel=0.25)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "cohere", "granite", "phi", "gpt2"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_hidden_states_give_the_rows_of_the_models_own_logits(tmp_path, family, codec, dtype):
    model = families.make_family(family, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(families.VOCAB_SIZE, (12,), generator=generator).tolist() for _ in range(3)]
    report = capture(model, None, documents, tmp_path, top_k=K, temperatures=(1.0, 2.0), codec=codec)
    assert report.documents == 3
    verify(tmp_path)
    store = Store(tmp_path)
    # The error of a logit is that of its hidden state times the norm of its row of the head, at most.
    head = LanguageModelHead.of(model)
    for ids in documents:
        document = store[store.find(ids)]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            hidden = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, :-1].float()
        rows = document.teacher
        step = hidden.abs().amax(-1) * (ROUNDING[codec] + (2.0**-8 if dtype == torch.bfloat16 else 1e-6))
        bound = step[:, None] * head.weight.float().abs().sum(-1) * head.logit_scale
        bound = bound + (logits.abs() * 2.0**-7 + 2e-2 if dtype == torch.bfloat16 else 1e-5)
        kept = rows.ids.long()
        assert ((rows.logits - logits.gather(-1, kept)).abs() <= bound.gather(-1, kept)).all()
        assert ((rows.logits.amax(-1) - logits.amax(-1)).abs() <= bound.amax(-1)).all()
        target = torch.tensor(ids[1:])[:, None]
        assert ((rows.target_logit - logits.gather(-1, target)[:, 0]).abs() <= bound.gather(-1, target)[:, 0]).all()
        for column, temperature in enumerate((1.0, 2.0)):
            error = (rows.lse[:, column] - (logits / temperature).logsumexp(-1)).abs()
            assert (error <= bound.amax(-1) / temperature + 1e-5).all()
        # Exactly consistent with themselves: what is kept and the rest are the whole row.
        together = torch.logaddexp(rows.logits.double().logsumexp(-1), rows.rest_lse[:, 0].double())
        torch.testing.assert_close(
            together, rows.lse[:, 0].double(), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0
        )


def test_a_capture_leaves_out_the_rows_that_pad_a_head(tmp_path):
    tokenizer = teachers.make_tokenizer()
    model = teachers.make_teacher(vocab_size=len(tokenizer) + 20)
    documents = [[5, 3, 8, 1, 9], [4, 4, 2]]
    capture(model, tokenizer, documents, tmp_path, top_k=K, codec="hidden16")
    store = Store(tmp_path)
    assert store.vocab_size == len(tokenizer)
    assert store.head.read().weight.shape[0] == len(tokenizer)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor(documents[:1])).logits[0, :-1, : len(tokenizer)]
    torch.testing.assert_close(store[0].teacher.lse[:, 0], logits.logsumexp(-1), atol=2e-2, rtol=0)


def test_a_capture_of_hidden_states_is_continued_as_if_it_had_not_stopped(tmp_path):
    model, documents = teachers.make_teacher(), [ids.tolist() for ids, *_ in make_documents(12)]
    options = {"codec": "hidden8", "top_k": K, "shard_rows": 10}
    capture(model, None, documents, tmp_path / "one", **options)
    capture(model, None, documents[:5], tmp_path / "two", **options, window=1)
    report = capture(model, None, documents, tmp_path / "two", **options)
    assert report.skipped == 5
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    for document in one:
        other = two[two.find(document.input_ids)]
        torch.testing.assert_close(document.teacher.logits, other.teacher.logits, atol=0.05, rtol=0)
    with pytest.raises(errors.SettingsMismatchError):
        capture(teachers.make_teacher(seed=5), None, documents, tmp_path / "two", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"select": "sample"}, "select must be 'top_k'"), ({"top_p": 0.9}, "top_p must be None")],
)
def test_a_capture_refuses_selections_that_readers_cannot_make(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        capture(teachers.make_teacher(), None, [[1, 2]], tmp_path, codec="hidden8", **options)


def test_a_killed_writer_leaves_a_store_that_is_continued(tmp_path):
    """Killed at random while it writes: what was flushed is whole, and the next writer continues it."""
    code = textwrap.dedent(
        """
        import sys
        sys.path[:0] = sys.argv[2:]
        from test_store_hidden import StoreWriter, make_documents, settings
        with StoreWriter(sys.argv[1], **settings()) as writer:
            for document in make_documents(300):
                if document[0] not in writer:
                    writer.add(*document)
                    writer.flush()
                    print(len(writer), flush=True)
        """
    )
    generator = np.random.default_rng(3)
    written = 0
    for _ in range(4):
        command = [sys.executable, "-c", code, str(tmp_path), *sys.path]
        wanted = written + int(generator.integers(1, 20))
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                written = int(line)
                if written >= wanted and process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
        verify(tmp_path)
        assert written <= len(Store(tmp_path)) <= written + 1
        written = len(Store(tmp_path))


def test_the_head_of_a_killed_writer_is_written_again(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"unfinished")
    (tmp_path / "head.safetensors.tmp").write_bytes(b"unfinished")
    write(tmp_path)
    verify(tmp_path)


def test_a_store_of_logits_does_not_hold_a_head(tmp_path):
    with StoreWriter(tmp_path, **settings(codec="affine8") | {"head": None, "top_k": None}):
        pass
    (tmp_path / "head.safetensors").write_bytes(b"")
    with pytest.raises(errors.UnexpectedFileError):
        verify(tmp_path)


def test_an_export_holds_the_rows(tmp_path):
    pytest.importorskip("pyarrow")
    write(tmp_path / "store")
    export_parquet(tmp_path / "store", tmp_path / "file.parquet")
    import_parquet(tmp_path / "file.parquet", tmp_path / "copy")
    assert Store(tmp_path / "copy").settings.codec == "float32"
    for one, two in zip(Store(tmp_path / "store"), Store(tmp_path / "copy"), strict=True):
        assert_same_rows(two.teacher, one.teacher, atol=0)


def test_a_student_is_evaluated_on_hidden_states(tmp_path):
    model = families.make_family("llama")
    documents = [[5, 3, 8, 1, 9], [4, 4, 2], [7, 8, 9, 10]]
    for codec in ("hidden16", "float32"):
        capture(model, None, documents, tmp_path / codec, top_k=K, codec=codec)
    student = families.make_family("llama", seed=4)
    found, expected = (evaluate_store(student, StoreDataset(tmp_path / codec)) for codec in ("hidden16", "float32"))
    for name in ("loss", "kl_ghost", "teacher_perplexity", "teacher_mass"):
        assert found[name] == pytest.approx(expected[name], rel=1e-2)
    # The teacher itself differs from its rows by their rounding alone.
    assert evaluate_store(model, Store(tmp_path / "hidden16"))["kl_ghost"] < 1e-3


def test_batches_of_any_collator_find_their_hidden_states(tmp_path):
    documents = write(tmp_path)
    teacher = StoredTeacher(Store(tmp_path))
    for ids, positions, hidden in documents:
        found = teacher.rows({"input_ids": ids[None]}, positions - 1)
        assert_same_rows(found, rows_of(make_head(), hidden.bfloat16(), ids, positions))
    assert len(teacher.rows({"input_ids": documents[0][0][None]}, torch.zeros(0, dtype=torch.int64))) == 0


def test_hidden_states_train_like_the_logits_that_are_made_of_them(tmp_path):
    """At a temperature that the store was not captured with."""
    model, documents = families.make_family("llama"), [[5, 3, 8, 1, 9], [4, 4, 2], [7, 8, 9, 10]]
    losses = []
    for codec, temperatures in (("hidden16", (1.0,)), ("float32", (1.0, 2.0))):
        capture(model, None, documents, tmp_path / codec, top_k=K, codec=codec, temperatures=temperatures)
        student = families.make_family("llama", seed=4)
        options = {"max_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "temperature": 2.0}
        metrics = train(
            tmp_path / codec, student, "kd", tmp_path / f"{codec}-out", rest="ghost", save_strategy="no", **options
        )
        losses.append(metrics["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_trainer_says_how_to_open_hidden_states_at_a_temperature(tmp_path):
    model = families.make_family("llama")
    capture(model, None, [[5, 3, 8, 1, 9]], tmp_path / "store", top_k=K, codec="hidden8")
    args = SlimConfig(output_dir=str(tmp_path), method="kd", temperature=3.0, rest="ghost", use_cpu=True)
    with pytest.raises(ValueError, match=r"open it as a Store with temperatures=\(1\.0, 3\.0\)"):
        SlimTrainer(model, args, train_dataset=StoreDataset(tmp_path / "store"))
    SlimTrainer(model, args, train_dataset=StoreDataset(Store(tmp_path / "store", temperatures=(1.0, 3.0))))


def test_settings_without_hidden_states_hash_as_before(tmp_path):
    """Checkpoints of earlier releases hold the fingerprint of a store of logits."""
    with StoreWriter(tmp_path, **settings(codec="affine8") | {"head": None, "top_k": None}):
        pass
    assert "hidden" not in Store(tmp_path).settings.content()
    assert "hidden" in dataclasses.asdict(Store(tmp_path).settings)
