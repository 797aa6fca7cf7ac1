"""TRL's trainers with the loss of this package, against the same trainers with their own."""

from __future__ import annotations

import pytest
import torch
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE, make_model, make_tokenizer

import slimkernels as sk

trl = trainer_package("trl")
RECIPE = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning")


def losses_of(trainer) -> list[float]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == RECIPE["max_steps"]
    return losses


def test_sft_trainer_follows_its_own_curve(tmp_path, ran):
    from datasets import Dataset

    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(2, VOCAB_SIZE, (9,), generator=generator).tolist()} for _ in range(16)]

    class Distiller(sk.SlimLossMixin, trl.SFTTrainer):
        pass

    def losses(trainer_class, **options) -> list[float]:
        args = trl.SFTConfig(output_dir=str(tmp_path), **RECIPE)
        dataset, tokenizer = Dataset.from_list(rows), make_tokenizer()
        return losses_of(
            trainer_class(make_model(), args, train_dataset=dataset, processing_class=tokenizer, **options)
        )

    found, expected = losses(Distiller, objective="sft"), losses(trl.SFTTrainer)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == len(expected)
    ran("trl", "SFTTrainer", f"{len(found)} steps on the labels, with the loss curve of its own loss")
