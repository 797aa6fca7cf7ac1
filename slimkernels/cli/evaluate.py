"""``slimkernels eval``: models on the held-out documents of a store."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slimkernels.cli import compare
from slimkernels.cli.options import Parser, add_command, positive_int, refuse
from slimkernels.cli.terminal import (
    be_quiet,
    print_columns,
    print_json,
    progress_bars,
    progress_task,
    shown,
    warn_deprecated,
)

if TYPE_CHECKING:
    from rich.progress import Progress

_EXAMPLES = """\
examples:
  students on a held-out store, by perplexity and divergence from the teacher:
    slimkernels eval --store runs/held-out --model runs/slim runs/kd runs/sft
    slimkernels eval --store runs/held-out --model runs/slim --json
A held-out store is captured like any other, with the same options, from text that is not in the training store:
    slimkernels capture --teacher ./my-model --text held-out.jsonl --out runs/held-out
Estimated time on two idle CPU cores: five seconds for 5,000 tokens, with a student of the demonstration's size.
Models are compared on questions, with a report, by `slimkernels compare`.
"""


def add_parser(commands: Any) -> None:
    """Adds the command ``eval``."""
    parser = add_command(commands, "eval", run, "evaluate models on a held-out store", _EXAMPLES, compare.API_NAMES)
    add = parser.add_argument
    # Required, except in the old form of this command, which compares models.
    add("--store", metavar="DIR", help="held-out store with the teacher's logits")
    add("--model", nargs="+", metavar="MODEL", help="folders or names of models")
    add("--json", action="store_true", help="print JSON; null stands for a number that is infinite")
    add(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="documents scored at a time (default: %(default)s)",
    )
    _add_old_form(parser)


def _add_old_form(parser: Parser) -> None:
    """Adds the options of ``compare``, which was a part of this command in the last release, without showing them."""
    shown_actions = set(parser._actions)
    compare.add_arguments(parser, is_old_form=True)
    for action in parser._actions:
        if action not in shown_actions:
            action.help = argparse.SUPPRESS


def _old_form(parser: Parser) -> list[str]:
    """Returns the attributes of the options that are those of ``compare`` alone."""
    return [action.dest for action in parser._actions if action.help == argparse.SUPPRESS]


def run(args: argparse.Namespace) -> None:
    """Evaluates the models and prints their metrics."""
    if compare.is_given(args):
        warn_deprecated("comparing with `slimkernels eval` is now `slimkernels compare`, with the same options")
        refuse(args, ["model", "json"], "in a comparison, whose models are --models")
        compare.run(args)
        return
    refuse(args, _old_form(args.parser), "with eval, whose models are measured on --store: use `slimkernels compare`")
    if args.store is None or args.model is None:
        raise ValueError("eval needs --store DIR, a held-out store, and --model: folders or names of models")
    be_quiet()
    with progress_bars() as progress:
        results = _evaluate_on_store(args, progress)
    if args.json:
        print_json(results)
    else:
        print_columns({name: {key: shown(value) for key, value in found.items()} for name, found in results.items()})


def _evaluate_on_store(args: argparse.Namespace, progress: Progress) -> dict[str, dict[str, float]]:
    """Returns the metrics of each model on the store."""
    from slimkernels import teacher
    from slimkernels.models.heldout import evaluate_store
    from slimkernels.models.load import model_origin
    from slimkernels.store import Store

    store = Store(args.store)
    # A name that is wrong fails before the models ahead of it are evaluated.
    for name in args.model:
        model_origin(name)
    results = {}
    for name in args.model:
        model = teacher.load_model(name)
        update = progress_task(progress, f"documents, {name}")
        results[name] = evaluate_store(
            model, store, batch_size=args.batch_size, on_batch=lambda done, update=update: update(done, len(store))
        )
    return results
