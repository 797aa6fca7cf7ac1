"""``slimkernels eval``: models on a held-out store, or models and decoders side by side on questions."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slimkernels.cli.options import DTYPES, Parser, add_command, positive_int
from slimkernels.cli.terminal import be_quiet, print_columns, progress_bars, progress_task, shown

if TYPE_CHECKING:
    from rich.progress import Progress

    from slimkernels.evaluate.decoders import DecoderSettings
    from slimkernels.evaluate.judge import Judge
    from slimkernels.evaluate.runner import Plan

_EXAMPLES = """\
examples:
  students on a held-out store, by perplexity and divergence from the teacher:
    slimkernels eval --store runs/held-out --model runs/slim runs/kd runs/sft
    slimkernels eval --store runs/held-out --model runs/slim --json
  models side by side on questions, with a report in runs/report/report.html:
    slimkernels eval --models runs/slim runs/kd --tasks gsm8k strategyqa --data data --samples 100 --out runs/report
  the students of `slimkernels demo` and their teacher, on the held-out store and on questions:
    slimkernels eval --models demo-output/students/{sft,kd,slim} teacher=smollm2-135m-instruct \\
        --tasks heldout gsm8k strategyqa commonsenseqa --store demo-output/store/heldout --data data \\
        --samples 30 --out demo-output/evaluation
  decoders side by side, three seeds each:
    slimkernels eval --models smollm2-135m-instruct --decoders greedy self-consistency pathfinder --seeds 0 1 2 \\
        --tasks gsm8k commonsenseqa --data data --samples 50 --out runs/decoders
  a model behind an OpenAI-compatible server and one that runs here; the server's key is read from OPENAI_API_KEY:
    slimkernels eval --models runs/slim teacher=http://localhost:8000/v1#NAME --prompt-style plain \\
        --tasks gsm8k --data data --samples 100 --out runs/served
  multiple choice, asked and scored by lm-eval, without a decoder:
    slimkernels eval --models runs/slim runs/kd --tasks arc_easy hellaswag mmlu_anatomy truthfulqa_mc1 --data data \\
        --samples 200 --out runs/choices
  the report again after the scoring has changed, without generating anything:
    slimkernels eval --rescore --out runs/report
  ratings by a judge in addition to the scores, one request per output; the key is read from OPENAI_API_KEY:
    slimkernels eval --rescore --out runs/report --judge http://localhost:8000/v1 --judge-model NAME
  outputs that others published (qid, prompt, question, generated_text, answer):
    slimkernels eval --outputs outputs/svamp/*/output.jsonl --out runs/published
The same command continues a stopped run and asks nothing twice. A server is named URL#MODEL, or URL where it lists one
model. It is asked in plain text unless --tokenizer gives a chat template, which works with llama.cpp and vLLM. Tasks
that need probabilities of given texts, heldout and multiple choice, are refused for servers.
--data DIR holds gsm8k/test.jsonl, strategyqa/dev.json, commonsenseqa/dev_rand_split.jsonl, ... as published.
"""
# Options that are fields of DecoderSettings: flag, type, help.
_SETTINGS: dict[str, tuple[str, type, str]] = {
    "temperature": ("--temperature", float, "sampling temperature (default: 0.8)"),
    "top_p": ("--top-p", float, "sample from the fewest tokens whose probabilities add up to X (default: 0.95)"),
    "max_steps": ("--max-steps", int, "maximum number of lines in an answer (default: 12)"),
    "max_step_tokens": ("--max-step-tokens", int, "maximum number of tokens in a line (default: 64)"),
    "max_tokens": ("--max-tokens", int, "maximum number of tokens generated per question (default: no limit)"),
    "num_chains": ("--chains", int, "self-consistency: number of answers drawn (default: 5)"),
    "branching_factor": ("--branching", int, "pathfinder: children per open leaf (default: 3)"),
    "beam": ("--beam", int, "pathfinder: open leaves kept at every depth (default: 3)"),
}
_HELDOUT = "heldout"
# Flags of one kind of evaluation that the other one refuses.
_STORE_ONLY = {"model": "--model", "json": "--json"}
_SIDE_BY_SIDE = {
    "models": "--models",
    "tasks": "--tasks",
    "data": "--data",
    "out": "--out",
    "rescore": "--rescore",
    "outputs": "--outputs",
    "judge": "--judge",
    "tokenizer": "--tokenizer",
    "key_env": "--key-env",
}


def add_parser(commands: Any) -> None:
    """Adds the command ``eval``."""
    summary = "evaluate models on a held-out store, or models and decoders side by side"
    parser = add_command(commands, "eval", run, summary, _EXAMPLES)
    _add_store_arguments(parser)
    _add_side_by_side_arguments(parser)


def _add_store_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--store", metavar="DIR", help="held-out store with the teacher's logits")
    add("--model", nargs="+", metavar="MODEL", help="folders or names of models")
    add(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="documents or choices scored at a time (default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON")


def _add_side_by_side_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("side by side, on questions and held-out documents").add_argument
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="folders, .gguf files, names on the hub, or servers as http://HOST:PORT/v1#MODEL; NAME=MODEL sets the "
        "name of a model in the report",
    )
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="gsm8k, strategyqa, commonsenseqa, self_instruct, dolly; heldout: the labels of --store; any other name: "
        "a multiple-choice task of lm-eval, such as arc_easy, hellaswag, mmlu, truthfulqa_mc1",
    )
    add("--data", metavar="DIR", help="folder with a folder of questions for each task")
    add("--out", metavar="DIR", help="folder for the records and the report")
    add(
        "--decoders",
        nargs="+",
        default=["greedy"],
        metavar="NAME",
        help="greedy, self-consistency, pathfinder (default: greedy)",
    )
    add("--samples", type=positive_int, metavar="N", help="questions per task, from the first (default: all)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="random seeds for sampling (default: 0)")
    add("--shots", type=int, default=3, metavar="N", help="worked examples before a question (default: %(default)s)")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="worked examples before a multiple-choice question (default: set by lm-eval)",
    )
    add(
        "--batch-questions",
        type=positive_int,
        default=8,
        metavar="N",
        help="questions decoded at a time (default: %(default)s)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the models' weights (default: %(default)s)")
    add(
        "--prompt-style",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="form of the prompts: chat template or plain text; auto: the template of the model, or of --tokenizer for "
        "a server, where there is one (default: %(default)s)",
    )
    add(
        "--tokenizer",
        nargs="+",
        metavar="MODEL",
        help="tokenizer whose chat template is used with servers; NAME=MODEL: only with the server called NAME "
        "(default: none, plain text)",
    )
    add("--key-env", metavar="NAME", help="environment variable with the servers' key (default: OPENAI_API_KEY)")
    for field, (flag, kind, text) in _SETTINGS.items():
        add(flag, dest=field, type=kind, metavar="N" if kind is int else "X", help=text)
    add("--rescore", action="store_true", help="score the records in --out again without generating anything")
    add("--outputs", nargs="+", metavar="FILE", help="files of published outputs to score and report")
    add("--judge", metavar="URL", help="OpenAI-compatible server that rates the outputs (default: none)")
    add("--judge-model", metavar="NAME", help="name of the judge on its server")
    add("--judge-key-env", metavar="NAME", help="environment variable with the judge's key (default: OPENAI_API_KEY)")


def run(args: argparse.Namespace) -> None:
    """Evaluates, and prints the metrics or the place of the report."""
    is_side_by_side = _is_side_by_side(args)
    be_quiet()
    with progress_bars() as progress:
        if is_side_by_side:
            report = _compare(args, lambda description: progress_task(progress, description))
        else:
            results = _evaluate_on_store(args, progress)
    if is_side_by_side:
        print(report)
    elif args.json:
        # JSON has no infinity, which the perplexity of a diverged model is.
        finite = {
            name: {key: value if math.isfinite(value) else None for key, value in found.items()}
            for name, found in results.items()
        }
        print(json.dumps(finite, indent=2, allow_nan=False))
    else:
        print_columns({name: {key: shown(value) for key, value in found.items()} for name, found in results.items()})


def _is_side_by_side(args: argparse.Namespace) -> bool:
    """Returns whether questions are to be answered, rather than a store's labels predicted.

    Raises:
        ValueError: The options do not fit together, or some are missing.
    """
    given = [flag for name, flag in _SIDE_BY_SIDE.items() if getattr(args, name)]
    asks_store = _HELDOUT in (args.tasks or ())
    if args.store is not None and not (args.models and asks_store):
        if given:
            raise ValueError(f"{given[0]} has no meaning with --store unless --models and --tasks {_HELDOUT} are given")
        if args.model is None:
            raise ValueError("--store needs --model: folders or names of models")
        return False
    foreign = [flag for name, flag in _STORE_ONLY.items() if getattr(args, name)]
    if foreign:
        raise ValueError(f"{foreign[0]} needs --store DIR, a held-out store; side by side it is --models")
    if args.out is None:
        raise ValueError("eval needs --store DIR with --model, or --out DIR with --models, --rescore or --outputs")
    if (args.models is not None) + args.rescore + (args.outputs is not None) != 1:
        raise ValueError("--out needs one of --models, --rescore and --outputs")
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("--judge URL and --judge-model NAME go together: give both, or neither")
    if args.judge is not None and args.outputs is not None:
        raise ValueError("--judge rates outputs of --models or --rescore, not those of --outputs")
    if args.models is not None:
        _check_tasks(args)
    return True


def _check_tasks(args: argparse.Namespace) -> None:
    if args.tasks is None:
        raise ValueError("--models needs --tasks: the questions to ask")
    if _HELDOUT in args.tasks and args.store is None:
        raise ValueError(f"--tasks {_HELDOUT} needs --store DIR, a held-out store")
    from slimkernels.evaluate.tasks import TASKS

    if args.data is None and set(args.tasks) & set(TASKS):
        raise ValueError("--models needs --data: the folder with the questions")


def _evaluate_on_store(args: argparse.Namespace, progress: Progress) -> dict[str, dict[str, float]]:
    """Returns the metrics of each model on the store."""
    from slimkernels import teacher
    from slimkernels.models.heldout import evaluate_store
    from slimkernels.store import Store

    store = Store(args.store)
    results = {}
    for name in args.model:
        model = teacher.load_model(name)
        update = progress_task(progress, f"documents, {name}")
        results[name] = evaluate_store(
            model, store, batch_size=args.batch_size, on_batch=lambda done, update=update: update(done, len(store))
        )
    return results


def _compare(args: argparse.Namespace, bar: Callable[[str], Callable[[int, int | None], None]]) -> str:
    """Writes the report of a comparison and returns a sentence about it; ``bar`` adds a progress bar."""
    from slimkernels.evaluate.report.write import describe_outputs, write_report

    if args.outputs is not None:
        from slimkernels.evaluate.gemini import comparable, read_outputs

        files = {path: read_outputs(path) for path in args.outputs}
        records: Sequence[Any] = comparable(list(files.values()))
        page = write_report(records, args.out, describe_outputs(files))
    else:
        from slimkernels.evaluate.runner import load_run, rate, rescore, run

        judge = _judge(args)
        if args.rescore:
            rescore(args.out)
        else:
            run(_plan(args), args.out, bar)
        described, records = load_run(args.out)
        page = write_report(records, args.out, described)
        if judge is not None:
            with judge:
                described, records = rate(args.out, judge, bar)
            page = write_report(records, args.out, described)
    return f"{len(records)} outputs; report in {page}"


def _judge(args: argparse.Namespace) -> Judge | None:
    """Returns the judge after a first answer, so that a wrong address fails before anything is generated."""
    if args.judge is None:
        return None
    from slimkernels.evaluate.judge import Judge

    judge = Judge(args.judge, args.judge_model, key_env=args.judge_key_env)
    judge.check()
    return judge


def _plan(args: argparse.Namespace) -> Plan:
    from slimkernels.evaluate.choices import load_choices
    from slimkernels.evaluate.heldout import load_heldout
    from slimkernels.evaluate.models import find_models
    from slimkernels.evaluate.runner import Plan
    from slimkernels.evaluate.tasks import TASKS, load_task

    # Data is read before models, so that a missing file fails first.
    tasks = [load_task(name, args.data, args.samples) for name in args.tasks if name in TASKS]
    other = [name for name in args.tasks if name not in (_HELDOUT, *TASKS)]
    options = {"num_fewshot": args.num_fewshot, "batch_size": args.batch_size}
    choices = load_choices(other, args.data, args.samples, **options) if other else []
    heldout = None
    if _HELDOUT in args.tasks:
        heldout = load_heldout(args.store, args.samples, batch_size=args.batch_size)
    models = find_models(
        args.models,
        dtype=args.dtype,
        prompt_style=args.prompt_style,
        tokenizers=args.tokenizer or (),
        key_env=args.key_env,
    )
    settings = _decoder_settings(args)
    return Plan(models, args.decoders, tasks, settings, args.seeds, args.shots, args.batch_questions, heldout, choices)


def _decoder_settings(args: argparse.Namespace) -> DecoderSettings:
    from slimkernels.evaluate.decoders import DecoderSettings

    return DecoderSettings(**{name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None})
