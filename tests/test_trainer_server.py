"""Training with a teacher behind a server: rows, requests ahead of their step, the store of rows, and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support import served, teachers
from support.served_scores import ScoringServer
from transformers import Trainer, TrainerCallback, TrainingArguments

import slimkernels as sk
from slimkernels.models.make_student import make_student
from slimkernels.served_rows.journal import AnswerJournal
from slimkernels.served_rows.rows import ServedDocument
from slimkernels.serving.errors import BudgetSpentError, ServerRequestError
from slimkernels.store import Store, StoreWriter
from slimkernels.teacher import tokenizer_fingerprint
from slimkernels.trainer import SlimConfig, SlimTrainer, TeacherServer

pytest.importorskip("httpx2", reason="the extra `server` is not installed")

TOP_K = 9
DOCUMENTS = 8
RECIPE = {
    "num_train_epochs": 1,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Documents of different lengths; their own rows are never read."""
    path = tmp_path_factory.mktemp("served") / "store"
    generator = torch.Generator().manual_seed(0)
    writer = StoreWriter(
        path,
        vocab_size=300,
        tokenizer_fingerprint=tokenizer_fingerprint(teachers.make_tokenizer()),
        teacher={"name": "none"},
        selection={"kind": "top_k", "value": 2, "top_k": 2},
    )
    with writer:
        for number in range(DOCUMENTS):
            tokens = torch.randint(2, 300, (6 + number,), generator=generator)
            positions = torch.arange(2, len(tokens))
            logits = torch.randn(len(positions), 300, generator=generator)
            writer.add(tokens, positions, sk.topk_logits(logits, top_k=2), prompt_length=2)
    return Store(path)


@pytest.fixture
def server():
    with ScoringServer() as server:
        yield server


def make_student_model():
    return make_student(vocab_size=300, hidden_size=16, num_layers=1, num_heads=2, max_length=64, seed=1)


def make_trainer(
    output: Path, store, url: str | None = None, *, callbacks=None, server=None, teacher_model=None, **options
) -> SlimTrainer:
    given = {"store": output / "rows", "top_logprobs": TOP_K, "backoff_s": 0.01, "timeout_s": 20.0, "max_retries": 1}
    config = SlimConfig(output_dir=str(output), **RECIPE | {"method": "reverse_kl"} | options)
    return SlimTrainer(
        model=make_student_model(),
        args=config,
        train_dataset=store,
        processing_class=teachers.make_tokenizer(),
        callbacks=callbacks,
        teacher_model=teacher_model,
        teacher_server=None if url is None else TeacherServer(url, served.MODEL, **given | (server or {})),
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "reverse_kl"},
        {"method": "kd", "rest": "ghost"},
        {"method": "slim", "rest": "ghost"},
        {"method": "jsd", "gradient_accumulation_steps": 2},
        {"method": "gkd", "max_new_tokens": 4},
    ],
    ids=lambda options: options["method"],
)
def test_losses_are_those_of_the_teacher_in_process(options, store, server, tmp_path) -> None:
    trainer = make_trainer(tmp_path / "served", store, server.url, num_train_epochs=2, **options)
    trainer.train()
    local = make_trainer(
        tmp_path / "local", store, teacher_model=server.model, num_train_epochs=2, teacher_top_k=TOP_K, **options
    )
    local.train()
    assert losses(trainer) == pytest.approx(losses(local), rel=1e-4)
    assert all("teacher_wait_seconds" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_a_second_epoch_and_a_second_run_send_no_requests(store, server, tmp_path) -> None:
    make_trainer(tmp_path, store, server.url, num_train_epochs=3).train()
    assert sorted(server.documents) == sorted(tuple(document.input_ids.tolist()) for document in store)
    make_trainer(tmp_path, store, server.url, seed=5).train()
    assert len(server.documents) == DOCUMENTS


def test_text_of_the_student_is_not_stored(store, server, tmp_path) -> None:
    make_trainer(tmp_path, store, server.url, method="gkd", on_policy_fraction=1.0, max_new_tokens=4).train()
    assert len(server.documents) >= DOCUMENTS
    assert len(Store(tmp_path / "rows" / "rank-00000")) == 0


def test_the_next_batch_is_asked_for_before_a_step_ends(store, server, tmp_path) -> None:
    arrived: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            # The requests for the next batch were sent; the stub has no bound but the ones that it was sent.
            wanted = min(2 * (state.global_step + 1), DOCUMENTS)
            for _ in range(2000):
                if len(server.documents) >= wanted:
                    break
                threading.Event().wait(0.005)
            arrived.append(len(server.documents))

    make_trainer(tmp_path, store, server.url, callbacks=[Watch()], server={"ahead": 1}).train()
    # Bounded: never more than one micro-batch ahead of the step.
    assert arrived == [4, 6, 8, 8]


def test_given_text_is_asked_for_ahead_where_the_student_writes_some(store, server, tmp_path) -> None:
    """Of batches that the student does not write, the requests leave before the step ahead of theirs ends."""
    given = {tuple(document.input_ids.tolist()) for document in store}
    arrived: dict[int, int] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            step = state.global_step
            if step < 4 and not trainer._student_writes(step, 0):
                wanted = 2 * sum(not trainer._student_writes(number, 0) for number in range(step + 1))
                for _ in range(2000):
                    if len(given & set(server.documents)) >= wanted:
                        break
                    threading.Event().wait(0.005)
                arrived[step] = len(given & set(server.documents)) - wanted

    options = {"method": "gkd", "on_policy_fraction": 0.5, "max_new_tokens": 4, "seed": 3}
    trainer = make_trainer(tmp_path, store, server.url, callbacks=[Watch()], server={"ahead": 1}, **options)
    is_written = [trainer._student_writes(step, 0) for step in range(4)]
    assert set(is_written) == {True, False}
    trainer.train()
    assert set(arrived.values()) == {0}
    assert len(Store(tmp_path / "rows" / "rank-00000")) == 2 * is_written.count(False)


@pytest.mark.parametrize("stops_at", [1, 2])
def test_a_killed_run_keeps_what_was_paid_for(stops_at, store, server, tmp_path) -> None:
    """SIGKILL long before the first write to the store: no answer is asked for again, those ahead of it included."""
    code = f"""
import os, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
import test_trainer_server as here
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {stops_at}:
            for future in trainer.served_teacher._asked.values():
                future.result()
            os.kill(os.getpid(), 9)
trainer = here.make_trainer(here.Path({str(tmp_path)!r}), here.Store({str(store.path)!r}), {server.url!r},
                            callbacks=[Kill()], server={{"flush_s": 1e6, "ahead": 1}})
trainer.train()
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(server.documents) == server.answered == 2 * (stops_at + 1)
    assert len(Store(tmp_path / "rows" / "rank-00000")) == 0
    make_trainer(tmp_path, store, server.url).train()
    assert sorted(server.documents) == sorted(tuple(document.input_ids.tolist()) for document in store)


def test_a_training_goes_on_with_the_answers_that_a_kill_left(store, server, tmp_path) -> None:
    """The rows of a journal, also of a process that a later run does not have, are those of the server."""
    make_trainer(tmp_path / "whole", store, server.url).train()
    expected = Store(tmp_path / "whole" / "rows" / "rank-00000")
    settings = expected.settings
    rows_of = {"teacher": settings.teacher, "selection": settings.selection}
    rows_of["tokenizer_fingerprint"] = settings.tokenizer_fingerprint
    (tmp_path / "rows").mkdir()
    for rank in (0, 3):
        with AnswerJournal(tmp_path / "rows" / f"rank-{rank:05d}.journal", rows_of) as journal:
            for document in list(expected)[rank : rank + 3]:
                ids, positions = document.input_ids.tolist(), document.positions.tolist()
                journal.append(ServedDocument(ids, positions, document.teacher))
    # A line that a kill cut off.
    with open(tmp_path / "rows" / "rank-00003.journal", "ab") as file:
        file.write(b'{"rows_of": {"teacher"')
    server.documents.clear()
    make_trainer(tmp_path, store, server.url).train()
    assert len(server.documents) == DOCUMENTS - 6
    assert_same_documents_in_any_order(Store(tmp_path / "rows" / "rank-00000"), expected)
    assert [path.stat().st_size for path in sorted((tmp_path / "rows").glob("*.journal"))] == [0, 0]


def assert_same_documents_in_any_order(left: Store, right: Store) -> None:
    assert len(left) == len(right)
    for document in left:
        other = right[right.find(document.input_ids)]
        assert torch.equal(document.positions, other.positions)
        for name in ("ids", "logits", "lse", "target_logit", "rest_lse"):
            assert torch.equal(getattr(document.teacher, name), getattr(other.teacher, name)), name


def test_an_answer_without_one_of_its_rows_is_not_kept(store, server, tmp_path, monkeypatch) -> None:
    """A label without a row ends the run, and the next one asks for that document again."""
    whole, is_broken = server.reply, True

    def reply(path, body):
        status, headers, data = whole(path, body)
        if is_broken and path == "/v1/completions" and body["prompt"] != server._sample:
            answer = json.loads(data)
            answer["choices"][0]["prompt_logprobs"][4] = None
            data = json.dumps(answer)
        return status, headers, data

    monkeypatch.setattr(server, "reply", reply)
    with pytest.raises(
        ServerRequestError, match=r"gave no log-probability .* for the label at position 4 of a document"
    ):
        make_trainer(tmp_path, store, server.url).train()
    assert len(Store(tmp_path / "rows" / "rank-00000")) == 0
    is_broken = False
    make_trainer(tmp_path, store, server.url).train()
    assert len(Store(tmp_path / "rows" / "rank-00000")) == DOCUMENTS


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"store": None}, TypeError, "store must be the path of a folder, got None"),
        ({"model": None}, TypeError, "model must be a str, got None"),
        ({"codec": "hidden8"}, ValueError, "codec must be one of 'float32', .*, got 'hidden8'"),
        ({"flush_s": -1}, ValueError, "flush_s must be finite and at least 0, got -1"),
        ({"flush_s": "x"}, TypeError, "flush_s must be a number"),
        ({"max_unmapped_fraction": 2}, ValueError, r"max_unmapped_fraction must be in \[0, 1\], got 2"),
        ({"ahead": -1}, ValueError, "ahead must be an int of at least 0, got -1"),
    ],
)
def test_settings_that_make_no_teacher_are_named(options, error, message) -> None:
    with pytest.raises(error, match=message):
        TeacherServer(**{"url": "http://localhost:8000/v1", "model": "m", "store": "rows"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 2.0}, "a server tells its rows at temperature 1 alone, so set temperature=1, or rest="),
        (
            {"teacher_in_chunks": True},
            "got {'teacher_in_chunks': True} without one: set top_logprobs of the teacher_server",
        ),
        ({"teacher_top_k": 3}, "got {'teacher_top_k': 3} without one: set top_logprobs of the teacher_server"),
        (
            {"support": "intersection", "student_top_k": 301},
            "student_top_k must be at most the vocabulary's 300, got 301",
        ),
    ],
)
def test_options_that_do_not_fit_a_served_teacher_are_refused(options, message, store, server, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, store, server.url, **options)


def test_answers_of_another_teacher_are_refused(store, server, tmp_path) -> None:
    (tmp_path / "rows").mkdir()
    with AnswerJournal(tmp_path / "rows" / "rank-00001.journal", {"teacher": "other"}) as journal:
        # The rows are not looked at.
        journal.append(
            ServedDocument([1, 2], [1], sk.topk_logits(torch.randn(1, 300), top_k=2, target=torch.tensor([2])))
        )
    with pytest.raises(ValueError, match=r"rank-00001.journal must hold rows of .*, got rows of {'teacher': 'other'}"):
        make_trainer(tmp_path, store, server.url)


def test_a_budget_ends_the_training_and_keeps_the_answers(store, server, tmp_path) -> None:
    sample = len(server._sample) + 1
    lengths = [len(document.input_ids) + 1 for document in store]
    budget = {"token_budget": sample + sum(lengths[:3]) + 1, "concurrency": 1}
    options = {"train_sampling_strategy": "sequential"}
    trainer = make_trainer(tmp_path, store, server.url, server=budget, **options)
    spent = rf"token_budget={budget['token_budget']} is spent: {sample + sum(lengths[:3])} tokens were asked for"
    with pytest.raises(BudgetSpentError, match=spent):
        trainer.train()
    assert server.answered == len(Store(tmp_path / "rows" / "rank-00000")) == 3
    make_trainer(tmp_path, store, server.url, server=budget | {"token_budget": sample + sum(lengths[3:])}).train()
    assert server.answered == DOCUMENTS


def test_two_ranks_ask_only_for_their_own_documents(store, server, tmp_path) -> None:
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads(1)
import test_trainer_server as here
here.make_trainer(here.Path({str(tmp_path)!r}), here.Store({str(store.path)!r}), {server.url!r},
                  num_train_epochs=3, per_device_train_batch_size=1).train()
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(server.documents) == sorted(tuple(document.input_ids.tolist()) for document in store)
    assert [len(Store(tmp_path / "rows" / f"rank-0000{rank}")) for rank in (0, 1)] == [DOCUMENTS // 2] * 2


@pytest.mark.parametrize("kind", ["llamacpp", "openai"])
def test_a_server_that_cannot_score_text_is_refused(kind, store, tmp_path) -> None:
    with ScoringServer(kind=kind) as server, pytest.raises(ServerRequestError, match="must be a vLLM or SGLang server"):
        make_trainer(tmp_path, store, server.url)


def test_a_context_that_is_too_short_is_refused_before_the_first_step(store, tmp_path) -> None:
    with ScoringServer(max_model_len=13) as server, pytest.raises(ValueError, match=r"at most 12 tokens .* of 13"):
        make_trainer(tmp_path, store, server.url)
    assert not server.documents


def test_another_tokenizer_is_refused_before_the_first_step(store, server, tmp_path) -> None:
    server.shift = 1
    with pytest.raises(ServerRequestError, match="give the student the tokenizer of the model"):
        make_trainer(tmp_path, store, server.url)


def test_another_tokenizer_is_seen_by_the_texts_of_scored_tokens(store, server, tmp_path) -> None:
    """A server without /tokenize, which scores the ids that it is sent whatever they stand for."""
    server.tokenizes = False
    make_trainer(tmp_path, store, server.url)
    # Some servers leave out spaces, write nothing, or show characters of several tokens as broken ones.
    for number, spelling in enumerate(
        [lambda token: server.tokenizer.decode(token).strip(), lambda _: "", lambda _: "\ufffd"]
    ):
        server.spelling = spelling
        make_trainer(tmp_path / str(number), store, server.url)
    server.spelling = lambda token: server.tokenizer.decode(token + 1)
    with pytest.raises(ServerRequestError, match=r"reads token \d+ as '.+', and the student's tokenizer as '.+': give"):
        make_trainer(tmp_path, store, server.url)


def test_a_key_that_is_not_set_is_named(store, server, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ValueError, match="TEACHER_KEY must hold the server's key"):
        make_trainer(tmp_path, store, server.url, server={"key_env": "TEACHER_KEY"})


def test_an_exhausted_budget_reaches_the_training_and_leaves_no_thread(store, server, tmp_path) -> None:
    trainer = make_trainer(tmp_path, store, server.url)
    server.faults.append((402, {}, '{"error": {"message": "the budget is exhausted"}}'))
    with pytest.raises(ServerRequestError, match="the budget is exhausted"):
        trainer.train()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("teacher-server")]:
        thread.join(900)
        assert not thread.is_alive()


def test_an_interrupt_does_not_wait_for_the_server(store, server, tmp_path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            raise KeyboardInterrupt

    server.held = {tuple(document.input_ids.tolist()) for document in list(store)[2:]}
    server.gate.clear()
    options = {"train_sampling_strategy": "sequential", "server": {"ahead": 1}}
    trainer = make_trainer(tmp_path, store, server.url, callbacks=[Interrupt()], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    # The server still holds what was asked ahead; what it had answered is kept.
    assert server.answered == 2
    assert len(Store(tmp_path / "rows" / "rank-00000")) == 2
    server.gate.set()


class Distiller(sk.SlimLossMixin, Trainer):
    pass


def collate(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_the_mixin_learns_the_same_from_a_server(store, server, tmp_path) -> None:
    rows = [{"input_ids": document.input_ids.tolist()} for document in store]

    def trained(name, **teacher):
        trainer = Distiller(
            model=make_student_model(),
            args=TrainingArguments(output_dir=str(tmp_path / name), **RECIPE, remove_unused_columns=False),
            train_dataset=rows,
            data_collator=collate,
            processing_class=teachers.make_tokenizer(),
            **teacher,
        )
        trainer.train()
        return losses(trainer)

    connection = TeacherServer(server.url, served.MODEL, tmp_path / "rows", top_logprobs=TOP_K)
    objective = sk.SlimObjective("reverse_kl", teacher_top_k=TOP_K)
    expected = trained("local", teacher_model=server.model, objective=objective)
    assert trained("served", teacher_server=connection, objective="reverse_kl") == pytest.approx(expected, rel=1e-4)
    assert len(server.documents) == DOCUMENTS


@pytest.mark.parametrize("packed", [False, True])
def test_the_mixin_refuses_a_short_context_before_the_first_step(packed, store, server, tmp_path) -> None:
    """Rows of a data set are documents, unless they say how long the documents in them are."""
    rows = [{"input_ids": document.input_ids.tolist()} for document in store]
    if packed:
        ids = [token for row in rows for token in row["input_ids"]]
        rows = [{"input_ids": ids, "seq_lengths": [len(row["input_ids"]) for row in rows]}]

    def made() -> Distiller:
        return Distiller(
            model=make_student_model(),
            args=TrainingArguments(output_dir=str(tmp_path), **RECIPE, remove_unused_columns=False),
            train_dataset=Dataset.from_list(rows),
            data_collator=collate,
            processing_class=teachers.make_tokenizer(),
            objective="reverse_kl",
            teacher_server=TeacherServer(server.url, served.MODEL, tmp_path / "rows", top_logprobs=TOP_K),
        )

    server.max_model_len = 13
    with pytest.raises(ValueError, match=r"documents must have at most 12 tokens .* got one of 13"):
        made()
    server.max_model_len = 14
    made()
    assert not server.documents
