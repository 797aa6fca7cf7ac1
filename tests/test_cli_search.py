"""`slimkernels decode` and `slimkernels tree`: what they take, print, write, go on from, and refuse."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import re
import sys
from pathlib import Path

import pytest
from support import teachers
from transformers import AutoConfig, LlamaForTokenClassification

from slimkernels.cli import decode_results, decode_watch, main
from slimkernels.cli.decode import SEARCH_FIELDS
from slimkernels.search import PathFinder, PathFinderConfig, RepetitionCheck, TransformersEngine, read_trace
from slimkernels.teacher import load_teacher

RECORDS = [
    {"id": "a", "question": "When the rain stopped", "gold": "1", "choices": ["yes", "no"]},
    {"id": "b", "question": "Anna", "gold": "2", "choices": []},
    {"id": "c", "question": "It was", "gold": "3", "choices": []},
]
FIELDS = {"branching_factor": 2, "beam": 2, "max_depth": 3, "max_step_tokens": 5, "answer_pattern": "(?i)a(.)"}
OPTIONS = [option for field, value in FIELDS.items() for option in (SEARCH_FIELDS[field][0], str(value))]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(teachers.save_teacher(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(autouse=True)
def _silence(monkeypatch):
    """A slow machine writes no line about the loading of a model before an error."""
    monkeypatch.setattr(decode_watch, "SILENCE_S", 1e9)


@pytest.fixture
def questions(tmp_path) -> str:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + "\n")
    return str(path)


@pytest.fixture
def decode(model, capsys):
    """Runs the command with the tiny model; the exit code, the output and the errors."""

    def run(*options: object) -> tuple[int, str, str]:
        code = main(["decode", "--model", model, "--template", "{question}", *OPTIONS, *map(str, options)])
        return code, *capsys.readouterr()

    return run


def records_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    return [{**record, "seconds": 0} for record in records]


def test_decode_documents_the_defaults_of_the_configuration():
    # Functions, which have options of their own or none.
    functions = ("step_end", "score_steps", "merge_embed")
    fields = {field.name: field.default for field in dataclasses.fields(PathFinderConfig)}
    fields = {name: default for name, default in fields.items() if name not in functions}
    assert set(fields) == set(SEARCH_FIELDS)
    own = {
        "max_tokens": "no limit",
        "stop_when_agreed": "no early stop",
        "merge_siblings": "no merging",
        "branching_temperature": "equal shares",
        "time_limit_s": "no limit",
        "step_delimiter": r"\n",
        "answer_pattern": "the rule of --answer-kind",
    }
    for name, default in fields.items():
        if name != "end_markers":
            assert SEARCH_FIELDS[name][2].endswith(f"(default: {own.get(name, default)})"), name


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Answer: 18", "18"),
        ("So the answer is 18.", "18"),
        ("**Answer:** $1,800.50**", "$1,800.50"),
        ("#### 18\n", "18"),
        ("The answer is: yes\nmore", "yes"),
        ("To answer, we add.", None),
        ("Answer:", None),
    ],
)
def test_decode_finds_answers(text, answer):
    assert PathFinderConfig().answer(text) == answer


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\u000b", " "])
def test_decode_reads_lines_of_json_with_separators_in_strings(tmp_path, mark, separator):
    path = tmp_path / "questions.jsonl"
    asked = [f"Anna{separator}has 3?", "And Tom?"]
    lines = [json.dumps({"question": question}, ensure_ascii=False) for question in asked]
    path.write_text(mark + "\r\n".join(lines) + "\n", encoding="utf-8", newline="")
    args = argparse.Namespace(question=None, questions=str(path), samples=None, question_field="question")
    args.reference_field = None
    assert [item.text for item in decode_results.read_questions(args)] == asked


def test_decode_names_the_line_with_half_of_a_surrogate_pair(decode, model, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "whole \\ud83d\\ude00?"}\n{"question": "cut \\ud83d"}\n')
    code, _, errors = decode("--questions", path)
    assert code == 2
    assert "the field 'question' in line 2 of" in errors
    assert "holds half of a surrogate pair" in errors


def test_decode_writes_every_prediction(decode, model, questions, tmp_path):
    out, trace = tmp_path / "out.jsonl", tmp_path / "trace.jsonl"
    code, output, errors = decode(
        "--questions", questions, "--out", out, "--trace", trace, "--reference-field", "gold", "--seed", 7
    )
    assert code == 0, errors
    assert output.count("question ") == 3
    assert "question 1, depth 1: " in errors
    assert re.search(r"3 questions, \d+ tokens, .* tokens/s", errors)
    engine = TransformersEngine(*load_teacher(model))
    config = PathFinderConfig(**FIELDS, seed=7)
    # A template without a colon or a space at its end is a line of its own.
    prompts = [record["question"] + "\n" for record in RECORDS]
    expected = PathFinder(engine, config, checks=[RepetitionCheck()]).solve(prompts)
    for record, source, result in zip(records_of(out), RECORDS, expected, strict=True):
        assert (record["question"], record["reference"], record["seed"]) == (source["question"], source["gold"], 7)
        assert (record["text"], record["answer"], record["finished"]) == (result.text, result.answer, result.finished)
        assert (record["num_tokens"], record["ends"]) == (result.num_tokens, result.reasons)
        assert [entry["score"] for entry in record["candidates"]] == result.scores
        assert [entry["text"] for entry in record["candidates"]] == [entry.text for entry in result.candidates]
        assert (record["unfinished_reason"] is None) == result.finished
        assert record["text"].strip() in output
    assert [traced.result["text"] for traced in read_trace(trace).questions] == [result.text for result in expected]


def test_decode_goes_on_with_the_questions_that_are_left(decode, questions, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert decode("--questions", questions, "--out", whole)[0] == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(lines[0] + lines[1] + lines[2][:30])
    assert re.search(r"\n1 question, \d+ tokens", decode("--questions", questions, "--out", cut)[2])
    cut.write_bytes(lines[0] + lines[1][:30])
    code, output, errors = decode("--questions", questions, "--out", cut)
    assert code == 0
    assert "1 of 3 questions are answered" in errors
    assert "2 questions," in errors
    assert "question 1 of 3" not in output
    assert without_time(records_of(cut)) == without_time(records_of(whole))
    assert decode("--questions", questions, "--out", cut)[1] == ""


def test_decode_draws_a_question_that_is_asked_again_anew(decode, tmp_path):
    path, whole, rest = tmp_path / "twice.jsonl", tmp_path / "whole.jsonl", tmp_path / "rest.jsonl"
    path.write_text(2 * (json.dumps({"question": "Anna"}) + "\n"))
    assert decode("--questions", path, "--out", whole)[0] == 0
    first, second = records_of(whole)
    assert first["candidates"] != second["candidates"]
    # A run that has only the second one left draws the same.
    rest.write_bytes(whole.read_bytes().splitlines(keepends=True)[0])
    assert decode("--questions", path, "--out", rest)[0] == 0
    assert without_time(records_of(rest)) == without_time([first, second])


def test_decode_goes_on_inside_of_a_tree(decode, questions, tmp_path, monkeypatch):
    whole, cut, trace = (tmp_path / name for name in ("whole.jsonl", "cut.jsonl", "trace.jsonl"))
    options = ["--questions", questions, "--batch-questions", "1"]
    assert decode(*options, "--out", whole, "--trace", trace)[0] == 0
    lines = trace.read_bytes().splitlines(keepends=True)
    second = [number for number, line in enumerate(lines) if line.startswith(b'{"question": 1,')]
    trace.write_bytes(b"".join(lines[: second[0] + 1]) + b'{"question": 1, "dep')
    cut.write_bytes(whole.read_bytes().splitlines(keepends=True)[0])
    replayed = []
    replay = TransformersEngine.replay
    monkeypatch.setattr(
        TransformersEngine, "replay", lambda *args, **options: replayed.append(args) or replay(*args, **options)
    )
    code, _, errors = decode(*options, "--out", cut, "--trace", trace)
    assert code == 0
    assert replayed
    assert "question 2, depth 1" not in errors
    assert "question 2, depth 2" in errors
    assert without_time(records_of(cut)) == without_time(records_of(whole))


@pytest.mark.parametrize(
    ("decoder", "options", "chains"),
    [("greedy", [], 1), ("self-consistency", ["--chains", 3], 3), ("best-of-n", ["--chains", 3], 3)],
)
def test_decode_by_other_decoders_within_the_same_budget(decode, model, tmp_path, decoder, options, chains):
    out = tmp_path / "out.jsonl"
    command = ["decode", "--model", model, "--template", "{question}", "--max-step-tokens", "5", "--max-depth", "3"]
    command += ["--decoder", decoder, "--out", str(out), "--max-tokens", "40", "Anna", *map(str, options)]
    assert main(command) == 0
    [record] = records_of(out)
    assert record["decoder"] == decoder
    assert 0 < record["num_tokens"] <= 40
    assert len(record["candidates"]) == chains
    votes = [
        sum(other["answer"] == entry["answer"] for other in record["candidates"]) for entry in record["candidates"]
    ]
    votes = [count if entry["answer"] else 0 for count, entry in zip(votes, record["candidates"], strict=True)]
    sums = [entry["sum_logprob"] for entry in record["candidates"]]
    assert [entry["score"] for entry in record["candidates"]] == (votes if decoder == "self-consistency" else sums)


def test_decode_prunes_by_a_scorer_of_steps(decode, model, tmp_path):
    classifier = teachers.save_teacher(tmp_path / "classifier")
    scorer = LlamaForTokenClassification(AutoConfig.from_pretrained(classifier))
    scorer.save_pretrained(classifier)
    found = []
    for name in (model, classifier):
        trace, out = tmp_path / f"{len(found)}.jsonl", tmp_path / f"{len(found)}-out.jsonl"
        options = ["--score-steps", name, "--score-weight", "0.5", "--score-reduction", "min"]
        options += ["--selector", "step-score", "--trace", trace, "--out", out]
        code, _, errors = decode(*options, "Anna")
        assert code == 0, errors
        header = read_trace(trace).header["config"]
        found.append(header["score_steps"]["name"])
        assert (header["score_weight"], header["score_reduction"]) == (0.5, "min")
        [record] = records_of(out)
        assert all(0 < entry["score"] < 1 for entry in record["candidates"])
    assert found == ["StepVerifier", "ProcessRewardModel"]
    command = ["decode", "--model", model, "--decoder", "best-of-n", "--score-steps", model, "Anna"]
    assert main(command) == 2
    config = json.loads((classifier / "config.json").read_text())
    config["architectures"] = ["Qwen2ForProcessRewardModel"]
    (classifier / "config.json").write_text(json.dumps(config))
    code, _, errors = decode("--score-steps", classifier, "Anna")
    assert code == 2
    assert "is a Qwen2ForProcessRewardModel, whose code comes with its weights and is not run" in errors


def test_decode_takes_a_question_from_standard_input(decode, monkeypatch, tmp_path):
    direct, piped, records = (tmp_path / name for name in ("direct.jsonl", "piped.jsonl", "records.jsonl"))
    assert decode("--out", direct, "Anna\nwas")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("Anna\nwas\n"))
    assert decode("--out", piped, "-")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"q": "Anna\\nwas"}\n'))
    assert decode("--out", records, "--questions", "-", "--question-field", "q")[0] == 0
    assert without_time(records_of(piped)) == without_time(records_of(direct)) == without_time(records_of(records))


def test_decode_asks_by_the_template_and_the_chat_template(model, tmp_path, questions):
    tokenizer = teachers.make_tokenizer()
    tokenizer.chat_template = (
        "<|start|>{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}"
        "[assistant]{% endif %}"
    )
    chat = teachers.save_teacher(tmp_path / "chat")
    tokenizer.save_pretrained(chat)
    template = tmp_path / "template.txt"
    template.write_text("{id}) {question}? {choices} {unknown}:")
    command = ["decode", "--questions", questions, "--template-file", str(template), "--samples", "1", *OPTIONS]

    def prompt(name: str, *options: str):
        trace = tmp_path / f"{name}.jsonl"
        assert main([*command, "--trace", str(trace), *options]) == 0
        [traced] = read_trace(trace).questions
        assert traced.question.context == "When the rain stopped"
        return traced.question.prompt

    asked = "a) When the rain stopped? yes, no {unknown}:"
    assert prompt("plain", "--model", model) == asked
    assert prompt("off", "--model", str(chat), "--prompt-style", "plain") == asked
    assert tokenizer.decode(prompt("chat", "--model", str(chat))) == f"<|start|>[user] {asked}[assistant]"


def test_decode_plan_generates_nothing(decode, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "start", lambda *_: pytest.fail("the search began"))
    code, output, _ = decode("--plan", "Anna")
    assert code == 0
    # Depths of 2, 4 and 4 children, 5 tokens each, twice.
    assert re.search(r"generated tokens +at most 100\n", output)
    assert re.search(r"keys and values +at most \d+ bytes", output)


def test_decode_draws_a_tree_in_a_terminal(decode, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "9")
    code, _, errors = decode("Anna [bold]")
    assert code == 0
    assert "├── " in errors
    assert "more nodes" in errors
    assert "Anna [bold]" in errors, "text is no markup"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "needs a QUESTION"),
        (["Anna", "--questions", "x.jsonl"], "and not both"),
        (["  "], "must have text"),
        (["--questions", "missing.jsonl"], "missing.jsonl"),
        (["--prompt-style", "chat", "Anna"], "needs a tokenizer with a chat template"),
        (["--key-env", "KEY", "Anna"], "--key-env has no meaning without a server"),
        (["--decoder", "greedy", "Anna"], "--branching-factor has no meaning with --decoder greedy"),
        (["--chains", "3", "Anna"], "--chains has no meaning with --decoder pathfinder"),
        (["--verifier", "x", "Anna"], "--verifier has no meaning without --selector verifier"),
        (["--contradiction-threshold", "0.4", "Anna"], "needs --nli"),
        (["--no-repetition-check", "--repetition-threshold", "0.4", "Anna"], "has no meaning"),
        (["--repetition-threshold", "2", "Anna"], r"threshold must be in \[0, 1\]"),
        (["--score-weight", "0.5", "Anna"], "--score-weight has no meaning without --score-steps MODEL"),
        (["--selector", "step-score", "Anna"], "--selector step-score needs --score-steps MODEL"),
        (["--score-steps", "http://127.0.0.1:9/v1", "Anna"], "--score-steps must name a model of the server"),
        (["--score-steps", "x", "--score-weight", "2", "Anna"], "--score-weight must be finite and in"),
        (["--branching-temperature", "0", "Anna"], "--branching-temperature must be finite and above 0"),
        (["--branching-temperature", "1", "--beam", "1", "Anna"], "--branching-temperature has no meaning where"),
        (["--merge-siblings", "2", "Anna"], r"--merge-siblings must be in \[0, 1\]"),
        (["--branching-factor", "2,0", "Anna"], "--branching-factor must be at least 1"),
        (["--temperature", "-1", "Anna"], "temperature must be"),
        (["--answer-pattern", "(", "Anna"], "--answer-pattern must be"),
        (["--template", "What?", "Anna"], "--template must contain {question}"),
        (["Anna " * 200], "question 1: the prompt must be shorter"),
    ],
)
def test_decode_refuses_bad_input(decode, options, message):
    code, _, errors = decode(*options)
    assert code == 2
    assert errors.count("\n") == 1
    assert re.search(message, errors)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "at least one question"),
        ("{\n", "line 1 of .* must be a JSON object"),
        ('{"question": "a"}\n[1]\n', "line 2 of .* has no field 'question', only list"),
        ('{"text": "a"}\n', r"has no field 'question', only \['text'\]"),
        ('{"question": " "}\n', "must be text"),
        ('{"question": 3}\n', "must be text"),
    ],
)
def test_decode_refuses_bad_question_files(decode, tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    code, _, errors = decode("--questions", path)
    assert code == 2
    assert re.search(message, errors)


def test_decode_refuses_results_of_another_run(decode, questions, tmp_path):
    out = tmp_path / "out.jsonl"
    assert decode("--questions", questions, "--samples", 1, "--out", out)[0] == 0
    before = out.read_bytes()
    for options, message in (
        (["--questions", questions, "--seed", 3], "other settings"),
        (["Another question"], "other questions"),
        (["--questions", questions, "--out", questions], "must be new, or begin with"),
    ):
        code, _, errors = decode("--out", out, *options)
        assert code == 2
        assert message in errors
    assert out.read_bytes() == before
    assert Path(questions).read_text().count("\n") == 4


def test_decode_refuses_a_trace_of_another_run(decode, tmp_path):
    trace = tmp_path / "trace.jsonl"
    assert decode("--trace", trace, "Anna")[0] == 0
    code, _, errors = decode("--trace", trace, "--seed", 3, "Anna")
    assert code == 2
    assert "its config seed is 0, this search's 3" in errors


def test_tree_writes_a_page(decode, tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    assert decode("--trace", trace, "Anna <i>")[0] == 0
    assert main(["tree", str(trace)]) == 0
    assert "1. Anna &lt;i&gt;" in trace.with_suffix(".html").read_text()
    assert main(["tree", str(trace), "-o", str(tmp_path / "x.html"), "--question", "2"]) == 2
    assert "--question must be in [1, 1]" in capsys.readouterr().err
    assert main(["tree", str(tmp_path / "none.jsonl")]) == 2
