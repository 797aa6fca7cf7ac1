"""The stores of ``slimkernels train``: their options, and what is checked of them before a student is loaded."""

from __future__ import annotations

import argparse
from typing import Any


def add_store_options(parser: argparse.ArgumentParser) -> None:
    """Adds --store, and the options that say how several stores are put together."""
    add = parser.add_argument
    add(
        "--store",
        required=True,
        action="append",
        metavar="DIR",
        help="store of the documents and the teacher's logits; repeat it for several, whose documents are all read",
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


def check_stores(args: argparse.Namespace) -> dict[str, Any]:
    """Opens the stores, so that a wrong path fails before the student is loaded; returns options of ``train``.

    Raises:
        ValueError: An option would have no effect, or has not a number for each store.
        StoreError: A store cannot be opened.
    """
    from slimkernels.store import Store
    from slimkernels.store.mixed_stores import check_alike
    from slimkernels.store.shares import checked_shares

    check_alike([Store(path) for path in args.store])
    if args.eval_store is not None:
        Store(args.eval_store)
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
