"""``slimkernels capture``: the logits of a teacher model, of a server or of files into a store."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from slimkernels.cli import capture_hidden, capture_served
from slimkernels.cli.capture_served import SHIPPED_PROMPTS, given_documents, read_prompts
from slimkernels.cli.errors import named
from slimkernels.cli.options import (
    CODECS,
    HIDDEN_CODECS,
    Parser,
    add_command,
    add_corpus_options,
    add_model_options,
    positive_int,
    refuse,
)
from slimkernels.cli.terminal import be_quiet, print_table, progress_bars, progress_task, shown

if TYPE_CHECKING:
    from slimkernels.teacher import Ranks

_EXAMPLES = """\
examples:
  100000 tokens of the teacher's own text, from the prompts that come with the package:
    slimkernels capture --teacher smollm2-135m-instruct --prompts --tokens 100000 --out runs/store
  your text, one JSON object with a field "text" per line:
    slimkernels capture --teacher ./my-model --text corpus.jsonl --out runs/store --top-k 64 --temperatures 1 2
  on four GPUs, each with the whole teacher, or with the teacher split over all four:
    torchrun --nproc-per-node 4 -m slimkernels capture --teacher ./my-model --text corpus.jsonl --out runs/store
    torchrun --nproc-per-node 4 -m slimkernels capture --teacher ./my-model --text corpus.jsonl --out runs/store \\
        --tensor-parallel 4
  an unbiased sparse teacher, 50 draws per row:
    slimkernels capture --teacher ./my-model --text corpus.jsonl --out runs/store --select sample --rounds 50
  text that a server continues, or scores (vLLM), with the key in OPENAI_API_KEY or the variable of --key-env:
    slimkernels capture --server http://localhost:8000/v1 --model NAME --tokenizer ./my-model --prompts --out runs/store
    slimkernels capture --server http://localhost:8000/v1 --model NAME --tokenizer ./my-model --text corpus.jsonl \\
        --out runs/store
  logits in a file, (N, V) for the concatenated tokens of all documents:
    slimkernels capture --logits logits.npy --model NAME --tokenizer ./my-model --text documents.jsonl --out runs/store
  hidden states that vLLM wrote into a folder, with the head of the model that it served:
    slimkernels capture --hidden hidden/ --head ./my-model --out runs/store
Estimated time on two idle CPU cores: a few minutes for 20,000 tokens that smollm2-135m-instruct writes.
A stopped capture is continued by the same command, also with another number of processes. Train on a store that was
captured from a server with --rest ghost.
"""
# Options that apply to a teacher that runs here.
_TEACHER_ONLY = (
    *("gguf_file", "revision", "dtype", "sample_top_k", "generated", "batch_size", "batch_tokens", "top_p"),
    *("select", "rounds", "shard_rows", "parts", "tensor_parallel", "threads"),
)
# Options of the sampling of continuations. --seed is that of random draws of logits too.
_SAMPLING = ("max_new_tokens", "temperature", "sample_top_k", "batch_size", "generated")
# In the errors of the sampling top_k is another option than in those of the capture.
_SAMPLING_NAMES = {"top_k": "--sample-top-k"}
# Options by the names that the functions of ``slimkernels.teacher`` have for them.
_API_NAMES = {
    "num_tokens": "--tokens",
    "num_documents": "--documents",
    "max_tokens": "--max-new-tokens",
    "top_logprobs": "--top-k",
    "max_unmapped_fraction": "--max-unmapped",
    "num_parts": "--parts",
    # In the errors these are the documents and the model themselves.
    "documents": "",
    "model": "",
}


def add_parser(commands: Any) -> None:
    """Adds the command ``capture``."""
    parser = add_command(
        commands, "capture", run, "write a teacher's largest logits into a store", _EXAMPLES, _API_NAMES
    )
    _add_teacher_arguments(parser)
    _add_text_arguments(parser)
    capture_served.add_arguments(parser)
    capture_hidden.add_arguments(parser)
    _add_selection_arguments(parser)
    _add_process_arguments(parser)


def _add_teacher_arguments(parser: Parser) -> None:
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--teacher", metavar="MODEL", help="folder, .gguf file, smollm2-135m-instruct, or name on the hub")
    add("--server", metavar="URL", help="address of an OpenAI-compatible server, such as http://localhost:8000/v1")
    add("--logits", metavar="FILE", help=".npy or .safetensors file with the logits of the documents in --text")
    add("--hidden", metavar="DIR", help="folder of the hidden states that vLLM wrote, a .safetensors file per request")
    add_model_options(parser, "the teacher")
    parser.add_argument("--out", required=True, metavar="DIR", help="store; an existing one is appended to")


def _add_text_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("text: your own (--text), or written by the teacher (--prompts)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--text", metavar="FILE", help=".jsonl, .json, .parquet, or .txt with blank lines between documents")
    add(
        "--prompts",
        nargs="?",
        const=SHIPPED_PROMPTS,
        metavar="FILE",
        help="file with one prompt per line; without FILE, the prompts that come with the package",
    )
    add_corpus_options(group)
    add = group.add_argument
    add(
        "--teacher-prefix-field",
        metavar="NAME",
        help="field with what the teacher reads before the document, and the student does not see (default: none)",
    )
    add(
        "--tokens",
        type=positive_int,
        metavar="N",
        help="least number of tokens to generate, prompts included; or most to read of --text, the last document cut",
    )
    add("--documents", type=positive_int, metavar="N", help="number of documents to generate, or to read of --text")
    add(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="longest continuation of a prompt, in tokens (default: %(default)s)",
    )
    add("--temperature", type=float, default=1.0, metavar="T", help="sampling temperature (default: %(default)s)")
    add("--sample-top-k", type=positive_int, metavar="K", help="sample from the K most probable tokens (default: all)")
    add("--seed", type=int, default=0, metavar="N", help="random seed for sampling (default: %(default)s)")
    add(
        "--batch-size",
        type=positive_int,
        default=128,
        metavar="N",
        help="documents generated at a time (default: %(default)s)",
    )
    add("--generated", metavar="FILE", help="file that receives the generated documents (default: DIR.jsonl)")


def _add_selection_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("selection of the logits to keep")
    add = group.add_mutually_exclusive_group().add_argument
    add("--top-fraction", type=float, metavar="F", help="share of the vocabulary to keep (default: 0.05)")
    add("--top-k", type=positive_int, metavar="K", help="number of logits to keep per row (--server: default 20)")
    add = group.add_argument
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="keep, of the selected logits, only the fewest whose probabilities add up to P (default: keep all)",
    )
    add(
        "--select",
        choices=("top-k", "sample", "mixed"),
        default="top-k",
        help="keep the largest logits, random draws, or the largest and draws from the rest (default: %(default)s)",
    )
    add(
        "--rounds",
        type=positive_int,
        metavar="N",
        help="draws per row with --select sample or mixed (default: 50)",
    )
    add(
        "--temperatures",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="T",
        help="temperatures at which students may train (default: 1)",
    )
    add(
        "--codec",
        choices=(*CODECS, *HIDDEN_CODECS),
        help="encoding of the logits (default: affine8; float32 for draws), or 8 or 16 bits of hidden states",
    )
    add(
        "--batch-tokens",
        type=positive_int,
        default=4096,
        metavar="N",
        help="tokens that the teacher reads at a time (default: %(default)s)",
    )
    add(
        "--shard-rows",
        type=positive_int,
        metavar="N",
        help="rows per file of the store, the most that a killed process loses (default: about 64 MiB)",
    )


def _add_process_arguments(parser: Parser) -> None:
    group = parser.add_argument_group(
        "processes, started by torchrun or accelerate launch, each on its GPU or CPU cores"
    )
    add = group.add_argument
    add(
        "--parts",
        type=positive_int,
        metavar="N",
        help="parts of a new store, each written by one process (default: number of processes)",
    )
    add(
        "--tensor-parallel",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes over which one teacher is split (default: %(default)s)",
    )
    add(
        "--threads",
        type=positive_int,
        metavar="N",
        help="CPU threads per process (default: the machine's cores, shared by its processes)",
    )


def run(args: argparse.Namespace) -> None:
    """Captures the logits and prints what was added and what the store holds."""
    _refuse_useless(args)
    if args.teacher is not None:
        _capture_model(args)
        return
    if args.hidden is None:
        capture_served.check(args)
    be_quiet()
    with progress_bars() as progress:
        if args.hidden is not None:
            capture = capture_hidden.capture
        else:
            capture = capture_served.capture_server if args.logits is None else capture_served.capture_logits
        report = capture(args, progress.console.print, progress_task(progress, "documents"))
    _print_report(report, args.out)


def _refuse_useless(args: argparse.Namespace) -> None:
    """Refuses the options that the source of the logits or that of the text does not use."""
    if args.hidden is not None:
        capture_hidden.check(args)
        return
    if args.text is None and args.prompts is None:
        args.parser.error("one of the arguments --text --prompts is required")
    refuse(args, capture_hidden.HIDDEN_ONLY, "without --hidden")
    if args.teacher is not None:
        refuse(args, capture_served.SERVED, "with --teacher, which runs here and has its own tokenizer")
        if args.select == "top-k":
            refuse(args, ["rounds"], "without --select sample or mixed")
    else:
        source = "--server" if args.logits is None else "--logits"
        refuse(args, _TEACHER_ONLY, f"with {source}")
        if args.codec in HIDDEN_CODECS:
            raise ValueError(f"--codec {args.codec} needs a teacher's hidden states, which {source} does not give")
    if args.text is not None:
        draws = args.teacher is not None and args.select != "top-k"
        refuse(args, _SAMPLING if draws else (*_SAMPLING, "seed"), "with --text, which is not generated")
        if args.logits is not None:
            useless = ["max_length", "teacher_prefix_field"]
            refuse(args, useless, "with --logits, which are those of whole documents")
    else:
        refuse(args, ["max_length", "teacher_prefix_field"], "with --prompts, whose documents are not split")
        if args.prompts == SHIPPED_PROMPTS:
            refuse(args, ["text_field"], "with the prompts that come with the package")


def _print_report(report: str, path: str) -> None:
    from slimkernels import store

    print(report)
    print_table({name: shown(value) for name, value in store.info(path).items()})


def _capture_model(args: argparse.Namespace) -> None:
    _check_generation(args)
    be_quiet()
    import torch

    from slimkernels import teacher

    ranks = teacher.Ranks.from_environment(args.tensor_parallel)
    _check_numbers(args)
    prompts = _check_source(args)
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
        captured = progress_task(progress, "captured tokens")
        total: list[int] = []
        unit = "documents" if args.tokens is None else "tokens"
        generated = progress_task(progress, f"generated {unit}") if prompts is not None else None
        report = teacher.capture(
            model,
            tokenizer,
            _documents(args, model, tokenizer, prompts, ranks, generated, total.append),
            args.out,
            select=args.select.replace("-", "_"),
            codec=args.codec,
            **_selected(args),
            batch_tokens=args.batch_tokens,
            shard_rows=args.shard_rows,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
            num_parts=args.parts,
            progress=lambda _, tokens: captured(tokens, total[0] if total else None),
        )
    ranks.finish()
    _print_rank_report(
        f"added {report.documents} documents, {report.tokens} tokens; skipped {report.skipped}", args, ranks
    )


def _check_generation(args: argparse.Namespace) -> None:
    if args.prompts is not None and (args.tokens is None) == (args.documents is None):
        raise ValueError("--prompts needs the amount of text to generate: give --tokens N or --documents N")


def _check_numbers(args: argparse.Namespace) -> None:
    """Checks what selects the logits and draws the text, before the teacher is loaded."""
    from slimkernels.store.rank_writer import check_num_parts
    from slimkernels.teacher.generation import SamplingOptions
    from slimkernels.teacher.selection import check_selection

    check_num_parts(args.parts)
    check_selection(args.select.replace("-", "_"), args.codec, **_selected(args))
    if args.prompts is not None:
        with named(_SAMPLING_NAMES):
            SamplingOptions(args.max_new_tokens, args.temperature, args.sample_top_k, args.seed, args.batch_size)


def _selected(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the numbers of the selection by their names in ``capture``."""
    names = ("top_k", "top_fraction", "top_p", "rounds", "seed", "temperatures")
    return {name: getattr(args, name) for name in names}


def _check_source(args: argparse.Namespace) -> list[str] | None:
    """Checks the file of --text, or returns the prompts, before the teacher is loaded."""
    from slimkernels import teacher

    if args.text is not None:
        teacher.check_corpus_file(args.text)
        return None
    if args.tensor_parallel > 1:
        raise ValueError(
            "--tensor-parallel captures existing text only: generate it first, and give it as --text FILE "
            "--text-field input_ids"
        )
    return read_prompts(args)


def _documents(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    prompts: list[str] | None,
    ranks: Ranks,
    generated: Callable[[int, int | None], None] | None,
    on_total: Callable[[int], None],
) -> Iterator[list[int]]:
    """Yields the documents as token ids, after the teacher has generated all of them where there are prompts.

    As a generator this starts once the store is open, so that options that do not fit the store fail before hours of
    generation. ``on_total`` receives the number of tokens where it is known before they are captured.
    """
    from slimkernels import teacher

    if prompts is None:
        yield from given_documents(args, tokenizer)
        return
    with named(_SAMPLING_NAMES):
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
            progress=generated,
        )
    if ranks.num_ranks == 1:
        on_total(corpus.tokens)
    yield from teacher.read_documents(corpus.path, tokenizer, text_field="input_ids", max_length=None)


def _print_rank_report(added: str, args: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.num_processes == 1:
        _print_report(added, args.out)
    elif ranks.process % ranks.tensor_parallel == 0:
        # In one piece: the lines of several processes would mix.
        sys.stdout.write(f"rank {ranks.rank} of {ranks.num_ranks}: {added}\n")
