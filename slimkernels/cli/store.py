"""``slimkernels store``: look into a store, check it, import and export it, turn it into one of another tokenizer."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from slimkernels.cli.options import (
    CODECS,
    FieldOptions,
    Parser,
    add_command,
    add_corpus_options,
    add_fields,
    given_fields,
    positive_int,
    refuse,
)
from slimkernels.cli.store_translate import add_translate
from slimkernels.cli.terminal import be_quiet, print_columns, print_histogram, print_json, print_table, shown

_INFO_EXPLAINED = """\
bits_per_entry counts all bytes of the store; entropy_bound_bits_per_entry is the least that any coding of the same ids
can reach. The lines that begin with quantisation_ estimate the cost of rounding the kept logits, from up to 256 rows.
The store does not hold the logits before rounding, so each row is moved by uniform noise of up to half a step, as the
original may have been, encoded again, and compared with the encoded row. Over the kept ids, normalised to add up to 1,
before and after rounding:
  quantisation_kl_nats    mean KL divergence of the rounded from the unrounded row
  quantisation_gradient   mean Euclidean error of the loss's gradient by the student's logits (at most 1.41)
  quantisation_log_mass   mean change of the logarithm of the kept probability
In a store of hidden states the noise is added to these, and the rows are made of them before and after.
Where the size of the teacher's hidden states is known, bytes_per_token_affine8, _hidden8 and _hidden16 are what the
same rows take as logits and as hidden states, without the head_bytes of the teacher's head, which is kept once;
smallest_codec is the smallest for these documents with the head.
"""
_STATS_EXPLAINED = """\
The entropy of a row is that of its kept ids and one outcome for all others, at temperature 1, from the store alone. It
shows which documents are easy for the teacher: `slimkernels train --order easy-first` begins with the lowest means.
"""
_VERIFY_EXAMPLES = """\
examples:
  slimkernels store verify runs/store
  slimkernels store verify runs/store --complete corpus.jsonl --tokenizer ./my-model
"""
_IMPORT_EXAMPLES = """\
examples:
  log-probabilities of a vLLM server, in the form that axolotl reads:
    slimkernels store import --format axolotl data.jsonl runs/store --tokenizer ./teacher --logprobs-field logprobs
  samples of DistillKit, with its compression_config.yaml in the same folder:
    slimkernels store import --format distillkit logits/ runs/store --tokenizer ./teacher
  cached logits of Megatron-LM, with the samples of that run, in order, as token ids:
    slimkernels store import --format megatron cache/ runs/store --tokenizer ./teacher --samples samples.parquet
  a file of `slimkernels store export`:
    slimkernels store import --format parquet store.parquet runs/store
"""
_EXPORT_EXAMPLES = """\
examples:
  slimkernels store export runs/store store.parquet
"""
# Options that are arguments of the importers, each of which takes those that its format needs.
_IMPORT_OPTIONS: FieldOptions = {
    "vocab_size": (
        "--vocab-size",
        {"type": positive_int, "metavar": "V"},
        "size of the teacher's vocabulary (default: the tokenizer's)",
    ),
    "teacher": ("--teacher", {"metavar": "NAME"}, "name of the teacher, kept in the store"),
    "codec": (
        "--codec",
        {"choices": CODECS},
        "encoding of the logits (default: affine8; parquet: as in the file)",
    ),
    "temperature": (
        "--temperature",
        {"type": float, "metavar": "T"},
        "axolotl: temperature of the log-probabilities (default: 1)",
    ),
    "logprobs_field": (
        "--logprobs-field",
        {"metavar": "NAME"},
        "axolotl: column of raw log-probabilities (default: prepared columns)",
    ),
    "messages_field": (
        "--messages-field",
        {"metavar": "NAME"},
        "axolotl: column of the conversation, where there are no input_ids",
    ),
    "alignment": (
        "--alignment",
        {"choices": ("next", "same")},
        "axolotl: token that a prepared row j predicts, j + 1 (next) or j (same) (default: next)",
    ),
    "compression_config": (
        "--compression-config",
        {"metavar": "FILE"},
        "distillkit: file with the settings of the compression (default: compression_config.yaml next to the files)",
    ),
    "pad_token_id": (
        "--pad-token-id",
        {"type": int, "metavar": "ID"},
        "distillkit: label of padding; its rows are not imported",
    ),
    "check_alignment": (
        "--no-alignment-check",
        {"action": "store_const", "const": False},
        "import rows even if they seem to predict other tokens",
    ),
    "samples": (
        "--samples",
        {"metavar": "FILE"},
        "megatron: .parquet, .arrow or .jsonl file with the input_ids of the samples",
    ),
}


def add_parser(commands: Any) -> None:
    """Adds the commands ``store info``, ``stats``, ``verify``, ``import``, ``export`` and ``translate``."""
    summary = "look into a store, check it, import, export and translate it"
    parser = commands.add_parser("store", help=summary, description=f"{summary.capitalize()}.")
    actions = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    _add_info(actions)
    _add_stats(actions)
    _add_verify(actions)
    _add_import(actions)
    _add_export(actions)
    add_translate(actions)


def _add_info(actions: Any) -> None:
    parser = add_command(actions, "info", _info, "show what a store holds and how much space it takes", _INFO_EXPLAINED)
    parser.add_argument("dir", metavar="DIR", help="store")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _info(args: argparse.Namespace) -> None:
    from slimkernels import store

    content = store.info(args.dir)
    if args.json:
        print(json.dumps(content, indent=2))
    else:
        print_table({name: shown(value) for name, value in content.items()})


def _add_stats(actions: Any) -> None:
    summary = "show the distribution of the teacher's entropy over tokens and documents"
    parser = add_command(actions, "stats", _stats, summary, _STATS_EXPLAINED)
    parser.add_argument("dir", metavar="DIR", help="store")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _stats(args: argparse.Namespace) -> None:
    from slimkernels import store

    content = store.stats(args.dir)
    if args.json:
        print_json(content)
        return
    print(f"{content['documents']} documents, {content['rows']} rows; entropy in nats")
    shown_by = {"per token": content["token_entropy"], "mean of a document": content["document_entropy"]}
    known = {heading: found for heading, found in shown_by.items() if found is not None}
    print_columns(
        {
            heading: {name: shown(value) for name, value in ({"mean": found["mean"]} | found["quantiles"]).items()}
            for heading, found in known.items()
        }
    )
    for heading, found in known.items():
        print(f"\n{heading}")
        print_histogram(**found["histogram"])


def _add_verify(actions: Any) -> None:
    summary = "check every byte of a store; the exit code is 1 if it is damaged"
    parser = add_command(actions, "verify", _verify, summary, _VERIFY_EXAMPLES)
    add = parser.add_argument
    add("dir", metavar="DIR", help="store")
    add("--complete", metavar="FILE", help="corpus; check also that the store holds each of its documents")
    add("--tokenizer", metavar="MODEL", help="tokenizer of the corpus; not needed for a field of token ids")
    add_corpus_options(parser)


def _verify(args: argparse.Namespace) -> None:
    from slimkernels import store

    if args.complete is not None:
        _verify_complete(args)
    else:
        refuse(args, ["tokenizer", "text_field", "max_length"], "without --complete FILE")
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


def _add_import(actions: Any) -> None:
    summary = "import the teacher files of another project into a store"
    parser = add_command(actions, "import", _import, summary, _IMPORT_EXAMPLES)
    add = parser.add_argument
    add(
        "--format",
        required=True,
        choices=("axolotl", "distillkit", "megatron", "parquet"),
        help="project that wrote the files; parquet: store export",
    )
    add("source", metavar="SOURCE", help="file, or folder of files")
    add("dir", metavar="DIR", help="store; an existing one is appended to")
    add("--tokenizer", metavar="MODEL", help="tokenizer of the teacher; required except for parquet")
    add_fields(parser, _IMPORT_OPTIONS)


def _import(args: argparse.Namespace) -> None:
    be_quiet()
    from slimkernels import teacher
    from slimkernels.exchange import IMPORTERS

    importer = IMPORTERS[args.format]
    given = given_fields(args, _IMPORT_OPTIONS)
    taken = inspect.signature(importer).parameters
    refuse(args, set(given) - set(taken), f"with --format {args.format}")
    for name in ("tokenizer", "samples"):
        if name in taken and taken[name].default is inspect.Parameter.empty and getattr(args, name) is None:
            raise ValueError(f"--format {args.format} needs --{name}, which its files do not hold")
    tokenizer = None if args.tokenizer is None else teacher.load_tokenizer(args.tokenizer)
    report = importer(args.source, args.dir, tokenizer, **given)
    print(
        f"added {report.documents} documents, {report.rows} rows; skipped {report.skipped}; the label is among the "
        f"kept ids of {report.label_share:.1%} of the rows"
    )


def _add_export(actions: Any) -> None:
    summary = "export a store as one parquet file that Hugging Face datasets reads"
    parser = add_command(actions, "export", _export, summary, _EXPORT_EXAMPLES)
    parser.add_argument("dir", metavar="DIR", help="store")
    parser.add_argument("out", metavar="FILE", help="file to write; ends in .parquet")


def _export(args: argparse.Namespace) -> None:
    from slimkernels.exchange import export_parquet

    print(f"wrote {export_parquet(args.dir, args.out)} documents to {args.out}")
