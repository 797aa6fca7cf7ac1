"""SlimPlugin in axolotl's own trainer, made by its own builder, against its KD plugin and its plain trainer."""

from __future__ import annotations

import os

import pytest
import torch
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE, make_model, make_tokenizer

# axolotl would report the run to a server, and compile its loss for a minute.
os.environ |= {"DO_NOT_TRACK": "1", "TORCHDYNAMO_DISABLE": "1"}
axolotl = trainer_package("axolotl")
pytestmark = pytest.mark.filterwarnings("ignore")
PLUGIN = "slimkernels.integrations.axolotl.SlimPlugin"
KD_PLUGIN = "axolotl.integrations.kd.KDPlugin"
STEPS = 4


def rows_with_teacher(top_k: int) -> list[dict]:
    """Makes documents with axolotl's prepared columns: row j is the distribution over token j + 1."""
    generator, teacher = torch.Generator().manual_seed(0), make_model(seed=9).eval()
    rows = []
    for length in torch.randint(6, 15, (8,), generator=generator).tolist():
        ids = torch.randint(2, VOCAB_SIZE, (length,), generator=generator)
        with torch.no_grad():
            kept = teacher(ids[None]).logits[0].log_softmax(-1).topk(top_k)
        mask = torch.ones(length, top_k, dtype=torch.int)
        mask[0] = mask[-1] = 0
        rows.append(
            {
                "input_ids": ids.tolist(),
                "attention_mask": [1] * length,
                "labels": [-100, -100, *ids[2:].tolist()],
                "target_token_ids": kept.indices.tolist(),
                "target_logprobs": kept.values.log_softmax(-1).tolist(),
                "target_mask": mask.tolist(),
            }
        )
    return rows


def trainer_of(tmp_path, rows: list[dict], **options):
    """Builds a trainer as ``axolotl train`` does, from a validated configuration."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import normalize_config, prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault
    from datasets import Dataset

    PluginManager._instance = None
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    cfg = DictDefault(
        {
            "base_model": str(tmp_path / "model"),
            "datasets": [{"path": str(tmp_path), "type": "alpaca"}],
            "output_dir": str(tmp_path / "out"),
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "sequence_len": 64,
            "pad_to_sequence_len": False,
            "logging_steps": 1,
            "seed": 0,
            "bf16": False,
            "fp16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "val_set_size": 0.0,
        }
        | options
    )
    prepare_plugins(cfg)
    cfg = validate_config(cfg)
    normalize_config(cfg)
    PluginManager.get_instance().cfg = cfg
    # The class of the arguments gets the plugins' fields when this module is loaded.
    from axolotl.core.builders import HFCausalTrainerBuilder

    builder = HFCausalTrainerBuilder(cfg, make_model().train(), make_tokenizer())
    builder.train_dataset = Dataset.from_list(rows)
    return builder.build(STEPS)


def losses_of(trainer) -> list[float]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(losses)) == STEPS
    return losses


def test_its_own_columns_give_its_own_curve(tmp_path, ran):
    rows = rows_with_teacher(VOCAB_SIZE)
    theirs = {"kd_trainer": True, "kd_ce_alpha": 0.25, "kd_alpha": 0.75, "kd_temperature": 1.0, "kd_beta": 0.0}
    expected = losses_of(trainer_of(tmp_path, rows, plugins=[KD_PLUGIN], **theirs))
    objective = {"method": "kd", "ce_weight": 0.25, "kd_weight": 0.75}
    found = losses_of(trainer_of(tmp_path, rows, plugins=[PLUGIN], slim_objective=objective))
    assert found == pytest.approx(expected, rel=1e-4)
    ran("axolotl", "AxolotlTrainer", f"{STEPS} steps on axolotl's KD columns with K = V, its KD plugin's own curve")


def test_a_store_gives_the_curve_of_a_teacher_of_which_it_keeps_all(tmp_path, ran):
    from test_trainer_mixin import write_store

    rows = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows_with_teacher(2)]
    teacher = make_model(seed=9).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    write_store(tmp_path / "store", teacher, rows)
    objective = {"method": "kd", "rest": "ghost"}
    store = {"slim_store": str(tmp_path / "store"), "slim_objective": objective}
    online = {"slim_teacher": str(tmp_path / "teacher"), "slim_objective": objective | {"teacher_top_k": 9}}
    found = losses_of(trainer_of(tmp_path, rows, plugins=[PLUGIN], **store))
    assert found == pytest.approx(losses_of(trainer_of(tmp_path, rows, plugins=[PLUGIN], **online)), rel=1e-4)
    ran("axolotl", "AxolotlTrainer", f"{STEPS} steps from a store of this package, the curve of its teacher model")


def test_without_a_teacher_it_follows_axolotls_own_curve(tmp_path, ran):
    rows = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows_with_teacher(2)]
    # axolotl gives every micro-batch one weight, and this package every label.
    options = {"gradient_accumulation_steps": 1}
    expected = losses_of(trainer_of(tmp_path, rows, **options))
    found = losses_of(trainer_of(tmp_path, rows, plugins=[PLUGIN], slim_objective={"method": "sft"}, **options))
    assert found == pytest.approx(expected, rel=1e-4)
    ran("axolotl", "AxolotlTrainer", f"{STEPS} steps on the labels, its own curve")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slim_objective": {"rest": "ghost"}}, "rest must be one of"),
        ({"slim_store": "a", "slim_teacher": "b"}, "must not both be set"),
        ({"slim_alignment": "previous"}, "slim_alignment must be one of"),
        ({"orpo_alpha": 0.1}, "orpo_alpha must not be set with SlimPlugin"),
    ],
)
def test_what_it_cannot_honour_it_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows_with_teacher(2), plugins=[PLUGIN], **options)


@pytest.mark.parametrize(
    "option", [{"rl": "dpo"}, {"reward_model": True}, {"trainer_cls": "a.B"}, {"kd_trainer": True}]
)
def test_other_trainers_are_refused_before_the_model_is_loaded(option):
    from axolotl.utils.dict import DictDefault

    from slimkernels.integrations.axolotl import SlimPlugin

    with pytest.raises(ValueError, match=f"{next(iter(option))} must not be set with SlimPlugin"):
        SlimPlugin().pre_model_load(DictDefault(option))
