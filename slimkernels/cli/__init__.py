"""The command line: arguments in, one sentence out on bad input; all work is done elsewhere, and loaded on use."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slimkernels.cli.parser import IMPORT_OPTIONS, SHIPPED_PROMPTS, TRAIN_FIELDS, make_parser
from slimkernels.cli.terminal import be_quiet, print_table, progress_bars, progress_task, shown

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
_PATH_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
    BlockingIOError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code is 0, 1 (a failed run or a damaged store), 2 (bad input) or 130 (Ctrl-C)."""
    args = make_parser().parse_args(argv)
    try:
        _COMMANDS[args.command](args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted; what was reported written is kept", _EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_FAILED
    except Exception as error:
        code = _exit_code(error)
        if code is None or args.traceback:
            raise
        return _fail(_sentence(error), code)
    return 0


def _exit_code(error: Exception) -> int | None:
    """The exit code for an error whose message tells the user what to do; None for a defect of this program."""
    from slimkernels.store import errors

    usage = (errors.NotAStoreError, errors.SettingsMismatchError, errors.StoreLockedError)
    if isinstance(error, errors.StoreError):
        return _EXIT_USAGE if isinstance(error, usage) else _EXIT_FAILED
    if isinstance(error, (ValueError, ImportError, *_PATH_ERRORS)):
        return _EXIT_USAGE
    # A run that failed though its input was good: the loss became NaN, the disk is full.
    return _EXIT_FAILED if isinstance(error, (FloatingPointError, OSError)) else None


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is not installed: pip install 'slimkernels[demo]'"
    return " ".join(str(error).split())


def _fail(message: str, code: int) -> int:
    print(f"slimkernels: {message}", file=sys.stderr)
    return code


def _demo(args: argparse.Namespace) -> None:
    from slimkernels.demo import run_demo

    run_demo(args.out, quick=args.quick, seed=args.seed)


def _capture(args: argparse.Namespace) -> None:
    if args.teacher is None:
        from slimkernels.cli import capture_served as cli_served

        cli_served.check(args)
        be_quiet()
        with progress_bars() as progress:
            capture = cli_served.capture_server if args.logits is None else cli_served.capture_logits
            report = capture(args, progress.console.print, progress_task(progress, "documents"))
        _print_captured(report, args.out)
        return
    if args.prompts is None and (args.tokens, args.documents, args.generated) != (None, None, None):
        raise ValueError("--tokens, --documents and --generated say what to generate: give --prompts, not --text")
    if args.prompts is not None and (args.tokens is None) == (args.documents is None):
        raise ValueError("--prompts needs to know how much to generate: give --tokens N or --documents N")
    be_quiet()
    import torch

    from slimkernels import teacher

    ranks = teacher.Ranks.from_environment(args.tensor_parallel)
    if args.prompts is not None and args.tensor_parallel > 1:
        raise ValueError(
            "--tensor-parallel captures a text that is there: generate it first, and give it as --text FILE "
            "--text-field input_ids"
        )
    if args.text is not None:
        teacher.check_corpus_file(args.text)
    prompts = None
    if args.prompts is not None:
        prompts = teacher.shipped_prompts() if args.prompts == SHIPPED_PROMPTS else teacher.read_prompts(args.prompts)
    if ranks.num_processes > 1:
        # Launchers end the other processes with SIGTERM when one has died: they keep what they have, as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    ranks.start(args.threads)
    model, tokenizer = teacher.load_teacher(
        args.teacher,
        gguf_file=args.gguf_file,
        revision=args.revision,
        dtype=getattr(torch, args.dtype),
        device=ranks.device,
        tensor_parallel=args.tensor_parallel,
    )
    with progress_bars(is_shown=ranks.process == 0) as progress:

        def documents() -> Iterator[list[int]]:
            """Starts when the store is open: what does not fit the store is found out before hours of generation."""
            if prompts is None:
                yield from teacher.read_documents(
                    args.text, tokenizer, text_field=args.text_field, max_length=args.max_length
                )
                return
            corpus = teacher.generate_documents(
                model,
                tokenizer,
                prompts,
                args.generated or f"{args.out.rstrip('/')}.jsonl",
                num_tokens=args.tokens,
                num_documents=args.documents,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.sample_top_k,
                seed=args.seed,
                batch_size=args.batch_size,
                wait=ranks.num_ranks > 1,
                progress=progress_task(progress, "generated " + ("documents" if args.tokens is None else "tokens")),
            )
            yield from teacher.read_documents(corpus.path, tokenizer, text_field="input_ids", max_length=None)

        captured = progress_task(progress, "captured tokens")
        report = teacher.capture(
            model,
            tokenizer,
            documents(),
            args.out,
            top_k=args.top_k,
            top_fraction=args.top_fraction,
            select=args.select.replace("-", "_"),
            rounds=args.rounds,
            seed=args.seed,
            top_p=args.top_p,
            temperatures=args.temperatures,
            codec=args.codec,
            batch_tokens=args.batch_tokens,
            shard_rows=args.shard_rows,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
            num_parts=args.parts,
            progress=lambda _, tokens: captured(tokens, None),
        )
    ranks.finish()
    added = f"added {report.documents} documents, {report.tokens} tokens; skipped {report.skipped}"
    if ranks.num_processes == 1:
        _print_captured(added, args.out)
    elif ranks.process % ranks.tensor_parallel == 0:
        # In one piece: the lines of several processes would mix.
        sys.stdout.write(f"rank {ranks.rank} of {ranks.num_ranks}: {added}\n")


def _print_captured(report: str, path: str) -> None:
    from slimkernels import store

    print(report)
    print_table({name: shown(value) for name, value in store.info(path).items()})


def _train(args: argparse.Namespace) -> None:
    options = {name: getattr(args, name) for name in TRAIN_FIELDS if getattr(args, name) is not None}
    be_quiet()
    from slimkernels import teacher
    from slimkernels.store import Store
    from slimkernels.trainer import train, trainer_of

    config = trainer_of(args.method)[1]
    known = {field.name for field in dataclasses.fields(config)} - {"method", "output_dir"}
    for name in options:
        # TRL calls the temperature of its draws by this name.
        if name not in known or (args.method == "minillm" and name == "temperature"):
            raise ValueError(f"{TRAIN_FIELDS[name][0]} means nothing with --method {args.method}")
    for name, value in args.option:
        if name not in known:
            raise ValueError(
                f"--option must name a field of {config.__name__} that has no flag of its own, got {name!r}"
            )
        options[name] = value
    # Opened before the student is loaded: a path that holds no store is found out at once.
    for path in filter(None, (args.store, args.eval_store)):
        Store(path)
    student: Any = None
    if args.student is not None and args.student.endswith(".json"):
        from transformers import AutoConfig

        if not Path(args.student).is_file():
            raise FileNotFoundError(f"student not found: there is no configuration file {args.student}")
        student = AutoConfig.from_pretrained(args.student)
    elif args.student is not None:
        student = teacher.load_model(args.student)
    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    has_bar = sys.stderr.isatty()
    try:
        metrics = train(
            args.store,
            student,
            args.method,
            args.out,
            tokenizer=tokenizer,
            teacher_model=None if args.teacher is None else teacher.load_model(args.teacher),
            eval_store_path=args.eval_store,
            **{"report_to": "none", "disable_tqdm": not has_bar} | options,
        )
    finally:
        # The trainer's bar leaves the cursor behind it.
        if has_bar:
            print(file=sys.stderr)
    print_table({name: shown(value) for name, value in metrics.items()})
    print(f"student saved in {args.out}")


def _eval(args: argparse.Namespace) -> None:
    from slimkernels.cli import evaluate as cli_evaluate

    is_side_by_side = cli_evaluate.is_side_by_side(args)
    be_quiet()
    if is_side_by_side:
        with progress_bars() as progress:
            report = cli_evaluate.compare(args, lambda description: progress_task(progress, description))
        print(report)
        return
    from slimkernels import teacher
    from slimkernels.models.heldout import evaluate_store
    from slimkernels.store import Store

    store = Store(args.store)
    results = {}
    with progress_bars() as progress:
        for name in args.model:
            model = teacher.load_model(name)
            update = progress_task(progress, f"documents, {name}")
            results[name] = evaluate_store(
                model, store, batch_size=args.batch_size, on_batch=lambda done, update=update: update(done, len(store))
            )
    if args.json:
        print(json.dumps(results, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    table.add_column("")
    for name in results:
        table.add_column(name, overflow="fold")
    for metric in next(iter(results.values())):
        table.add_row(metric, *(shown(metrics[metric]) for metrics in results.values()))
    Console().print(table)


def _store_info(args: argparse.Namespace) -> None:
    from slimkernels import store

    content = store.info(args.dir)
    if args.json:
        print(json.dumps(content, indent=2))
    else:
        print_table({name: shown(value) for name, value in content.items()})


def _store_verify(args: argparse.Namespace) -> None:
    from slimkernels import store

    if args.complete is not None:
        _verify_complete(args)
    store.verify(args.dir)
    content = store.info(args.dir)
    print(f"{args.dir}: every byte of {content['documents']} documents, {content['rows']} rows, is as written")


def _verify_complete(args: argparse.Namespace) -> None:
    be_quiet()
    from slimkernels import store, teacher

    teacher.check_corpus_file(args.complete)
    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    if tokenizer is not None:
        store.Store(args.dir, tokenizer_fingerprint=teacher.tokenizer_fingerprint(tokenizer))
    documents = teacher.read_documents(args.complete, tokenizer, text_field=args.text_field, max_length=args.max_length)
    found = store.verify_complete(args.dir, documents)
    print(f"{args.dir}: holds all {found} documents of {args.complete}")


def _store_import(args: argparse.Namespace) -> None:
    be_quiet()
    from slimkernels import teacher
    from slimkernels.exchange import IMPORTERS

    importer = IMPORTERS[args.format]
    given = {name: getattr(args, name) for name in IMPORT_OPTIONS if getattr(args, name) is not None}
    taken = inspect.signature(importer).parameters
    for name in set(given) - set(taken):
        raise ValueError(f"{IMPORT_OPTIONS[name][0]} means nothing with --format {args.format}")
    for name in ("tokenizer", "samples"):
        if name in taken and taken[name].default is inspect.Parameter.empty and getattr(args, name) is None:
            raise ValueError(f"--format {args.format} needs --{name}, which its files do not hold")
    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    report = importer(args.source, args.dir, tokenizer, **given)
    print(
        f"added {report.documents} documents, {report.rows} rows; skipped {report.skipped}; the label is among the "
        f"kept ids of {report.label_share:.1%} of the rows"
    )


def _store_export(args: argparse.Namespace) -> None:
    from slimkernels.exchange import export_parquet

    print(f"wrote {export_parquet(args.dir, args.out)} documents to {args.out}")


def _decode(args: argparse.Namespace) -> None:
    from slimkernels.cli import decode as cli_search

    be_quiet()
    cli_search.decode(args, print)


def _tree(args: argparse.Namespace) -> None:
    from slimkernels.cli import decode as cli_search

    cli_search.tree(args, print)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "capture": _capture,
    "train": _train,
    "eval": _eval,
    "decode": _decode,
    "tree": _tree,
    "store info": _store_info,
    "store verify": _store_verify,
    "store import": _store_import,
    "store export": _store_export,
}
