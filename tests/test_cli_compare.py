"""`slimkernels compare`: questions of the user's own, outputs of `decode`, and the names of the release before."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import commands, evaluation, teachers

from slimkernels.cli import compare, decode, main
from slimkernels.cli.parser import make_parser
from slimkernels.cli.search_options import DEFAULT_TEMPLATE, SEARCH_FIELDS
from slimkernels.evaluate.decoded import read_all_outputs
from slimkernels.evaluate.decoders import DecoderSettings
from slimkernels.evaluate.own_questions import load_questions
from slimkernels.evaluate.records import read_records
from slimkernels.evaluate.runner import Plan
from slimkernels.search import DEFAULT_CHAINS, PathFinderConfig

SHORT = ["--max-depth", "2", "--max-step-tokens", "4"]
OWN = [
    {"question": "How many legs have two dogs?", "answer": 8},
    {"question": "What is 7 + 8?", "answer": "7 + 8 = 15\n#### 15"},
    {"question": "What is half of one?", "answer": "1/2"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(teachers.save_teacher(tmp_path_factory.mktemp("models") / "tiny"))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path: Path, rows: list[dict], **options):
    return load_questions("own", write(tmp_path / "own.jsonl", rows), template=DEFAULT_TEMPLATE, **options)


def test_compare_asks_own_questions_and_reports_them_by_their_name(model, tmp_path, capsys):
    path, out = (
        write(tmp_path / "q.jsonl", [{"q": row["question"], "gold": row["answer"]} for row in OWN]),
        tmp_path / "out",
    )
    words = ["compare", "--models", f"tiny={model}", "--tasks", f"riddles={path}", "--out", str(out), *SHORT]
    words += ["--question-field", "q", "--reference-field", "gold", "--decoders", "greedy", "self-consistency"]
    assert main([*words, "--chains", "2"]) == 0
    assert "6 outputs; report in" in capsys.readouterr().out
    page = (out / "report.html").read_text()
    assert "Scores: riddles" in page
    assert "q.jsonl" in page
    records = read_records(out / "records.jsonl")
    assert {record.task for record in records} == {"riddles"}
    assert {record.reference for record in records} == {"8", "15", "1/2"}
    assert {record.prompt for record in records if record.reference == "8"} == {
        DEFAULT_TEMPLATE.format(question="How many legs have two dogs?") + "\n"
    }
    # Scores follow the outputs, also when they are computed again from the records alone.
    (file, *_) = sorted(out.glob("records/tiny--greedy*.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    outputs = {"8": "The answer is $8.00.", "15": "It is 51.", "1/2": "Answer: 0.5"}
    file.write_text("".join(json.dumps(row | {"output": outputs[row["reference"]]}) + "\n" for row in rows))
    assert main(["compare", "--rescore", "--out", str(out)]) == 0
    scores = {record.reference: record.scores for record in read_records(file)}
    assert scores == {
        "8": {"flexible": 1, "strict": 1},
        "15": {"flexible": 0, "strict": 0},
        "1/2": {"flexible": 1, "strict": 1},
    }


@pytest.mark.parametrize(
    ("rows", "kind", "references"),
    [
        (OWN, "number", {"8", "15", "1/2"}),
        ([{"answer": True}, {"answer": "no"}], "yes_no", {"yes", "no"}),
        ([{"answer": "Paris"}, {"answer": "The answer is Rome."}], "any", {"Paris", "Rome"}),
        ([{"answer": "b", "choices": ["x", "y"]}, {"answer": "x", "choices": ["x", "y"]}], "letter", {"B", "A"}),
        ([{"answer": "7", "kind": "any"}, {"answer": "8", "kind": "any"}], "any", {"7", "8"}),
        ([{"answer": "7", "kind": "text"}, {"answer": "A whole sentence."}], None, {"7", "A whole sentence."}),
    ],
)
def test_own_questions_are_scored_by_the_kind_of_their_answers(rows, kind, references, tmp_path):
    task = load(tmp_path, [{"question": f"Question {n}?"} | row for n, row in enumerate(rows)])
    assert task.kind == kind
    assert {sample.reference.upper() for sample in task.samples} == {text.upper() for text in references}
    if kind == "letter":
        assert all(sample.question.endswith("\n(A) x\n(B) y") for sample in task.samples)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "cut \ud83d", "answer": 1}], {}, "line 1: .*field .question. holds half of a surrogate pair"),
        ([{"question": "q"}], {}, r"line 1: not a sample of own \(there is no field 'answer', only \['question'\]\)"),
        ([{"q": "q", "answer": 1}], {}, "there is no field 'question'"),
        ([{"question": " ", "answer": 1}], {}, "must be text"),
        ([{"question": "q", "answer": None}], {}, "must be a text, a number, true or false, got null"),
        ([{"question": "q", "answer": "z", "choices": ["x", "y"]}], {}, "one of the choices or its letter, got 'z'"),
        ([{"question": "q", "answer": "many"}], {"kind": "number"}, "'many' is not an answer of kind 'number'"),
        ([{"question": "q", "answer": "many", "kind": "number"}], {}, "'many' is not an answer of kind 'number'"),
        (
            [{"question": "q", "answer": 1, "kind": "sums"}],
            {},
            "line 1: .*yes_no, letter, text, got .sums",
        ),
        ([{"question": "q", "answer": 1, "kind": ["any"]}], {}, r"'kind' must be one of .* got \[.any.\]"),
        (
            [{"question": q, "answer": 1, "kind": kind} for q, kind in (("a", "number"), ("b", "any"))],
            {},
            "must hold answers of one kind, got any and number in its field 'kind': put the questions",
        ),
        ([], {}, "must hold samples of own, got none"),
    ],
)
def test_own_questions_refuse_bad_files(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, rows, **options)


def test_a_given_kind_takes_the_place_of_the_stated_one(tmp_path):
    rows = [{"question": "q", "answer": 1, "kind": "sums"}, {"question": "r", "answer": 2, "kind": "number"}]
    assert load(tmp_path, rows, kind="any").kind == "any"


def test_own_questions_need_a_name_of_their_own(tmp_path, model, capsys):
    path = write(tmp_path / "q.jsonl", OWN)
    for name in ("gsm8k", "heldout", "", "a b"):
        assert main(["compare", "--models", model, "--tasks", f"{name}={path}", "--out", str(tmp_path / "o")]) == 2
        assert "needs a name of letters, digits" in capsys.readouterr().err
    assert main(["compare", "--models", model, "--tasks", "a=no.jsonl", "--out", str(tmp_path / "o")]) == 2
    assert "questions not found: there is no file no.jsonl" in capsys.readouterr().err


def test_compare_reads_what_decode_writes(model, tmp_path, capsys):
    questions = write(tmp_path / "q.jsonl", OWN)
    files = []
    for decoder in ("greedy", "self-consistency"):
        files.append(str(tmp_path / f"{decoder}.jsonl"))
        words = ["decode", "--model", model, "--questions", questions, "--decoder", decoder, "--out", files[-1], *SHORT]
        assert main(words) == 0
    rows = [json.loads(line) for line in Path(files[0]).read_text().splitlines()]
    rows[1]["text"] = "7 + 8 = 15\nAnswer: **15**"
    write(Path(files[0]), rows)
    out = tmp_path / "report"
    assert main(["compare", "--outputs", *files, "--out", str(out)]) == 0
    assert "6 outputs; report in" in capsys.readouterr().out
    records = read_records(out / "records.jsonl")
    # Both decoders answered the same questions, so that they can be paired.
    assert len({record.sample for record in records}) == 3
    assert {record.decoder for record in records} == {"greedy", "self-consistency"}
    [scored] = [record for record in records if record.output == rows[1]["text"]]
    assert scored.scores == {"flexible": 1, "strict": 1}
    assert scored.tokens == rows[1]["num_tokens"]
    assert "self-consistency" in (out / "report.html").read_text()
    # The same decoder with other settings is told apart by its file.
    same = write(tmp_path / "again.jsonl", rows)
    labels = {record.decoder for file in read_all_outputs([files[0], same]).values() for record in file.records}
    assert labels == {"greedy (greedy)", "greedy (again)"}


def test_outputs_of_decode_without_references_are_refused(model, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["decode", "--model", model, "Anna has", "--decoder", "greedy", "--out", str(out), *SHORT]) == 0
    assert main(["compare", "--outputs", str(out), "--out", str(tmp_path / "report")]) == 2
    assert "has no reference to score it by: run decode with --reference-field" in capsys.readouterr().err


def test_decode_and_compare_have_the_same_options_and_defaults():
    parsers = {parser.prog: parser for parser in commands.parsers()}
    decoding, comparing = (parsers[f"slimkernels {name}"]._option_string_actions for name in ("decode", "compare"))
    config, settings = PathFinderConfig(), DecoderSettings()
    for option, field in compare._SETTINGS.items():
        flag = f"--{option.replace('_', '-')}"
        assert decoding[flag].help.rpartition("(")[2] == comparing[flag].help.rpartition("(")[2], flag
        assert (decoding[flag].type, decoding[flag].default) == (comparing[flag].type, comparing[flag].default)
        expected = DEFAULT_CHAINS if option == "chains" else getattr(config, option)
        assert getattr(settings, field) == expected
    for flag in ("--batch-questions", "--prompt-style", "--samples", "--key-env", "--answer-kind"):
        assert decoding[flag].default == comparing[flag].default, flag
    assert Plan.batch_questions == config.batch_questions
    assert f"(default: {DEFAULT_CHAINS})" in decoding["--chains"].help
    # What is not given is left to the configuration, so that Python and the command line cannot differ.
    args = make_parser().parse_args(["decode", "--model", "x", "q"])
    assert [name for name in SEARCH_FIELDS if getattr(args, name) is not None] == []
    assert DecoderSettings() == compare._decoder_settings(make_parser().parse_args(["compare"]))
    functions = {"step_end", "score_steps", "merge_embed"}
    assert {field.name for field in dataclasses.fields(config)} - functions == set(SEARCH_FIELDS)


@pytest.mark.parametrize(
    ("words", "present", "expected"),
    [
        (["decode", "--model", "x", "q", "--token-budget", "99"], "--max-tokens", {"max_tokens": 99}),
        (["decode", "--model", "x", "q", "--limit", "3"], "--samples", {"samples": 3}),
        (["decode", "--model", "x", "q", "--no-chat"], "--prompt-style plain", {"prompt_style": "plain"}),
        (["compare", "--branching", "4"], "--branching-factor", {"branching_factor": 4}),
        (["eval", "--max-steps", "7"], "--max-depth", {"max_depth": 7}),
    ],
)
def test_an_old_name_works_and_warns_in_one_line(words, present, expected, capsys):
    old = next(word for word in words if word.startswith("--") and word != "--model")
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {present}; the old form will be removed"):
        args = make_parser().parse_args(words)
    assert {name: getattr(args, name) for name in expected} == expected
    with pytest.raises(SystemExit):
        main([words[0], "--help"])
    assert f"{old} " not in capsys.readouterr().out


def test_a_deprecation_is_printed_as_one_line(tmp_path):
    words = ["decode", "--model", "x", "--limit", "2"]
    done = subprocess.run([sys.executable, "-m", "slimkernels", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    deprecation, error = done.stderr.splitlines()
    assert deprecation == "slimkernels: --limit is now --samples; the old form will be removed in the next release"
    assert "decode needs a QUESTION" in error


def test_the_old_form_of_eval_compares(model, tmp_path, capsys):
    data, out = evaluation.make_data(tmp_path / "data"), tmp_path / "out"
    words = ["--models", model, "--tasks", "gsm8k", "--data", str(data), "--samples", "1", "--shots", "0", *SHORT]
    assert main(["compare", *words, "--out", str(out)]) == 0
    with pytest.warns(DeprecationWarning, match="comparing with `slimkernels eval` is now `slimkernels compare`"):
        assert main(["eval", *words, "--out", str(out)]) == 0
    assert "1 outputs; report in" in capsys.readouterr().out
    with pytest.warns(DeprecationWarning, match="is now `slimkernels compare`"):
        assert main(["eval", "--rescore", "--out", str(out), "--json"]) == 2
    assert "--json has no meaning in a comparison" in capsys.readouterr().err
    assert main(["eval", "--store", "x"]) == 2
    assert "eval needs --store DIR, a held-out store, and --model" in capsys.readouterr().err


def test_help_of_eval_shows_its_own_options_only(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    shown = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", capsys.readouterr().out, re.M))
    assert shown == {"--help", "--store", "--model", "--json", "--batch-size"}


def test_no_document_or_help_text_shows_an_old_form(tmp_path, recwarn):
    for command in commands.shown_commands():
        make_parser().parse_args(commands.words_of(command.text, tmp_path))
        assert not re.search(r"slimkernels eval .*--(models|rescore|outputs)|decode .*--server", command.text), command
    assert [warning for warning in recwarn if issubclass(warning.category, DeprecationWarning)] == []


def test_decode_says_what_a_small_budget_did(model, capsys):
    words = ["decode", "--model", model, "--branching-factor", "8", "--max-tokens", "20", *SHORT, "Anna"]
    assert main(words) == 0
    assert "note: the budget of 20 tokens had room for 5 of 8 children at depth 1" in capsys.readouterr().out
    assert decode.DEFAULT_TEMPLATE == DEFAULT_TEMPLATE
