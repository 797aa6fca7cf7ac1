"""The trace of a search: a search killed anywhere resumes to the same trees, and refuses any trace but its own."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.teachers import make_teacher, make_tokenizer
from support.toy_engines import CharacterEngine

from slimkernels.durable import JsonLines
from slimkernels.search import (
    DamagedLineError,
    FileInUseError,
    ForeignFileError,
    PathFinder,
    PathFinderConfig,
    Question,
    RepetitionCheck,
    TraceDamagedError,
    TraceMismatchError,
    TransformersEngine,
    log_probability,
    read_trace,
)

CONFIG = PathFinderConfig(branching_factor=3, beam=2, buffer_size=5, max_depth=4, max_step_tokens=6, batch_questions=2)
QUESTIONS = ["p", "q", Question("r", "what is r?")]


class Embedding(CharacterEngine):
    """An engine whose embedding of a step depends only on the letters in it."""

    def embed(self, text):
        return np.array([text.count("a"), text.count("b"), 1.0])


def finder(config=CONFIG, engine=None, **options):
    return PathFinder(engine or Embedding(-2.0), config, checks=[RepetitionCheck(0.99)], **options)


def everything(result):
    """Returns everything in a result except the time."""
    tree = result.tree
    nodes = [tree.record(node) for node in range(1, len(tree))]
    return nodes, result._replace(tree=None, seconds=0.0)


def trees_of(path):
    """Reads every node of every question and the results from a trace."""
    return [
        ([traced.progress.tree.record(node) for node in range(len(traced.progress.tree))], traced.result)
        for traced in read_trace(path).questions
    ]


def lines_of(path):
    return Path(path).read_bytes().splitlines(keepends=True)


@pytest.fixture
def whole(tmp_path):
    """Returns the results of a search and the path of its trace."""
    path = tmp_path / "whole.jsonl"
    return finder().solve(QUESTIONS, trace=path), path


def test_trace_changes_nothing_and_holds_the_trees(whole):
    results, path = whole
    assert list(map(everything, results)) == list(map(everything, finder().solve(QUESTIONS)))
    content = read_trace(path)
    assert [traced.question for traced in content.questions] == [Question("p", "p"), Question("q", "q"), QUESTIONS[2]]
    for result, traced in zip(results, content.questions, strict=True):
        assert everything(result._replace(tree=traced.progress.tree)) == everything(result)
        assert traced.progress.num_tokens == result.num_tokens
        assert traced.result["node"] == result.node
        assert traced.result["scores"] == result.scores
    assert any("repetition" in result.reasons for result in results)


def test_trace_goes_on_after_every_line_and_inside_of_lines(whole, tmp_path):
    results, path = whole
    lines = lines_of(path)
    assert len(lines) > 10
    cut = tmp_path / "cut.jsonl"
    for kept in range(len(lines) + 1):
        for torn in (b"", lines[kept][: len(lines[kept]) // 2] if kept < len(lines) else b""):
            cut.write_bytes(b"".join(lines[:kept]) + torn)
            resumed = finder()
            assert list(map(everything, resumed.solve(QUESTIONS, trace=cut))) == list(map(everything, results))
            assert resumed.engine.texts == {}
            if kept == len(lines):
                assert resumed.engine.encoded == resumed.engine.batches == []
            # The file has the same lines except for the seconds; none is written twice.
            assert len(lines_of(cut)) == len(lines)
            assert trees_of(cut) == trees_of(path)


def test_trace_goes_on_without_the_work_that_was_done(whole, tmp_path):
    _, path = whole
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines_of(path)[:5]))  # the header, and two depths of two questions
    fresh, resumed = finder(), finder()
    fresh.solve(QUESTIONS)
    resumed.solve(QUESTIONS, trace=cut)
    assert resumed.engine.batches[0][0].path == fresh.engine.batches[-len(resumed.engine.batches)][0].path
    assert sum(map(len, resumed.engine.batches)) < sum(map(len, fresh.engine.batches))
    assert resumed.engine.replayed, "the open leaves were given back"


def test_trace_goes_on_with_another_number_of_questions_at_a_time(whole, tmp_path):
    results, path = whole
    lines = lines_of(path)
    cut = tmp_path / "cut.jsonl"
    for batch_questions in (1, 3):
        cut.write_bytes(b"".join(lines[:4]))  # one question is a depth behind the other
        again = finder(dataclasses.replace(CONFIG, batch_questions=batch_questions))
        assert list(map(everything, again.solve(QUESTIONS, trace=cut))) == list(map(everything, results))


def test_trace_of_a_token_budget_goes_on(tmp_path):
    config = dataclasses.replace(CONFIG, max_tokens=50)
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    results = finder(config).solve(QUESTIONS, trace=path)
    assert any("budget" in result.reasons for result in results)
    for kept in range(1, len(lines_of(path))):
        cut.write_bytes(b"".join(lines_of(path)[:kept]))
        assert list(map(everything, finder(config).solve(QUESTIONS, trace=cut))) == list(map(everything, results))


def test_trace_takes_another_selector_and_notes_its_choice(whole):
    results, path = whole
    again = finder(selector=log_probability).solve(QUESTIONS, trace=path)
    assert [result.candidates for result in again] == [result.candidates for result in results]
    assert [traced.result["scores"] for traced in read_trace(path).questions] == [result.scores for result in again]


def test_trace_counts_the_time_before_the_interruption(whole, tmp_path):
    _, path = whole
    lines = [json.loads(line) for line in lines_of(path)[:3]]
    lines[1]["seconds"] = lines[2]["seconds"] = 500.0
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = finder().solve(QUESTIONS, trace=cut)
    assert 500 < results[0].seconds < 560
    assert results[2].seconds < 60


def test_trace_in_use_is_refused(whole):
    _, path = whole
    with JsonLines(path, "slimkernels_trace"), pytest.raises(FileInUseError, match="written by another process"):
        finder().solve(QUESTIONS, trace=path)


@pytest.mark.parametrize(
    ("other", "questions", "message"),
    [
        (finder(dataclasses.replace(CONFIG, beam=3)), QUESTIONS, "config beam is 2, this search's 3"),
        (finder(dataclasses.replace(CONFIG, step_end=str.isspace)), QUESTIONS, "config step_end is None"),
        (PathFinder(Embedding(), CONFIG, checks=[RepetitionCheck(0.5)]), QUESTIONS, "checks is .*0.99.*0.5"),
        (PathFinder(CharacterEngine(), CONFIG, checks=[RepetitionCheck(0.99)]), QUESTIONS, "engine engine is 'Emb"),
        (finder(), QUESTIONS[:2], "number of questions is 3"),
        (finder(), ["p", "q", "r"], r"questions\[2\] is .*what is r"),
    ],
)
def test_trace_of_another_search_is_refused(whole, other, questions, message):
    _, path = whole
    before = path.read_bytes()
    with pytest.raises(TraceMismatchError, match=message):
        other.solve(questions, trace=path)
    assert path.read_bytes() == before


def test_trace_of_another_version_is_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"slimkernels_trace": 2}\n')
    for read in (lambda: finder().solve(QUESTIONS, trace=path), lambda: read_trace(path)):
        with pytest.raises(TraceMismatchError, match="version 1, got 2"):
            read()


@pytest.mark.parametrize("content", ["my thesis", '{"question": "p"}', "\n", "{}"])
def test_trace_leaves_a_foreign_file_alone(tmp_path, content):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(ForeignFileError, match=r"questions\.jsonl must be new, or begin with"):
        finder().solve(QUESTIONS, trace=path)
    with pytest.raises(ForeignFileError, match=r"questions\.jsonl must begin with"):
        read_trace(path)
    assert path.read_text() == content


def test_trace_without_a_header_cannot_be_read(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"slimkernels_tr')
    with pytest.raises(TraceDamagedError, match="header"):
        read_trace(path)


def damaged(lines, number, **changes):
    lines[number] = json.dumps({**json.loads(lines[number]), **changes}).encode() + b"\n"


def node(**changes):
    record = {"node": 1, "parent": 0, "ordinal": 0, "attempts": 1, "token_ids": [97], "text": "a"}
    return {**record, "sum_logprob": -1.0, "status": "open", "reason": "", **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"question": 3},
        {"question": "p"},
        {"nodes": [node(node=2)]},
        {"nodes": [node(parent=1)]},
        {"nodes": [node(parent=-1)]},
        {"nodes": [node(status="lost")]},
        {"nodes": [node(token_ids=["a"])]},
        {"nodes": [node(token_ids=[1 << 70])]},
        {"nodes": [{}]},
        {"nodes": None},
        {"changed": [{"node": 99, "status": "pruned", "reason": ""}]},
        {"changed": [{"node": -1, "status": "pruned", "reason": ""}]},
    ],
)
def test_trace_with_a_damaged_line_is_refused(whole, changes):
    _, path = whole
    lines = lines_of(path)
    damaged(lines, 1, **changes)
    path.write_bytes(b"".join(lines))
    with pytest.raises(TraceDamagedError, match="line 2 of"):
        finder().solve(QUESTIONS, trace=path)
    assert path.read_bytes() == b"".join(lines)


def test_trace_with_a_line_that_is_no_json_is_refused(whole):
    _, path = whole
    lines = lines_of(path)
    lines[2] = b"\0" * 40 + b"\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(DamagedLineError, match="line 3 of"):
        finder().solve(QUESTIONS, trace=path)


def test_trace_calls_on_depth_as_the_trees_grow():
    seen = []
    results = finder().solve(QUESTIONS, on_depth=lambda index, tree: seen.append((index, len(tree))))
    assert {index for index, _ in seen} == {0, 1, 2}
    for index, result in enumerate(results):
        sizes = [size for other, size in seen if other == index]
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == len(result.tree)


def tiny_finder():
    engine = TransformersEngine(make_teacher(), make_tokenizer())
    config = PathFinderConfig(branching_factor=3, beam=3, max_depth=4, max_step_tokens=7, temperature=0.9)
    return PathFinder(engine, config, checks=[RepetitionCheck(0.8)])


TINY_QUESTIONS = ["When the rain stopped", "Anna", "It was"]


def test_trace_replays_a_model_to_the_bit(tmp_path):
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    results = tiny_finder().solve(TINY_QUESTIONS, trace=path)
    assert any("repetition" in result.reasons for result in results), "steps are compared with replayed ones"
    for kept in (4, 8, 10):
        cut.write_bytes(b"".join(lines_of(path)[:kept]))
        resumed = tiny_finder()
        assert list(map(everything, resumed.solve(TINY_QUESTIONS, trace=cut))) == list(map(everything, results))
        assert resumed.engine.memory().unshared_bytes == 0, "every branch is freed"


def test_trace_of_another_model_is_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    tiny_finder().solve(["Anna"], trace=path)
    other = tiny_finder()
    with torch.no_grad():
        other.engine.model.get_output_embeddings().weight.mul_(2)
    with pytest.raises(TraceMismatchError, match="engine weights is"):
        other.solve(["Anna"], trace=path)


def test_trace_survives_sigkill(tmp_path):
    """Kills processes in the middle of appends and of generations; each new process resumes the search."""
    path = tmp_path / "killed.jsonl"
    script = Path(__file__).parent / "scripts/search_killed.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[1]), str(script.parents[2])])}
    done = subprocess.run(
        [sys.executable, script, path], capture_output=True, text=True, timeout=900, env=environment, check=True
    )
    report = [json.loads(line) for line in done.stdout.splitlines()]
    deaths = [line for line in report if line["signal"] == signal.SIGKILL]
    assert len(deaths) >= 12
    assert len({line["bytes"] for line in deaths}) > 8, "at different moments"
    for name, finder_of, questions in (("toy", finder, QUESTIONS), ("tiny", tiny_finder, TINY_QUESTIONS)):
        expected = finder_of().solve(questions)
        resumed = finder_of().solve(questions, trace=f"{path}.{name}")
        assert list(map(everything, resumed)) == list(map(everything, expected))
