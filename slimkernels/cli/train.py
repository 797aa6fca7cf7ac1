"""``slimkernels train``: a student on the teacher's logits in a store."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from slimkernels.cli import train_tokenizer
from slimkernels.cli.options import (
    SERVER_FIELDS,
    FieldOptions,
    add_command,
    add_fields,
    given_fields,
    key_value,
    positive_int,
    refuse,
)
from slimkernels.cli.terminal import be_quiet, print_table, shown
from slimkernels.cli.train_progress import PROGRESS_FIELDS, schedules_by_name
from slimkernels.cli.train_stores import add_store_options, check_stores, documents_of
from slimkernels.cli.train_student import add_student_options, student_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from slimkernels.trainer import TeacherServer

_EXAMPLES = """\
examples:
  a new small student, which starts from random weights:
    slimkernels train --store runs/store --method kd --out runs/student --batch-size 4 \\
        --option lr_scheduler_type=cosine --option warmup_steps=0.1
  your own student, with the teacher's remaining probability as one more outcome of the divergence:
    slimkernels train --store runs/store --student ./my-student --method kd --rest ghost --out runs/student
  a divergence that grows over the training, on the documents that are easy for the teacher first:
    slimkernels train --store runs/store --method kd --schedule kd_weight=linear:0:1 --order easy-first \\
        --out runs/curriculum
  some of the teacher's layers, which learn to do without the others:
    slimkernels train --store runs/store --student ./teacher --layers 0,1,2,4,6,8 --method kd \\
        --out runs/healed --learning-rate 1e-3
  two teachers, each of whose documents are a store, with three documents of one for each of the other:
    slimkernels train --store runs/math --store runs/code --store-shares 3 1 --method slim --out runs/both
A stopped training is continued from its newest checkpoint by the same command; a finished one is not trained on.
Estimated time on two idle CPU cores: a minute for 100,000 tokens that the new small student reads.
--option takes these fields of SlimConfig (docs/training.md explains them), with their defaults:
{options}and those of transformers.TrainingArguments, such as warmup_steps=20, weight_decay=0.1, bf16=true,
use_cpu=true, lr_scheduler_type=cosine or save_steps=200; with --method minillm, fields of TRL's MiniLLMConfig instead.
VALUE is JSON, or else a text.
"""
# Fields of SlimConfig that have no flag, with their defaults. A list because the help must not load transformers.
OPTIONS = {
    "alpha": None,
    "beta": None,
    "ce_weight": None,
    "detach_weight": True,
    "entropy_threshold": 0.8,
    "forward_weight": 1.0,
    "label_smoothing": 0.0,
    "log_overlap": False,
    "max_new_tokens": 128,
    "on_policy_fraction": 0.5,
    "sampling_temperature": 1.0,
    "student_top_k": None,
    "tail_weight": 1.0,
    "teacher_blend": 1.0,
    "teacher_in_chunks": False,
    "teacher_rounds": None,
    "teacher_top_fraction": None,
    "teacher_top_k": None,
    "token_weight": None,
    "z_loss_weight": 0.0,
}
# Options that are fields of TeacherServer.
_SERVER_FIELDS: FieldOptions = {
    "top_logprobs": (
        "--top-logprobs",
        {"type": positive_int, "metavar": "K"},
        "entries to ask for per token (default: 20)",
    ),
    **SERVER_FIELDS,
}
RESTS = ("renorm", "zero", "ghost", "zero_logit", "renorm_both")
SUPPORTS = ("teacher", "student", "union", "intersection")
DIVERGENCES = ("forward_kl", "soft_ce", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "ab", "gated")
# Divergences that each of their options has an effect in.
_DIVERGENCES_WITH = {
    "alpha": ("skew_kl", "skew_reverse_kl", "ab"),
    "beta": ("jsd", "ab"),
    "entropy_threshold": ("gated",),
    "forward_weight": ("gated",),
}
# Options that are fields of SlimConfig.
_FIELDS: FieldOptions = {
    "num_train_epochs": ("--epochs", {"type": float, "metavar": "F"}, "passes over the store (default: 3)"),
    "max_steps": (
        "--max-steps",
        {"type": positive_int, "metavar": "N"},
        "optimizer steps, in place of --epochs (default: set by --epochs)",
    ),
    "learning_rate": (
        "--learning-rate",
        {"type": float, "metavar": "F"},
        "peak learning rate (default: 5e-5; from random weights 6e-3, less beyond a width of 128)",
    ),
    "per_device_train_batch_size": (
        "--batch-size",
        {"type": positive_int, "metavar": "N"},
        "documents per step and device (default: 8)",
    ),
    "gradient_accumulation_steps": (
        "--accumulation-steps",
        {"type": positive_int, "metavar": "N"},
        "batches per optimizer step (default: 1)",
    ),
    "seed": ("--seed", {"type": int, "metavar": "N"}, "random seed for the order of the documents (default: 42)"),
    "rest": (
        "--rest",
        {"choices": RESTS},
        "treatment of the teacher's probability outside the kept ids (default: renorm with forward_kl and soft_ce, "
        "else ghost)",
    ),
    "divergence": (
        "--divergence",
        {"choices": DIVERGENCES},
        "divergence from the teacher (default: set by --method, mostly forward_kl)",
    ),
    "support": (
        "--support",
        {"choices": SUPPORTS},
        "ids on which teacher and student are compared: those of the largest logits of one of them, of either or of "
        "both (default: teacher)",
    ),
    "temperature": (
        "--temperature",
        {"type": float, "metavar": "T"},
        "temperature of both distributions in the divergence (default: 1)",
    ),
    "kd_weight": (
        "--kd-weight",
        {"type": float, "metavar": "F"},
        "factor of the divergence (default: 3; 1 with reverse_kl and gkd, 0 with sft)",
    ),
    **PROGRESS_FIELDS,
}
# Options by the names that the trainers have for them.
_API_NAMES = {name: f"--option {name}" for name in (*OPTIONS, "max_grad_norm", "max_completion_length")} | {
    "resume_from_checkpoint": "the newest checkpoint in --out",
    "output_dir": "--out",
    "teacher_model": "--teacher",
    "train_dataset": "--store",
    "eval_dataset": "--eval-store",
    "processing_class": "--tokenizer",
    "weights": "--store-weights",
    "shares": "--store-shares",
    # In the errors these are the models and the content of the store themselves.
    "student": "",
    "teacher": "",
    "store": "",
}


def add_parser(commands: Any) -> None:
    """Adds the command ``train``."""
    options = "".join(f"  {name}={json.dumps(value)}\n" for name, value in OPTIONS.items())
    epilog = _EXAMPLES.replace("{options}", options)
    parser = add_command(commands, "train", run, "train a student on a store, or on text", epilog, _API_NAMES)
    add = parser.add_argument
    add_store_options(parser)
    add(
        "--method",
        required=True,
        choices=("slim", "kd", "sft", "sampled", "reverse_kl", "jsd", "gkd", "minillm"),
        help="loss: cross-entropy on the labels (sft), plus a KL divergence from the teacher (kd), weighted per token "
        "(slim) or on random draws (sampled), plus another divergence (reverse_kl, jsd); or learning from the "
        "student's own text (gkd, minillm)",
    )
    add("--out", required=True, metavar="DIR", help="folder for the checkpoints and the trained student")
    add_student_options(parser)
    add(
        "--tokenizer",
        metavar="MODEL",
        help="the student's tokenizer: folder or name; compared with the store's and saved with the student "
        "(default: that of --student, of --teacher or of the store's teacher, where it is on this machine)",
    )
    add(
        "--teacher",
        metavar="MODEL",
        help="model that scores the documents during training (default: none, the store's rows are used)",
    )
    add(
        "--teacher-server",
        metavar="URL",
        help="vLLM or SGLang server that scores the documents during training; its rows are kept in "
        "--teacher-rows (default: none)",
    )
    server = parser.add_argument_group("options of --teacher-server")
    add = server.add_argument
    add("--teacher-name", metavar="NAME", help="name of the model on the server (default: none, it must be given)")
    add("--teacher-rows", metavar="DIR", help="folder of the rows that were scored (default: teacher-rows in --out)")
    add_fields(server, _SERVER_FIELDS)
    add = parser.add_argument
    add("--eval-store", metavar="DIR", help="held-out store to measure the trained student on (default: none)")
    add_fields(parser, _FIELDS)
    add(
        "--option",
        type=key_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other field of the configuration, listed below; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    """Trains the student, saves it, and prints the metrics."""
    be_quiet()
    from slimkernels.trainer import train

    # Launchers number their processes; only the first one prints.
    is_first = os.environ.get("RANK", "0") == "0"
    options = _options(args)
    teacher_server = _teacher_server(args)
    stores = check_stores(args)
    _refuse_useless(args, options)
    _check_options(args, options)
    tokenizer, note = train_tokenizer.find_tokenizer(args)
    if is_first and note:
        print(f"slimkernels: {note}", file=sys.stderr)
    documents = documents_of(args, tokenizer)
    student = student_of(args)
    has_bar = sys.stderr.isatty()
    try:
        metrics = train(
            documents,
            student,
            args.method,
            args.out,
            tokenizer=tokenizer,
            teacher_model=_teacher(args, tokenizer),
            teacher_server=teacher_server,
            eval_store_path=args.eval_store,
            **stores,
            printer=_printer(has_bar, "learning_rate" in options),
            **{"report_to": "none", "disable_tqdm": not has_bar} | options,
        )
    finally:
        # The trainer's bar leaves the cursor at its end.
        if has_bar:
            print(file=sys.stderr)
    if is_first:
        print_table({name: shown(value) for name, value in metrics.items()})
        print(f"student saved in {args.out}")


def _teacher(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel | None:
    from slimkernels import teacher

    return None if args.teacher is None else teacher.load_model(args.teacher, tokenizer=tokenizer)


def _teacher_server(args: argparse.Namespace) -> TeacherServer | None:
    """Returns the server that scores the documents, or None.

    Raises:
        ValueError: An option is missing, or would have no effect.
    """
    from slimkernels.trainer import TeacherServer

    if args.teacher_server is None:
        refuse(args, ["teacher_name", "teacher_rows", *_SERVER_FIELDS], "without --teacher-server")
        return None
    if args.teacher is not None or args.method == "minillm":
        raise ValueError("--teacher-server takes the place of --teacher, and not with --method minillm: omit it")
    if args.teacher_name is None:
        raise ValueError("--teacher-server needs --teacher-name: NAME of the model on the server")
    rows = args.teacher_rows or os.path.join(args.out, "teacher-rows")
    return TeacherServer(args.teacher_server, args.teacher_name, rows, **given_fields(args, _SERVER_FIELDS))


def _printer(has_bar: bool, has_rate: bool) -> TrainerCallback:
    """Returns the callback that shows the training's logs, without those of its end, which the table holds.

    It begins with the learning rate; ``has_rate`` says whether that was given.
    """
    from transformers import PrinterCallback
    from transformers.trainer_callback import ProgressCallback

    usual: Any = ProgressCallback if has_bar else PrinterCallback

    class Printer(usual):
        """The usual callback, which is silent once the training ends."""

        has_ended = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            if state.is_world_process_zero:
                note = "" if has_rate else f", the default ({_FIELDS['learning_rate'][0]} sets another)"
                print(f"slimkernels: learning rate {args.learning_rate:g}{note}", file=sys.stderr)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.has_ended |= "train_runtime" in (logs or ())
            # Wall time and losses are of interest, the number of operations is an estimate.
            (logs or {}).pop("total_flos", None)
            if not self.has_ended:
                super().on_log(args, state, control, logs, **kwargs)

    return Printer()


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of the method's configuration that were given, by flag or by --option."""
    from slimkernels.trainer import trainer_of

    config = trainer_of(args.method)[1]
    known = {field.name for field in dataclasses.fields(config)} - {"method", "output_dir"}
    options = given_fields(args, _FIELDS)
    for name in options:
        # MiniLLMConfig has a field of this name, the temperature of its samples.
        if name not in known or (args.method == "minillm" and name == "temperature"):
            raise ValueError(f"{_FIELDS[name][0]} has no meaning with --method {args.method}: omit it")
    if "schedules" in options:
        options["schedules"] = schedules_by_name(options["schedules"])
    for name, value in args.option:
        if name not in known:
            raise ValueError(
                f"--option must name a field of {config.__name__} that has no flag of its own, got {name!r}"
                f"{_meant(name, known)}"
            )
        options[name] = value
    return options


def _refuse_useless(args: argparse.Namespace, options: Mapping[str, Any]) -> None:
    """Refuses options that the method, or another option, leaves without an effect.

    Raises:
        ValueError: One of them was given; the message names it.
    """
    if args.method == "minillm":
        return
    scheduled = options.get("schedules", {})
    useless: dict[str, Collection[str]] = {}
    if "max_steps" in options:
        useless["with --max-steps, which takes its place"] = ["num_train_epochs"]
    if args.method == "sft":
        learnt = ("rest", "divergence", "temperature", "token_weight", "detach_weight", "teacher_blend", "tail_weight")
        useless["with --method sft, which has no teacher"] = learnt
        if args.teacher is not None:
            raise ValueError("--teacher has no meaning with --method sft, which has no teacher: omit it")
    if args.method != "gkd":
        useless["without --method gkd"] = ("on_policy_fraction", "max_new_tokens", "sampling_temperature")
    if args.teacher is None:
        useless["without --teacher"] = ("teacher_top_k", "teacher_top_fraction", "teacher_rounds")
    divergence = options.get("divergence") or {"jsd": "jsd", "gkd": "jsd"}.get(args.method)
    for name, users in _DIVERGENCES_WITH.items():
        if divergence not in users:
            reason = f"without the divergence {' or '.join(users)}"
            useless[reason] = [*useless.get(reason, ()), name]
    for reason, names in useless.items():
        for name in names:
            if name in scheduled:
                raise ValueError(f"--schedule {name} has no meaning {reason}: omit it")
            if name in options:
                # The errors of a command show a name with an underscore as its flag, or behind --option.
                flag = _FIELDS[name][0] if name in _FIELDS else name if "_" in name else f"--option {name}"
                raise ValueError(f"{flag} has no meaning {reason}: omit it")


def _check_options(args: argparse.Namespace, options: Mapping[str, Any]) -> None:
    """Checks the values of the options, before the student is loaded."""
    from slimkernels.trainer.run import check_options

    is_scored = args.teacher is not None or args.teacher_server is not None
    try:
        check_options(args.method, args.out, args.store or (), is_scored, **options)
    except TypeError as error:
        # A value of --option is whatever JSON it is.
        raise ValueError(str(error)) from error


def _meant(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean {close[0]}?" if close else "; `slimkernels train --help` lists them"
