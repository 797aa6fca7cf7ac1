"""SlimLossMixin, online teachers and patched models on two gloo ranks against one, and resumed after a stop."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.families import make_family
from support.tiny import make_model, make_store
from test_patch_model import make_batch
from test_trainer import RECIPE
from test_trainer_mixin import OBJECTIVE, Distiller, curve, make_plain, make_rows, write_store

import slimkernels as sk
from slimkernels.store import Store, StoreDataset

RUN = """
import sys
import torch
sys.path.insert(0, {tests!r})
import test_trainer_ranks

torch.set_num_threads(1)
trainer = test_trainer_ranks.{make}({output!r}, batch_size=1, **{options!r})
trainer.train()
torch.save(
    (trainer.model.state_dict(), [entry for entry in trainer.state.log_history if "loss" in entry]),
    "{output}/rank" + str(trainer.args.process_index) + ".pt",
)
"""


def make_mixin(output, *, batch_size: int, offline: bool = False, **options):
    options = {"per_device_train_batch_size": batch_size} | options
    if offline:
        return make_plain(output, Distiller, make_model(), options=options, teacher_store=Store(Path(output) / "rows"))
    teacher = make_model(seed=9)
    return make_plain(output, Distiller, make_model(), options=options, teacher_model=teacher, objective=OBJECTIVE)


def make_slim(output, *, batch_size: int, **options) -> sk.SlimTrainer:
    recipe = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 2, "max_steps": 5}
    return sk.SlimTrainer(
        model=make_model(),
        args=sk.SlimConfig(output_dir=str(output), **RECIPE | recipe | options),
        train_dataset=StoreDataset(Path(output) / "store"),
        teacher_model=make_model(seed=1234),
    )


def run_two_ranks(tmp_path, make: str, options: dict) -> list[tuple[dict, list[dict]]]:
    source = RUN.format(tests=str(Path(__file__).parent), make=make, output=str(tmp_path), options=options)
    return run_script(tmp_path, source)


# Threads of gloo that are still there when the interpreter ends can abort the process.
# A thread of gloo's that has not ended yet aborts a process whose libraries are unloaded, after all its work is done.
END = """
import os, sys
import torch.distributed

if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""


def run_script(tmp_path, source: str) -> list:
    """Runs a script on two ranks and returns what each rank saved."""
    script = tmp_path / "run.py"
    script.write_text(source + END)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]


def assert_same_run(ranks, alone) -> None:
    expected = [entry for entry in alone.state.log_history if "loss" in entry]
    for logged, entry in zip(ranks[0][1], expected, strict=True):
        for name in ("loss", "ce", "kd", "label_kept"):
            assert logged[name] == pytest.approx(entry[name], rel=1e-4), name
    for name, parameter in alone.model.state_dict().items():
        torch.testing.assert_close(ranks[0][0][name], ranks[1][0][name], rtol=0, atol=0)
        torch.testing.assert_close(
            ranks[0][0][name], parameter, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("offline", [False, True], ids=["online", "offline"])
def test_mixin_on_two_ranks_equals_one(tmp_path, offline):
    """Uses micro-batches with different numbers of labels on the two ranks, for which a mean of means would differ."""
    write_store(tmp_path / "rows", make_model(seed=9).eval(), make_rows())
    alone = make_mixin(tmp_path, batch_size=2, offline=offline)
    alone.train()
    assert_same_run(run_two_ranks(tmp_path, "make_mixin", {"offline": offline}), alone)


def test_online_teacher_on_two_ranks_equals_one(tmp_path):
    make_store(tmp_path / "store")
    alone = make_slim(tmp_path, batch_size=2, method="kd")
    alone.train()
    assert_same_run(run_two_ranks(tmp_path, "make_slim", {"method": "kd"}), alone)


def test_students_of_two_ranks_write_apart_and_learn_together(tmp_path):
    make_store(tmp_path / "store")
    options = {"method": "gkd", "on_policy_fraction": 1.0, "max_new_tokens": 6}
    (first, logs), (second, _) = run_two_ranks(tmp_path, "make_slim", options)
    start = make_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any((first[name] - start[name]).abs().max() > 1e-3 for name in first)
    assert all(entry["loss"] > 0 for entry in logs)


def test_stopped_mixin_run_goes_on_to_the_same_weights(tmp_path):
    """Uses dropout and a shuffled order, so that every generator's state and the place in the data must be restored."""

    def make(**options):
        trainer = make_mixin(
            tmp_path,
            batch_size=2,
            max_steps=12,
            save_strategy="steps",
            save_steps=7,
            lr_scheduler_type="linear",
            **options,
        )
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.2
        return trainer

    whole = make()
    losses = curve(whole)
    expected = copy.deepcopy(whole.model.state_dict())
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    logged = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert logged == losses
    for name, parameter in resumed.model.state_dict().items():
        assert torch.equal(parameter, expected[name]), name


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, {tests!r})
from support.families import make_family
from test_patch_model import make_batch
from slimkernels.models.head_loss import loss_of_batch
import slimkernels as sk

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
saved = {{}}
for case in {cases!r}:
    family, _, place = case.partition(" ")
    model, batch = sk.patch_model(make_family(family)), make_batch(seed=rank)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if place:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if place:
        try:
            model(**batch)
        except ValueError as error:
            saved["refused"] = str(error)
        rows = torch.arange(24).view(2, 12)[:, :-1].flatten()
        loss = loss_of_batch(model, batch | {{"rows": rows, "target": batch["labels"][:, 1:].flatten()}}).loss
    else:
        loss = model(**batch).loss
    loss.backward()
    saved[case] = loss.item(), {{name: p.grad.full_tensor() for name, p in model.named_parameters()}}
torch.save(saved, "{output}/rank" + str(rank) + ".pt")
dist.destroy_process_group()
"""


def test_patched_model_sharded_over_two_ranks_has_the_gradients_of_one(tmp_path):
    """Shards the head in the group of the whole model, or in its own group, for which only SlimTrainer's loss works."""
    cases = ("llama", "llama-tied", "gemma2", "llama head-by-itself")
    ranks = run_script(tmp_path, SHARDED.format(tests=str(Path(__file__).parent), output=str(tmp_path), cases=cases))
    for case in cases:
        model = make_family(case.split()[0])
        for rank in range(2):
            loss = model(**make_batch(seed=rank)).loss
            (loss / 2).backward()
            assert ranks[rank][case][0] == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ranks[0][case][1][name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert "the head's weight must be whole" in ranks[0]["refused"]
    assert "a shard of (61, 16): shard it with the model as a whole" in ranks[0]["refused"]
