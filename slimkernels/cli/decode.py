"""``slimkernels decode``: answers to questions by tree search, with results and a trace in files."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimkernels.cli.decode_judges import (
    add_judge_arguments,
    check_judge_options,
    device_of,
    make_checks,
    make_selector,
    make_step_scorer,
    not_loaded,
)
from slimkernels.cli.decode_results import (
    Asked,
    answered_questions,
    read_questions,
    record_of,
    settings_of,
    summary_of,
)
from slimkernels.cli.decode_watch import Watch, watch_of
from slimkernels.cli.options import (
    Parser,
    add_command,
    add_fields,
    add_model_options,
    add_old_name,
    given_fields,
    positive_int,
    refuse,
)
from slimkernels.cli.search_options import (
    DEFAULT_TEMPLATE,
    PROMPT_STYLES,
    SEARCH_FIELDS,
    add_chains_option,
)
from slimkernels.cli.terminal import be_quiet, warn_deprecated

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.search import Engine, PathFinder, Question

_DECODERS = ("pathfinder", "self-consistency", "best-of-n", "greedy")
_EXAMPLES = """\
examples:
  slimkernels decode --model smollm2-135m-instruct "Anna has 3 bags of 4 apples. How many apples are that?"
  echo "Why is the sky blue?" | slimkernels decode --model ./my-model -
  every question of a file, by two decoders that may generate the same number of tokens:
    slimkernels decode --model ./my-model --questions test.jsonl --max-tokens 4096 --out tree.jsonl
    slimkernels decode --model ./my-model --questions test.jsonl --max-tokens 4096 --out chains.jsonl \\
        --decoder self-consistency --chains 16
  the highest cost of that, without generating anything:
    slimkernels decode --model ./my-model --questions test.jsonl --plan
  progress and answers for another program:
    slimkernels decode --model ./my-model --questions test.jsonl --json
  a search that can be stopped and continued, and a page that shows its trees:
    slimkernels decode --model ./my-model --questions test.jsonl --trace trace.jsonl
    slimkernels tree trace.jsonl -o tree.html
Estimated time on two idle CPU cores, with a model of 135 million parameters: a few seconds for a question with
--decoder greedy, some ten times as long for the search at its defaults, which --max-tokens and --time-limit bound.
The same command continues a stopped run: --out skips the questions that it already answers, and --trace continues
inside an unfinished tree. The prompt is --template, with {question} or any other {field} of the question's record
filled in. It is sent as a user's message where the tokenizer has a chat template, else as text to continue. The default
template is
    {question}

    Think step by step, one step on each line. The last line is "Answer:" and the answer alone.
"""
# Fields of the configuration that a decoder sets on its own.
_SET_BY_CHAINS = (
    "branching_factor",
    "branching_temperature",
    "beam",
    "buffer_size",
    "annealing",
    "max_attempts",
    "merge_siblings",
)
_SET_BY = {
    "pathfinder": (),
    "self-consistency": _SET_BY_CHAINS,
    "best-of-n": _SET_BY_CHAINS,
    "greedy": (*_SET_BY_CHAINS, "temperature", "top_k", "top_p"),
}
# Options by the names that the functions of ``slimkernels.search`` have for them.
_API_NAMES = {"num_chains": "--chains", "token_budget": "--max-tokens"}


def add_parser(commands: Any) -> None:
    """Adds the command ``decode``."""
    parser = add_command(
        commands, "decode", run, "answer questions with a model and a tree search", _EXAMPLES, _API_NAMES
    )
    _add_model_arguments(parser)
    _add_question_arguments(parser)
    add_judge_arguments(parser)
    add_fields(parser.add_argument_group("search"), SEARCH_FIELDS)
    _add_old_names(parser)


def _add_model_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("question", nargs="?", metavar="QUESTION", help="question; - reads one question from standard input")
    add(
        "--model",
        required=True,
        metavar="MODEL",
        help="folder, .gguf file, smollm2-135m-instruct, name on the hub, or server as http://HOST:PORT/v1#MODEL",
    )
    add("--tokenizer", metavar="MODEL", help="tokenizer whose chat template is used with a server (default: none)")
    add("--key-env", metavar="NAME", help="environment variable with the server's key (default: OPENAI_API_KEY)")
    add_model_options(parser, "the model")
    add("--device", metavar="DEVICE", help="device of the model, such as cuda (default: the CPU)")
    add("--decoder", choices=_DECODERS, default=_DECODERS[0], help="search algorithm (default: %(default)s)")
    add_chains_option(parser, "self-consistency and best-of-n")
    add(
        "--json",
        action="store_true",
        help='print progress and results as JSON, an object on each line with its kind as "event"',
    )
    add("--plan", action="store_true", help="print the highest possible number of tokens and bytes, and stop")
    add(
        "--out",
        metavar="FILE",
        help=".jsonl file that receives every prediction with all candidates; an existing one is continued",
    )
    add(
        "--trace", metavar="FILE", help=".jsonl file that receives the trees as they grow; an existing one is continued"
    )


def _add_question_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("questions")
    add = group.add_argument
    add("--questions", metavar="FILE", help=".jsonl file with one record per question; - reads standard input")
    add("--question-field", default="question", metavar="NAME", help="field with the question (default: %(default)s)")
    add(
        "--reference-field",
        metavar="NAME",
        help="field with the correct answer, copied to --out as reference (default: answer, in records that have it)",
    )
    add("--samples", type=positive_int, metavar="N", help="number of questions to read, from the first (default: all)")
    template = group.add_mutually_exclusive_group()
    template.add_argument(
        "--template", default=DEFAULT_TEMPLATE, metavar="TEXT", help="prompt with {question} (see below)"
    )
    template.add_argument("--template-file", metavar="FILE", help="file with the template")
    add(
        "--prompt-style",
        choices=PROMPT_STYLES,
        default="auto",
        help="form of the prompts: chat template or plain text; auto: the tokenizer's template, where there is one "
        "(default: %(default)s)",
    )


def _add_old_names(parser: Parser) -> None:
    add_old_name(parser, "--token-budget", "--max-tokens")
    add_old_name(parser, "--limit", "--samples")
    add_old_name(parser, "--no-chat", "--prompt-style", const="plain")
    parser.add_argument("--server", metavar="URL", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Answers the questions: answers to standard output, progress to standard error; with --json all to the first."""
    if args.server is not None:
        warn_deprecated("--server URL --model NAME is now --model URL#NAME")
        args.model = f"{args.server}#{args.model}"
    _check_options(args)
    template = args.template if args.template_file is None else Path(args.template_file).read_text(encoding="utf-8")
    asked = read_questions(args)
    texts = [_filled(item, template) for item in asked]
    with watch_of(args) as watch:
        watch.stage(f"loading {args.model}")
        be_quiet()
        from slimkernels.search.question import count_repeats

        finder, tokenizer = _path_finder(args)
        # Counted here, so that a run that answers only the questions that are left draws the same.
        questions = count_repeats(
            [_question(item, text, tokenizer, args.prompt_style) for item, text in zip(asked, texts, strict=True)]
        )
        if not args.plan:
            _solve(args, watch, finder, asked, questions, template)
    if args.plan:
        _print_plan(finder, questions)


def _check_options(args: argparse.Namespace) -> None:
    if (args.question is None) == (args.questions is None):
        raise ValueError("decode needs a QUESTION (or - for the standard input), or --questions FILE, and not both")
    refused = list(_SET_BY[args.decoder])
    if args.decoder not in ("self-consistency", "best-of-n"):
        refused += ["chains"]
    refuse(args, refused, f"with --decoder {args.decoder}")
    check_judge_options(args)
    if args.questions is None:
        refuse(args, ["question_field", "reference_field", "samples"], "without --questions FILE")
    if args.answer_pattern is not None:
        refuse(args, ["answer_kind"], "with --answer-pattern, which takes its place")
    if args.plan:
        refuse(args, ["out", "trace", "json"], "with --plan, which generates nothing")


def _path_finder(args: argparse.Namespace) -> tuple[PathFinder, PreTrainedTokenizerBase | None]:
    from slimkernels import search
    from slimkernels.evaluate.served import is_server

    # Made before the model is loaded, so that a bad value fails at once.
    score_steps = None if args.score_steps is None else not_loaded
    config = search.PathFinderConfig(**given_fields(args, SEARCH_FIELDS), score_steps=score_steps)
    has_server = is_server(args.model)
    _check_place(args, has_server)
    checks = make_checks(args)
    engine, model, tokenizer = _served(args) if has_server else _embedded(args)
    config = dataclasses.replace(config, score_steps=make_step_scorer(args, model, tokenizer))
    selector = make_selector(args, model, tokenizer)
    selection = {} if selector is None else {"selector": selector}
    if args.decoder == "pathfinder":
        return search.PathFinder(engine, config, checks=checks, **selection), tokenizer
    if args.decoder == "greedy":
        return search.greedy(engine, config), tokenizer
    preset = search.self_consistency if args.decoder == "self-consistency" else search.best_of_n
    chains = search.DEFAULT_CHAINS if args.chains is None else args.chains
    return preset(engine, chains, config, **selection), tokenizer


def _check_place(args: argparse.Namespace, has_server: bool) -> None:
    """Refuses options that have no meaning where the model runs, before anything is loaded."""
    from slimkernels.evaluate.served import is_server

    if has_server:
        refuse(args, ["gguf_file", "revision", "device", "dtype"], "with a server, which has loaded its model")
        if args.selector == "verifier" and args.verifier is None:
            raise ValueError("--selector verifier needs --verifier MODEL with a server: the verifier runs here")
        return
    refuse(args, ["tokenizer"], "with a model that runs here and has its own")
    if args.score_steps is None or not is_server(args.score_steps):
        refuse(args, ["key_env"], "without a server, --model http://HOST:PORT/v1#NAME")
    device_of(args)


def _embedded(args: argparse.Namespace) -> tuple[Engine, PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from slimkernels import search, teacher

    model, tokenizer = teacher.load_teacher(
        args.model,
        gguf_file=args.gguf_file,
        revision=args.revision,
        dtype=getattr(torch, args.dtype),
        device=device_of(args),
    )
    return search.TransformersEngine(model, tokenizer), model, tokenizer


def _served(args: argparse.Namespace) -> tuple[Engine, None, PreTrainedTokenizerBase | None]:
    from slimkernels import teacher
    from slimkernels.evaluate.served import find_server

    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    return find_server(args.model, key_env=args.key_env).engine, None, tokenizer


def _filled(item: Asked, template: str) -> str:
    """Returns the template with the fields of a question's record filled in."""
    values = {**item.record, "question": item.text}

    def value(match: re.Match[str]) -> str:
        found = values.get(match[1], match[0])
        return ", ".join(map(str, found)) if isinstance(found, list) else str(found)

    text = re.sub(r"\{(\w+)\}", value, template)
    if text == template:
        raise ValueError(f"--template must contain {{question}}, where the question goes, got {template!r}")
    return text


def _question(item: Asked, text: str, tokenizer: PreTrainedTokenizerBase | None, style: str) -> Question:
    from slimkernels.evaluate.models import to_continue
    from slimkernels.search import Question

    has_template = tokenizer is not None and bool(tokenizer.chat_template)
    if style == "chat" and not has_template:
        raise ValueError("--prompt-style chat needs a tokenizer with a chat template, and there is none: use plain")
    if style == "plain" or tokenizer is None or not has_template:
        return Question(to_continue(text), item.text)
    messages = [{"role": "user", "content": text}]
    # Token ids: the template's special tokens would be encoded a second time with the text.
    token_ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return Question(token_ids, item.text)


@contextlib.contextmanager
def _numbered(indices: Sequence[int]) -> Iterator[None]:
    """Names the question of an error by its number in the input."""
    from slimkernels.search import QuestionError

    try:
        yield
    except QuestionError as error:
        raise ValueError(f"question {indices[error.index] + 1}: {error.reason}") from error


def _print_plan(finder: PathFinder, questions: Sequence[Question]) -> None:
    with _numbered(range(len(questions))):
        plan = finder.plan(questions)
    print(f"questions            {len(questions)}")
    print(f"prompt tokens        {plan.prompt_tokens}")
    print(f"generated tokens     at most {plan.generated_tokens}")
    print(f"steps at a time      at most {plan.most_rows}")
    print(f"keys and values      at most {plan.cache_bytes} bytes ({plan.cache_bytes / 2**20:.1f} MiB)")


def _solve(
    args: argparse.Namespace,
    watch: Watch,
    finder: PathFinder,
    asked: Sequence[Asked],
    questions: Sequence[Question],
    template: str,
) -> None:
    """Searches the questions that are left, prints each answer, and appends it to --out."""
    with contextlib.ExitStack() as stack:
        results, settings = None, ""
        if args.out is not None:
            from slimkernels.durable import JsonLines

            results = stack.enter_context(JsonLines(args.out, "index"))
            settings = settings_of(args, finder, template)
        answered = set() if results is None else answered_questions(results, settings, asked)
        # A trace belongs to all questions of a run, and records which of them are done.
        todo = [index for index in range(len(asked)) if args.trace is not None or index not in answered]
        if answered:
            watch.note(f"{len(answered)} of {len(asked)} questions are answered in {args.out}")
        if not todo:
            return
        watch.search([index + 1 for index in todo], [asked[index].text for index in todo], finder.config)
        tokens, known_notes = 0, set[str]()
        stack.enter_context(_numbered(todo))
        prompts = [questions[index] for index in todo]
        found = finder.solve_each(prompts, trace=args.trace, on_progress=watch.depth, on_tokens=watch.tokens)
        for place, result in found:
            index = todo[place]
            tokens += result.num_tokens
            record = record_of(args, index, asked[index], finder, result, settings)
            watch.result(place, record, summary_of(index, len(asked), result, known_notes))
            if results is not None and index not in answered:
                results.append(record)
        watch.end(tokens)
