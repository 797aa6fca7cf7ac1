"""LLaMA-Factory on a store or with a teacher: python examples/llamafactory_slim.py sft.yaml METHOD STORE_OR_MODEL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from llamafactory.train.tuner import run_exp

import slimkernels as sk


def trainer_class(method: str, teacher: str) -> type[CustomSeq2SeqTrainer]:
    """Makes LLaMA-Factory's trainer with the loss of a method, from a store's folder or a model's folder or name."""
    is_store = (Path(teacher) / "manifest.json").exists()

    class SlimTrainer(sk.SlimLossMixin, CustomSeq2SeqTrainer):
        def __init__(self, finetuning_args: Any, processor: Any, **kwargs: Any) -> None:
            if finetuning_args.use_dft_loss or finetuning_args.use_eaft_loss or finetuning_args.use_asft_loss:
                raise ValueError("use_dft_loss, use_eaft_loss and use_asft_loss must be False: the loss is this one")
            if processor is not None:
                raise ValueError("the model must read text alone: a teacher's rows are found by the tokens of a text")
            kwargs |= {"teacher_store" if is_store else "teacher_model": teacher, "objective": method}
            super().__init__(finetuning_args=finetuning_args, processor=processor, **kwargs)

    return SlimTrainer


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/llamafactory_slim.py sft.yaml METHOD STORE_OR_MODEL")
    workflow.CustomSeq2SeqTrainer = trainer_class(*sys.argv[2:])
    sys.argv = sys.argv[:2]  # LLaMA-Factory reads its configuration from the command line
    run_exp()
