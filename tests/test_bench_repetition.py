"""The benchmark of the repetition check: its embeddings are the engine's, and its steps have the kinds they claim."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.teachers import make_teacher, make_tokenizer
from support.toy_engines import ScriptedEngine

from bench import blocks, records, repetition
from bench.repetition_chains import SYNONYMS, Chain, Step, gsm8k_chains, own_chains, say_again, strategyqa_chains
from slimkernels.search import PathFinderConfig, TransformersEngine
from slimkernels.search import Step as EngineStep


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    solution = "Anna has 3 * 4 = <<3*4=12>>12 cats.\nShe sold 5 of them, so 7 are left.\n#### 7"
    for name in ("gsm8k", "strategyqa"):
        (folder / name).mkdir()
    rows = [json.dumps({"question": f"How many, {n}?", "answer": solution}) for n in range(66)]
    for split in ("train", "test"):
        (folder / f"gsm8k/{split}.jsonl").write_text("\n".join(rows))
    facts = [["Cats are small."], ["Dogs bark.", "The sun is hot."]]
    (folder / "strategyqa/train.json").write_text(json.dumps([{"question": "Why?", "facts": said} for said in facts]))
    return folder


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_bench_repetition_embeds_as_the_engine_does(layer):
    model, tokenizer = make_teacher(), make_tokenizer()
    engine = TransformersEngine(model, tokenizer, embedding_layer=layer)
    prompt, steps = tokenizer("When the rain stopped")["input_ids"], [[5, 6, 7], [8], [9, 10]]
    [branch] = engine.start([prompt])
    expected = []
    for ids in steps:
        [read] = engine.replay([EngineStep(branch, ids, "", 0.0, "step")], embed=True)
        branch = read.branch
        expected.append(read.embedding)
    chain = Chain(0, prompt, [Step(ids, "", "") for ids in steps])
    np.testing.assert_allclose(repetition.step_embeddings(model, chain, [layer])[0], expected, atol=1e-5)


def test_bench_repetition_says_again():
    step = "She sold 5 cats, so 9 are left."
    assert say_again(step, "verbatim") == step
    assert say_again(step, "retyped") == "So, she sold 5 cats, so 9 are left"
    assert say_again(step, "reworded") == f"She {SYNONYMS['sold']} 5 cats, thus 9 are {SYNONYMS['left']}."
    assert say_again(step, "renumbered") == "She sold 8 cats, so 12 are left."


def test_bench_repetition_chains_of_data_sets(data):
    tokenizer = make_tokenizer()
    first, *_, last = gsm8k_chains(data / "gsm8k/train.jsonl", tokenizer, 66)
    assert [step.kind for step in first.steps] == ["", "gsm8k", "paraphrased"]
    assert [step.text for step in first.steps[:2]] == [
        " Anna has 3 * 4 = 12 cats.\n",
        "She sold 5 of them, so 7 are left.\n",
    ]
    assert (last.number, last.steps[2].kind) == (65, "verbatim")
    assert last.steps[2].text.strip() in (step.text.strip() for step in last.steps[:2])
    assert tokenizer.decode(last.prompt) == "Q: How many, 65?\nA:"
    assert all(tokenizer.decode(step.token_ids) == step.text for step in first.steps)
    [facts] = strategyqa_chains(data / "strategyqa/train.json", tokenizer, 5)
    assert [(step.text, step.kind) for step in facts.steps] == [
        (" Dogs bark.\n", ""),
        ("The sun is hot.\n", "strategyqa"),
    ]


def test_bench_repetition_knows_a_loop_of_the_model():
    said = ["Cats sleep.\n", "Dogs bark at night.\n", "Dogs bark at noon.\n", "cats sleep\n", "Cats sleep.\n"]
    script = {"".join(said[:place]): [(text, -1.0)] for place, text in enumerate(said)}
    engine = ScriptedEngine(script)
    engine.tokenizer = make_tokenizer()
    [chain] = own_chains(engine, ["Why?"], PathFinderConfig(max_depth=5))
    assert [(step.text, step.kind) for step in chain.steps] == list(
        zip(
            said, ["", "own", "", "loop"], strict=False
        )  # the third shares three of five words: neither new nor repeated
    )
    assert engine.encoded == [engine.tokenizer.decode(chain.prompt)] == ["Q: Why?\nA:"]


def test_bench_repetition_chooses_on_one_half_and_tells_of_the_other():
    choosing = {"gsm8k": [0.6] * 199 + [0.9], "own": [0.7] * 199 + [0.8], "verbatim": [0.99]}
    held_out = {"gsm8k": [0.5, 0.9], "own": [0.6], "verbatim": [0.98, 0.7]}
    chosen, default = repetition.judge("layer 7", choosing, held_out)
    assert (chosen["threshold"], default["threshold"]) == (0.701, 0.98)
    assert chosen["cut"] == {"new": {"gsm8k": 0.5, "own": 0.0}, "repeated": {"verbatim": 0.5}, "between": {}}
    assert default["cut"] == {"new": {"gsm8k": 0.0, "own": 0.0}, "repeated": {"verbatim": 0.5}, "between": {}}
    assert chosen["steps"] == {"gsm8k": 2, "own": 1, "verbatim": 2}


def test_bench_repetition_appends_rows_that_the_docs_show(data, tmp_path):
    make_teacher(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    out = tmp_path / "repetition.jsonl"
    sizes = ["--layers", "0", "2", "--gsm8k", "20", "--strategyqa", "9", "--own", "2"]
    repetition.main(["--data", str(data), "--out", str(out), "--model", str(tmp_path / "model"), *sizes])
    rows = records.read(out)
    assert [(row["embedding"], row["chosen_by"]) for row in rows] == [
        (f"layer {layer}", chosen_by) for layer in (0, 2) for chosen_by in ("the other half", "default")
    ]
    [default] = [row for row in rows if row["is_default"]]
    assert (default["embedding"], default["threshold"]) == ("layer 2", 0.98)
    assert default["steps"]["gsm8k"] == 10
    cut = f"{100 * default['cut']['new']['gsm8k']:.0f} %"
    assert f"| new | a solution of GSM8K | 10 | {cut} |" in blocks.repetition_table(rows)
