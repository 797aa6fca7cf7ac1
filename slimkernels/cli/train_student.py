"""The student of ``slimkernels train``: its options, and how it is loaded or made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.cli.options import refuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_student_options(parser: argparse.ArgumentParser) -> None:
    """Adds --student and --layers."""
    add = parser.add_argument
    add(
        "--student",
        metavar="MODEL",
        help="folder or name of a model, or a .json configuration of a new one (default: a new small Llama)",
    )
    add(
        "--layers",
        type=_layers,
        metavar="N,N,...",
        help="layers of --student to keep, by their indices from 0 (default: all)",
    )


def student_of(args: argparse.Namespace) -> Any:
    """Returns the student as ``train`` takes it: a model, a configuration, or None for a new small one."""
    if args.student is None or args.student.endswith(".json"):
        refuse(args, ["layers"], "without --student MODEL, whose layers they are")
    if args.student is None:
        if args.tokenizer is not None:
            return None
        # A tokenizer that was found must not change the weights that the student starts from.
        from slimkernels.models.make_student import make_student
        from slimkernels.store import Store

        return make_student(vocab_size=Store(args.store[0]).vocab_size)
    if not args.student.endswith(".json"):
        from slimkernels import teacher

        return _with_layers(teacher.load_model(args.student), args)
    from transformers import AutoConfig

    if not Path(args.student).is_file():
        raise FileNotFoundError(f"student not found: there is no configuration file {args.student}")
    return AutoConfig.from_pretrained(args.student)


def _with_layers(model: PreTrainedModel, args: argparse.Namespace) -> PreTrainedModel:
    """Returns the model, or a new one of the layers in ``args.layers``."""
    from transformers import PreTrainedModel

    from slimkernels.models.make_student import drop_layers

    if args.layers is None:
        return model
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"--layers needs the folder of a whole model, got that of an adapter, {args.student}: merge it"
        )
    return drop_layers(model, args.layers)


def _layers(text: str) -> list[int]:
    """Reads the indices of layers."""
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"expected indices such as 0,1,2,4, got {text!r}")
    layers = [int(word) for word in words]
    if layers != sorted(set(layers)):
        raise argparse.ArgumentTypeError(f"the indices must increase, got {text!r}")
    return layers
