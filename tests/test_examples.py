"""The training examples against eager loops on full logits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import teachers
from support.served import MODEL
from support.served_scores import ScoringServer
from support.tiny import make_model, make_store
from test_trainer import batch_terms
from test_trainer_mixin import make_rows, write_store
from transformers import AutoModelForCausalLM

from slimkernels.store import DocumentOrder, StoreDataset
from slimkernels.teacher import capture

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eager_losses(model, store, batches: list[list[int]]) -> list[float]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    for batch in batches:
        terms = batch_terms(model, [store[index] for index in batch])
        loss = (terms["ce"] + terms["weight"] * terms["kd"]).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_plain_loop_follows_the_eager_curve(tmp_path):
    dataset = StoreDataset(make_store(tmp_path / "store"))
    losses = list(load("plain_loop").train(make_model(), dataset, epochs=2, batch_size=3))
    order, batches = DocumentOrder(len(dataset), seed=0), []
    for epoch in range(2):
        order.set_epoch(epoch)
        indices = list(order)
        batches += [indices[first : first + 3] for first in range(0, len(indices), 3)]
    assert losses == pytest.approx(eager_losses(make_model(), dataset.store, batches), rel=1e-4)
    assert len(losses) == 6


def test_plain_loop_runs_as_a_script(tmp_path):
    make_store(tmp_path / "store")
    make_model().save_pretrained(tmp_path / "model")
    command = [sys.executable, EXAMPLES / "plain_loop.py", tmp_path / "store", tmp_path / "model", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 ")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.equal(trained.lm_head.weight, make_model().lm_head.weight)


@pytest.mark.filterwarnings("ignore")
def test_lightning_follows_the_eager_curve(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs the package lightning")
    example, dataset = load("lightning_module"), StoreDataset(make_store(tmp_path / "store"))

    class Keep(lightning.Callback):
        losses = []  # noqa: RUF012 -- one test's

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            self.losses.append(float(outputs["loss"]))

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, callbacks=[Keep()], enable_model_summary=False, **options)
    trainer.fit(example.Student(make_model().train()), example.make_loader(dataset, batch_size=4))
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert Keep.losses == pytest.approx(eager_losses(make_model(), dataset.store, batches), rel=1e-4)
    assert 0 < float(trainer.callback_metrics["weight"]) < 1


@pytest.fixture
def texts(tmp_path):
    """A folder with a student and its tokenizer, and a file of prompts."""
    teachers.save_teacher(tmp_path / "student", seed=5)
    rows = [json.dumps({"prompt": text}) for text in teachers.PROMPTS[:4]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    return tmp_path


SHORT = {"per_device_train_batch_size": 2, "max_completion_length": 5, "max_steps": 2, "learning_rate": 1e-3}
SHORT |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


@pytest.mark.filterwarnings("ignore")
def test_trl_distillation_learns_from_a_server(texts):
    pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    options = {"prompts": str(texts / "prompts.jsonl"), **SHORT}
    with ScoringServer() as server:
        trainer = load("trl_distillation").make_trainer(
            str(texts / "student"), str(texts / "out"), server=server.url, name=MODEL, **options
        )
        before = trainer.model.get_output_embeddings().weight.detach().clone()
        trainer.train()
        prompts = [tuple(server.tokenizer(text)["input_ids"]) for text in teachers.PROMPTS[:4]]
    assert len(server.documents) == 4
    assert all(any(document[: len(prompt)] == prompt for prompt in prompts) for document in server.documents)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(entry["loss"] == pytest.approx(entry["kd"], rel=1e-4) and entry["kd"] > 0 for entry in logs)
    assert all(0 < entry["teacher_mass"] < 1 for entry in logs)
    assert not torch.equal(trainer.model.get_output_embeddings().weight, before)


@pytest.mark.filterwarnings("ignore")
def test_trl_distillation_learns_from_a_store(texts):
    pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    model, tokenizer = teachers.make_teacher(seed=3), teachers.make_tokenizer()
    capture(model, tokenizer, [tokenizer(text)["input_ids"] for text in teachers.PROMPTS], texts / "store")
    options = SHORT | {"max_steps": 12, "learning_rate": 1e-2}
    trainer = load("trl_distillation").make_trainer(
        str(texts / "student"), str(texts / "out"), store=str(texts / "store"), **options
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("trl_sft", "student store texts.jsonl out"),
        ("trl_distillation", "student out --store store --steps 2 --learning-rate 1e-3"),
    ],
)
def test_trl_examples_run_by_their_commands(texts, monkeypatch, name, command):
    """Takes no option of a test: TRL's own defaults train in bfloat16, which fails without a GPU."""
    pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    model, tokenizer = teachers.make_teacher(seed=3), teachers.make_tokenizer()
    learned = [*teachers.PROMPTS, *map(str.upper, teachers.PROMPTS)]
    capture(model, tokenizer, [tokenizer(text)["input_ids"] for text in learned], texts / "store")
    (texts / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in learned))
    monkeypatch.chdir(texts)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *command.split()])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    before, after = (
        AutoModelForCausalLM.from_pretrained(texts / folder).lm_head.weight for folder in ("student", "out")
    )
    assert not torch.equal(before, after)


def test_trl_distillation_says_what_it_lacks(monkeypatch, capsys):
    pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    monkeypatch.setattr(sys, "argv", ["trl_distillation.py", "student", "out", "--prompts", "prompts.jsonl"])
    with pytest.raises(SystemExit):
        load("trl_distillation").main()
    assert "give --store, or --prompts and --server" in capsys.readouterr().err


NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_the_outputs_of_one_run_from_top_to_bottom(path):
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        compile("".join(cell["source"]), path.name, "exec")
        assert bool(cell["outputs"]) == ("print(" in "".join(cell["source"]))
    links = re.findall(r"\]\(([^)]+)\)", "".join(text for cell in notebook["cells"] for text in cell["source"]))
    assert all((EXAMPLES / link).exists() for link in links)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_top_to_bottom(path):
    """The notebook's own assertions hold its claims."""
    runner = Path(__file__).parent / "scripts/run_notebook.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, runner, path], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "the truth" in done.stdout


QUICK = {"per_device_train_batch_size": 4, "max_steps": 12, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
QUICK |= {"save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
# The labels are random tokens, which no teacher expects.
HEAL = QUICK | {"ce_weight": 0.0}


@pytest.fixture
def own(tmp_path):
    """A folder with a model of four layers, and a store of its logits."""
    model = make_model(seed=3, num_layers=4)
    with torch.no_grad():  # new layers do little, and would not be missed
        for name, weight in model.get_decoder().layers.named_parameters():
            if "norm" not in name:
                weight.mul_(8)
    model.save_pretrained(tmp_path / "model")
    write_store(tmp_path / "store", model.eval(), make_rows(count=8))
    return tmp_path


def logged(trainer, name: str = "kd") -> list[float]:
    trainer.train()
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def test_a_pruned_student_is_healed(own):
    trainer = load("pruned_student").make_trainer(
        own / "model", 2, own / "store", str(own / "out"), **HEAL | {"learning_rate": 3e-3}
    )
    teacher = AutoModelForCausalLM.from_pretrained(own / "model")
    layers = trainer.model.get_decoder().layers
    assert len(layers) == 2
    assert torch.equal(layers[1].mlp.up_proj.weight, teacher.get_decoder().layers[3].mlp.up_proj.weight)
    kds = logged(trainer)
    assert sum(kds[-3:]) < 0.6 * sum(kds[:3])


def test_a_student_in_three_bits_learns_from_itself(own):
    example = load("quantisation_aware")
    trainer = example.make_trainer(own / "model", 3, own / "store", str(own / "out"), **QUICK | {"learning_rate": 2e-3})
    kds = logged(trainer)
    assert sum(kds[-3:]) < 0.6 * sum(kds[:3])
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        trained = trainer.model.eval()(tokens).logits
    example.bake(trainer.model).save_pretrained(own / "out")
    saved = AutoModelForCausalLM.from_pretrained(own / "out")
    torch.testing.assert_close(saved(tokens).logits, trained)
    for row in saved.get_decoder().layers[2].self_attn.q_proj.weight:
        assert len(row.unique()) <= 2**3 - 1


@pytest.mark.filterwarnings("ignore")
def test_adapters_learn_from_a_store(own):
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    write_store(own / "other", make_model(seed=4).eval(), make_rows(count=8))
    trainer = load("lora").make_trainer(own / "model", own / "other", str(own / "out"), **HEAL)
    kds = logged(trainer)
    assert sum(kds[-3:]) < 0.9 * sum(kds[:3])
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(own / "model")
    adapted = peft.PeftModel.from_pretrained(base, own / "out")
    assert any(bool(w.any()) for name, w in adapted.named_parameters() if "lora_B" in name)
    original = AutoModelForCausalLM.from_pretrained(own / "model").get_decoder().layers[0].self_attn.q_proj.weight
    assert torch.equal(trainer.model.get_decoder().layers[0].self_attn.q_proj.base_layer.weight, original)


@pytest.mark.filterwarnings("ignore")
def test_trl_sft_learns_from_a_store(texts):
    pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    model, tokenizer = teachers.make_teacher(seed=3), teachers.make_tokenizer()
    capture(model, tokenizer, [tokenizer(text)["input_ids"] for text in teachers.PROMPTS], texts / "store")
    (texts / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in teachers.PROMPTS))
    files = [str(texts / name) for name in ("student", "store", "texts.jsonl", "out")]
    losses = logged(load("trl_sft").make_trainer(*files, bf16=False, gradient_checkpointing=False, **QUICK), "loss")
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


ANSWERS = "{% generation %}{{ message['content'] }}{% endgeneration %}"
CHAT = "{% for message in messages %}{% if message['role'] == 'assistant' %}" + ANSWERS
CHAT += "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"


def test_on_policy_the_student_answers_in_its_own_words(tmp_path, monkeypatch):
    from slimkernels.trainer import slim_trainer

    tokenizer, written = teachers.make_tokenizer(), []
    tokenizer.chat_template = CHAT
    for name, seed in {"student": 5, "teacher": 3}.items():
        teachers.save_teacher(tmp_path / name, seed)
        tokenizer.save_pretrained(tmp_path / name)
    chats = [[{"role": "user", "content": t}, {"role": "assistant", "content": " and then"}] for t in teachers.PROMPTS]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    continue_prompts = slim_trainer.continue_prompts

    def counted(*args, **options):
        batch = continue_prompts(*args, **options)
        written.append(batch["input_ids"])
        return batch

    monkeypatch.setattr(slim_trainer, "continue_prompts", counted)
    options = QUICK | {"max_steps": 8, "max_new_tokens": 4, "on_policy_fraction": 0.5}
    files = [str(tmp_path / name) for name in ("student", "teacher", "chats.jsonl", "out")]
    kds = logged(load("on_policy").make_trainer(*files, **options))
    assert 0 < len(written) < 8
    prompts = [tokenizer(text)["input_ids"] for text in teachers.PROMPTS]
    for ids in written[0].tolist():
        assert any(ids[: len(prompt)] == prompt for prompt in prompts)
    assert sum(kds[-3:]) < sum(kds[:3])


@pytest.mark.slow
def test_fsdp2_on_two_processes_follows_the_eager_curve(tmp_path):
    store = StoreDataset(make_store(tmp_path / "store", num_documents=20)).store
    make_model().save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", EXAMPLES / "fsdp2.py"]
    command += [tmp_path / "store", tmp_path / "model", tmp_path / "out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    model = make_model()
    assert losses == pytest.approx(eager_losses(model, store, [list(range(16)), list(range(16, 20))]), rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), atol=1e-4, rtol=1e-3)
