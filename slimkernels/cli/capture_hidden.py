"""The source of ``slimkernels capture`` that is a folder of hidden states, written by a server."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from slimkernels.cli.options import Parser, refuse

# Options that have a meaning for hidden states alone.
HIDDEN_ONLY = ("head", "check_server")
# All others than these are refused with --hidden.
_USED = (
    *("hidden", "head", "check_server", "model", "tokenizer", "dtype", "out"),
    *("top_fraction", "top_k", "temperatures", "codec", "shard_rows"),
)


def add_arguments(parser: Parser) -> None:
    """Adds the options of hidden states."""
    add = parser.add_argument_group("options of --hidden").add_argument
    add("--head", metavar="MODEL", help="folder or name of the model that was served; its head makes the logits")
    add(
        "--check-server",
        metavar="URL",
        help="server that scores one document, named by --model, to find the layer; then --head needs the weights of "
        "its final layers alone",
    )


def check(args: argparse.Namespace) -> None:
    """Checks that the options fit together, before anything is loaded.

    Raises:
        ValueError: An option is missing, or would have no effect.
    """
    if args.head is None:
        raise ValueError("--hidden needs --head: MODEL that was served, whose head makes the logits")
    refuse(args, {action.dest for action in args.parser._actions} - {"help", *_USED}, "with --hidden")
    if args.check_server is None:
        refuse(args, ["model"], "with --hidden without --check-server")


def capture(args: argparse.Namespace, say: Callable[[str], None], progress: Callable[[int, int | None], None]) -> str:
    """Captures from hidden states and returns the report; ``say`` is not used, as the capture costs nothing."""
    import torch

    from slimkernels import teacher
    from slimkernels.models.final_layers import has_safetensors, load_final_layers
    from slimkernels.teacher.selection import check_selection

    check_selection(
        "top_k", args.codec, top_k=args.top_k, top_fraction=args.top_fraction, temperatures=args.temperatures
    )
    dtype = getattr(torch, args.dtype)
    tokenizer = teacher.load_tokenizer(args.tokenizer or args.head)
    if args.check_server is not None and has_safetensors(args.head):
        model = load_final_layers(args.head, dtype=dtype)
    else:
        model = teacher.load_model(args.head, dtype=dtype)
    report = teacher.capture_hidden(
        args.hidden,
        model,
        tokenizer,
        args.out,
        top_k=args.top_k,
        top_fraction=args.top_fraction,
        temperatures=args.temperatures,
        codec=args.codec or "affine8",
        server=args.check_server,
        server_model=args.model,
        shard_rows=args.shard_rows,
        progress=lambda done, _: progress(done, None),
    )
    added = f"added {report.documents} documents, {report.tokens} tokens; skipped {report.skipped}"
    if report.layer is None:
        return added
    norm = "the final norm applied here" if report.norm_applied else "after the final norm"
    return f"{added}; read layer {report.layer} of the files, {norm}"
