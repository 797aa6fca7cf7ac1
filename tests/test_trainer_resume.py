"""Runs that are continued: what makes a run the same, and checkpoints that are damaged."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import VOCAB_SIZE, make_model, make_store, make_tokenizer
from test_trainer import make_trainer, training_logs
from test_trainer_methods import make_teacher, online
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.models.make_student import make_student
from slimkernels.store import Store, StoreDataset, StoreWriter
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.store.prompts import prompts_content, prompts_name
from slimkernels.teacher import capture, tokenizer_fingerprint
from slimkernels.trainer import SlimTrainer, last_complete_checkpoint, train

# peft still calls functions that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def store_path(tmp_path_factory) -> str:
    return make_store(tmp_path_factory.mktemp("store") / "train")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store_path) -> Path:
    """The folder of a run of four steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, Store(store_path), **SAVING).train()
    return folder


@pytest.fixture
def run(tmp_path, finished) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def resume(run: Path, store, **options) -> SlimTrainer:
    trainer = make_trainer(run, store, **SAVING | options)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def test_a_run_is_another_with_another_store(run, tmp_path):
    other = Store(make_store(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match=r"checkpoint of the same run.* differs: store='\w{32}' there, '\w{32}' here"):
        resume(run, other)


def test_a_run_is_another_with_other_lengths_of_the_prompts(run, tmp_path, store_path):
    shutil.copytree(store_path, tmp_path / "prompts")
    store = Store(tmp_path / "prompts")
    lengths = np.array([int(document.positions[0]) for document in store[: store.shards[0].documents]])
    content = prompts_content(store.shards[0].checksum, lengths)
    (tmp_path / "prompts" / prompts_name(store.shards[0].file)).write_bytes(content)
    with pytest.raises(ValueError, match=r"differs: prompt_lengths='unknown' there, '\w{32}' here; give this run"):
        resume(run, Store(tmp_path / "prompts"))
    for folder in run.glob("checkpoint-*"):
        # A checkpoint of a release that did not compare the lengths: the finished run and a longer one go on.
        recorded = json.loads((folder / "slim_run.json").read_text())
        assert recorded.pop("prompt_lengths") == "unknown"
        assert recorded["store"] == Store(tmp_path / "prompts").rows_fingerprint
        (folder / "slim_run.json").write_text(json.dumps(recorded))
    assert resume(run, Store(tmp_path / "prompts")).state.global_step == 4
    assert resume(run, Store(tmp_path / "prompts"), max_steps=6).state.global_step == 6


def test_a_run_is_another_with_another_student_of_the_same_shape(run, store_path):
    with pytest.raises(ValueError, match=r"differs: student='\w{16}' there, '\w{16}' here"):
        resume(run, Store(store_path), model=make_model(seed=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.1}, "learning_rate=0.005 there, 0.1 here"),
        ({"optim": "sgd"}, "optim='adamw_torch' there, 'sgd' here"),
        ({"weight_decay": 0.1}, "weight_decay=0.0 there, 0.1 here"),
        ({"adam_beta2": 0.9}, "adam_beta2=0.999 there, 0.9 here"),
        ({"max_grad_norm": 0.5}, "max_grad_norm=1.0 there, 0.5 here"),
        ({"bf16": True}, "bf16=False there, True here"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type='constant' there, 'linear' here"),
        ({"warmup_steps": 3, "learning_rate": 0.1}, "learning_rate=.*; warmup_steps=0 there, 3 here"),
        ({"per_device_train_batch_size": 2}, "documents_per_step=4 there, 2 here"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=None there, 5.0 here"),
        ({"train_sampling_strategy": "random"}, "train_sampling_strategy='sequential' there, 'random' here"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=False there, True here"),
    ],
)
def test_a_run_is_another_with_another_optimizer_or_schedule(run, store_path, options, message):
    with pytest.raises(ValueError, match=message):
        resume(run, Store(store_path), **options)


def test_a_student_of_another_shape_is_one_sentence(run, store_path):
    student = make_model(num_layers=2, hidden_size=8)
    for folder in run.glob("checkpoint-*"):
        # A checkpoint of a release that recorded nothing of the student.
        (folder / "slim_run.json").unlink()
    with pytest.raises(ValueError, match=r"of the same student, .* of shape \(97, 16\), got \(97, 8\) here"):
        resume(run, Store(store_path), model=student)


def test_the_command_says_that_a_run_is_another(tmp_path, store_path, capsys):
    command = ["train", "--store", store_path, "--method", "slim", "--out", str(tmp_path / "out")]
    command += ["--max-steps", "1", "--option", "use_cpu=true"]
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--learning-rate", "0.001"]) == 2
    assert "--learning-rate 0.006 there, 0.001 here" in capsys.readouterr().err
    other = make_store(tmp_path / "other", seed=1)
    assert main([*command[:2], other, *command[3:]]) == 2
    assert "differs: store=" in capsys.readouterr().err


def test_a_schedule_with_an_end_is_another_when_it_is_made_longer(tmp_path, store_path):
    store = Store(store_path)
    options = {"lr_scheduler_type": "linear"}
    make_trainer(tmp_path, store, **SAVING | options).train()
    with pytest.raises(ValueError, match="max_steps=4 there, 6 here"):
        resume(tmp_path, store, max_steps=6, **options)


def test_a_run_without_such_an_end_can_be_made_longer(run, store_path):
    trainer = resume(run, Store(store_path), max_steps=6)
    assert [entry["step"] for entry in training_logs(trainer)] == [1, 2, 3, 4, 5, 6]


def test_names_and_places_do_not_make_a_run_another(run, tmp_path, store_path):
    shutil.copytree(store_path, tmp_path / "moved")
    run.rename(tmp_path / "renamed")
    for dataset in (StoreDataset(tmp_path / "moved"), str(tmp_path / "moved")):
        assert resume(tmp_path / "renamed", dataset).state.global_step == 4


def test_a_student_that_is_loaded_from_the_checkpoint_continues(run, store_path):
    student = AutoModelForCausalLM.from_pretrained(run / "checkpoint-4")
    assert resume(run, Store(store_path), model=student, max_steps=5).state.global_step == 5


def test_what_an_older_release_did_not_record_is_not_compared(run, store_path):
    recorded = ("kd_weight", "token_weight", "documents", "documents_per_step", "seed", "online_teacher")
    for path in run.glob("checkpoint-*/slim_run.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({name: content[name] for name in recorded}))
    assert resume(run, Store(store_path), learning_rate=0.1, model=make_model(seed=7)).state.global_step == 4
    with pytest.raises(ValueError, match="documents_per_step=4 there, 2 here"):
        resume(run, Store(store_path), per_device_train_batch_size=2)


def test_a_run_is_another_with_another_online_teacher(tmp_path, store_path):
    store = Store(store_path)
    online(tmp_path, store, **SAVING).train()
    online(tmp_path, store, **SAVING).train(resume_from_checkpoint=True)
    trainer = SlimTrainer(
        model=make_model(), args=online(tmp_path, store, **SAVING).args, train_dataset=store, teacher_model=make_model()
    )
    with pytest.raises(ValueError, match=r"teacher_weights='\w{16}' there, '\w{16}' here"):
        trainer.train(resume_from_checkpoint=True)


class Distiller(sk.SlimLossMixin, Trainer):
    pass


def test_a_run_of_the_mixin_is_another_with_another_objective_or_teacher(tmp_path):
    ids = torch.arange(2, 10)
    rows = [{"input_ids": ids, "labels": ids}] * 4

    def make(teacher_seed: int = 1, method: str = "kd", **options):
        settings = {"max_steps": 2, "save_steps": 2, "use_cpu": True, "report_to": "none"} | options
        args = TrainingArguments(str(tmp_path), **settings)
        teacher = make_model(seed=teacher_seed)
        return Distiller(model=make_model(), args=args, train_dataset=rows, teacher_model=teacher, objective=method)

    make().train()
    make().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"teacher_weights='\w{16}' there"):
        make(teacher_seed=2).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="token_weight='none' there, 'teacher_over_student' here"):
        make(method="slim").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"learning_rate=5e-05 there, 0\.001 here"):
        make(learning_rate=1e-3).train(resume_from_checkpoint=True)


def test_adapters_that_are_initialised_at_random_are_no_part_of_a_run(tmp_path, store_path):
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")

    def adapted(seed: int):
        return peft.get_peft_model(make_model(seed=seed), peft.LoraConfig(r=2, target_modules=["q_proj"]))

    store = Store(store_path)
    make_trainer(tmp_path, store, model=adapted(0), **SAVING).train()
    torch.manual_seed(99)
    assert resume(tmp_path, store, model=adapted(0), max_steps=6).state.global_step == 6
    with pytest.raises(ValueError, match="differs: student="):
        resume(tmp_path, store, model=adapted(7))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_a_checkpoint_that_was_cut_off_is_passed_over_for_an_older_one(run, store_path, caplog, name):
    path = run / "checkpoint-4" / name
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, "slimkernels"):
        assert last_complete_checkpoint(str(run)) == str(run / "checkpoint-2")
    assert f"checkpoint-4 is damaged in {name} and is not continued from" in caplog.text
    trainer = resume(run, Store(store_path))
    assert trainer.state.global_step == 4
    assert last_complete_checkpoint(str(run)) == str(run / "checkpoint-4")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"must be a whole checkpoint, got .*checkpoint-4, whose {name} is damaged"):
        make_trainer(run, Store(store_path), **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_train_names_a_run_that_is_another(tmp_path, store_path):
    options = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "report_to": "none"}
    train(store_path, make_model(), "kd", tmp_path / "out", **options)
    with pytest.raises(ValueError, match=r"learning_rate=0.006 there, 0\.001 here"):
        train(store_path, make_model(), "kd", tmp_path / "out", learning_rate=1e-3, **options)


def make_documents(count: int) -> list[list[int]]:
    return [[2 + index, 3, 4, 5] for index in range(count)]


def test_a_teacher_whose_folder_was_renamed_continues_its_store(tmp_path):
    """Knows a teacher by its weights, in a store and in a store of parts, which keeps the first name."""
    tokenizer = make_tokenizer()
    for parts in (1, 2):
        path = tmp_path / f"store-{parts}"
        teacher = make_teacher()
        teacher.name_or_path = "before"
        capture(teacher, tokenizer, make_documents(3), path, top_k=4, num_parts=parts)
        teacher.name_or_path = "after"
        assert capture(teacher, tokenizer, make_documents(5), path, top_k=4).documents == 2
        store = Store(path)
        assert len(store) == 5
        assert store.settings.teacher["name"] == "before"
        other = make_model(seed=3)
        other.name_or_path = "before"
        with pytest.raises(SettingsMismatchError, match="was made with teacher="):
            capture(other, tokenizer, make_documents(6), path, top_k=4)


def test_a_teacher_without_a_fingerprint_is_known_by_its_whole_description(tmp_path):
    settings = {"vocab_size": 4, "tokenizer_fingerprint": "", "selection": {}}
    StoreWriter(tmp_path, teacher={"name": "a"}, **settings).close()
    with pytest.raises(SettingsMismatchError, match="was made with teacher="):
        StoreWriter(tmp_path, teacher={"name": "b"}, **settings)


def test_a_pad_token_that_is_added_leaves_the_tokenizer_the_same(tmp_path, store_path):
    store, tokenizer = Store(store_path), make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer_fingerprint(tokenizer) != store.tokenizer_fingerprint
    assert tokenizer_fingerprint(tokenizer).endswith(f" {store.tokenizer_fingerprint}")
    student = make_student(vocab_size=VOCAB_SIZE, hidden_size=8, num_heads=2)
    make_trainer(tmp_path, store, model=student, tokenizer=tokenizer)
    tokenizer.add_tokens("another")
    with pytest.raises(ValueError, match="the student's tokenizer must be the one"):
        make_trainer(tmp_path, store, model=student, tokenizer=tokenizer)
