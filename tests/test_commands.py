"""Every command that a document or a help text shows is parsed, and run where tiny local files are all it needs."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from pathlib import Path

import pytest
from support import commands, teachers

from slimkernels.cli import main
from slimkernels.cli.errors import EXTRAS
from slimkernels.cli.parser import make_parser

ROOT = commands.ROOT
SHOWN = commands.shown_commands()
RUN = [command for command in SHOWN if not commands.needs(command.text)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return teachers.save_teacher(tmp_path_factory.mktemp("models") / "tiny")


def name_of(command: commands.Command) -> str:
    return f"{command.source}: {command.text[:60]}"


def test_commands_are_found_in_documents_and_help():
    sources = {command.source for command in SHOWN}
    assert {"slimkernels --help", "slimkernels eval --help", "examples/README.md"} <= sources
    assert any(source == "README.md" or source.startswith("docs/") for source in sources)
    assert len(RUN) > 20
    assert {commands.needs(command.text) for command in SHOWN} >= {"several processes", "a server"}


@pytest.mark.parametrize("command", SHOWN, ids=name_of)
def test_shown_command_is_parsed(command, tmp_path):
    make_parser().parse_args(commands.words_of(command.text, tmp_path))


@pytest.mark.parametrize("command", RUN, ids=name_of)
def test_shown_command_runs(command, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(commands.input_of(command.text)))
    args = make_parser().parse_args(commands.words_of(command.text, tmp_path))
    if args.command == "demo":
        make_the_demonstration_tiny(monkeypatch, model)
    elif args.command == "store import":
        pytest.importorskip("pyarrow", reason="needs the extra exchange")
    commands.Files(tmp_path, model).make(args)
    words = commands.words_of(command.text, tmp_path)  # again: patterns of files match now
    code = main(commands.smaller(args, words))
    assert code == 0, capsys.readouterr().err


def make_the_demonstration_tiny(monkeypatch, model: Path) -> None:
    from slimkernels.demo import demo

    sizes = {"tokens": 300, "prompts": 4, "heldout_every": 2, "max_new_tokens": 8, "epochs": 1, "evaluations": 1}
    tiny = dataclasses.replace(demo.QUICK, teacher=str(model), teacher_dtype="float32", layers=(0,), **sizes)
    monkeypatch.setattr(demo, "QUICK", tiny)


@pytest.mark.parametrize("command", commands.inline_commands(), ids=name_of)
def test_command_in_a_sentence_has_known_options(command):
    """It may lack options that are required, and name a choice as in axolotl|parquet."""
    *names, _ = re.split(r" (?=[^a-z])|$", command.text, maxsplit=1)
    known = {parser.prog: parser for parser in commands.parsers()}
    prog = next(prog for length in (3, 2, 1) if (prog := " ".join(command.text.split()[:length])) in known)
    flags = set(re.findall(r"(?<!\S)--[a-z-]+", command.text))
    assert flags <= set(known[prog]._option_string_actions), f"{prog}: {command.source}"
    assert names


def test_extras_in_messages_exist():
    """Errors advise `pip install 'slimkernels[EXTRA]'`."""
    extras = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    assert set(EXTRAS.values()) <= extras
    files = [*ROOT.glob("slimkernels/**/*.py"), *commands.DOCUMENTS]
    named = {
        name
        for path in files
        for names in re.findall(r"slimkernels\[([a-z,]+)\]", path.read_text())
        for name in names.split(",")
    }
    assert {"exchange", "server"} <= named <= extras


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("    slimkernels store info runs/store    # a comment", ["slimkernels store info runs/store    # a comment"]),
        ("slimkernels train --store a \\\n    --out b", ["slimkernels train --store a --out b"]),
        ('$ echo "Why?" | slimkernels decode --model m -', ['echo "Why?" | slimkernels decode --model m -']),
        ("torchrun --nproc-per-node 2 -m slimkernels train", ["torchrun --nproc-per-node 2 -m slimkernels train"]),
        ("import slimkernels as sk\nslimkernels is imported\npip install slimkernels", []),
    ],
)
def test_commands_are_read_from_code(block, expected):
    assert [text for text in commands.commands_in(block) if "is imported" not in text] == expected


def test_words_are_those_of_a_shell(tmp_path):
    (tmp_path / "a.jsonl").touch()
    command = "slimkernels compare --models x/{sft,kd} teacher=http://h/v1#NAME --outputs *.jsonl 'a b' # a comment"
    words = ["compare", "--models", "x/sft", "x/kd", "teacher=http://h/v1#NAME", "--outputs", "a.jsonl", "a b"]
    assert commands.words_of(command, tmp_path) == words


def test_a_wrong_command_would_be_noticed(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(commands.words_of("slimkernels store info runs/store --no-such-option", tmp_path))
    assert "--no-such-option" in capsys.readouterr().err
