"""SlimTrainer against an eager loop with full logits, and training runs that are killed, poisoned or distributed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import TOP_K, VOCAB_SIZE, make_model, make_store, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, TrainerCallback

from slimkernels.models.head import LanguageModelHead, check_head
from slimkernels.models.hidden_states import hidden_states
from slimkernels.models.make_student import drop_layers, make_student
from slimkernels.store import Document, Store, StoreDataset
from slimkernels.trainer import SlimCollator, SlimConfig, SlimTrainer, last_complete_checkpoint, train

RECIPE = {
    "max_steps": 10,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_store(tmp_path_factory.mktemp("store") / "train"))


def make_trainer(tmp_path: Path, store, model=None, callbacks=None, tokenizer=None, **options) -> SlimTrainer:
    config = SlimConfig(output_dir=str(tmp_path), **(RECIPE | options))
    return SlimTrainer(
        model=make_model() if model is None else model,
        args=config,
        train_dataset=store,
        callbacks=callbacks,
        processing_class=tokenizer,
    )


def test_the_default_learning_rate_suits_the_student(store, tmp_path):
    options = {name: value for name, value in RECIPE.items() if name != "learning_rate"}
    config = SlimConfig(output_dir=str(tmp_path), **options)

    def rate_of(model, args=config) -> float:
        return SlimTrainer(model=model, args=args, train_dataset=store).args.learning_rate

    # Random weights: 6e-3 up to a width of 128.
    assert rate_of(make_model()) == 6e-3
    assert rate_of(make_model(hidden_size=256)) == 3e-3
    gpt2 = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    assert rate_of(make_student(gpt2)) == 6e-3
    new = make_trainer(tmp_path / "new", store, **{"learning_rate": config.learning_rate})
    new.train()
    assert max(entry["learning_rate"] for entry in training_logs(new)) == 6e-3
    # What was trained, and what was made of it, counts as pretrained.
    assert rate_of(new.model) == rate_of(drop_layers(new.model, 1)) == 5e-5
    new.save_model(str(tmp_path / "saved"))
    assert rate_of(make_student(str(tmp_path / "saved"))) == 5e-5
    # A given rate stays, even if it equals the default, and a configuration serves several students.
    assert rate_of(make_model(), SlimConfig(output_dir=str(tmp_path), learning_rate=5e-5, **options)) == 5e-5
    assert config.learning_rate == 5e-5
    slow = make_trainer(tmp_path / "slow", store, learning_rate=5e-5)
    slow.train()
    assert training_logs(new)[-1]["ce"] < training_logs(slow)[-1]["ce"] - 0.1


def training_logs(trainer: SlimTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def dense_terms(model, document: Document, rest: str) -> dict[str, torch.Tensor]:
    """Computes CE, KL and w of one document's labels from its full logits, straight from the definitions."""
    positions = document.positions
    logits = model(document.input_ids[None]).logits[0, positions - 1]
    logprobs = logits.log_softmax(-1)
    label_logprob = logprobs.gather(-1, document.input_ids[positions, None]).squeeze(-1)
    teacher = document.teacher
    log_q = teacher.logits - teacher.lse[:, :1]
    if rest == "renorm":
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    log_p = logprobs.gather(-1, teacher.ids.long())
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    if rest == "ghost":
        tail_q = 1 - log_q.double().exp().sum(-1)
        outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(-1, teacher.ids.long(), False)
        tail_log_p = logprobs.double().masked_fill(~outside, -math.inf).logsumexp(-1)
        kl = kl + (tail_q * (tail_q.log() - tail_log_p)).float()
    log_t_y = teacher.target_logit - teacher.lse[:, 0]
    weight = 1 - torch.exp(-torch.exp(log_t_y - label_logprob.detach()))
    return {
        "ce": -label_logprob,
        "kd": kl,
        "weight": weight,
        "teacher_mass": (teacher.logits - teacher.lse[:, :1]).exp().sum(-1),
        "student_mass": log_p.exp().sum(-1),
    }


def dense_loss(terms: dict[str, torch.Tensor], method: str) -> torch.Tensor:
    return {
        "sft": terms["ce"],
        "kd": terms["ce"] + 3 * terms["kd"],
        "slim": terms["ce"] + 3 * terms["weight"] * terms["kd"],
    }[method]


def batch_terms(model, documents, rest: str = "renorm") -> dict[str, torch.Tensor]:
    parts = [dense_terms(model, document, rest) for document in documents]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize(
    ("method", "rest"), [("sft", "renorm"), ("kd", "renorm"), ("slim", "renorm"), ("slim", "ghost")]
)
def test_trainer_follows_the_eager_curve(tmp_path, store, method, rest):
    trainer = make_trainer(tmp_path, store, method=method, rest=rest)
    trainer.train()
    logs = training_logs(trainer)
    assert len(logs) == 10

    model = make_model()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["learning_rate"], weight_decay=0.0)
    for step, logged in enumerate(logs):
        first = 4 * step % len(store)
        terms = batch_terms(model, [store[index] for index in range(first, first + 4)], rest)
        loss = dense_loss(terms, method).mean()
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4), step
        if method == "kd":
            terms["weight"] = torch.ones_like(terms["weight"])
        names = terms if method != "sft" else ["ce"]
        for name in names:
            assert logged[name] == pytest.approx(terms[name].mean().item(), rel=1e-3), (step, name)
        assert ("kd" in logged) == (method != "sft")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for (name, trained), expected in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=5e-3, atol=5e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_rows_train_the_same(tmp_path):
    """8-bit rows, decoded by the reader or where the loss is, with and without workers: the same weights and scores."""
    path = make_store(tmp_path / "store", codec="affine8")
    weights, scores = [], []
    for dataset, workers in ((Store(path), 0), (StoreDataset(path), 0), (StoreDataset(path), 2)):
        trainer = make_trainer(tmp_path, dataset, method="slim", max_steps=3, dataloader_num_workers=workers)
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        scores.append(trainer.evaluate(dataset)["eval_kl_ghost"])
    for packed in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(packed, weights[0], strict=True))
    assert scores[0] == scores[1] == scores[2]
    with pytest.raises(ValueError, match=r"teacher\.ids must be below the student's vocabulary size 96, got 96"):
        SlimCollator(vocab_size=VOCAB_SIZE - 1)([StoreDataset(path)[0]])


class GradientRecorder(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append([p.grad.clone() for p in model.parameters()])


@pytest.mark.parametrize("method", ["sft", "slim"])
def test_accumulation_equals_one_large_batch(tmp_path, store, method):
    """Uses micro-batches with different numbers of labels, for which a mean of means would differ."""
    recorded = {}
    for batch, accumulation in ((8, 1), (2, 4)):
        recorder = GradientRecorder()
        trainer = make_trainer(
            tmp_path,
            store,
            callbacks=[recorder],
            method=method,
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0.0,
        )
        trainer.train()
        recorded[batch] = recorder.gradients[0], training_logs(trainer)[0]
    counts = [sum(len(store[i].positions) for i in range(first, first + 2)) for first in range(0, 8, 2)]
    assert len(set(counts)) > 1
    (large, large_log), (small, small_log) = recorded[8], recorded[2]
    for expected, accumulated in zip(large, small, strict=True):
        torch.testing.assert_close(accumulated, expected, rtol=1e-4, atol=1e-6)
    for name in ("loss", "ce", *(("kd", "weight") if method == "slim" else ())):
        assert small_log[name] == pytest.approx(large_log[name], rel=1e-5)


def test_gradient_is_that_of_the_dense_mean(tmp_path, store):
    recorder = GradientRecorder()
    make_trainer(tmp_path, store, callbacks=[recorder], max_steps=1, max_grad_norm=0.0).train()
    model = make_model()
    model.train()
    dense_loss(batch_terms(model, [store[index] for index in range(4)]), "kd").mean().backward()
    for gradient, parameter in zip(recorder.gradients[0], model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


class NoDenseLogits(TorchDispatchMode):
    """A mode that fails on any tensor as large as one (N, V) matrix, unless it has the shape of the head's weight."""

    def __init__(self, num_rows: int, weight_shape):
        super().__init__()
        self.limit = num_rows * VOCAB_SIZE
        self.weight_shape = weight_shape

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape != self.weight_shape:
                assert tensor.shape[-1:] != (VOCAB_SIZE,) or tensor.numel() < self.limit, (func, tensor.shape)
        return out


def test_student_logits_never_exist(tmp_path, store):
    trainer = make_trainer(tmp_path, store, method="slim")
    batch = trainer.data_collator([store[index] for index in range(8)])
    weight = trainer.model.get_output_embeddings().weight
    with NoDenseLogits(len(batch["target"]), weight.shape):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(10)).backward()
    assert weight.grad.abs().sum() > 0


def test_mixed_precision_stays_near_float32(tmp_path, store):
    losses = {}
    for bf16 in (False, True):
        trainer = make_trainer(tmp_path, store, bf16=bf16, max_steps=3)
        trainer.train()
        losses[bf16] = [entry["loss"] for entry in training_logs(trainer)]
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)
    assert losses[True] != losses[False]


def test_collator_points_each_row_at_the_label_before(store):
    """Collates two hand-made documents, [7 8 9] with labels at 1, 2 and [3 4 5 6 2] with a label at 4."""
    long, short = store[0].teacher[:1], store[0].teacher[:2]
    documents = [
        Document(torch.tensor([7, 8, 9]), torch.tensor([1, 2]), short),
        Document(torch.tensor([3, 4, 5, 6, 2]), torch.tensor([4]), long),
    ]
    batch = SlimCollator(pad_token_id=1, vocab_size=VOCAB_SIZE)(documents)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 1, 1], [3, 4, 5, 6, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["rows"].tolist() == [0, 1, 8]
    assert batch["target"].tolist() == [8, 9, 2]
    assert batch["teacher"].ids.shape == (3, TOP_K)
    assert SlimCollator(with_teacher=False)(documents)["teacher"] is None
    with pytest.raises(ValueError, match=r"at most max_length=4 tokens.*5"):
        SlimCollator(max_length=4)(documents)
    with pytest.raises(ValueError, match="input_ids must be below the student's vocabulary size 9, got 9"):
        SlimCollator(vocab_size=9)(documents)
    with pytest.raises(ValueError, match=r"positions must lie in \[1, 3\), got 0 to 1"):
        SlimCollator()([dataclasses.replace(documents[0], positions=torch.tensor([0, 1]))])


def test_padding_does_not_change_the_rows(store):
    model = make_model().eval()
    collator = SlimCollator()
    together = hidden_states(model, collator([store[index] for index in range(4)]))
    alone = torch.cat([hidden_states(model, collator([store[index]])) for index in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


HEADS = [
    (Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 8}),
    (GraniteConfig, {"logits_scaling": 4.0}),
    (CohereConfig, {"logit_scale": 0.25}),
]


@pytest.mark.parametrize(("config", "options"), HEADS, ids=lambda value: getattr(value, "model_type", ""))
def test_head_reads_softcap_and_scale(config, options):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = make_student(config(**sizes, **heads, **options), seed=1)
    model.get_output_embeddings().weight.data.mul_(50)
    check_head(model)
    head = LanguageModelHead.of(model)
    assert (head.softcap, head.logit_scale) == (options.get("final_logit_softcapping"), 1.0 if head.softcap else 0.25)


def test_head_that_cannot_be_reproduced_is_refused(tmp_path, store):
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM are not softcap"):
        make_trainer(tmp_path, store, model=model)


def test_vocabulary_mismatch_is_an_error_before_the_first_step(tmp_path, store):
    with pytest.raises(ValueError, match=r"vocabulary in the store, 97, got 96; .*resize_token_embeddings\(97\)"):
        make_trainer(tmp_path, store, model=make_model(vocab_size=VOCAB_SIZE - 1))


def test_tokenizer_mismatch_is_an_error_before_the_first_step(tmp_path, store):
    make_trainer(tmp_path, store, tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match=f"fingerprint {store.tokenizer_fingerprint}, got "):
        make_trainer(tmp_path, store, tokenizer=make_tokenizer(VOCAB_SIZE - 1))


def test_config_fills_only_what_is_left_open(tmp_path):
    def options(**fields):
        return SlimConfig(output_dir=str(tmp_path), use_cpu=True, **fields).loss_options

    assert (options(method="sft")["kd_weight"], options(method="kd")["kd_weight"]) == (0.0, 3.0)
    assert options(method="kd")["token_weight"] == "none"
    assert options(method="slim")["token_weight"] == "teacher_over_student"
    assert (options()["token_weight"], options()["kd_weight"]) == ("none", 3.0)
    assert options(method="kd", kd_weight=0.3, token_weight="student_over_teacher")["kd_weight"] == 0.3
    assert options(method="kd", token_weight="student_over_teacher")["token_weight"] == "student_over_teacher"
    changed = dataclasses.replace(SlimConfig(output_dir=str(tmp_path), method="sft", use_cpu=True), method="kd")
    assert changed.loss_options["kd_weight"] == 3.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "dpo"}, "method must be one of"),
        ({"method": "sft", "kd_weight": 0.5}, "kd_weight must stay None or 0"),
        ({"label_smoothing_factor": 0.1}, "use label_smoothing"),
        ({"torch_compile": True}, "torch_compile must be False"),
    ],
)
def test_config_refuses_what_it_would_ignore(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        SlimConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


def test_trainer_refuses_plain_training_arguments(tmp_path, store):
    with pytest.raises(TypeError, match="args must be a SlimConfig, got NoneType"):
        SlimTrainer(model=make_model(), train_dataset=store)


def test_label_smoothing_and_z_loss_reach_the_loss(tmp_path, store):
    trainer = make_trainer(tmp_path, store, method="sft", max_steps=1, label_smoothing=0.1, z_loss_weight=0.01)
    trainer.train()
    logits = torch.cat([make_model()(store[i].input_ids[None]).logits[0, store[i].positions - 1] for i in range(4)])
    target = torch.cat([store[i].input_ids[store[i].positions] for i in range(4)])
    expected = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
    expected = expected + 0.01 * logits.logsumexp(-1).square().mean()
    assert training_logs(trainer)[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            model.get_input_embeddings().weight.data[5:].fill_(math.nan)


def test_non_finite_loss_names_its_step_and_leaves_no_checkpoint(tmp_path, store):
    trainer = make_trainer(
        tmp_path, store, callbacks=[Poison()], logging_steps=100, save_strategy="steps", save_steps=3, max_steps=9
    )
    with pytest.raises(FloatingPointError, match="NaN or infinite at optimizer step 4 of 9"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_evaluate_reports_perplexity_and_kl(tmp_path, store):
    trainer = make_trainer(tmp_path, store)
    metrics = trainer.evaluate(store)
    with torch.no_grad():
        terms = batch_terms(make_model().eval(), list(store), rest="ghost")
    assert metrics["eval_loss"] == pytest.approx(float(terms["ce"].mean()), rel=1e-4)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(terms["ce"].mean()), rel=1e-4)
    assert metrics["eval_kl_ghost"] == pytest.approx(float(terms["kd"].mean()), rel=1e-3)


KILLED_RUN = """
import os, signal, sys
from transformers import TrainerCallback
sys.path.insert(0, {tests!r})
from test_trainer import resumable_trainer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

resumable_trainer({output!r}, {store!r}, callbacks=[Kill()]).train()
"""


def resumable_trainer(output_dir: str, store_path: str, callbacks=None, **options) -> SlimTrainer:
    """Makes a trainer with dropout and random order, so that a resumed run needs the state of every generator."""
    model = make_model()
    model.config.attention_dropout = 0.2
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.2
    recipe = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    recipe |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}
    return make_trainer(Path(output_dir), Store(store_path), model=model, callbacks=callbacks, **recipe | options)


def test_killed_training_continues_to_the_same_weights(tmp_path):
    store_path = make_store(tmp_path / "store")
    whole = resumable_trainer(str(tmp_path / "whole"), store_path)
    whole.train()

    killed = tmp_path / "killed"
    script = KILLED_RUN.format(tests=str(Path(__file__).parent), output=str(killed), store=store_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # A kill while a checkpoint is written leaves it without its last file.
    half_written = killed / "checkpoint-9"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"half")
    (half_written / "trainer_state.json").write_text('{"global_step": 9, "epo')
    assert last_complete_checkpoint(str(killed)) == str(killed / "checkpoint-6")

    resumed = resumable_trainer(str(killed), store_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert min(entry["step"] for entry in training_logs(resumed)[-6:]) == 7
    for expected, parameter in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)

    with pytest.raises(
        ValueError, match=r"checkpoint of the same run.*token_weight='none' there, 'teacher_over_student' here"
    ):
        resumable_trainer(str(killed), store_path, method="slim").train(resume_from_checkpoint=True)
    fresh = resumable_trainer(str(tmp_path / "fresh"), store_path, max_steps=1)
    fresh.train(resume_from_checkpoint=True)
    assert fresh.state.global_step == 1


RANDOMLY_KILLED_RUN = """
import os, signal, sys, threading
from transformers import TrainerCallback
sys.path.insert(0, {tests!r})
from test_trainer import resumable_trainer

class Kill(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL)).start()

trainer = resumable_trainer({output!r}, {store!r}, callbacks=[Kill()], max_steps=60)
trainer.train(resume_from_checkpoint=True)
"""


@pytest.mark.slow
def test_training_killed_at_random_moments_ends_with_the_same_weights(tmp_path):
    """Kills the run while it computes or writes, several times, and then lets it finish."""
    store_path = make_store(tmp_path / "store")
    whole = resumable_trainer(str(tmp_path / "whole"), store_path, max_steps=60)
    whole.train()
    seconds = whole.state.log_history[-1]["train_runtime"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    generator = random.Random(0)
    kills = 0
    for _ in range(8):
        options = {"tests": str(Path(__file__).parent), "output": str(tmp_path / "killed"), "store": store_path}
        script = RANDOMLY_KILLED_RUN.format(**options, delay=generator.uniform(0.1, 0.6) * seconds)
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=900)
        kills += done.returncode == -signal.SIGKILL
    assert kills >= 2
    resumed = resumable_trainer(str(tmp_path / "killed"), store_path, max_steps=60)
    resumed.train(resume_from_checkpoint=True)
    assert training_logs(resumed)[-1]["loss"] == training_logs(whole)[-1]["loss"]
    for expected, parameter in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


DDP_RUN = """
import sys
import torch
sys.path.insert(0, {tests!r})
from test_trainer import make_trainer, training_logs
from slimkernels.store import Store

torch.set_num_threads(1)
options = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4)
trainer = make_trainer({output!r}, Store({store!r}), **options)
trainer.train()
metrics = trainer.evaluate(Store({store!r}))
if trainer.is_world_process_zero():
    logs = [(entry["loss"], entry["kd"]) for entry in training_logs(trainer)]
    torch.save((trainer.model.state_dict(), logs, metrics["eval_loss"]), {output!r} + "/result.pt")
"""


def test_two_processes_equal_one(tmp_path):
    """Compares two ranks of two one-document micro-batches with one rank that has the same four documents a step."""
    store_path = make_store(tmp_path / "store")
    alone = make_trainer(tmp_path, Store(store_path), max_steps=4)
    alone.train()

    script = tmp_path / "ddp.py"
    source = DDP_RUN.format(tests=str(Path(__file__).parent), output=str(tmp_path), store=store_path)
    script.write_text(f"{source}\ntorch.distributed.destroy_process_group()\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    weights, logs, eval_loss = torch.load(tmp_path / "result.pt")
    for (loss, kd), expected in zip(logs, training_logs(alone), strict=True):
        assert (loss, kd) == pytest.approx((expected["loss"], expected["kd"]), rel=1e-4)
    for name, parameter in alone.model.state_dict().items():
        torch.testing.assert_close(
            weights[name], parameter, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert eval_loss == pytest.approx(alone.evaluate(Store(store_path))["eval_loss"], rel=1e-4)


def test_train_saves_a_student_that_loads(tmp_path):
    make_store(tmp_path / "train")
    make_store(tmp_path / "heldout", seed=1, num_documents=3)
    options = RECIPE | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    arguments = (str(tmp_path / "train"), make_model(), "kd", tmp_path / "out")
    metrics = train(*arguments, eval_store_path=str(tmp_path / "heldout"), tokenizer=make_tokenizer(), **options)
    assert math.isfinite(metrics["train_loss"])
    assert math.isfinite(metrics["eval_kl_ghost"])
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert student.config.vocab_size == VOCAB_SIZE
    assert (tmp_path / "out" / "tokenizer.json").exists()
    settings = json.loads((tmp_path / "out" / "checkpoint-4" / "slim_run.json").read_text())
    assert (settings["kd_weight"], settings["token_weight"], settings["documents"]) == (3.0, "none", 8)


def test_new_student_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = make_student(vocab_size=VOCAB_SIZE, hidden_size=8, num_heads=2, seed=7)
    assert torch.equal(torch.rand(3), expected)
    second = make_student(vocab_size=VOCAB_SIZE, hidden_size=8, num_heads=2, seed=7)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert make_student(tokenizer=make_tokenizer(), hidden_size=8, num_heads=2).config.vocab_size == VOCAB_SIZE
    with pytest.raises(ValueError, match="needs vocab_size or tokenizer"):
        make_student()
    with pytest.raises(ValueError, match=r"multiple of 2 \* num_heads=8, got 12|multiple of 2 \* num_heads=8 .*got 12"):
        make_student(vocab_size=VOCAB_SIZE, hidden_size=12, num_heads=4)
