"""`slimkernels capture` from a server, or from logits in a file: arguments in, a sentence about what was done out."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from slimkernels.cli.parser import SHIPPED_PROMPTS

# Options that mean nothing without a model of one's own, and their values when they are not given.
_FOR_A_MODEL = {
    "gguf_file": None,
    "revision": None,
    "dtype": "float32",
    "tokens": None,
    "sample_top_k": None,
    "generated": None,
    "batch_size": 128,
    "batch_tokens": 4096,
    "top_p": None,
    "select": "top-k",
    "rounds": None,
    "shard_rows": None,
    "parts": None,
    "tensor_parallel": 1,
    "threads": None,
}
_FOR_A_SERVER = {
    "api": "auto",
    "key_env": None,
    "concurrency": 8,
    "max_retries": 6,
    "requests_per_minute": None,
    "vocab_size": None,
    "max_unmapped": 0.01,
}
_FOR_WHOLE_ROWS = {"top_fraction": None, "temperatures": [1.0]}


def check(args: argparse.Namespace) -> None:
    """Checks that the options fit together, before anything is loaded.

    Raises:
        ValueError: One is missing, or would have no effect.
    """
    source = "--server" if args.logits is None else "--logits"
    for name in ("model", "tokenizer"):
        if getattr(args, name) is None:
            raise ValueError(f"{source} needs --{name}: NAME of the model and MODEL for its tokenizer")
    if args.logits is not None and args.prompts is not None:
        raise ValueError("--logits needs the documents whose logits they are: give --text, not --prompts")
    if args.text is not None and args.documents is not None:
        raise ValueError("--documents says what to generate: give --prompts, not --text")
    for name, default in (_FOR_A_MODEL | (_FOR_WHOLE_ROWS if args.logits is None else _FOR_A_SERVER)).items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {source}: leave it out")


def capture_server(
    args: argparse.Namespace, say: Callable[[str], None], progress: Callable[[int, int | None], None]
) -> str:
    """Runs the command; ``say`` gets the cost before it starts."""
    from slimkernels import teacher

    tokenizer = teacher.load_tokenizer(args.tokenizer)
    documents = prompts = None
    if args.text is not None:
        documents = teacher.read_documents(args.text, tokenizer, text_field=args.text_field, max_length=args.max_length)
    else:
        prompts = teacher.shipped_prompts() if args.prompts == SHIPPED_PROMPTS else teacher.read_prompts(args.prompts)
    report = teacher.capture_server(
        args.server,
        args.model,
        tokenizer,
        args.out,
        documents=documents,
        prompts=prompts,
        top_logprobs=args.top_k or 20,
        api=args.api,
        num_documents=args.documents,
        max_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        vocab_size=args.vocab_size,
        codec=args.codec or "affine8",
        max_unmapped_fraction=args.max_unmapped,
        key_env=args.key_env,
        concurrency=args.concurrency,
        max_retries=args.max_retries,
        requests_per_minute=args.requests_per_minute,
        announce=lambda cost: say(
            f"{cost.requests} requests: {cost.prompt_tokens} prompt tokens, at most {cost.max_generated_tokens} "
            "generated tokens"
        ),
        progress=progress,
    )
    return (
        f"added {report.documents} documents, {report.tokens} tokens ({report.generated_tokens} generated); skipped "
        f"{report.skipped}, dropped {report.dropped}; {100 * report.unmapped_fraction:.2g} % of the entries unmapped"
    )


def capture_logits(
    args: argparse.Namespace, say: Callable[[str], None], progress: Callable[[int, int | None], None]
) -> str:
    """Runs the command."""
    from slimkernels import teacher

    tokenizer = teacher.load_tokenizer(args.tokenizer)
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
