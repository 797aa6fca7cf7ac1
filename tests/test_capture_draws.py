"""Captures of draws: what the store holds is unbiased, and depends on nothing but the document and the seed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import teachers
from test_capture import contents, make_documents

import slimkernels as sk
from slimkernels import reference_sampling as reference
from slimkernels.cli import main
from slimkernels.store import Store, verify
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.store.manifest import seal_manifest
from slimkernels.teacher import capture
from slimkernels.teacher.selection import document_seed
from slimkernels.trainer import SlimConfig, SlimTrainer

ROUNDS, TOP_K = 8, 5


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return teachers.make_teacher()


def dense_logits(model, document) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=document.input_ids[None]).logits[0, :-1].float()


@pytest.mark.parametrize("select", ["sample", "mixed"])
def test_capture_of_draws_stores_what_was_drawn(select, model, tokenizer, tmp_path) -> None:
    documents = make_documents(6)
    top_k = {"top_k": TOP_K} if select == "mixed" else {}
    capture(model, tokenizer, documents, tmp_path, select=select, rounds=ROUNDS, seed=3, batch_tokens=90, **top_k)
    verify(tmp_path)
    store = Store(tmp_path)
    assert store.settings.codec == "float32"
    drawn = {"rounds": ROUNDS, "seed": 3, "draw_version": 2}
    assert store.manifest["selection"] == {"kind": select, "top_k": TOP_K * bool(top_k), **drawn}
    for document in store:
        logits, teacher = dense_logits(model, document), document.teacher
        options = {"position": document.positions, "target": document.input_ids[1:]}
        # All rows of a document share its seed; their positions make the noise of each its own.
        seed = torch.full((len(logits),), document_seed(3, document.input_ids.tolist()))
        if select == "sample":
            expected = reference.sample_targets(logits, ROUNDS, seed, **options)
        else:
            expected = reference.mixed_targets(logits, TOP_K, ROUNDS, seed, **options)
        width = teacher.top_k
        assert teacher.rest_lse.isneginf().all()
        assert torch.equal(teacher.ids, expected.ids[:, :width])
        assert (expected.ids[:, width:] < 0).all()
        torch.testing.assert_close(teacher.logits.exp(), expected.logits[:, :width].exp(), atol=2e-5, rtol=0)
        torch.testing.assert_close(teacher.target_logit, expected.target_logit, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            sk.sparse_softmax(teacher, rest="zero").logprobs.exp().sum(-1), torch.ones(len(teacher))
        )


def test_capture_of_draws_does_not_depend_on_the_batches(model, tokenizer, tmp_path) -> None:
    documents = make_documents(8)
    # A repeated prefix, which must not get the same draws at the same place.
    documents.append([*documents[0][:-1], (documents[0][-1] + 1) % 300])
    for name, tokens in (("a", 64), ("b", 4096)):
        capture(model, tokenizer, documents, tmp_path / name, select="sample", rounds=ROUNDS, batch_tokens=tokens)
    one, other = Store(tmp_path / "a"), Store(tmp_path / "b")
    for ids in documents:
        assert torch.equal(one[one.find(ids)].teacher.ids, other[other.find(ids)].teacher.ids)
    first, last = one[one.find(documents[0])].teacher, one[one.find(documents[-1])].teacher
    rows = min(len(first), len(last))
    assert not torch.equal(first.ids[:rows, 0], last.ids[:rows, 0])
    capture(model, tokenizer, documents, tmp_path / "c", select="sample", rounds=ROUNDS, batch_tokens=4096)
    assert contents(tmp_path / "c") == contents(tmp_path / "b")
    capture(model, tokenizer, documents, tmp_path / "d", select="sample", rounds=ROUNDS, seed=1)
    assert contents(tmp_path / "d") != contents(tmp_path / "b")


@pytest.mark.parametrize("select", ["sample", "mixed"])
def test_gradient_of_captured_draws_approaches_the_dense_one(select, model, tokenizer, tmp_path) -> None:
    documents = make_documents(1, longest=12)
    top_k = {"top_k": TOP_K} if select == "mixed" else {}
    total, errors = 0.0, {}
    for seed in range(64):
        path = tmp_path / str(seed)
        capture(model, tokenizer, documents, path, select=select, rounds=ROUNDS, seed=seed, **top_k)
        document = Store(path)[0]
        logits = dense_logits(model, document)
        student = (0.5 * logits).requires_grad_()
        target = document.input_ids[1:]
        options = {"rest": "renorm", "token_weight": "none", "ce_weight": 0.0, "reduction": "sum"}
        sk.slim_loss(student, target, document.teacher, **options).loss.backward()
        total = total + student.grad
        if seed in (0, 63):
            dense = torch.softmax(student.detach(), -1) - torch.softmax(logits, -1)
            errors[seed + 1] = float((total / (seed + 1) - dense).norm())
    # 64 times the draws: an eighth of the error, up to chance.
    assert 5 < errors[1] / errors[64] < 13
    largest = sk.topk_logits(logits, ROUNDS)
    student.grad = None
    sk.slim_loss(student, target, largest, **options).loss.backward()
    assert float((student.grad - dense).norm()) > 4 * errors[64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "topk"}, "select must be one of 'top_k', 'sample', 'mixed', got 'topk'"),
        ({"rounds": 5}, "rounds must be None with select='top_k'"),
        ({"select": "sample", "top_k": 5}, "top_k and top_fraction must be None with select='sample', got 5 and None"),
        ({"select": "sample", "rounds": 0}, "rounds must be an integer of at least 1 .* got 0"),
        ({"select": "mixed", "rounds": True}, "rounds must be an integer of at least 1 .* got True"),
        ({"select": "mixed", "seed": 2**63}, "seed must be an integer of 64 bits"),
        ({"select": "mixed", "top_k": 301}, "top_k must be an integer in"),
        ({"select": "sample", "temperatures": (1.0, 2.0)}, r"temperatures must be \(1.0,\) with select='sample'"),
    ],
)
def test_capture_of_draws_refuses(options, message, model, tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        capture(model, tokenizer, [[1, 2]], tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("select", ["sample", "mixed"])
def test_capture_of_draws_stops_at_logits_that_are_not_finite(select, tokenizer, tmp_path) -> None:
    model = teachers.make_teacher()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(FloatingPointError, match=r"not finite in torch.float32"):
        capture(model, tokenizer, make_documents(2), tmp_path, select=select)
    assert len(Store(tmp_path)) == 0


def test_capture_command_draws(tmp_path, capsys) -> None:
    teacher, text = str(teachers.save_teacher(tmp_path / "tiny")), tmp_path / "corpus.txt"
    text.write_text("When the rain stopped, Anna put on her boots.\n\nThe apple trees were still wet.\n")
    command = ["capture", "--teacher", teacher, "--text", str(text)]
    assert main([*command, "--out", str(tmp_path / "a"), "--select", "sample", "--rounds", "9"]) == 0
    drawn = {"rounds": 9, "seed": 0, "draw_version": 2}
    assert Store(tmp_path / "a").manifest["selection"] == {"kind": "sample", "top_k": 0, **drawn}
    assert main([*command, "--out", str(tmp_path / "b"), "--select", "mixed", "--top-k", "4", "--seed", "2"]) == 0
    drawn = {"rounds": 50, "seed": 2, "draw_version": 2}
    assert Store(tmp_path / "b").manifest["selection"] == {"kind": "mixed", "top_k": 4, **drawn}
    assert main([*command, "--out", str(tmp_path / "c"), "--rounds", "9"]) == 2
    assert "--rounds has no meaning without --select sample or mixed" in capsys.readouterr().err


def as_version_one(path: Path) -> None:
    """Makes a store's manifests those of release 0.1.0, which did not write the version of the draws."""
    for manifest in path.rglob("manifest.json"):
        content = json.loads(manifest.read_text())
        del content["checksum"], content["selection"]["draw_version"]
        manifest.write_bytes(seal_manifest(content))


@pytest.mark.parametrize(("select", "parts"), [("sample", 1), ("mixed", 2)])
def test_store_of_other_draws_is_read_but_not_continued(select, parts, model, tokenizer, tmp_path) -> None:
    documents = make_documents(6)
    path, options = tmp_path / "store", {"select": select, "rounds": ROUNDS, "num_parts": parts}
    capture(model, tokenizer, documents[:4], path, **options)
    kept = [document.teacher.ids for document in Store(path)]
    as_version_one(path)
    verify(path)
    assert all(torch.equal(one.teacher.ids, ids) for one, ids in zip(Store(path), kept, strict=True))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    message = rf"{path} holds draws of version 1, but this release draws version 2.*: capture into a new directory"
    with pytest.raises(SettingsMismatchError, match=message):
        capture(model, tokenizer, documents, path, **options)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    config = {"output_dir": str(tmp_path / "out"), "method": "kd", "use_cpu": True, "report_to": "none"}
    trainer = SlimTrainer(model, SlimConfig(**config, max_steps=1), train_dataset=Store(path))
    assert math.isfinite(trainer.train().training_loss)


def test_trainer_refuses_another_temperature_for_draws(model, tokenizer, tmp_path) -> None:
    capture(model, tokenizer, make_documents(2), tmp_path / "store", select="sample")
    config = {"output_dir": str(tmp_path / "out"), "method": "kd", "use_cpu": True, "report_to": "none"}
    with pytest.raises(ValueError, match=r"temperature must be 1 with a store of select='sample'.* got 2.0"):
        SlimTrainer(model, SlimConfig(**config, temperature=2.0), train_dataset=Store(tmp_path / "store"))
    trainer = SlimTrainer(model, SlimConfig(**config, max_steps=1), train_dataset=Store(tmp_path / "store"))
    assert math.isfinite(trainer.train().training_loss)
