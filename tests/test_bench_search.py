"""The benchmark of the search: its peers search as it does, and its rows say what was measured."""

from __future__ import annotations

import string

import pytest
import torch
from teachers import make_teacher, make_tokenizer

from bench import blocks, records, search, search_peers
from slimkernels.search import PathFinder, PathFinderConfig, TransformersEngine, log_probability


@pytest.fixture(scope="module")
def model():
    """Writes capital letters only, which the tokenizer joins to nothing: their text has one encoding."""
    model = make_teacher(max_position_embeddings=512)
    others = set(range(300)) - set(make_tokenizer().convert_tokens_to_ids(list(string.ascii_uppercase)))
    with torch.no_grad():
        model.get_output_embeddings().weight[sorted(others)] = 0
    return model


def test_bench_search_with_generate_is_the_search(model):
    # The likeliest token in both: the same texts, with the same log-probabilities.
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


def test_bench_search_rows(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    sizes = [
        "--branching",
        "2",
        "--beam",
        "3",
        "--depth",
        "3",
        "--step-tokens",
        "2",
        "--prompt-tokens",
        "40",
        "--rounds",
        "1",
        "--dtype",
        "float32",
    ]
    search.main(["--out", str(tmp_path / "search.jsonl"), "--model", str(tmp_path / "model"), *sizes])
    rows = records.read(tmp_path / "search.jsonl")
    speeds = {row["provider"]: row["p50"] for row in rows if row["metric"] == "throughput"}
    assert set(speeds) == {search.OURS, search.REENCODING, search.PLAIN}
    assert all(speed > 0 for speed in speeds.values())
    bytes_of = {row["provider"]: row["p50"] for row in rows if row["metric"] == "kv_memory"}
    # Of a token: keys and values, two layers, two heads of eight float32. 48 rows with 46 tokens each.
    assert bytes_of["unshared copies"] == 48 * 46 * 2 * 2 * 2 * 8 * 4
    assert bytes_of[search.OURS] < bytes_of["unshared copies"] / 3
    said = blocks.search_sentence(rows)
    assert f"{speeds[search.OURS] / speeds[search.PLAIN]:.1f}x {search.PLAIN}" in said
    assert f"{speeds[search.OURS]:,.0f} tokens/s" in said
    assert "8 questions at once, branching 2, beam 3, 3 steps of 2 tokens" in said
