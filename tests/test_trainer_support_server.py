"""Comparing teacher and student on the student's own ids where the teacher is behind a server."""

from __future__ import annotations

import json

import pytest
import test_trainer_server
import torch
from support import served
from support.served_scores import ScoringServer, ScoringSglang
from test_trainer_mixin import Distiller
from test_trainer_server import RECIPE, TOP_K, make_student_model, make_trainer
from test_trainer_server import store as store  # the fixture
from transformers import TrainingArguments

import slimkernels as sk
from slimkernels.serving.errors import ServerRequestError
from slimkernels.store import Store
from slimkernels.trainer import TeacherServer

pytest.importorskip("httpx2", reason="the extra `server` is not installed")

OPTIONS = {"method": "reverse_kl", "student_top_k": 5, "gradient_accumulation_steps": 2}


@pytest.fixture
def server():
    with ScoringSglang() as server:
        yield server


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("support", ["student", "union", "intersection"])
def test_losses_are_those_of_the_teacher_in_process(support, store, server, tmp_path):
    options = OPTIONS | {"support": support}
    local = make_trainer(tmp_path, store, teacher_model=server.model, teacher_top_k=TOP_K, **options)
    remote = make_trainer(tmp_path, store, server.url, **options)
    assert losses(remote) == pytest.approx(losses(local), rel=1e-4)
    assert len(server.documents) == len(store)
    if support == "intersection":
        assert server.named == [[]] * len(store)
    else:
        assert all(5 <= len(named) == len(set(named)) for named in server.named)
        assert any("teacher_wait_seconds" in entry for entry in remote.state.log_history)
    # What is scored for the student's ids is of no use to another epoch.
    assert len(Store(remote.served_teacher.store.path)) == (len(store) if support == "intersection" else 0)


@pytest.mark.parametrize("support", ["teacher", "student", "union", "intersection"])
def test_a_head_that_is_padded_beyond_the_tokenizer_learns_from_a_server(support, store, tmp_path, monkeypatch):
    def padded(model):
        torch.manual_seed(0)
        model.resize_token_embeddings(331, mean_resizing=False)
        with torch.no_grad():
            model.get_output_embeddings().weight[300:] *= 50
        return model

    monkeypatch.setattr(test_trainer_server, "make_student_model", lambda: padded(make_student_model()))
    options = OPTIONS | {"support": support}
    if support == "teacher":
        del options["student_top_k"]
    with ScoringSglang() as server:
        local = make_trainer(tmp_path, store, teacher_model=server.model, teacher_top_k=TOP_K, **options)
        remote = make_trainer(tmp_path, store, server.url, **options)
        assert losses(remote) == pytest.approx(losses(local), rel=1e-4)
        assert all(max(named, default=0) < 300 for named in server.named)


def test_the_mixin_asks_for_the_students_ids(store, server, tmp_path):
    rows = [store[index] for index in range(len(store))]

    def collate(documents):
        width = max(len(document.input_ids) for document in documents)
        batch = {name: torch.zeros(len(documents), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        labels = torch.full((len(documents), width), -100)
        for row, document in enumerate(documents):
            count = len(document.input_ids)
            batch["input_ids"][row, :count], batch["attention_mask"][row, :count] = document.input_ids, 1
            labels[row, document.positions] = document.input_ids[document.positions]
        return batch | {"labels": labels}

    curves = []
    teacher = TeacherServer(server.url, served.MODEL, tmp_path / "rows", top_logprobs=TOP_K)
    for given in ({"teacher_server": teacher}, {"teacher_model": server.model}):
        kept = {"teacher_top_k": TOP_K} if "teacher_model" in given else {}
        objective = sk.SlimObjective("reverse_kl", support="union", student_top_k=5, **kept)
        args = TrainingArguments(output_dir=str(tmp_path), **RECIPE, remove_unused_columns=False)
        trainer = Distiller(
            model=make_student_model(),
            args=args,
            train_dataset=rows,
            data_collator=collate,
            processing_class=server.tokenizer,
            objective=objective,
            **given,
        )
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("support", ["student", "union"])
def test_a_server_that_cannot_score_given_ids_is_refused(support, store, tmp_path):
    with (
        ScoringServer() as server,
        pytest.raises(ServerRequestError, match=f"support '{support}' needs .* SGLang gives .* of kind 'vllm'"),
    ):
        make_trainer(tmp_path, store, server.url, support=support, student_top_k=5)


def test_scores_that_are_missing_end_the_training(store, server, tmp_path):
    server.forgets = True
    trainer = make_trainer(tmp_path, store, server.url, support="student", student_top_k=5)
    with pytest.raises(ServerRequestError, match="did not give the scores of the ids"):
        trainer.train()


@pytest.mark.parametrize("support", ["student", "union"])
def test_scores_that_are_no_log_probabilities_end_the_training(support, store, server, tmp_path, monkeypatch):
    """The most probable tokens are as they should be, and the given ids are named by logits."""
    whole = server.reply

    def reply(path, body):
        status, headers, data = whole(path, body)
        if path == "/generate" and body.get("token_ids_logprob"):
            answer = json.loads(data)
            for position in answer["meta_info"]["input_token_ids_logprobs"][1:]:
                for entry in position:
                    entry[0] += 6.0
            data = json.dumps(answer)
        return status, headers, data

    monkeypatch.setattr(server, "reply", reply)
    trainer = make_trainer(tmp_path, store, server.url, support=support, student_top_k=60)
    with pytest.raises(
        ServerRequestError, match=r"gave entries with a probability of .* together, at most 1 is possible"
    ):
        trainer.train()
