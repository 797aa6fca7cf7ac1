"""The arguments of the command line, and its help."""

from __future__ import annotations

import argparse
import json
from typing import Any

from slimkernels.cli import evaluate as cli_evaluate
from slimkernels.cli.decode_arguments import DECODE_EXAMPLES, TREE_EXAMPLES, add_decode, add_tree

SHIPPED_PROMPTS = "shipped"
_DTYPES = ("float32", "bfloat16", "float16")
_CODECS = ("affine8", "affine6", "bfloat16", "float32")

_EXAMPLES = """\
examples:
  slimkernels demo --out demo-output
  slimkernels capture --teacher smollm2-135m-instruct --prompts --tokens 100000 --out runs/store
  slimkernels train --store runs/store --method slim --out runs/student
  slimkernels eval --store runs/held-out --model runs/student runs/other-student
  slimkernels decode --model runs/student "Why is the sky blue?"
  slimkernels store info runs/store
  slimkernels store verify runs/store --complete corpus.jsonl --tokenizer ./my-model
"""
_CAPTURE_EXAMPLES = """\
examples:
  the teacher's own text, 100000 tokens of it, from the prompts that come with the package:
    slimkernels capture --teacher smollm2-135m-instruct --prompts --tokens 100000 --out runs/store
  your text, one JSON object with a field "text" per line:
    slimkernels capture --teacher ./my-model --text corpus.jsonl --out runs/store --top-k 64 --temperatures 1 2
  on four GPUs, each with the whole teacher, or with the teacher split over all four:
    torchrun --nproc-per-node 4 -m slimkernels capture --teacher ./my-model --text corpus.jsonl --out runs/store
    torchrun --nproc-per-node 4 -m slimkernels capture ... --tensor-parallel 4
  an unbiased teacher of 50 draws a row:
    slimkernels capture --teacher ./my-model --text corpus.jsonl --out runs/store --select sample --rounds 50
  text that a server continues, or scores (vLLM), with the key in OPENAI_API_KEY or the variable of --key-env:
    slimkernels capture --server http://localhost:8000/v1 --model NAME --tokenizer ./my-model --prompts --out runs/store
    slimkernels capture --server http://localhost:8000/v1 --model NAME --tokenizer ./my-model --text corpus.jsonl \\
        --out runs/store
  logits that you have, (N, V) for all tokens of the documents, one after the other:
    slimkernels capture --logits logits.npy --model NAME --tokenizer ./my-model --text documents.jsonl --out runs/store
The same command continues after it was stopped, also with another number of processes. A store from a server is
trained on with --rest ghost.
"""
_TRAIN_EXAMPLES = """\
examples:
  a new small student:
    slimkernels train --store runs/store --method slim --out runs/student --epochs 3
  your own, with the tail of the teacher's distribution as one more outcome:
    slimkernels train --store runs/store --student ./my-student --method kd --rest ghost --out runs/student
The same command continues from the newest checkpoint after it was stopped.
"""
_INFO_EXPLAINED = """\
bits_per_entry counts all bytes of the store; entropy_bound_bits_per_entry is what no coder of the same ids can beat.
The quantisation_ lines estimate what rounding the kept logits costs, from up to 256 rows. The logits before rounding
are not in the store: each row is moved by uniform noise of half a step either way, as the original may have been, and
what the codec makes of it is compared with it. Over the kept ids, adding up to 1, before and after rounding:
  quantisation_kl_nats    mean KL divergence of the rounded from the unrounded row
  quantisation_gradient   mean Euclidean error of the loss's gradient by the student's logits (that is at most 1.41)
  quantisation_log_mass   mean change of the logarithm of the kept probability
"""
# Options of `train` that are fields of SlimConfig.
TRAIN_FIELDS: dict[str, tuple[str, type, str]] = {
    "num_train_epochs": ("--epochs", float, "passes over the store"),
    "max_steps": ("--max-steps", int, "optimizer steps, instead of epochs"),
    "learning_rate": ("--learning-rate", float, "peak learning rate"),
    "per_device_train_batch_size": ("--batch-size", int, "documents per step and device"),
    "gradient_accumulation_steps": ("--accumulation-steps", int, "batches per optimizer step"),
    "seed": ("--seed", int, "of the order of the documents"),
    "rest": ("--rest", str, "the teacher outside its kept ids: renorm, zero, ghost, zero_logit, renorm_both"),
    "divergence": ("--divergence", str, "forward_kl, soft_ce, reverse_kl, jsd, skew_kl"),
    "temperature": ("--temperature", float, "of the divergence"),
    "kd_weight": ("--kd-weight", float, "factor of the divergence"),
}
_IMPORT_EXAMPLES = """\
examples:
  a vLLM server's log-probabilities, as axolotl is given them:
    slimkernels store import --format axolotl data.jsonl runs/store --tokenizer ./teacher --logprobs-field logprobs
  what DistillKit sampled, its compression_config.yaml beside the files:
    slimkernels store import --format distillkit logits/ runs/store --tokenizer ./teacher
  Megatron-LM's cached logits, with the samples of that run, in order, as token ids:
    slimkernels store import --format megatron cache/ runs/store --tokenizer ./teacher --samples samples.parquet
  a file of `slimkernels store export`:
    slimkernels store import --format parquet store.parquet runs/store
"""
# Options of `store import` that are arguments of the importers, which take what belongs to their format.
IMPORT_OPTIONS: dict[str, tuple[str, type, str]] = {
    "vocab_size": ("--vocab-size", int, "of the teacher (default: the tokenizer's)"),
    "teacher": ("--teacher", str, "its name, kept in the store"),
    "codec": ("--codec", str, "affine8, affine6, bfloat16 or float32 (default: affine8, or the parquet file's)"),
    "temperature": ("--temperature", float, "axolotl: of the log-probabilities (default: 1)"),
    "logprobs_field": ("--logprobs-field", str, "axolotl: the raw column; without it, prepared columns are read"),
    "messages_field": ("--messages-field", str, "axolotl: the conversation, where there are no input_ids"),
    "alignment": ("--alignment", str, "axolotl: what prepared row j is about, token j + 1 (next) or j (same)"),
    "compression_config": ("--compression-config", str, "distillkit: its file (default: the one beside the source)"),
    "pad_token_id": ("--pad-token-id", int, "distillkit: rows with this label are left out"),
    "check_alignment": ("--no-alignment-check", bool, "import rows whatever tokens they seem to be about"),
    "samples": ("--samples", str, "megatron: .parquet, .arrow or .jsonl of input_ids"),
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of every command; it sets ``command`` to the command's words, as in "store info"."""
    description = "Distil a teacher's kept logits into a student, and search with a model."
    parser = _Parser(prog="slimkernels", description=description, epilog=_EXAMPLES)
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    demo = _command(commands, "demo", "a teacher writes, a student learns it three ways", "")
    demo.add_argument("--out", default="demo-output", metavar="DIR", help="gets everything (default: %(default)s)")
    demo.add_argument("--quick", action="store_true", help="a much smaller run that only shows that it works")
    demo.add_argument("--seed", type=int, default=0, metavar="N")
    _add_capture(_command(commands, "capture", "a teacher's kept logits into a store", _CAPTURE_EXAMPLES))
    _add_train(_command(commands, "train", "a student on a store", _TRAIN_EXAMPLES))
    evaluate = _command(
        commands, "eval", "models on a held-out store, or models and decoders side by side", cli_evaluate.EXAMPLES
    )
    evaluate.add_argument("--store", metavar="DIR", help="held-out, with the teacher's logits")
    evaluate.add_argument("--model", nargs="+", metavar="MODEL", help="folders or names of models")
    evaluate.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="documents at a time")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    cli_evaluate.add_arguments(evaluate, _positive)
    add_decode(_command(commands, "decode", "answers of a model by tree search", DECODE_EXAMPLES))
    add_tree(_command(commands, "tree", "a page that shows the trees of a trace", TREE_EXAMPLES))
    store = commands.add_parser("store", help="look into a store", description="Look into a store.")
    actions = store.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    info = _command(actions, "info", "what a store holds, and what it costs", _INFO_EXPLAINED)
    info.add_argument("dir", metavar="DIR")
    info.add_argument("--json", action="store_true", help="print JSON")
    verify = _command(actions, "verify", "check every byte; exit code 1 when damaged", "")
    verify.add_argument("dir", metavar="DIR")
    verify.add_argument("--complete", metavar="FILE", help="check too that every document of this corpus is there")
    verify.add_argument("--tokenizer", metavar="MODEL", help="of the corpus; not needed for a field of token ids")
    _add_corpus_options(verify.add_argument)
    _add_import(_command(actions, "import", "teacher files of other projects into a store", _IMPORT_EXAMPLES))
    export = _command(actions, "export", "a store as one parquet file, for Hugging Face datasets", "")
    export.add_argument("dir", metavar="DIR")
    export.add_argument("out", metavar="FILE", help="ends in .parquet")
    return parser


def _add_corpus_options(add: Any) -> None:
    add("--text-field", default="text", metavar="NAME", help="of text or of token ids (default: %(default)s)")
    add("--max-length", type=_positive, default=1024, metavar="N", help="longer texts are split (default: %(default)s)")


class _Parser(argparse.ArgumentParser):
    """Keeps the line breaks of the examples, and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)


def _command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=examples
    )
    parser.set_defaults(command=parser.prog.removeprefix("slimkernels "))
    return parser


def _add_capture(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument(
        "--teacher", metavar="MODEL", help="folder, .gguf file, smollm2-135m-instruct, or a hub's name"
    )
    teacher.add_argument(
        "--server", metavar="URL", help="of an OpenAI-compatible server, like http://localhost:8000/v1"
    )
    teacher.add_argument("--logits", metavar="FILE", help=".npy or .safetensors with the logits of --text")
    add("--gguf-file", metavar="NAME", help="the .gguf file inside the teacher's folder or repository")
    add("--revision", metavar="REV", help="of a teacher from the hub")
    add("--dtype", choices=_DTYPES, default="float32", help="of the teacher's weights (default: %(default)s)")
    add("--out", required=True, metavar="DIR", help="the store; appended to when it is there")
    text = parser.add_argument_group("text: the teacher's own, from --prompts, or yours, from --text")
    source = text.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", metavar="FILE", help=".jsonl, .json, .parquet, or .txt (a blank line between documents)"
    )
    source.add_argument(
        "--prompts",
        nargs="?",
        const=SHIPPED_PROMPTS,
        metavar="FILE",
        help="a prompt per line; without FILE the shipped ones",
    )
    add = text.add_argument
    _add_corpus_options(add)
    add("--tokens", type=_positive, metavar="N", help="generate this many tokens")
    add("--documents", type=_positive, metavar="N", help="generate this many documents")
    add("--max-new-tokens", type=_positive, default=128, metavar="N", help="of a document (default: %(default)s)")
    add("--temperature", type=float, default=1.0, metavar="T", help="of the draws (default: %(default)s)")
    add("--sample-top-k", type=_positive, metavar="K", help="draw among the K most probable tokens (default: all)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add("--batch-size", type=_positive, default=128, metavar="N", help="documents at a time (default: %(default)s)")
    add("--generated", metavar="FILE", help="gets the generated documents (default: DIR.jsonl)")
    server = parser.add_argument_group("--server, --logits")
    add = server.add_argument
    add("--model", metavar="NAME", help="the server's name for the model; with --logits, the name to store")
    add("--tokenizer", metavar="MODEL", help="folder or name of the model's tokenizer")
    add("--api", choices=("auto", "completions", "chat", "llama.cpp"), default="auto", help="(default: %(default)s)")
    add("--key-env", metavar="NAME", help="environment variable with the key (default: OPENAI_API_KEY, if it is set)")
    add("--concurrency", type=_positive, default=8, metavar="N", help="requests at a time (default: %(default)s)")
    add("--max-retries", type=int, default=6, metavar="N", help="of a request (default: %(default)s)")
    add("--requests-per-minute", type=float, metavar="N", help="limit, repetitions included (default: none)")
    add("--vocab-size", type=_positive, metavar="V", help="rows of the model's head (default: the tokenizer's tokens)")
    add("--max-unmapped", type=float, default=0.01, metavar="F", help="share of foreign tokens (default: %(default)s)")
    logits = parser.add_argument_group("logits")
    kept = logits.add_mutually_exclusive_group()
    kept.add_argument("--top-fraction", type=float, metavar="F", help="share of the vocabulary kept (default: 0.05)")
    kept.add_argument("--top-k", type=_positive, metavar="K", help="entries kept of every row (--server: default 20)")
    add = logits.add_argument
    add("--top-p", type=float, metavar="P", help="of those, the fewest that hold this much probability (default: all)")
    add("--select", choices=("top-k", "sample", "mixed"), default="top-k", help="the largest, draws, or both")
    add("--rounds", type=_positive, metavar="N", help="draws of every row, with --select sample or mixed (default: 50)")
    add("--temperatures", type=float, nargs="+", default=[1.0], metavar="T", help="students may use these (default: 1)")
    add("--codec", choices=_CODECS, help="of the kept logits (default: affine8; float32 with draws)")
    add("--batch-tokens", type=_positive, default=4096, metavar="N", help="tokens at a time (default: %(default)s)")
    add("--shard-rows", type=_positive, metavar="N", help="tokens that a kill loses at most (default: about 64 MiB)")
    processes = parser.add_argument_group("processes, under torchrun or accelerate launch: each its GPU, or its CPUs")
    add = processes.add_argument
    add("--parts", type=_positive, metavar="N", help="of a new store, at most one process each (default: processes)")
    add("--tensor-parallel", type=_positive, default=1, metavar="N", help="processes that hold one teacher together")
    add("--threads", type=_positive, metavar="N", help="of each process on the CPU (default: the machine's, shared)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--store", required=True, metavar="DIR")
    add("--method", required=True, choices=("slim", "kd", "sft", "sampled", "reverse_kl", "jsd", "gkd", "minillm"))
    add("--out", required=True, metavar="DIR", help="gets the checkpoints and the student")
    add("--student", metavar="MODEL", help="a model, or the .json configuration of a new one (default: a small Llama)")
    add("--tokenizer", metavar="MODEL", help="checked against the store's, and saved with the student")
    add("--teacher", metavar="MODEL", help="scores the documents as they come, in place of the store's rows")
    add("--eval-store", metavar="DIR", help="a held-out store to measure the student on")
    for field, (flag, kind, text) in TRAIN_FIELDS.items():
        add(flag, dest=field, type=kind, metavar=kind.__name__.upper(), help=text)
    add(
        "--option",
        type=_key_value,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any field of SlimConfig, or of TRL's MiniLLMConfig",
    )


def _add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--format", required=True, choices=("axolotl", "distillkit", "megatron", "parquet"))
    add("source", metavar="SOURCE", help="a file, or a folder of them")
    add("dir", metavar="DIR", help="the store; appended to when it is there")
    add("--tokenizer", metavar="MODEL", help="the teacher's; needed but for parquet")
    for field, (flag, kind, text) in IMPORT_OPTIONS.items():
        if kind is bool:
            add(flag, dest=field, action="store_const", const=False, help=text)
        else:
            add(flag, dest=field, type=kind, metavar=kind.__name__.upper(), help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _key_value(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
