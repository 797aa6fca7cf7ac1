"""Held-out metrics against the same numbers from dense logits in float64."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from support.tiny import VOCAB_SIZE, make_model, make_store

from slimkernels.cli import main
from slimkernels.evaluate import evaluate_store
from slimkernels.store import Store, StoreWriter


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_store(tmp_path_factory.mktemp("store") / "heldout", num_documents=7))


@torch.no_grad()
def dense_metrics(model, store) -> dict[str, float]:
    """Computes each metric from (T, V) float64 logits of one document at a time."""
    rows = []
    for document in store:
        logits = model(document.input_ids[None]).logits[0, document.positions - 1].double()
        logprobs = logits.log_softmax(-1)
        teacher, ids = document.teacher, document.teacher.ids.long()
        q = (teacher.logits.double() - teacher.lse[:, :1].double()).exp()
        p = logprobs.exp()
        kept_p = p.gather(-1, ids)
        tail_q, tail_p = 1 - q.sum(-1), p.scatter(-1, ids, 0.0).sum(-1)
        rows.append(
            torch.stack(
                [
                    -logprobs.gather(-1, document.input_ids[document.positions, None])[:, 0],
                    (q * (q / kept_p).log()).sum(-1) + tail_q * (tail_q / tail_p).log(),
                    (teacher.lse[:, 0] - teacher.target_logit).double(),
                    q.sum(-1),
                    kept_p.sum(-1),
                ],
                dim=-1,
            )
        )
    ce, kl, teacher_ce, teacher_mass, student_mass = torch.cat(rows).mean(0).tolist()
    return {
        "loss": ce,
        "perplexity": math.exp(ce),
        "kl_ghost": kl,
        "teacher_perplexity": math.exp(teacher_ce),
        "teacher_mass": teacher_mass,
        "student_mass": student_mass,
        "tokens": sum(len(document.positions) for document in store),
    }


@pytest.mark.parametrize("batch_size", [0, -1])
def test_evaluate_store_refuses_batches_of_nothing(store, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {batch_size}"):
        evaluate_store(make_model(), store, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_evaluate_store_equals_dense_metrics(store, batch_size):
    model = make_model(seed=3).eval()
    expected = dense_metrics(model, store)
    metrics = evaluate_store(model, store, batch_size=batch_size)
    assert metrics.pop("tokens_per_second") > 0
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert metrics["kl_ghost"] > 0.1


def test_teacher_has_no_divergence_to_itself(store):
    metrics = evaluate_store(make_model(seed=1234), store)
    assert abs(metrics["kl_ghost"]) < 1e-5
    assert metrics["perplexity"] == pytest.approx(metrics["teacher_perplexity"], rel=1e-4)
    assert metrics["student_mass"] == pytest.approx(metrics["teacher_mass"], rel=1e-4)


def test_model_keeps_its_mode_and_needs_no_gradient(store):
    model = make_model()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    done = []
    first = evaluate_store(model.train(), store, batch_size=3, on_batch=done.append)
    assert model.training
    assert done == [3, 6, 7]
    assert all(parameter.grad is None for parameter in model.parameters())
    second = evaluate_store(model.eval(), store, batch_size=3)
    assert not model.training
    assert first["loss"] == second["loss"]


def test_plain_documents_serve_as_a_store(store):
    model = make_model(seed=3)
    documents = [store[index] for index in range(len(store))]
    assert evaluate_store(model, documents)["kl_ghost"] == evaluate_store(model, store)["kl_ghost"]


def test_errors_say_what_is_wrong(store):
    with pytest.raises(ValueError, match="at least one label to evaluate on, got none"):
        evaluate_store(make_model(), [])
    with pytest.raises(ValueError, match=f"below the student's vocabulary size {VOCAB_SIZE // 2}"):
        evaluate_store(make_model(vocab_size=VOCAB_SIZE // 2), store)


def with_unknown_labels(store, path, unknown: float, share: int) -> Store:
    """Writes a store again without the teacher's logit of some labels, as imported files lack it."""
    settings = {"vocab_size": VOCAB_SIZE, "tokenizer_fingerprint": "", "teacher": {}, "selection": {}}
    with StoreWriter(path, codec="float32", **settings) as writer:
        for document in store:
            logits = document.teacher.target_logit.clone()
            logits[::share] = unknown
            teacher = dataclasses.replace(document.teacher, target_logit=logits)
            writer.add(document.input_ids, document.positions, teacher)
    return Store(path)


@pytest.mark.parametrize("unknown", [-math.inf, math.nan])
def test_labels_that_the_teacher_is_not_known_for_are_left_out_and_counted(store, tmp_path, unknown):
    model = make_model(seed=3)
    expected = evaluate_store(model, store)
    assert "teacher_tokens" not in expected
    some = with_unknown_labels(store, tmp_path / "some", unknown, share=2)
    known = [(d.teacher.lse[:, 0] - d.teacher.target_logit)[1::2] for d in store]
    metrics = evaluate_store(model, some)
    assert metrics["teacher_tokens"] == sum(map(len, known))
    assert metrics["teacher_perplexity"] == pytest.approx(math.exp(torch.cat(known).mean()), rel=1e-5)
    assert metrics["loss"] == expected["loss"]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    none = evaluate_store(model, with_unknown_labels(store, tmp_path / "none", unknown, share=1))
    assert none["teacher_tokens"] == 0
    assert "teacher_perplexity" not in none


def test_the_json_of_a_diverged_student_is_json(store, tmp_path, capsys):
    model = make_model(seed=3)
    model.get_output_embeddings().weight.data.mul_(1e5)
    model.save_pretrained(tmp_path)
    assert main(["eval", "--store", str(store.path), "--model", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail).values()
    assert found["perplexity"] is None
    assert found["loss"] > 700
