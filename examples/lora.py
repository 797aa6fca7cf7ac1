"""Adapters that learn from a store: python examples/lora.py STUDENT STORE OUT."""

import sys

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import slimkernels as sk
from slimkernels.store import StoreDataset


def make_trainer(student: str, store: str, out: str, **options) -> sk.SlimTrainer:
    """Makes the trainer of adapters on all linear layers but the head, for folders of a student and a store."""
    model = AutoModelForCausalLM.from_pretrained(student)
    adapted: PeftModel = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    options = {"learning_rate": 1e-3, "report_to": "none"} | options
    args = sk.SlimConfig(output_dir=out, rest="ghost", **options)
    return sk.SlimTrainer(model=adapted, args=args, train_dataset=StoreDataset(store))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/lora.py STUDENT STORE OUT")
    trainer = make_trainer(*sys.argv[1:])
    trainer.train()
    trainer.save_model()
