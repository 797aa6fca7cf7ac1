"""What `slimkernels decode` shows while it runs: lines, a drawing, JSON, and never a long silence."""

from __future__ import annotations

import json
import re
import threading

import pytest
from support import teachers
from support.toy_engines import CharacterEngine

from slimkernels.cli import decode_watch, main
from slimkernels.search import PathFinder, PathFinderConfig, TransformersEngine

RECORDS = [{"question": "When the rain stopped"}, {"question": "Anna"}, {"question": "It was"}]
OPTIONS = ["--template", "{question}", "--branching-factor", "2", "--beam", "2", "--max-depth", "3"]
OPTIONS += ["--max-step-tokens", "5"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(teachers.save_teacher(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def decode(model, questions, capsys):
    def run(*options):
        code = main(["decode", "--model", model, *OPTIONS, "--questions", str(questions), *map(str, options)])
        return code, *capsys.readouterr()

    return run


def test_lines_say_what_is_left_of_the_budgets(decode):
    code, output, errors = decode("--max-tokens", 60, "--time-limit", 1000)
    assert code == 0
    assert output.count("question ") == 3
    lines = re.findall(
        r"question (\d), depth (\d): (.*); (\d+) tokens, (\d+) left, \d+ s left, [\d.]+ tokens/s", errors
    )
    assert {number for number, *_ in lines} == {"1", "2", "3"}
    for _, depth, nodes, tokens, left in lines:
        assert int(tokens) + int(left) == 60
        assert depth != "1" or nodes in ("2 open", "1 open, 1 finished", "2 finished")


def test_silence_is_broken_while_the_model_loads_and_while_the_search_runs(decode, monkeypatch):
    said, heard = [], {"loading": threading.Event(), "searching": threading.Event()}
    write, load, extend = decode_watch.Watch._write, None, TransformersEngine.extend

    def listen(self, event, facts, text):
        write(self, event, facts, text)
        if event == "working":
            said.append(text)
            heard[text.split()[0]].set()

    from slimkernels import teacher

    load = teacher.load_teacher

    def slow_load(*args, **options):
        assert heard["loading"].wait(900)
        return load(*args, **options)

    def slow_extend(*args, **options):
        assert heard["searching"].wait(900)
        return extend(*args, **options)

    monkeypatch.setattr(decode_watch, "SILENCE_S", 0.0)
    monkeypatch.setattr(decode_watch.Watch, "_write", listen)
    monkeypatch.setattr("slimkernels.teacher.load_teacher", slow_load)
    monkeypatch.setattr(TransformersEngine, "extend", slow_extend)
    assert decode()[0] == 0
    assert re.fullmatch(r"loading .*tiny: \d+ s", said[0])
    assert any(re.fullmatch(r"searching 3 questions: \d+ s, \d+ tokens, [\d.]+ tokens/s", text) for text in said)


def test_json_lines_hold_progress_and_the_records_of_the_results(decode, tmp_path):
    out = tmp_path / "out.jsonl"
    code, output, errors = decode("--json", "--max-tokens", 60, "--out", out)
    assert (code, errors) == (0, "")
    lines = [json.loads(line) for line in output.splitlines()]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line for line in lines if line["event"] == "result"] == [{"event": "result", **r} for r in records]
    depths = [line for line in lines if line["event"] == "depth"]
    for number, record in enumerate(records, 1):
        own = [line for line in depths if line["question"] == number]
        assert [line["depth"] for line in own] == list(range(1, len(own) + 1))
        assert own[-1]["tokens"] == record["num_tokens"]
        assert all(line["tokens"] + line["tokens_left"] == 60 and line["seconds_left"] is None for line in own)
        assert sum(own[0]["nodes"].values()) == 2
    assert lines[-1]["event"] == "end"
    assert lines[-1]["tokens"] == sum(record["num_tokens"] for record in records)
    _, output, _ = decode("--json", "--max-tokens", 60, "--out", out)
    assert [json.loads(line)["event"] for line in output.splitlines()] == ["note"]


def test_json_has_no_meaning_with_plan(decode):
    code, _, errors = decode("--json", "--plan")
    assert code == 2
    assert "--json has no meaning with --plan" in errors


def test_a_terminal_shows_a_line_for_each_of_several_questions(decode, monkeypatch):
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "200"), ("LINES", "20")):
        monkeypatch.setenv(name, value)
    code, output, errors = decode()
    assert code == 0
    assert output.count("question ") == 3, "answers are no part of the drawing"
    for number in (1, 2, 3):
        assert f"question {number}, depth 1: " in errors
    assert re.search(r"searching 3 questions: \d+ s, \d+ tokens, ", errors)


@pytest.mark.parametrize("make_engine", [CharacterEngine, lambda: TransformersEngine(*tiny())])
def test_tokens_are_counted_as_they_are_drawn(make_engine):
    config = PathFinderConfig(branching_factor=3, beam=2, max_depth=3, max_step_tokens=6, batch_questions=2)
    counts, depths = [], []
    finder = PathFinder(make_engine(), config, checks=())
    found = finder.solve_each(
        ["p", "q", "r"],
        on_tokens=counts.append,
        on_progress=lambda index, progress: depths.append((index, progress.depth, progress.num_tokens)),
    )
    results = dict(found)
    assert sum(counts) == sum(result.num_tokens for result in results.values())
    assert counts.count(1) > len(depths)
    for index, result in results.items():
        own = [entry for entry in depths if entry[0] == index]
        assert [depth for _, depth, _ in own] == list(range(1, len(own) + 1))
        assert own[-1][2] == result.num_tokens


def tiny():
    return teachers.make_teacher(), teachers.make_tokenizer()
