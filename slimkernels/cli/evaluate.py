"""`slimkernels eval` side by side: arguments in, a report and a sentence about it out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimkernels.evaluate.decoders import DecoderSettings
    from slimkernels.evaluate.judge import Judge

EXAMPLES = """\
examples:
  students on a held-out store: perplexity, and divergence to the teacher:
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
  a model behind an OpenAI-compatible server beside one that runs here; its key is read from OPENAI_API_KEY:
    slimkernels eval --models runs/slim teacher=http://localhost:8000/v1#NAME --prompt-style plain \\
        --tasks gsm8k --data data --samples 100 --out runs/served
  multiple choice, asked and scored by lm-eval, whose choices no decoder writes:
    slimkernels eval --models runs/slim runs/kd --tasks arc_easy hellaswag mmlu_anatomy truthfulqa_mc1 --data data \\
        --samples 200 --out runs/choices
  the report again after the scoring has changed, without generating anything:
    slimkernels eval --rescore --out runs/report
  ratings by a judge beside the scores, asked once for each output; the key is read from OPENAI_API_KEY:
    slimkernels eval --rescore --out runs/report --judge http://localhost:8000/v1 --judge-model NAME
  outputs that others published (qid, prompt, question, generated_text, answer):
    slimkernels eval --outputs outputs/svamp/*/output.jsonl --out runs/published
The same command continues after it was stopped; nothing that was answered is asked again. A server is named by
URL#MODEL, or by URL where it lists one model. It is asked in plain text where --tokenizer gives no chat template (which
llama.cpp and vLLM take), and not for heldout or multiple choice, which need probabilities of given texts.
--data DIR holds gsm8k/test.jsonl, strategyqa/dev.json, commonsenseqa/dev_rand_split.jsonl, ... as published.
"""
# Options of the decoders that are fields of DecoderSettings.
_SETTINGS: dict[str, tuple[str, type, str]] = {
    "temperature": ("--temperature", float, "of the draws (default: 0.8)"),
    "top_p": ("--top-p", float, "draw among the fewest tokens with this much probability (default: 0.95)"),
    "max_steps": ("--max-steps", int, "lines of an answer at most (default: 12)"),
    "max_step_tokens": ("--max-step-tokens", int, "of a line at most (default: 64)"),
    "max_tokens": ("--max-tokens", int, "generated for a question at most, by all decoders (default: no limit)"),
    "num_chains": ("--chains", int, "of self-consistency (default: 5)"),
    "branching_factor": ("--branching", int, "children of a leaf, pathfinder (default: 3)"),
    "beam": ("--beam", int, "leaves kept, pathfinder (default: 3)"),
}
HELDOUT = "heldout"
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


def add_arguments(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Adds those of the comparison; ``positive`` reads a whole number of at least 1."""
    source = parser.add_argument_group("side by side, on questions and held-out documents")
    add = source.add_argument
    add(
        "--models",
        nargs="+",
        metavar="MODEL",
        help="folders, .gguf files, a hub's names, servers as http://HOST:PORT/v1#MODEL; NAME=MODEL names one",
    )
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="gsm8k, strategyqa, commonsenseqa, self_instruct, dolly; heldout: the labels of --store; "
        "any other: multiple choice by lm-eval, such as arc_easy, hellaswag, mmlu, truthfulqa_mc1",
    )
    add("--data", metavar="DIR", help="has a folder for each task")
    add("--out", metavar="DIR", help="gets the records and the report")
    add("--decoders", nargs="+", default=["greedy"], metavar="NAME", help="greedy, self-consistency, pathfinder")
    add("--samples", type=positive, metavar="N", help="of each task (default: all)")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="of the draws (default: 0)")
    add("--shots", type=int, default=3, metavar="N", help="worked examples before a question (default: %(default)s)")
    add("--num-fewshot", type=int, metavar="N", help="the same for multiple choice (default: what lm-eval's task says)")
    add("--batch-questions", type=positive, default=8, metavar="N", help="decoded together (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: %(default)s)")
    add(
        "--prompt-style",
        choices=("auto", "chat", "plain"),
        default="auto",
        help="ask in the model's chat template, where it has one; servers: in that of --tokenizer, else plain "
        "(default: %(default)s)",
    )
    add(
        "--tokenizer",
        nargs="+",
        metavar="MODEL",
        help="whose chat template servers are asked in; NAME=MODEL: the one called NAME (default: none, plain text)",
    )
    add("--key-env", metavar="NAME", help="variable with the key of the models' servers (default: OPENAI_API_KEY)")
    for field, (flag, kind, text) in _SETTINGS.items():
        add(flag, dest=field, type=kind, metavar="N" if kind is int else "X", help=text)
    add("--rescore", action="store_true", help="score what is in --out again; generate nothing")
    add("--outputs", nargs="+", metavar="FILE", help="report on outputs from elsewhere")
    add("--judge", metavar="URL", help="of an OpenAI-compatible server that rates the outputs (default: none)")
    add("--judge-model", metavar="NAME", help="the server's name for the judge")
    add("--judge-key-env", metavar="NAME", help="variable with the judge's key (default: OPENAI_API_KEY)")


def is_side_by_side(args: argparse.Namespace) -> bool:
    """Whether questions are to be answered, rather than a store's labels predicted.

    Raises:
        ValueError: The options do not fit together, or some are missing.
    """
    given = [flag for name, flag in _SIDE_BY_SIDE.items() if getattr(args, name)]
    asks_store = HELDOUT in (args.tasks or ())
    if args.store is not None and not (args.models and asks_store):
        if given:
            raise ValueError(f"{given[0]} has no meaning with --store but for --models ... --tasks {HELDOUT} ...")
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
        raise ValueError("--judge rates what was answered here: with --models or --rescore, not with --outputs")
    if args.models is not None:
        if args.tasks is None:
            raise ValueError("--models needs --tasks: what to ask")
        if asks_store and args.store is None:
            raise ValueError(f"--tasks {HELDOUT} needs --store DIR, a held-out store")
        from slimkernels.evaluate.tasks import TASKS

        if args.data is None and set(args.tasks) & set(TASKS):
            raise ValueError("--models needs --data: the folder with the questions")
    return True


def compare(args: argparse.Namespace, task: Callable[[str], Callable[[int, int | None], None]]) -> str:
    """Runs the command; ``task`` makes a progress bar."""
    from slimkernels.evaluate.report.write import describe_outputs, write_report

    if args.outputs is not None:
        from slimkernels.evaluate.gemini import comparable, read_outputs

        files = {path: read_outputs(path) for path in args.outputs}
        records = comparable(list(files.values()))
        page = write_report(records, args.out, describe_outputs(files))
    else:
        from slimkernels.evaluate.runner import load_run, rate, rescore

        judge = _judge(args)
        if args.rescore:
            rescore(args.out)
        else:
            _run(args, task)
        described, records = load_run(args.out)
        page = write_report(records, args.out, described)
        if judge is not None:
            with judge:
                described, records = rate(args.out, judge, task)
            page = write_report(records, args.out, described)
    return f"{len(records)} outputs; report in {page}"


def _judge(args: argparse.Namespace) -> Judge | None:
    """The judge, which answers: a wrong address is found out before anything is generated."""
    if args.judge is None:
        return None
    from slimkernels.evaluate.judge import Judge

    judge = Judge(args.judge, args.judge_model, key_env=args.judge_key_env)
    judge.check()
    return judge


def _run(args: argparse.Namespace, task: Callable[[str], Callable[[int, int | None], None]]) -> None:
    from slimkernels.evaluate.choices import load_choices
    from slimkernels.evaluate.decoders import DecoderSettings
    from slimkernels.evaluate.heldout import load_heldout
    from slimkernels.evaluate.models import find_models
    from slimkernels.evaluate.runner import Plan, run
    from slimkernels.evaluate.tasks import TASKS, load_task

    # The data first: what is missing is found out before a model is looked for.
    tasks = [load_task(name, args.data, args.samples) for name in args.tasks if name in TASKS]
    other = [name for name in args.tasks if name not in (HELDOUT, *TASKS)]
    options = {"num_fewshot": args.num_fewshot, "batch_size": args.batch_size}
    choices = load_choices(other, args.data, args.samples, **options) if other else []
    heldout = None
    if HELDOUT in args.tasks:
        heldout = load_heldout(args.store, args.samples, batch_size=args.batch_size)
    models = find_models(
        args.models,
        dtype=args.dtype,
        prompt_style=args.prompt_style,
        tokenizers=args.tokenizer or (),
        key_env=args.key_env,
    )
    settings = _settings(args, DecoderSettings)
    plan = Plan(models, args.decoders, tasks, settings, args.seeds, args.shots, args.batch_questions, heldout, choices)
    run(plan, args.out, task)


def _settings(args: argparse.Namespace, kind: type[DecoderSettings]) -> DecoderSettings:
    return kind(**{name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None})
