"""``slimkernels decode``: answers to questions by tree search, with results and a trace in files."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from slimkernels.cli.options import Parser, add_command, add_model_options, add_old_name, positive_int
from slimkernels.cli.search_options import (
    DEFAULT_REFERENCE_FIELD,
    DEFAULT_TEMPLATE,
    PROMPT_STYLES,
    SEARCH_FIELDS,
    add_chains_option,
    add_search_options,
)
from slimkernels.cli.terminal import be_quiet, warn_deprecated

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.durable import JsonLines
    from slimkernels.search import Engine, PathFinder, Question, Result, Scorer, Tree

_DECODERS = ("pathfinder", "self-consistency", "best-of-n", "greedy")
_SELECTORS = ("consensus", "majority-vote", "log-probability", "verifier")
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
  a search that can be stopped and continued, and a page that shows its trees:
    slimkernels decode --model ./my-model --questions test.jsonl --trace trace.jsonl
    slimkernels tree trace.jsonl -o tree.html
With a model of 135 million parameters on two CPU cores, --decoder greedy takes a few seconds for a question, and the
search at its defaults some ten times as long; --max-tokens and --time-limit bound it.
The same command continues a stopped run: --out skips the questions that it already answers, and --trace continues
inside an unfinished tree. The prompt is --template, with {question} or any other {field} of the question's record
filled in. It is sent as a user's message where the tokenizer has a chat template, else as text to continue. The default
template is
    {question}

    Think step by step, one step on each line. The last line is "Answer:" and the answer alone.
"""
# Fields of the configuration that a decoder sets on its own.
_SET_BY_CHAINS = ("branching_factor", "beam", "buffer_size", "annealing", "max_attempts")
_SET_BY = {
    "pathfinder": (),
    "self-consistency": _SET_BY_CHAINS,
    "best-of-n": _SET_BY_CHAINS,
    "greedy": (*_SET_BY_CHAINS, "temperature", "top_k", "top_p"),
}
_CHECK_OPTIONS = ("repetition_threshold", "no_repetition_check", "nli", "contradiction_threshold")


def add_parser(commands: Any) -> None:
    """Adds the command ``decode``."""
    parser = add_command(commands, "decode", run, "answer questions with a model and a tree search", _EXAMPLES)
    _add_model_arguments(parser)
    _add_question_arguments(parser)
    _add_judge_arguments(parser)
    add_search_options(parser.add_argument_group("search"))
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


def _add_judge_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("checks of steps, and selection of the answer").add_argument
    add(
        "--repetition-threshold",
        type=float,
        metavar="F",
        help="similarity from which a step repeats an earlier one (default: 0.98)",
    )
    add("--no-repetition-check", action="store_true", help="accept steps that repeat earlier ones")
    add("--nli", metavar="MODEL", help="entailment model, which turns the contradiction check on")
    add(
        "--contradiction-threshold",
        type=float,
        metavar="F",
        help="probability from which two steps contradict each other (default: 0.5)",
    )
    add(
        "--selector",
        choices=_SELECTORS,
        help="rule that chooses the answer (default: consensus; majority-vote with self-consistency, log-probability "
        "with best-of-n)",
    )
    add("--verifier", metavar="MODEL", help="model that judges with --selector verifier (default: the model itself)")


def _add_old_names(parser: Parser) -> None:
    add_old_name(parser, "--token-budget", "--max-tokens")
    add_old_name(parser, "--limit", "--samples")
    add_old_name(parser, "--no-chat", "--prompt-style", const="plain")
    parser.add_argument("--server", metavar="URL", help=argparse.SUPPRESS)


class _Asked(NamedTuple):
    """A question of the input.

    Attributes:
        text: The question.
        record: All fields of its line in the file; empty for a question from the command line.
    """

    text: str
    record: Mapping[str, Any]


def run(args: argparse.Namespace) -> None:
    """Answers the questions: answers to standard output, progress to standard error."""
    if args.server is not None:
        warn_deprecated("--server URL --model NAME is now --model URL#NAME")
        args.model = f"{args.server}#{args.model}"
    _check_options(args)
    be_quiet()
    template = args.template if args.template_file is None else Path(args.template_file).read_text(encoding="utf-8")
    asked = _read_questions(args)
    finder, tokenizer = _path_finder(args)
    questions = [_question(item, template, tokenizer, args.prompt_style) for item in asked]
    if args.plan:
        _print_plan(finder, questions)
    else:
        _solve(args, finder, asked, questions, template)


def _check_options(args: argparse.Namespace) -> None:
    if (args.question is None) == (args.questions is None):
        raise ValueError("decode needs a QUESTION (or - for the standard input), or --questions FILE, and not both")
    for name in _SET_BY[args.decoder]:
        if getattr(args, name) is not None:
            raise ValueError(f"{SEARCH_FIELDS[name][0]} has no meaning with --decoder {args.decoder}: omit it")
    refused = [] if args.decoder in ("self-consistency", "best-of-n") else ["chains"]
    if args.decoder != "pathfinder":
        refused += _CHECK_OPTIONS
    if args.decoder == "greedy":
        refused += ["selector"]
    if args.selector != "verifier":
        refused += ["verifier"]
    for name in refused:
        if getattr(args, name) not in (None, False):
            needed = "without --selector verifier" if name == "verifier" else f"with --decoder {args.decoder}"
            raise ValueError(f"--{name.replace('_', '-')} has no meaning {needed}: omit it")
    if args.no_repetition_check and args.repetition_threshold is not None:
        raise ValueError("--repetition-threshold has no meaning with --no-repetition-check: omit it")
    if args.contradiction_threshold is not None and args.nli is None:
        raise ValueError("--contradiction-threshold needs --nli MODEL, which turns the check on")


def _read_questions(args: argparse.Namespace) -> list[_Asked]:
    if args.question is not None:
        text = sys.stdin.read().strip() if args.question == "-" else args.question
        if not text.strip():
            raise ValueError("the question must have text in it, got an empty one")
        return [_Asked(text, {})]
    name = "the standard input" if args.questions == "-" else args.questions
    # Lines of JSON end at newlines alone: a string may hold other separators, such as U+2028. A file may begin with a
    # byte order mark.
    text = sys.stdin.read() if args.questions == "-" else Path(args.questions).read_text(encoding="utf-8")
    lines = text.removeprefix("\ufeff").split("\n")
    asked: list[_Asked] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(asked) == args.samples:
            break
        asked.append(_read_question(args, line, f"line {number} of {name}"))
    if not asked:
        raise ValueError(f"{name} must hold at least one question, got none")
    return asked


def _read_question(args: argparse.Namespace, line: str, where: str) -> _Asked:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be a JSON object: {error}") from error
    for field in filter(None, (args.question_field, args.reference_field)):
        if not isinstance(record, dict) or field not in record:
            fields = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{where} has no field {field!r}, only {fields}")
    text = record[args.question_field]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the field {args.question_field!r} must be text in {where}, got {text!r}")
    return _Asked(text, record)


def _path_finder(args: argparse.Namespace) -> tuple[PathFinder, PreTrainedTokenizerBase | None]:
    from slimkernels import search
    from slimkernels.evaluate.served import is_server

    options: dict[str, Any] = {name: getattr(args, name) for name in SEARCH_FIELDS if getattr(args, name) is not None}
    # Made before the model is loaded, so that a bad value fails at once.
    config = search.PathFinderConfig(**options)
    checks = _checks(args)
    engine, model, tokenizer = _served(args) if is_server(args.model) else _embedded(args)
    selector = _selector(args, model, tokenizer)
    selection = {} if selector is None else {"selector": selector}
    if args.decoder == "pathfinder":
        return search.PathFinder(engine, config, checks=checks, **selection), tokenizer
    if args.decoder == "greedy":
        return search.greedy(engine, config), tokenizer
    preset = search.self_consistency if args.decoder == "self-consistency" else search.best_of_n
    chains = search.DEFAULT_CHAINS if args.chains is None else args.chains
    return preset(engine, chains, config, **selection), tokenizer


def _checks(args: argparse.Namespace) -> list[Any]:
    from slimkernels import search

    checks: list[Any] = []
    if not args.no_repetition_check:
        threshold = args.repetition_threshold
        checks.append(search.RepetitionCheck() if threshold is None else search.RepetitionCheck(threshold))
    if args.nli is not None:
        threshold = 0.5 if args.contradiction_threshold is None else args.contradiction_threshold
        checks.append(search.ContradictionCheck(search.NLIModel.from_pretrained(args.nli), threshold))
    return checks


def _embedded(args: argparse.Namespace) -> tuple[Engine, PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from slimkernels import search, teacher

    if args.tokenizer is not None:
        raise ValueError("--tokenizer applies to a server's model only: a model that runs here has its own")
    if args.key_env is not None:
        raise ValueError("--key-env applies to a server's model only: --model http://HOST:PORT/v1#NAME")
    model, tokenizer = teacher.load_teacher(
        args.model,
        gguf_file=args.gguf_file,
        revision=args.revision,
        dtype=getattr(torch, args.dtype),
        device=_device(args),
    )
    return search.TransformersEngine(model, tokenizer), model, tokenizer


def _device(args: argparse.Namespace) -> torch.device | None:
    import torch

    return None if args.device is None else torch.device(args.device)


def _served(args: argparse.Namespace) -> tuple[Engine, None, PreTrainedTokenizerBase | None]:
    from slimkernels import teacher
    from slimkernels.evaluate.served import find_server

    for option in ("gguf_file", "revision", "device"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} has no meaning with a server, which has loaded its model")
    if args.selector == "verifier" and args.verifier is None:
        raise ValueError("--selector verifier needs --verifier MODEL with a server: the verifier runs here")
    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    return find_server(args.model, key_env=args.key_env).engine, None, tokenizer


def _selector(
    args: argparse.Namespace, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
) -> Scorer | None:
    """Returns the scorer of --selector; None for the decoder's own."""
    from slimkernels import search

    if args.selector is None:
        return None
    if args.selector != "verifier":
        scorers: dict[str, Scorer] = {
            "consensus": search.consensus(),
            "majority-vote": search.majority_vote,
            "log-probability": search.log_probability,
        }
        return scorers[args.selector]
    if args.verifier is None:
        return search.Verifier(*cast(Any, (model, tokenizer)))  # with a server, _served has refused this
    from slimkernels import teacher

    return search.Verifier(*teacher.load_teacher(args.verifier, device=_device(args)))


def _question(item: _Asked, template: str, tokenizer: PreTrainedTokenizerBase | None, style: str) -> Question:
    from slimkernels.evaluate.models import to_continue
    from slimkernels.search import Question

    values = {**item.record, "question": item.text}

    def value(match: re.Match[str]) -> str:
        found = values.get(match[1], match[0])
        return ", ".join(map(str, found)) if isinstance(found, list) else str(found)

    text = re.sub(r"\{(\w+)\}", value, template)
    if text == template:
        raise ValueError(f"--template must contain {{question}}, where the question goes, got {template!r}")
    has_template = tokenizer is not None and bool(tokenizer.chat_template)
    if style == "chat" and not has_template:
        raise ValueError("--prompt-style chat needs a tokenizer with a chat template, and there is none: use plain")
    if style == "plain" or tokenizer is None or not has_template:
        return Question(to_continue(text), item.text)
    messages = [{"role": "user", "content": text}]
    # Token ids: the template's special tokens would be encoded a second time with the text.
    token_ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return Question(token_ids, item.text)


def _print_plan(finder: PathFinder, questions: Sequence[Question]) -> None:
    plan = finder.plan(questions)
    print(f"questions            {len(questions)}")
    print(f"prompt tokens        {plan.prompt_tokens}")
    print(f"generated tokens     at most {plan.generated_tokens}")
    print(f"steps at a time      at most {plan.most_rows}")
    print(f"keys and values      at most {plan.cache_bytes} bytes ({plan.cache_bytes / 2**20:.1f} MiB)")


def _settings(args: argparse.Namespace, finder: PathFinder, template: str) -> str:
    """Returns a hash of everything that the predictions depend on, except for the questions."""
    from slimkernels.search.trace import header_of

    header = header_of(finder.engine, finder.config, finder.checks, [])
    content = [header, args.decoder, args.selector, args.verifier, args.nli, template, args.prompt_style == "plain"]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _solve(
    args: argparse.Namespace,
    finder: PathFinder,
    asked: Sequence[_Asked],
    questions: Sequence[Question],
    template: str,
) -> None:
    """Searches the questions that are left, prints each answer, and appends it to --out."""
    with contextlib.ExitStack() as stack:
        results, settings = None, ""
        if args.out is not None:
            from slimkernels.durable import JsonLines

            results = stack.enter_context(JsonLines(args.out, "index"))
            settings = _settings(args, finder, template)
        answered = set() if results is None else _answered(results, settings, asked)
        # A trace belongs to all questions of a run, and records which of them are done.
        todo = [index for index in range(len(asked)) if args.trace is not None or index not in answered]
        if answered:
            sys.stderr.write(f"{len(answered)} of {len(asked)} questions are answered in {args.out}\n")
        watch = stack.enter_context(_watch(asked, todo))
        started, tokens, known_notes = time.monotonic(), 0, set[str]()
        for place, result in finder.solve_each([questions[i] for i in todo], trace=args.trace, on_depth=watch):
            index = todo[place]
            tokens += result.num_tokens
            print(_summary(index, len(asked), result, known_notes))
            if results is not None and index not in answered:
                results.append(_record(args, index, asked[index], finder, result, settings))
        seconds = time.monotonic() - started
    if todo:
        sys.stderr.write(
            f"{len(todo)} questions, {tokens} tokens, {seconds:.1f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s\n"
        )


def _answered(results: JsonLines, settings: str, asked: Sequence[_Asked]) -> set[int]:
    """Returns the indices of the questions for which the results file has a prediction."""
    for record in results.found:
        if record.get("settings") != settings:
            raise ValueError(f"{results.path} holds predictions of other settings or another model: give another --out")
        index = record["index"]
        if index >= len(asked) or asked[index].text != record.get("question"):
            raise ValueError(f"{results.path} holds predictions of other questions: give another --out")
    return {record["index"] for record in results.found}


def _record(
    args: argparse.Namespace, index: int, asked: _Asked, finder: PathFinder, result: Result, settings: str
) -> dict[str, Any]:
    return {
        "index": index,
        "question": asked.text,
        "reference": asked.record.get(args.reference_field or DEFAULT_REFERENCE_FIELD),
        "text": result.text,
        "answer": result.answer,
        "finished": result.finished,
        "unfinished_reason": _unfinished_reason(result),
        "candidates": [
            {
                "text": candidate.text,
                "answer": candidate.answer,
                "score": score,
                "sum_logprob": candidate.sum_logprob,
                "num_tokens": candidate.num_tokens,
            }
            for candidate, score in zip(result.candidates, result.scores, strict=True)
        ],
        "num_tokens": result.num_tokens,
        "seconds": round(result.seconds, 3),
        "ends": result.reasons,
        "notes": list(result.notes),
        "decoder": args.decoder,
        "model": args.model,
        "seed": finder.config.seed,
        "settings": settings,
    }


def _unfinished_reason(result: Result) -> str | None:
    if result.finished:
        return None
    return (result.node is not None and result.tree.reasons[result.node]) or result.notes[-1]


def _summary(index: int, total: int, result: Result, known_notes: set[str]) -> str:
    """Returns what is printed of a result: its outcome, its answer and text, and the notes that are not yet known."""
    outcome = "finished" if result.finished else f"unfinished ({_unfinished_reason(result)})"
    answer = "" if result.answer is None else f"answer: {result.answer}\n"
    notes = "".join(f"note: {note}\n" for note in result.notes if note not in known_notes)
    known_notes.update(result.notes)
    return (
        f"question {index + 1} of {total}: {outcome}, {len(result.candidates)} candidates, {result.num_tokens} tokens, "
        f"{result.seconds:.1f} s\n{notes}{answer}{result.text.strip()}\n"
    )


@contextlib.contextmanager
def _watch(asked: Sequence[_Asked], todo: Sequence[int]) -> Iterator[Callable[[int, Tree], None]]:
    """Yields the function that shows a finished depth: the tree in a terminal, a line elsewhere."""
    from rich.console import Console

    from slimkernels.search.tree_text import progress_line, render_tree

    console = Console(stderr=True)
    if not console.is_terminal:

        def write(place: int, tree: Tree) -> None:
            sys.stderr.write(f"{progress_line(todo[place], tree)}\n")

        yield write
        return
    from rich.live import Live

    with Live(console=console, transient=True, auto_refresh=False) as live:
        yield lambda place, tree: live.update(
            render_tree(asked[todo[place]].text, tree, console.height - 2), refresh=True
        )
