"""`slimkernels decode` and `slimkernels tree`: questions in, answers, results, a trace and its page out."""

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

from slimkernels.cli.decode_arguments import DECODE_FIELDS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.durable import JsonLines
    from slimkernels.search import Engine, PathFinder, Question, Result, Scorer, Tree

Say = Callable[[str], None]
_DEFAULT_CHAINS = 8
# Fields of the configuration that a decoder sets by itself.
_SET_BY_CHAINS = ("branching_factor", "beam", "buffer_size", "annealing", "max_attempts")
_SET_BY = {
    "pathfinder": (),
    "self-consistency": _SET_BY_CHAINS,
    "best-of-n": _SET_BY_CHAINS,
    "greedy": (*_SET_BY_CHAINS, "temperature", "top_k", "top_p"),
}
_CHECK_OPTIONS = ("repetition_threshold", "no_repetition_check", "nli", "contradiction_threshold")


class _Asked(NamedTuple):
    """A question of the input."""

    text: str
    record: Mapping[str, Any]


def decode(args: argparse.Namespace, say: Say) -> None:
    """Runs `decode`: answers to ``say``, progress to the standard error."""
    _check_options(args)
    template = args.template if args.template_file is None else Path(args.template_file).read_text(encoding="utf-8")
    asked = _read_questions(args)
    finder, tokenizer = _path_finder(args)
    questions = [_question(item, template, tokenizer, not args.no_chat) for item in asked]
    if args.plan:
        plan = finder.plan(questions)
        say(f"questions            {len(questions)}")
        say(f"prompt tokens        {plan.prompt_tokens}")
        say(f"generated tokens     at most {plan.generated_tokens}")
        say(f"steps at a time      at most {plan.most_rows}")
        say(f"keys and values      at most {plan.cache_bytes} bytes ({plan.cache_bytes / 2**20:.1f} MiB)")
        return
    with contextlib.ExitStack() as stack:
        results, settings = None, ""
        if args.out is not None:
            from slimkernels.durable import JsonLines

            results = stack.enter_context(JsonLines(args.out, "index"))
            settings = _settings(args, finder, template)
        answered = {} if results is None else _answered(results, settings, asked)
        # A trace is one of all questions, and knows itself which of them are done.
        todo = [index for index in range(len(asked)) if args.trace is not None or index not in answered]
        if answered:
            sys.stderr.write(f"{len(answered)} of {len(asked)} questions are answered in {args.out}\n")
        watch = stack.enter_context(_watch(asked, todo))
        started, tokens = time.monotonic(), 0
        for place, result in finder.solve_each([questions[i] for i in todo], trace=args.trace, on_depth=watch):
            index = todo[place]
            tokens += result.num_tokens
            say(_summary(index, len(asked), result))
            if results is not None and index not in answered:
                results.append(_record(args, index, asked[index], finder, result, settings))
        seconds = time.monotonic() - started
    if todo:
        sys.stderr.write(
            f"{len(todo)} questions, {tokens} tokens, {seconds:.1f} s, {tokens / max(seconds, 1e-9):.1f} tokens/s\n"
        )


def tree(args: argparse.Namespace, say: Say) -> None:
    """Runs `tree`."""
    from slimkernels.search.trace import read_trace
    from slimkernels.search.tree_page import tree_page

    content = read_trace(args.trace)
    number = args.question
    if number is not None and not 1 <= number <= len(content.questions):
        raise ValueError(
            f"--question must be in [1, {len(content.questions)}], the questions of the trace, got {number}"
        )
    out = Path(args.trace).with_suffix(".html") if args.out is None else Path(args.out)
    page = tree_page(content, None if number is None else [number - 1])
    out.write_text(page, encoding="utf-8", errors="replace")
    say(f"wrote {out}")


def _check_options(args: argparse.Namespace) -> None:
    if (args.question is None) == (args.questions is None):
        raise ValueError("decode needs a QUESTION (or - for the standard input), or --questions FILE, and not both")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    for name in _SET_BY[args.decoder]:
        if getattr(args, name) is not None:
            raise ValueError(f"{DECODE_FIELDS[name][0]} has no meaning with --decoder {args.decoder}: leave it out")
    chains = args.decoder in ("self-consistency", "best-of-n")
    refused = [] if chains else ["chains"]
    if args.decoder != "pathfinder":
        refused += _CHECK_OPTIONS
    if args.decoder == "greedy":
        refused += ["selector"]
    if args.selector != "verifier":
        refused += ["verifier"]
    for name in refused:
        if getattr(args, name) not in (None, False):
            needed = "without --selector verifier" if name == "verifier" else f"with --decoder {args.decoder}"
            raise ValueError(f"--{name.replace('_', '-')} has no meaning {needed}: leave it out")
    if args.no_repetition_check and args.repetition_threshold is not None:
        raise ValueError("--repetition-threshold has no meaning with --no-repetition-check: leave it out")
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
        if len(asked) == args.limit:
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} of {name} must be a JSON object: {error}") from error
        for field in filter(None, (args.question_field, args.reference_field)):
            if not isinstance(record, dict) or field not in record:
                fields = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"line {number} of {name} has no field {field!r}, only {fields}")
        text = record[args.question_field]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"the field {args.question_field!r} must be text in line {number} of {name}, got {text!r}")
        asked.append(_Asked(text, record))
    if not asked:
        raise ValueError(f"{name} must hold at least one question, got none")
    return asked


def _path_finder(args: argparse.Namespace) -> tuple[PathFinder, PreTrainedTokenizerBase | None]:
    from slimkernels import search

    options: dict[str, Any] = {name: getattr(args, name) for name in DECODE_FIELDS if getattr(args, name) is not None}
    # Before the model is loaded: a bad value is found out at once.
    config = search.PathFinderConfig(**options)
    chains = _DEFAULT_CHAINS if args.chains is None else args.chains
    if chains < 1:
        raise ValueError(f"--chains must be at least 1, got {chains}")
    checks = _checks(args)

    engine, model, tokenizer = _served(args) if args.server is not None else _embedded(args)
    selector: Scorer | None = None
    if args.selector == "verifier":
        from slimkernels import teacher

        if args.verifier is not None:
            selector = search.Verifier(*teacher.load_teacher(args.verifier, device=_device(args)))
        else:
            selector = search.Verifier(*cast(Any, (model, tokenizer)))  # a server has neither, and needs --verifier
    elif args.selector is not None:
        selector = {
            "consensus": search.consensus(),
            "majority-vote": search.majority_vote,
            "log-probability": search.log_probability,
        }[args.selector]
    selection = {} if selector is None else {"selector": selector}
    if args.decoder == "pathfinder":
        return search.PathFinder(engine, config, checks=checks, **selection), tokenizer
    if args.decoder == "greedy":
        return search.greedy(engine, config), tokenizer
    preset = search.self_consistency if args.decoder == "self-consistency" else search.best_of_n
    return preset(engine, chains, config, **selection), tokenizer


def _embedded(args: argparse.Namespace) -> tuple[Engine, PreTrainedModel, PreTrainedTokenizerBase]:
    import torch

    from slimkernels import search, teacher

    if args.tokenizer is not None:
        raise ValueError("--tokenizer is of --server: a model that runs here has its own")
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
    from slimkernels import search, teacher

    for option in ("gguf_file", "revision", "device"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')} has no meaning with --server, which has loaded its model")
    if args.selector == "verifier" and args.verifier is None:
        raise ValueError("--selector verifier needs --verifier MODEL with --server: the verifier runs here")
    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    return search.ServerEngine(args.server, args.model), None, tokenizer


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


def _question(item: _Asked, template: str, tokenizer: PreTrainedTokenizerBase | None, chat: bool) -> Question:
    from slimkernels.search import Question

    values = {**item.record, "question": item.text}

    def value(match: re.Match[str]) -> str:
        found = values.get(match[1], match[0])
        return ", ".join(map(str, found)) if isinstance(found, list) else str(found)

    text = re.sub(r"\{(\w+)\}", value, template)
    if text == template:
        raise ValueError(f"--template must contain {{question}}, where the question goes, got {template!r}")
    if not chat or tokenizer is None or not tokenizer.chat_template:
        return Question(text if text.endswith((" ", "\n", ":")) else f"{text}\n", item.text)
    messages = [{"role": "user", "content": text}]
    # Token ids: the template's special tokens would be encoded a second time with the text.
    token_ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return Question(token_ids, item.text)


def _settings(args: argparse.Namespace, finder: PathFinder, template: str) -> str:
    """A hash of all that the predictions depend on but the questions."""
    from slimkernels.search.trace import header_of

    header = header_of(finder.engine, finder.config, finder.checks, [])
    content = [header, args.decoder, args.selector, args.verifier, args.nli, template, args.no_chat]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def _answered(results: JsonLines, settings: str, asked: Sequence[_Asked]) -> set[int]:
    """The questions that the results file has a prediction for."""
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
        "reference": asked.record.get(args.reference_field) if args.reference_field else None,
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


def _summary(index: int, total: int, result: Result) -> str:
    outcome = "finished" if result.finished else f"unfinished ({_unfinished_reason(result)})"
    answer = "" if result.answer is None else f"answer: {result.answer}\n"
    return (
        f"question {index + 1} of {total}: {outcome}, {len(result.candidates)} candidates, {result.num_tokens} tokens, "
        f"{result.seconds:.1f} s\n{answer}{result.text.strip()}\n"
    )


@contextlib.contextmanager
def _watch(asked: Sequence[_Asked], todo: Sequence[int]) -> Iterator[Callable[[int, Tree], None]]:
    """What to do when a depth is done: draw the tree in a terminal, else write a line."""
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
