"""Commands that the documents and the help texts show, and the small files that let them run."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from support import evaluation, teachers
from support.exchange_cases import make_cases
from support.hidden_states import write_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimkernels.cli.parser import make_parser
from slimkernels.teacher import capture

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
_STARTS = re.compile(
    r"(?:\$ )?((?:echo [^|]*\| *)?(?:(?:torchrun|accelerate launch|python3?) .*-m )?slimkernels [a-z].*)"
)
_CORPUS = [
    "When the rain stopped, Anna put on her boots.",
    "The apple trees were still wet.",
    "A black cat was sleeping on the wooden bench.",
    "She thought about the long summer that was coming.",
]


class Command(NamedTuple):
    """A command as it is shown.

    Attributes:
        text: One line of shell, continued lines joined.
        source: Document or help text that shows it.
    """

    text: str
    source: str


def shown_commands() -> list[Command]:
    """Returns every different command in a code block of a document or in the epilog of a help text."""
    sources = {path.relative_to(ROOT).as_posix(): _blocks(path.read_text()) for path in DOCUMENTS}
    sources |= {f"{parser.prog} --help": parser.epilog or "" for parser in parsers()}
    found = [Command(text, source) for source, block in sources.items() for text in commands_in(block)]
    return list({command.text: command for command in found}.values())


def commands_in(block: str) -> Iterator[str]:
    """Yields the commands of this package in lines of code, those that span several lines joined."""
    for line in re.sub(r" *\\\n *", " ", block).splitlines():
        if match := _STARTS.fullmatch(line.strip()):
            yield match[1]


def _blocks(markdown: str) -> str:
    """Returns the lines of fenced and of indented code."""
    lines, is_fenced = [], False
    for line in markdown.splitlines():
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            lines.append(line)
    return "\n".join(lines)


def inline_commands() -> list[Command]:
    """Returns the commands inside sentences, such as `slimkernels train --method minillm`, which may lack options."""
    found = []
    for path in DOCUMENTS:
        prose = re.sub(r"^(```.*?^```|    [^\n]*)", "", path.read_text(), flags=re.M | re.S)
        texts = re.findall(r"`(slimkernels [^`]+)`", prose)
        found += [Command(" ".join(text.split()), path.relative_to(ROOT).as_posix()) for text in texts]
    return found


def parsers(parser: argparse.ArgumentParser | None = None) -> Iterator[argparse.ArgumentParser]:
    """Yields the parser of the command line and those of all its commands."""
    parser = make_parser() if parser is None else parser
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def words_of(command: str, folder: Path) -> list[str]:
    """Returns the words after ``slimkernels`` as a shell in ``folder`` passes them: unquoted, with braces and globs."""
    text = command.rpartition("| ")[2] if command.startswith("echo ") else command
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text}"], cwd=folder, capture_output=True, text=True, check=True
    )
    words = done.stdout.split("\0")[:-1]
    return words[words.index("slimkernels") + 1 :]


def input_of(command: str) -> str:
    """Returns the text that a command reads from ``echo``."""
    if not command.startswith("echo "):
        return ""
    return subprocess.run(["bash", "-c", command.partition("|")[0]], capture_output=True, text=True, check=True).stdout


def needs(command: str) -> str:
    """Returns what a command needs that a test lacks, or an empty text; such a command is only parsed."""
    if re.search(r"\b(torchrun|accelerate launch)\b", command):
        return "several processes"
    if "http://" in command:
        return "a server"
    if re.search(r"\bcuda\b", command):
        return "a GPU"
    if re.search(r"arc_easy|hellaswag|mmlu|truthfulqa", command):
        return "the data sets of lm-eval"
    if "--method minillm" in command:
        return "an older TRL"
    return ""


def smaller(args: argparse.Namespace, words: list[str]) -> list[str]:
    """Returns the words of a command that does the same on a tiny model in about a second."""
    if args.command == "capture" and args.prompts is not None:
        amount = ["--tokens", "60"] if args.tokens is not None else ["--documents", "3"]
        return [*words, *amount, "--max-new-tokens", "8"]
    if args.command == "train":
        if "--epochs" in words:  # has no meaning with --max-steps
            at = words.index("--epochs")
            words = words[:at] + words[at + 2 :]
        short = [*words, "--max-steps", "1", "--batch-size", "2", "--option", "use_cpu=true"]
        # The tiny models have two layers.
        return [*short, "--layers", "0,1"] if args.layers is not None else short
    if args.command == "compare" and args.models is not None:
        short = ["--samples", "2", "--max-depth", "2", "--max-step-tokens", "4"]
        short += ["--shots", "0"] if set(args.tasks) & {"gsm8k", "csqa", "strategyqa"} else []
        short += ["--chains", "2"] if "self-consistency" in args.decoders else []
        return [*words, *short, *(["--branching-factor", "2", "--beam", "2"] if "pathfinder" in args.decoders else [])]
    if args.command == "decode":
        short = ["--max-depth", "2", "--max-step-tokens", "4"]
        if args.template_file is None:
            short += ["--template", "{question}"]
        if args.decoder == "pathfinder":
            return [*words, *short, "--branching-factor", "2", "--beam", "2"]
        return [*words, *short, *(["--chains", "2"] if args.decoder != "greedy" else [])]
    return [*words, "--quick"] if args.command == "demo" else words


def make_chats(path: Path) -> None:
    """Writes two conversations."""
    asked = {"role": "user", "content": "Who?"}
    chats = [[asked, {"role": "assistant", "content": answer}] for answer in ("Anna.", "A cat.")]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))


def add_chat_template(model: Path) -> None:
    """Gives the tokenizer of a folder a chat template that marks what the assistant says."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}Q: {{ m.content }} {% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(model)


class Files:
    """Makes the files that a command reads, at the paths that its arguments name."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def make(self, args: argparse.Namespace) -> None:
        """Makes every file that the parsed command reads; the working directory must be the folder."""
        {
            "capture": self._capture,
            "train": self._train,
            "eval": self._eval,
            "compare": self._compare,
            "decode": self._decode,
            "tree": self._tree,
            "store info": self._stored,
            "store stats": self._stored,
            "store verify": self._stored,
            "store export": self._stored,
            "store import": self._import,
            "store translate": self._translate,
        }.get(args.command, lambda args: None)(args)

    def _capture(self, args: argparse.Namespace) -> None:
        self._models(args.teacher, args.tokenizer)
        if args.text is not None and args.text_field == "messages":
            make_chats(self._at(args.text))
            add_chat_template(self._at(args.teacher))
        elif args.text is not None:
            self.corpus(args.text, args.teacher_prefix_field)
        if args.prompts not in (None, "shipped"):
            self._write(args.prompts, "\n".join(teachers.PROMPTS) + "\n")
        if args.hidden is not None:
            self._models(args.head)
            documents = [teachers.make_tokenizer()(text).input_ids for text in _CORPUS]
            write_files(self._at(args.hidden), AutoModelForCausalLM.from_pretrained(self._at(args.head)), documents)
        if args.logits is not None:
            tokenizer = teachers.make_tokenizer()
            rows = sum(len(tokenizer(text).input_ids) for text in _CORPUS)
            np.save(self._at(args.logits), np.random.default_rng(0).normal(size=(rows, 300)).astype(np.float32))

    def _train(self, args: argparse.Namespace) -> None:
        self._models(args.student, args.tokenizer, args.teacher)
        for path in filter(None, (*args.store, args.eval_store)):
            self.store(path)

    def _eval(self, args: argparse.Namespace) -> None:
        self._models(*args.model)
        self.store(args.store)

    def _compare(self, args: argparse.Namespace) -> None:
        self._models(*(name.rpartition("=")[2] for name in args.models or ()))
        if args.store is not None:
            self.store(args.store)
        if args.data is not None:
            evaluation.make_data(self._at(args.data))
        for task in args.tasks or ():
            if "=" in task:
                rows = [{args.question_field: f"{n} + 1?", args.reference_field: n + 1} for n in range(3)]
                self._write(task.partition("=")[2], "".join(json.dumps(row) + "\n" for row in rows))
        for path in args.outputs or ():
            row = {
                "qid": 0,
                "prompt": "Q: 1\nA:",
                "question": "1?\n",
                "generated_text": "The answer is 1.",
                "answer": "1",
            }
            # The shell leaves a pattern that matches nothing as it is.
            self._write(path, json.dumps(row) + "\n")
        if args.rescore:
            self._models("asked")
            evaluation.make_data(self._at("questions"))
            words = "compare --models asked --tasks gsm8k --data questions --samples 2 --shots 0 --max-depth 1"
            self._run([*words.split(), "--max-step-tokens", "2", "--out", args.out])

    def _decode(self, args: argparse.Namespace) -> None:
        self._models(args.model, args.verifier, args.tokenizer)
        if args.questions is not None:
            self._questions(args.questions)
        if args.template_file is not None:
            self._write(args.template_file, "{question}")

    def _tree(self, args: argparse.Namespace) -> None:
        self._models("searched")
        self._questions("asked.jsonl")
        words = "decode --model searched --questions asked.jsonl --decoder greedy --template {question} --max-depth 1"
        self._run([*words.split(), "--max-step-tokens", "2", "--trace", args.trace])

    def _stored(self, args: argparse.Namespace) -> None:
        self.store(args.dir)
        if getattr(args, "complete", None) is not None:
            self.corpus(args.complete)
            self._models(args.tokenizer)

    def _import(self, args: argparse.Namespace) -> None:
        self._models(args.tokenizer)
        if args.format == "parquet":
            self.store("exported")
            self._run(["store", "export", "exported", args.source])
            return
        cases, source = make_cases(4), Path(args.source)
        if args.format == "axolotl":
            from test_exchange_axolotl import entries

            rows = [[entries(case, position) for position in range(1, len(case.input_ids))] for case in cases]
            records = [{"input_ids": c.input_ids, args.logprobs_field: r} for c, r in zip(cases, rows, strict=True)]
            self._write(args.source, "".join(json.dumps(record) + "\n" for record in records))
        elif args.format == "distillkit":
            from test_exchange_distillkit import EXACT, record_of, write

            source.mkdir()
            write(source / "rows.parquet", [record_of(case, EXACT) for case in cases])
            (source / "compression_config.yaml").write_text(json.dumps(EXACT))
        else:
            import test_exchange_megatron as megatron
            from pyarrow import Table, parquet

            samples = megatron.make_cases(megatron.BATCH)
            megatron.write_cache(source, samples)
            parquet.write_table(Table.from_pylist([{"input_ids": c.input_ids} for c in samples]), args.samples)

    def _translate(self, args: argparse.Namespace) -> None:
        self._models("captured", args.tokenizer, args.teacher_tokenizer)
        self.corpus("corpus.jsonl")
        self._run(["capture", "--teacher", "captured", "--text", "corpus.jsonl", "--top-k", "17", "--out", args.dir])

    def corpus(self, path: str, prefix_field: str | None = None) -> None:
        if path.endswith(".txt"):
            self._write(path, "\n\n".join(_CORPUS))
        else:
            prefix = {} if prefix_field is None else {prefix_field: "It rained. "}
            self._write(path, "".join(json.dumps({"text": text} | prefix) + "\n" for text in _CORPUS))

    def store(self, path: str) -> None:
        tokenizer = teachers.make_tokenizer()
        documents = [tokenizer(text).input_ids for text in _CORPUS]
        capture(teachers.make_teacher(), tokenizer, documents, self._at(path), top_k=17)

    def _models(self, *names: str | None) -> None:
        for name in filter(None, names):
            if not self._at(name).exists():
                shutil.copytree(self.model, self._at(name))

    def _questions(self, path: str) -> None:
        self._write(path, "".join(json.dumps({"question": text}) + "\n" for text in teachers.PROMPTS[:3]))

    def _write(self, path: str, content: str) -> None:
        self._at(path).write_text(content)

    def _at(self, path: str) -> Path:
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def _run(self, words: list[str]) -> None:
        args = make_parser().parse_args(words)
        args.run(args)
