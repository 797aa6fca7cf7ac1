"""The documents of ``slimkernels train``: options, and what is checked of them before a student is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from slimkernels.cli.options import add_corpus_options, refuse


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Adds --store, the options that say how several stores are put together, and --text."""
    add = parser.add_argument
    add(
        "--store",
        action="append",
        metavar="DIR",
        help="store of the documents and the teacher's logits; repeat it for several, whose documents are all read "
        "(default: none, --text is needed)",
    )
    add(
        "--store-weights",
        type=float,
        nargs="+",
        metavar="W",
        help="weight of each --store, to mix the rows of documents that several of them hold (default: such a document "
        "is read from the first that holds it)",
    )
    add(
        "--store-shares",
        type=float,
        nargs="+",
        metavar="S",
        help="share of each --store in the documents of an epoch, as in 3 1 (default: every document is read once)",
    )
    add(
        "--text",
        metavar="FILE",
        help="documents without a store, for a --teacher or --teacher-server that scores them, or --method sft: "
        ".jsonl, .json, .parquet, or .txt with blank lines between documents (default: none, --store is needed)",
    )
    add_corpus_options(parser)


def documents_of(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Returns what ``train`` learns from: the paths of the stores, or the documents of --text.

    Raises:
        ValueError: There is no tokenizer for a text.
    """
    if args.text is None:
        return args.store
    from slimkernels.teacher import read_documents
    from slimkernels.trainer import UnscoredDocuments

    if tokenizer is None:
        raise ValueError(
            "--text needs the tokenizer of the student, which was not found: give --tokenizer MODEL, or a --student "
            "that has one"
        )
    documents = read_documents(args.text, tokenizer, text_field=args.text_field, max_length=args.max_length)
    return UnscoredDocuments(documents)


def check_stores(args: argparse.Namespace) -> dict[str, Any]:
    """Opens the stores, so that a wrong path fails before the student is loaded; returns options of ``train``.

    Raises:
        ValueError: An option would have no effect, or has not a number for each store.
        StoreError: A store cannot be opened.
    """
    from slimkernels.store import Store
    from slimkernels.store.mixed_stores import check_alike
    from slimkernels.store.shares import checked_shares

    if args.eval_store is not None:
        Store(args.eval_store)
    if args.text is not None:
        _check_text(args)
        return {}
    refuse(args, ["text_field", "max_length"], "without --text")
    if args.store is None:
        raise ValueError("--store DIR or --text FILE must be given, which hold the documents to train on")
    check_alike([Store(path) for path in args.store])
    options = {"store_weights": args.store_weights, "store_shares": args.store_shares}
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not None and len(args.store) == 1:
            raise ValueError(f"{flag} has no meaning with one --store: omit it, or repeat --store")
        if value is not None:
            checked_shares(value, len(args.store), name)
    if args.store_weights is not None:
        for reason, is_so in {
            f"with --method {args.method}, which does not read the rows of the stores": args.method
            in ("sft", "minillm"),
            "with --teacher, which scores the documents itself": args.teacher is not None,
            "with --teacher-server, which scores the documents itself": args.teacher_server is not None,
        }.items():
            if is_so:
                raise ValueError(f"--store-weights has no meaning {reason}: omit it")
    return options


def _check_text(args: argparse.Namespace) -> None:
    from slimkernels.teacher.corpus_files import check_corpus_file

    refuse(args, ["store", "store_weights", "store_shares"], "with --text, whose documents are in no store")
    check_corpus_file(args.text)
    if args.method == "minillm":
        raise ValueError("--text has no meaning with --method minillm, which reads prompts: give --store")
    if args.method != "sft" and args.teacher is None and args.teacher_server is None:
        raise ValueError(
            f"--text with --method {args.method} needs --teacher or --teacher-server, which scores the documents: give "
            "one of them, or a --store that holds a teacher's logits"
        )
    if args.student is None and args.tokenizer is None:
        raise ValueError("--text needs --student, or --tokenizer for a new small one: no store says its vocabulary")
