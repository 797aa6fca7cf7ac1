"""Trainers whose student is sharded by FSDP2 or DeepSpeed ZeRO-3 over two gloo ranks, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import make_family
from support.tiny import make_model, make_store
from test_patch_model import make_batch
from test_trainer import RECIPE
from test_trainer_ranks import assert_same_run, make_mixin, make_slim, run_script

import slimkernels as sk
from slimkernels.models.sharding import is_partitioned
from slimkernels.store import Store, StoreDataset
from slimkernels.trainer.teachers import OnlineTeacher

# accelerate shards only on GPUs, so the script enables FSDP itself; plugin, groups and optimizer are accelerate's.
FSDP = """
import sys
import torch
sys.path.insert(0, {tests!r})
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from slimkernels.store import Store
from test_trainer_ranks import make_mixin, make_slim

torch.set_num_threads(1)
saved = {{}}
for name, make in (("mixin", make_mixin), ("slim", make_slim)):
    trainer = make({output!r} + "/" + name, batch_size=1)
    state = trainer.accelerator.state._shared_state
    state["distributed_type"] = DistributedType.FSDP
    state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    trainer.is_fsdp_enabled = True
    trainer.train()
    weights = trainer.model.lm_head.weight
    assert hasattr(weights, "full_tensor") and weights.to_local().shape[0] < weights.shape[0]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    saved[name] = {{key: value.full_tensor() for key, value in trainer.model.state_dict().items()}}, logs
saved["eval"] = trainer.evaluate(Store({output!r} + "/slim/store"))["eval_loss"]
torch.save(saved, {output!r} + "/rank" + str(trainer.args.process_index) + ".pt")
"""


def test_fsdp2_on_two_ranks_equals_one(tmp_path):
    make_store(tmp_path / "slim" / "store")
    ranks = run_script(tmp_path, FSDP.format(tests=str(Path(__file__).parent), output=str(tmp_path)))
    for name, make in (("slim", make_slim), ("mixin", make_mixin)):
        alone = make(tmp_path / name, batch_size=2)
        alone.train()
        assert_same_run([rank[name] for rank in ranks], alone)
        if name == "slim":
            expected = alone.evaluate(Store(tmp_path / "slim" / "store"))["eval_loss"]
    assert [rank["eval"] for rank in ranks] == pytest.approx([expected] * 2, rel=1e-4)


# The engine is used directly, as accelerate's DeepSpeed needs a GPU: for a patched model, and for SlimTrainer's loss.
ZERO = """
import os, sys
os.environ |= {{"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}}
import deepspeed
import torch
sys.path.insert(0, {tests!r})
from support.families import make_family
from test_patch_model import make_batch
from slimkernels.models.head_loss import loss_of_batch
from slimkernels.models.sharding import is_partitioned
import slimkernels as sk

torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
config = {{
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
    "zero_optimization": {{"stage": 3, "stage3_param_persistence_threshold": 0}},
}}
saved = {{}}
for case in {cases!r}:
    family, _, path = case.partition(" ")
    model = make_family(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert is_partitioned(model) and model.lm_head.weight.shape == (0,)
    batch, losses = make_batch(seed=rank), []
    if path == "patched":
        sk.patch_model(model)
    rows = torch.arange(24).view(2, 12)[:, :-1].flatten()
    rows_of_labels = {{"rows": rows, "target": batch["labels"][:, 1:].flatten()}}
    for _ in range(2):
        if path == "patched":
            loss = engine(**batch).loss
        else:
            loss = loss_of_batch(engine, batch | rows_of_labels, student=model).loss
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    names, parameters = zip(*model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters)):
        saved[case] = losses, {{name: p.detach().clone() for name, p in zip(names, parameters)}}
torch.save(saved, {output!r} + "/rank" + str(rank) + ".pt")
"""


def test_zero3_on_two_ranks_equals_one(tmp_path):
    """Takes two steps of plain gradient descent, after which weights are as wrong as gradients are."""
    pytest.importorskip("deepspeed", reason="needs the package deepspeed")
    cases = [f"{family} {path}" for family in ("llama", "llama-tied") for path in ("patched", "trainer")]
    ranks = run_script(tmp_path, ZERO.format(tests=str(Path(__file__).parent), output=str(tmp_path), cases=cases))
    for case in cases:
        model = make_family(case.split()[0])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for step in range(2):
            for rank in range(2):
                loss = model(**make_batch(seed=rank)).loss
                assert ranks[rank][case][0][step] == pytest.approx(loss.item(), rel=1e-4), case
                (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            for rank in range(2):
                torch.testing.assert_close(ranks[rank][case][1][name], parameter, rtol=1e-4, atol=1e-5)


def partition(model):
    """Partitions a model as DeepSpeed ZeRO-3 does before its engine exists."""
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    return model


def test_partitioned_models_are_known_as_such(tmp_path):
    model = partition(make_family("llama"))
    assert is_partitioned(model)
    assert not is_partitioned(make_family("llama"))
    sk.patch_model(model)  # runs nothing
    with pytest.raises(ValueError, match="teacher_model must be whole, got one that DeepSpeed ZeRO-3 has partitioned"):
        OnlineTeacher(partition(make_family("llama")), sk.SlimObjective("kd"), 61)


def test_a_head_that_nobody_gathers_is_refused():
    model, batch = sk.patch_model(make_family("llama")), make_batch()
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"the head's weight must be whole, \(V, 16\), .*shard it with the model"):
        model(**batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fsdp": True}, "FSDP must stay off on CPUs.*patch_model"),
        ({"method": "gkd"}, "a sharded one cannot: train it with DDP"),
        ({}, "FSDP2, got version 1: set fsdp_version: 2"),
    ],
)
def test_layouts_that_cannot_train_are_refused(tmp_path, options, message):
    dataset = StoreDataset(make_store(tmp_path / "store"))
    args = sk.SlimConfig(output_dir=str(tmp_path), **RECIPE | {key: options[key] for key in options if key != "fsdp"})
    trainer = sk.SlimTrainer(make_model(), args, train_dataset=dataset, teacher_model=make_model(seed=3))
    if "fsdp" in options:
        trainer.args.fsdp = True
    else:
        trainer.is_fsdp_enabled = True
        trainer.accelerator = type("Accelerator", (), {"is_fsdp2": "method" in options})()
    with pytest.raises(ValueError, match=message):
        trainer._check_layout()
