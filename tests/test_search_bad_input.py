"""Bad models and questions, which end with a clear report or error, and custom parts that users plug into a search."""

from __future__ import annotations

import json

import pytest
import torch
from support.teachers import END, make_teacher, make_tokenizer
from support.toy_engines import CharacterEngine

from slimkernels.cli import main
from slimkernels.search import (
    PathFinder,
    PathFinderConfig,
    Question,
    Status,
    TransformersEngine,
    custom_generate,
    greedy,
    self_consistency,
)

CONFIG = PathFinderConfig(branching_factor=2, beam=2, max_depth=3, max_step_tokens=4)


def with_logits(change):
    """Returns a tiny model with ``change`` applied to its logits (B, L, V)."""
    model = make_teacher()
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, logits: change(logits))
    return model


def only_end_of_text(logits):
    logits = torch.full_like(logits, -50.0)
    logits[..., make_tokenizer().convert_tokens_to_ids(END)] = 50.0
    return logits


def saved(folder, model):
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_model_without_any_step_delimiter_ends_by_length_and_depth():
    newline = make_tokenizer()("\n")["input_ids"]
    assert len(newline) == 1

    def change(logits):
        logits[..., [newline[0], 1]] = -1e4  # no end of text either
        return logits

    [result] = PathFinder(TransformersEngine(with_logits(change), make_tokenizer()), CONFIG, checks=()).solve(["Anna"])
    assert (result.finished, result.node is None) == (False, False)
    assert set(result.reasons) <= {"depth", "pruned", "empty"}
    tree = result.tree
    assert all(len(tree.step_token_ids(node)) == 4 for node in range(1, len(tree)))
    assert "\n" not in result.text


def test_a_model_that_emits_only_end_of_text_is_reported(tmp_path, monkeypatch):
    engine = TransformersEngine(with_logits(only_end_of_text), make_tokenizer())
    [result] = PathFinder(engine, CONFIG).solve(["Anna"])
    assert (result.text, result.finished, result.node) == ("", False, None)
    assert result.reasons == {"empty": 2}
    assert result.num_tokens == 4
    monkeypatch.setattr("slimkernels.teacher.load_teacher", lambda *_, **__: (engine.model, engine.tokenizer))
    out = tmp_path / "out.jsonl"
    assert main(["decode", "--model", "any", "--out", str(out), "--branching-factor", "2", "Anna"]) == 0
    record = json.loads(out.read_text())
    assert (record["finished"], record["candidates"]) == (False, [])
    assert record["unfinished_reason"] == "no branch was left: 2 empty"


def test_a_model_with_nan_logits_is_an_error(tmp_path, capsys):
    model = make_teacher()
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = float("nan")
    folder = saved(tmp_path / "nan", model)
    trace = tmp_path / "trace.jsonl"
    code = main(["decode", "--model", folder, "--trace", str(trace), "Anna"])
    assert code == 1
    assert "the model gives logits that are NaN" in capsys.readouterr().err
    assert not trace.exists()


@pytest.mark.parametrize("prompt", ["", " \n", []])
def test_an_empty_question_is_an_error_before_the_search(prompt, tmp_path):
    engine = CharacterEngine()
    with pytest.raises(ValueError, match=r"questions\[1\]: the prompt must have text in it"):
        PathFinder(engine, CONFIG).solve(["p", Question(prompt)], trace=tmp_path / "trace.jsonl")
    assert engine.encoded == []
    assert not (tmp_path / "trace.jsonl").exists()


def test_a_prompt_longer_than_the_context_is_an_error_and_one_that_fills_it_is_reported():
    engine = TransformersEngine(make_teacher(), make_tokenizer())
    with pytest.raises(ValueError, match=r"questions\[1\]: .*shorter than the model's context of 128 tokens, got 130"):
        PathFinder(engine, CONFIG).solve(["Anna", [5] * 130])
    [result] = PathFinder(engine, CONFIG, checks=()).solve([[5] * 127])
    assert set(result.reasons) <= {"context", "empty", "finished"}
    assert len(result.tree) == 3


def test_custom_step_boundaries_checks_and_scorers_are_plain_callables():
    class NoZ:
        name = "no z"
        needs_embeddings = False

        def __call__(self, branches):
            return ["z" in branch.step.text for branch in branches]

    config = PathFinderConfig(branching_factor=3, beam=3, max_depth=3, step_end=lambda text: len(text) >= 3)
    finder = PathFinder(
        CharacterEngine(-9.0), config, checks=[NoZ()], selector=lambda found: [-ord(c.text[0]) for c in found]
    )
    [result] = finder.solve(["p"])
    tree = result.tree
    assert {len(tree.steps[node]) for node in range(1, len(tree))} == {3}
    assert all(("z" in tree.steps[node]) == (tree.reasons[node] == "no z") for node in range(1, len(tree)))
    assert Status.CUT in tree.status
    assert result.text[0] == min(candidate.text[0] for candidate in result.candidates)


def test_custom_generate_answers_a_padded_batch_by_search():
    model, tokenizer = make_teacher(), make_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("When the rain stopped", "Anna")]
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    results = PathFinder(TransformersEngine(model, tokenizer), CONFIG).solve(prompts)
    hook = custom_generate(tokenizer, CONFIG)
    for _ in range(2):
        output = model.generate(input_ids, attention_mask=mask, custom_generate=hook, pad_token_id=9, max_new_tokens=5)
        assert output[:, :width].tolist() == input_ids.tolist()
        answers = [result.tree.token_ids(result.node) for result in results]
        longest = max(map(len, answers))
        assert output[:, width:].tolist() == [answer + [9] * (longest - len(answer)) for answer in answers]
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        model.generate(input_ids, custom_generate=hook, num_return_sequences=2, do_sample=True, max_new_tokens=5)


def test_presets_refuse_no_chains_and_take_a_trace(tmp_path):
    with pytest.raises(ValueError, match="num_chains must be at least 1, got 0"):
        self_consistency(CharacterEngine(), 0)
    first, again = (greedy(CharacterEngine(), CONFIG) for _ in range(2))
    [result] = first.solve(["p"], trace=tmp_path / "trace.jsonl")
    assert again.solve(["p"], trace=tmp_path / "trace.jsonl")[0].text == result.text
    assert again.engine.batches == []
