"""The sources of ``slimkernels capture`` that are not a model which runs here: a server, and a file of logits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from slimkernels.cli.options import SERVER_FIELDS, Parser, add_fields, given_fields, positive_int, refuse

SHIPPED_PROMPTS = "shipped"
# Options that have no meaning for a teacher that runs here.
_SERVER_ONLY = ("api", *SERVER_FIELDS, "vocab_size", "max_unmapped")
SERVED = ("model", "tokenizer", *_SERVER_ONLY)


def add_arguments(parser: Parser) -> None:
    """Adds the options of a server and of a file of logits."""
    group = parser.add_argument_group("options of --server and --logits")
    add = group.add_argument
    add("--model", metavar="NAME", help="name of the model on the server; with --logits, name kept in the store")
    add("--tokenizer", metavar="MODEL", help="folder or name of the model's tokenizer")
    add(
        "--api",
        choices=("auto", "completions", "chat", "llama.cpp", "sglang"),
        default="auto",
        help="endpoint of the server (default: %(default)s)",
    )
    add_fields(group, SERVER_FIELDS)
    add("--vocab-size", type=positive_int, metavar="V", help="rows of the model's head (default: the tokenizer's size)")
    add(
        "--max-unmapped",
        type=float,
        default=0.01,
        metavar="F",
        help="largest accepted share of entries whose token the tokenizer does not know (default: %(default)s)",
    )


def check(args: argparse.Namespace) -> None:
    """Checks that the options fit together, before anything is loaded.

    Raises:
        ValueError: An option is missing, or would have no effect.
    """
    source = "--server" if args.logits is None else "--logits"
    for name in ("model", "tokenizer"):
        # Logits of documents of token ids need none.
        if getattr(args, name) is None and (name == "model" or args.logits is None):
            raise ValueError(f"{source} needs --{name}: NAME of the model and MODEL for its tokenizer")
    if args.logits is not None and args.prompts is not None:
        raise ValueError("--logits needs the documents that were scored: give --text, not --prompts")
    if args.logits is not None:
        refuse(args, _SERVER_ONLY, "with --logits")
        refuse(args, ["documents", "tokens"], "with --logits, which are those of all documents")
    else:
        refuse(args, ["top_fraction", "temperatures"], "with --server")
        if args.prompts is not None:
            refuse(args, ["tokens"], "with --server and --prompts, whose documents are counted by --documents")


def capture_server(
    args: argparse.Namespace, say: Callable[[str], None], progress: Callable[[int, int | None], None]
) -> str:
    """Captures from a server and returns the report; ``say`` receives the cost before the first request."""
    from slimkernels import teacher
    from slimkernels.serving.client import ServerClient, TokenBudget
    from slimkernels.teacher.server import check_arguments

    asked = {
        "top_logprobs": args.top_k or 20,
        "api": args.api,
        "num_documents": args.documents if args.text is None else None,
        "max_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
        "max_unmapped_fraction": args.max_unmapped,
    }
    limits = given_fields(args, SERVER_FIELDS)
    check_arguments(**asked)
    # A client that asks nothing checks the address and the limits.
    budget = TokenBudget(args.token_budget)
    ServerClient(
        args.server, budget=budget, **{name: limits[name] for name in limits if name != "token_budget"}
    ).close()
    tokenizer = teacher.load_tokenizer(args.tokenizer)
    documents = prompts = None
    if args.text is not None:
        documents = given_documents(args, tokenizer)
    else:
        prompts = read_prompts(args)
    report = teacher.capture_server(
        args.server,
        args.model,
        tokenizer,
        args.out,
        documents=documents,
        prompts=prompts,
        vocab_size=args.vocab_size,
        codec=args.codec or "affine8",
        announce=lambda cost: say(
            f"{cost.requests} requests: {cost.prompt_tokens} prompt tokens, at most {cost.max_generated_tokens} "
            "generated tokens"
        ),
        progress=progress,
        **asked,
        **limits,
    )
    return (
        f"added {report.documents} documents, {report.tokens} tokens ({report.generated_tokens} generated); skipped "
        f"{report.skipped}, dropped {report.dropped}; {100 * report.unmapped_fraction:.2g} % of the entries unmapped"
        + "".join(f"\ndropped because {reason}" for reason in report.drop_reasons)
    )


def capture_logits(
    args: argparse.Namespace, say: Callable[[str], None], progress: Callable[[int, int | None], None]
) -> str:
    """Captures from a file of logits and returns the report; ``say`` receives the size of the text first."""
    from slimkernels import teacher
    from slimkernels.teacher.selection import check_selection

    check_selection(
        "top_k", args.codec, top_k=args.top_k, top_fraction=args.top_fraction, temperatures=args.temperatures
    )
    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    documents = list(teacher.read_documents(args.text, tokenizer, text_field=args.text_field, max_length=None))
    say(f"{len(documents)} documents, {sum(map(len, documents))} tokens")
    report = teacher.capture_logits(
        args.logits,
        tokenizer,
        documents,
        args.out,
        name=args.model,
        top_k=args.top_k,
        top_fraction=args.top_fraction,
        temperatures=args.temperatures,
        codec=args.codec or "affine8",
        progress=lambda done, _: progress(done, len(documents)),
    )
    return f"added {report.documents} documents, {report.tokens} tokens; skipped {report.skipped}"


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Returns the prompts of --prompts."""
    from slimkernels import teacher

    if args.prompts == SHIPPED_PROMPTS:
        return teacher.shipped_prompts()
    is_default = args.text_field == args.parser.get_default("text_field")
    return teacher.read_prompts(args.prompts, text_field=None if is_default else args.text_field)


def given_documents(args: argparse.Namespace, tokenizer: Any) -> Iterator[list[int]]:
    """Returns the documents of --text as token ids."""
    from slimkernels import teacher

    return teacher.read_documents(
        args.text,
        tokenizer,
        text_field=args.text_field,
        teacher_prefix_field=args.teacher_prefix_field,
        max_length=args.max_length,
        num_documents=args.documents,
        num_tokens=args.tokens,
    )
