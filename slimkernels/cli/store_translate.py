"""``slimkernels store translate``: turns a store into one of a student's tokenizer."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from slimkernels.cli.options import CODECS, add_command
from slimkernels.cli.terminal import be_quiet, print_table, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from slimkernels.store import Store

_EXPLAINED = """\
Run the same command again to go on after an interruption. Train on the result with --rest ghost. What is printed:
  labels        labels of the student, each of which has a row
  aligned       labels at whose first byte a token of the teacher begins too; the others learn from the text alone
  same_token    aligned labels that are the teacher's token, so that the teacher's probability of them is known
  mass_kept     teacher's probability on ids that the student has, mean and quantiles over the aligned labels; the rest
                of each row is one more outcome with --rest ghost
  mass_before   mean of the teacher's probability on all ids of these rows
  mapped_ids    ids of the teacher, of teacher_ids, that the student's vocabulary has
examples:
  slimkernels store translate runs/store runs/for-student --tokenizer ./my-model
  slimkernels train --store runs/for-student --method kd --rest ghost --out runs/kd
"""


def add_translate(actions: Any) -> None:
    """Adds the command ``store translate``."""
    summary = "turn a store into one of another tokenizer, for a student that has it"
    parser = add_command(actions, "translate", _translate, summary, _EXPLAINED)
    add = parser.add_argument
    add("dir", metavar="IN", help="store")
    add("out", metavar="OUT", help="store to write; an existing one is continued")
    add("--tokenizer", required=True, metavar="MODEL", help="tokenizer of the student")
    add("--teacher-tokenizer", metavar="MODEL", help="tokenizer of the store (default: that of its teacher)")
    add("--codec", choices=CODECS, help="encoding of the logits (default: that of the store)")
    add("--json", action="store_true", help="print JSON")


def _translate(args: argparse.Namespace) -> None:
    be_quiet()
    from slimkernels.exchange import translate_store
    from slimkernels.store import Store
    from slimkernels.teacher import load_tokenizer

    store = Store(args.dir)
    teacher_tokenizer = _teacher_tokenizer(store, args.teacher_tokenizer)
    report = translate_store(store, args.out, teacher_tokenizer, load_tokenizer(args.tokenizer), codec=args.codec)
    content = report._asdict()
    if args.json:
        print(json.dumps(content, indent=2))
        return
    share = f"{report.aligned / report.labels:.1%}" if report.labels else "none"
    content |= {
        "skipped": ", ".join(f"{number} because {reason}" for reason, number in report.skipped.items()) or "none",
        "aligned": f"{report.aligned} ({share})",
        "mass_kept": ", ".join(f"{name} {value:.4f}" for name, value in report.mass_kept.items()),
    }
    print_table({name: shown(value) for name, value in content.items()})


def _teacher_tokenizer(store: Store, given: str | None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a store; without a name for it, that of its teacher if it is on this machine."""
    from slimkernels.cli.train_tokenizer import is_here
    from slimkernels.teacher import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    name = store.settings.teacher.get("name")
    if not name or not is_here(name):
        raise ValueError(
            f"--teacher-tokenizer must be given for {store.path}: the tokenizer of its teacher, {name!r}, is not on "
            "this machine under this name"
        )
    return load_tokenizer(name)
