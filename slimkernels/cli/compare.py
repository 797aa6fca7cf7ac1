"""``slimkernels compare``: models and decoders side by side on questions and held-out documents, with a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from slimkernels.cli.options import DTYPES, Parser, add_command, add_fields, add_old_name, positive_int, refuse
from slimkernels.cli.search_options import (
    ANSWER_KINDS,
    DEFAULT_REFERENCE_FIELD,
    DEFAULT_TEMPLATE,
    PROMPT_STYLES,
    SEARCH_FIELDS,
    add_chains_option,
)
from slimkernels.cli.terminal import be_quiet, progress_bars, progress_task

if TYPE_CHECKING:
    from slimkernels.evaluate.decoders import DecoderSettings
    from slimkernels.evaluate.judge import Judge
    from slimkernels.evaluate.runner import Plan
    from slimkernels.evaluate.tasks import Task

_EXAMPLES = """\
examples:
  models on questions, with a report in runs/report/report.html:
    slimkernels compare --models runs/slim runs/kd --tasks gsm8k strategyqa --data data --samples 100 --out runs/report
  the students of `slimkernels demo` and their teacher, on the held-out store and on questions:
    slimkernels compare --models demo-output/students/{sft,kd,slim} teacher=smollm2-135m-instruct \\
        --tasks heldout gsm8k strategyqa commonsenseqa --store demo-output/store/heldout --data data \\
        --samples 30 --out demo-output/evaluation
  your own questions, {"question": ..., "answer": ...} on each line; the report calls them riddles:
    slimkernels compare --models runs/slim runs/kd --tasks riddles=questions.jsonl --out runs/own
    slimkernels compare --models runs/slim --tasks riddles=questions.jsonl --question-field q --reference-field gold \\
        --answer-kind number --out runs/numbers
  decoders side by side, three seeds each:
    slimkernels compare --models smollm2-135m-instruct --decoders greedy self-consistency pathfinder --seeds 0 1 2 \\
        --tasks gsm8k commonsenseqa --data data --samples 50 --out runs/decoders
  a model behind an OpenAI-compatible server and one that runs here; the server's key is read from OPENAI_API_KEY:
    slimkernels compare --models runs/slim teacher=http://localhost:8000/v1#NAME --prompt-style plain \\
        --tasks gsm8k --data data --samples 100 --out runs/served
  multiple choice, asked and scored by lm-eval, without a decoder:
    slimkernels compare --models runs/slim runs/kd --tasks arc_easy hellaswag mmlu_anatomy truthfulqa_mc1 --data data \\
        --samples 200 --out runs/choices
  the report again after the scoring has changed, without generating anything:
    slimkernels compare --rescore --out runs/report
  ratings by a judge in addition to the scores, one request per output; the key is read from OPENAI_API_KEY:
    slimkernels compare --rescore --out runs/report --judge http://localhost:8000/v1 --judge-model NAME
  answers that `slimkernels decode --out` wrote, by two decoders:
    slimkernels compare --outputs tree.jsonl chains.jsonl --out runs/decoded
  outputs that others published (qid, prompt, question, generated_text, answer):
    slimkernels compare --outputs outputs/svamp/*/output.jsonl --out runs/published
The same command continues a stopped run and asks nothing twice. Estimated time on two idle CPU cores, with a model of
135 million parameters: a few seconds for a greedy answer, several times as long by self-consistency or pathfinder.
A server is named URL#MODEL, or URL where it lists one model. It is asked in plain text unless --tokenizer gives a chat
template, which works with llama.cpp and vLLM. Tasks that need probabilities of given texts, heldout and multiple
choice, are refused for servers.
A file of your own has one JSON object per line. The choices are a list of texts, and the answer is a letter or one of
them. A field "kind" states the kind of the answers, like --answer-kind, and is the same in the whole file. Questions
are asked by --template, without worked examples.
--data DIR holds gsm8k/test.jsonl, strategyqa/dev.json, commonsenseqa/dev_rand_split.jsonl, ... as published.
"""
_HELDOUT = "heldout"
# Fields of DecoderSettings, by the names of the options.
_SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "max_depth": "max_steps",
    "max_step_tokens": "max_step_tokens",
    "max_tokens": "max_tokens",
    "chains": "num_chains",
    "branching_factor": "branching_factor",
    "beam": "beam",
}


# Options of the user's own questions, of all questions that models answer in their own words, and of everything that
# --rescore and --outputs do not ask.
_OWN_QUESTIONS = ("question_field", "reference_field", "choices_field", "answer_kind", "template")
_ANSWERING = (*("decoders", "seeds", "prompt_style", "batch_questions"), *_SETTINGS, *_OWN_QUESTIONS)
_ASKING = (
    *("tasks", "data", "store", "decoders", "samples", "seeds", "shots", "num_fewshot", "dtype", "prompt_style"),
    *("tokenizer", "key_env", "batch_size", "batch_questions", *_SETTINGS, *_OWN_QUESTIONS),
)
# Options by the names that the functions of ``slimkernels.evaluate`` have for them.
API_NAMES = {
    **{field: f"--{name.replace('_', '-')}" for name, field in _SETTINGS.items()},
    "num_samples": "--samples",
    "output_dir": "--out",
    "kind": "--answer-kind",
    "decoder": "--decoders",
    "tokenizers": "--tokenizer",
}


def add_parser(commands: Any) -> None:
    """Adds the command ``compare``."""
    summary = "compare models and decoders side by side, on questions and held-out documents"
    parser = add_command(commands, "compare", run, summary, _EXAMPLES, API_NAMES)
    add_arguments(parser)


def add_arguments(parser: Parser, *, is_old_form: bool = False) -> None:
    """Adds the options of a comparison; in its old form ``eval`` has those that are its own already."""
    add = parser.add_argument
    if not is_old_form:
        add("--store", metavar="DIR", help="held-out store with the teacher's logits, for --tasks heldout")
        add(
            "--batch-size",
            type=positive_int,
            default=8,
            metavar="N",
            help="documents or choices scored at a time (default: %(default)s)",
        )
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
        help="gsm8k, strategyqa, commonsenseqa, self_instruct, dolly; heldout: the labels of --store; "
        "NAME=FILE.jsonl: your own questions, called NAME in the report; any other name: a multiple-choice task of "
        "lm-eval, such as arc_easy, hellaswag, mmlu, truthfulqa_mc1",
    )
    add("--data", metavar="DIR", help="folder with a folder of questions for each named task")
    add("--out", metavar="DIR", help="folder for the records and the report")
    add(
        "--decoders",
        nargs="+",
        default=["greedy"],
        metavar="NAME",
        help="greedy, self-consistency, pathfinder (default: greedy)",
    )
    add(
        "--samples",
        type=positive_int,
        metavar="N",
        help="questions or documents per task: the first of an order that is shuffled in the same way in every run; "
        "multiple choice: the first of the data (default: all)",
    )
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="random seeds for sampling (default: 0)")
    add("--shots", type=int, default=3, metavar="N", help="worked examples before a question (default: %(default)s)")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="worked examples before a multiple-choice question (default: set by lm-eval)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the models' weights (default: %(default)s)")
    add(
        "--prompt-style",
        choices=PROMPT_STYLES,
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
    add_chains_option(parser, "self-consistency")
    add_fields(parser, SEARCH_FIELDS, [*(name for name in _SETTINGS if name != "chains"), "batch_questions"])
    _add_own_question_arguments(parser)
    add("--rescore", action="store_true", help="score the records in --out again without generating anything")
    add(
        "--outputs",
        nargs="+",
        metavar="FILE",
        help="files of decode --out or of published outputs to score and report",
    )
    add("--judge", metavar="URL", help="OpenAI-compatible server that rates the outputs (default: none)")
    add("--judge-model", metavar="NAME", help="name of the judge on its server")
    add("--judge-key-env", metavar="NAME", help="environment variable with the judge's key (default: OPENAI_API_KEY)")
    _add_old_names(parser)


def _add_own_question_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("your own questions, --tasks NAME=FILE.jsonl").add_argument
    add("--question-field", default="question", metavar="NAME", help="field with the question (default: %(default)s)")
    add(
        "--reference-field",
        default=DEFAULT_REFERENCE_FIELD,
        metavar="NAME",
        help="field with the correct answer (default: %(default)s)",
    )
    add(
        "--choices-field",
        default="choices",
        metavar="NAME",
        help="field with the list of choices, in records that have one (default: %(default)s)",
    )
    add(
        "--answer-kind",
        choices=(*ANSWER_KINDS, "text"),
        help="kind of the answers; text: scored by Rouge-L (default: the file's field kind, else letter where all have "
        "choices, else number or yes_no if all correct answers are, else any)",
    )
    add(
        "--template",
        default=DEFAULT_TEMPLATE,
        metavar="TEXT",
        help="prompt with {question}; the default is that of decode",
    )


def _add_old_names(parser: Parser) -> None:
    add_old_name(parser, "--branching", "--branching-factor")
    add_old_name(parser, "--max-steps", "--max-depth")


def is_given(args: argparse.Namespace) -> bool:
    """Returns whether ``eval`` was given options of a comparison, as in its old form."""
    return any((args.models, args.tasks, args.out, args.data, args.rescore, args.outputs, args.judge))


def run(args: argparse.Namespace) -> None:
    """Compares, and prints the place of the report."""
    _check(args)
    be_quiet()
    with progress_bars() as progress:
        report = _compare(args, lambda description: progress_task(progress, description))
    print(report)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError where options do not fit together, or some are missing."""
    if args.out is None:
        raise ValueError("compare needs --out DIR with --models, --rescore or --outputs")
    if (args.models is not None) + args.rescore + (args.outputs is not None) != 1:
        raise ValueError("--out needs one of --models, --rescore and --outputs")
    if (args.judge is None) != (args.judge_model is None):
        raise ValueError("--judge URL and --judge-model NAME go together: give both, or neither")
    if args.judge is not None and args.outputs is not None:
        raise ValueError("--judge rates outputs of --models or --rescore, not those of --outputs")
    if args.models is not None:
        _check_tasks(args)
        _check_models(args)
    else:
        kept = ("answer_kind",) if args.outputs is not None else ()
        source = "--rescore" if args.rescore else "--outputs"
        refuse(args, [name for name in _ASKING if name not in kept], f"with {source}, which asks nothing")
    if args.judge is None:
        refuse(args, ["judge_key_env"], "without --judge URL")


def _check_tasks(args: argparse.Namespace) -> None:
    if args.tasks is None:
        raise ValueError("--models needs --tasks: the questions to ask")
    if (_HELDOUT in args.tasks) != (args.store is not None):
        raise ValueError(f"--tasks {_HELDOUT} and --store DIR, a held-out store, go together: give both, or neither")
    from slimkernels.evaluate.tasks import TASKS

    if args.data is None and set(args.tasks) & set(TASKS):
        raise ValueError("--models needs --data: the folder with the questions")
    others = [task for task in args.tasks if task != _HELDOUT and task not in TASKS and "=" not in task]
    is_own = any("=" in task for task in args.tasks)
    if not is_own and not set(args.tasks) & set(TASKS):
        refuse(args, ["shots"], "without a task that has worked examples")
        refuse(args, _ANSWERING, "without questions that the models answer")
    if not others and args.store is None:
        refuse(args, ["batch_size"], f"without --tasks {_HELDOUT} or a multiple-choice task")
    if not is_own:
        refuse(args, _OWN_QUESTIONS, "without questions of your own, --tasks NAME=FILE.jsonl")
    if not set(args.tasks) & set(TASKS):
        refuse(args, ["shots"], "without a task that has worked examples")
    if not others:
        refuse(args, ["num_fewshot"], "without a multiple-choice task")
    if "self-consistency" not in args.decoders:
        refuse(args, ["chains"], "without --decoders self-consistency")
    if "pathfinder" not in args.decoders:
        refuse(args, ["branching_factor", "beam"], "without --decoders pathfinder")
    if set(args.decoders) == {"greedy"}:
        refuse(args, ["temperature", "top_p", "seeds"], "with --decoders greedy, which draws nothing")
    if not others and not set(args.tasks) & set(TASKS):
        refuse(args, ["data"], "without a task whose questions it holds")


def _check_models(args: argparse.Namespace) -> None:
    from slimkernels.evaluate.models import are_servers

    served = are_servers(args.models)
    if all(served):
        refuse(args, ["dtype"], "with servers, which have loaded their models")
    if not any(served):
        refuse(args, ["tokenizer", "key_env"], "without a server, http://HOST:PORT/v1#NAME")


def _compare(args: argparse.Namespace, bar: Callable[[str], Callable[[int, int | None], None]]) -> str:
    """Writes the report of a comparison and returns a sentence about it; ``bar`` adds a progress bar."""
    from slimkernels.evaluate.report.write import describe_outputs, write_report

    if args.outputs is not None:
        from slimkernels.evaluate.decoded import read_all_outputs
        from slimkernels.evaluate.published_outputs import comparable

        files = read_all_outputs(args.outputs, kind=args.answer_kind)
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
    from slimkernels.evaluate.runner import Plan, check_decoding
    from slimkernels.evaluate.tasks import TASKS, load_task

    # Data is read and numbers are checked before models are looked for, so that what is cheap fails first.
    tasks = [load_task(name, args.data, args.samples) for name in args.tasks if name in TASKS]
    tasks += [_own_questions(name, args) for name in args.tasks if "=" in name]
    other = [name for name in args.tasks if name not in (_HELDOUT, *TASKS) and "=" not in name]
    options = {"num_fewshot": args.num_fewshot, "batch_size": args.batch_size}
    choices = load_choices(other, args.data, args.samples, **options) if other else []
    heldout = None
    if _HELDOUT in args.tasks:
        heldout = load_heldout(args.store, args.samples, batch_size=args.batch_size)
    settings = _decoder_settings(args)
    batch_questions = Plan.batch_questions if args.batch_questions is None else args.batch_questions
    check_decoding(tasks, args.decoders, settings, args.shots, batch_questions)
    models = find_models(
        args.models,
        dtype=args.dtype,
        prompt_style=args.prompt_style,
        tokenizers=args.tokenizer or (),
        key_env=args.key_env,
    )
    return Plan(
        models,
        args.decoders,
        tasks,
        settings,
        args.seeds,
        args.shots,
        batch_questions,
        heldout=heldout,
        choices=choices,
    )


def _own_questions(task: str, args: argparse.Namespace) -> Task:
    from slimkernels.evaluate.own_questions import load_questions

    name, _, path = task.partition("=")
    return load_questions(
        name,
        path,
        args.samples,
        template=args.template,
        question_field=args.question_field,
        reference_field=args.reference_field,
        choices_field=args.choices_field,
        kind=args.answer_kind,
    )


def _decoder_settings(args: argparse.Namespace) -> DecoderSettings:
    from slimkernels.evaluate.decoders import DecoderSettings

    given = {field: getattr(args, name) for name, field in _SETTINGS.items() if getattr(args, name) is not None}
    return DecoderSettings(**given)
