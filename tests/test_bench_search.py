"""The benchmark of the search: its peers run the same search, and its rows describe what was measured."""

from __future__ import annotations

import string

import pytest
import torch
from support.teachers import make_teacher, make_tokenizer

from bench import blocks, records, search, search_peers
from slimkernels.search import PathFinder, PathFinderConfig, TransformersEngine, log_probability


@pytest.fixture(scope="module")
def model():
    """A model that writes only capital letters, which the tokenizer never merges: their text has one encoding."""
    model = make_teacher(max_position_embeddings=512)
    others = set(range(300)) - set(make_tokenizer().convert_tokens_to_ids(list(string.ascii_uppercase)))
    with torch.no_grad():
        model.get_output_embeddings().weight[sorted(others)] = 0
    return model


def test_bench_search_with_generate_is_the_search(model):
    # Both take the likeliest token, so they must give the same texts with the same log-probabilities.
    options = {"branching_factor": 2, "beam": 2, "max_depth": 3, "max_step_tokens": 4, "step_end": lambda _: False}
    config = PathFinderConfig(top_k=1, **options)
    questions = ["When the rain stopped", "Anna"]
    endless = search_peers.without_end(model)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    engine = TransformersEngine(endless, tokenizer, eos_token_ids=())
    results = PathFinder(engine, config, checks=(), selector=log_probability).solve(questions)
    beams = search_peers.search_with_generate(endless, tokenizer, config, questions, batch_leaves=3)
    for question, result, beam in zip(questions, results, beams, strict=True):
        assert {leaf.text for leaf in beam} == {question + result.text}
        assert len(beam) == 2
        for leaf in beam:
            assert leaf.num_tokens == 12
            assert leaf.sum_logprob == pytest.approx(max(result.scores), abs=1e-3)


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Returns a function that benchmarks a small search at a clean commit, and returns the rows of the file."""
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    here = search.machine() | {"commit": "0123456789ab"}
    monkeypatch.setattr(search, "machine", lambda: here)
    out = tmp_path / "search.jsonl"
    sizes = (
        "--branching 2 --beam 3 --depth 3 --step-tokens 2 --prompt-tokens 40 --candidates 9 --dtype float32 --shots 0"
    )

    def run(*options):
        search.main(["--out", str(out), "--model", str(tmp_path / "model"), *sizes.split(), *options])
        return records.read(out)

    run.out = out
    return run


def test_bench_search_rows(run):
    rows = run("--rounds", "1", "--reencoded", "4")
    speeds = {row["provider"]: row["p50"] for row in rows if row["metric"] == "throughput"}
    assert set(speeds) == {search.OURS, search.REENCODING, search.PLAIN}
    assert all(speed > 0 for speed in speeds.values())
    bytes_of = {row["provider"]: row["p50"] for row in rows if row["metric"] == "kv_memory"}
    # 48 rows of 46 tokens; each token has keys and values of two layers with two heads of eight float32.
    assert bytes_of["unshared copies"] == 48 * 46 * 2 * 2 * 2 * 8 * 4
    assert bytes_of[search.OURS] < bytes_of["unshared copies"] / 3
    times = {row["provider"]: row["p50"] for row in rows if row["op"] == "consensus"}
    said = blocks.search_table(rows)
    line = said.splitlines()[2]
    ratios = [f"{speeds[search.OURS] / speeds[peer]:.1f}x" for peer in (search.REENCODING, search.PLAIN)]
    assert line.split(" | ")[3:6] == [f"{speeds[search.OURS]:,.0f} tokens/s", *ratios]
    assert "8 questions at once, branching 2, beam 3, 3 steps of 2 tokens" in said
    assert f"9 candidates of 400 words takes {times[search.OURS]:.0f} ms" in said


def test_bench_search_goes_on_where_it_was_stopped(run):
    rows = run("--rounds", "2")
    assert len(rows) == 2 * 3 + 2 + 2 * 2
    run.out.write_text("".join(run.out.read_text().splitlines(keepends=True)[:-3]))
    again = run("--rounds", "2")
    assert again[:-3] == rows[:-3]
    named = ("op", "provider", "metric", "round")
    assert [[row.get(name) for name in named] for row in again] == [[row.get(name) for name in named] for row in rows]


def test_bench_search_says_medians_of_the_newest_commit():
    def rows(commit, rates):
        shared = dict.fromkeys(records.MACHINE_FIELDS, "") | {"op": "search", "metric": "throughput", "threads": 2}
        return [
            shared | {"commit": commit, "provider": provider, "p50": rate}
            for provider, of_rounds in rates.items()
            for rate in of_rounds
        ]

    old = rows("a", {search.OURS: [900.0], search.PLAIN: [1.0]})
    new = rows("b", {search.OURS: [10.0, 30.0, 20.0], search.PLAIN: [5.0, 7.0]})
    assert blocks._newest_medians(old + new) == {search.OURS: 20.0, search.PLAIN: 6.0}
