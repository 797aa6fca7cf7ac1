"""A student of its teacher's layers, healed: python examples/pruned_student.py TEACHER LAYERS STORE OUT."""

import sys

from transformers import AutoModelForCausalLM

import slimkernels as sk
from slimkernels.store import StoreDataset
from slimkernels.trainer import drop_layers


def make_trainer(teacher: str, num_layers: int, store: str, out: str, **options) -> sk.SlimTrainer:
    """Makes the trainer of a student that keeps ``num_layers`` layers, evenly spaced, from the first to the last."""
    student = drop_layers(AutoModelForCausalLM.from_pretrained(teacher), num_layers)
    options = {"learning_rate": 5e-4, "report_to": "none"} | options
    args = sk.SlimConfig(output_dir=out, rest="ghost", **options)
    return sk.SlimTrainer(model=student, args=args, train_dataset=StoreDataset(store))


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python examples/pruned_student.py TEACHER LAYERS STORE OUT")
    teacher, layers, store, out = sys.argv[1:]
    trainer = make_trainer(teacher, int(layers), store, out)
    trainer.train()
    trainer.save_model()
