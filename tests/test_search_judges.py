"""The models that judge, compared with their own forward of one input at a time, and used in a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.teachers import END, make_teacher, make_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from slimkernels.search import (
    Candidate,
    ContradictionCheck,
    NLIModel,
    PathFinder,
    PathFinderConfig,
    RepetitionCheck,
    SentenceEncoder,
    TransformersEngine,
    Verifier,
)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
TEXTS = ["The rain stopped.", "A", "The black cat was sleeping on the wall."]


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = END
    return tokenizer


def make_nli(labels=("entailment", "neutral", "contradiction")):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=len(labels), id2label=dict(enumerate(labels))))
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    return model.eval()


def test_judges_encoder_is_the_mean_over_each_texts_own_tokens(tokenizer):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval()
    embeddings = SentenceEncoder(model, tokenizer, batch_size=2)(TEXTS)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        np.testing.assert_allclose(embedding, hidden.mean(0), atol=1e-5)


@pytest.mark.parametrize("labels", [("entailment", "neutral", "contradiction"), ("CONTRADICTION", "ENTAILMENT")])
def test_judges_nli_gives_the_probability_of_the_label_that_says_contradiction(tokenizer, labels):
    model = make_nli(labels)
    pairs = [(left, right) for left in TEXTS for right in TEXTS if left != right]
    probabilities = NLIModel(model, tokenizer, batch_size=4)(pairs)
    index = [label.lower() for label in labels].index("contradiction")
    for pair, probability in zip(pairs, probabilities, strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(*pair, return_tensors="pt")).logits.softmax(-1)[0, index]
        assert probability == pytest.approx(expected.item(), abs=1e-5)
    assert probabilities.std() > 0.01


def test_judges_nli_refuses_labels_that_do_not_say(tokenizer):
    with pytest.raises(ValueError, match=r"'contradict', got \['LABEL_0', 'LABEL_1'\]"):
        NLIModel(make_nli(("LABEL_0", "LABEL_1")), tokenizer)


def test_judges_nli_reads_the_start_of_what_is_too_long(tokenizer):
    assert NLIModel(make_nli(), tokenizer)([("a" * 300, "b" * 300)]).shape == (1,)


def test_judges_nli_reads_no_more_than_the_tokenizer_says(tokenizer):
    # RoBERTa's first position is pad_token_id + 1: it reads two tokens fewer than it has positions.
    labels = dict(enumerate(("entailment", "neutral", "contradiction")))
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, pad_token_id=1, num_labels=3, id2label=labels))
    tokenizer.model_max_length = SIZES["max_position_embeddings"] - 2
    assert NLIModel(model, tokenizer)([("a" * 300, "b" * 300)]).shape == (1,)


def test_judges_verifier_is_the_probability_of_yes(tokenizer):
    model = make_teacher()
    verifier = Verifier(model, tokenizer, template="{question} {text}?", yes=("y", "Y", "no such token"), batch_size=2)
    candidates = [Candidate(i, text, None, 0.0, 1, context="Q") for i, text in enumerate(TEXTS)]
    yes = [tokenizer(spelling)["input_ids"][0] for spelling in "yY"]
    for text, score in zip(TEXTS, verifier(candidates), strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(f"Q {text}?", return_tensors="pt")).logits[0, -1]
        assert score == pytest.approx(logits.softmax(-1)[yes].sum().item(), rel=1e-3)


def test_judges_verifier_refuses(tokenizer):
    with pytest.raises(ValueError, match=r"must contain \{text\}"):
        Verifier(make_teacher(), tokenizer, template="{question}")
    with pytest.raises(ValueError, match="a single token"):
        Verifier(make_teacher(), tokenizer, yes=("absolutely",))


def test_judges_in_a_search(tokenizer):
    engine = TransformersEngine(make_teacher(), tokenizer)
    config = PathFinderConfig(branching_factor=3, beam=2, max_depth=3, max_step_tokens=8)
    asked = {}
    nli = NLIModel(make_nli(), tokenizer)

    def contradicts(pairs):
        probabilities = nli(pairs)
        assert not asked.keys() & set(pairs), "a pair is asked about once"
        asked.update(zip(pairs, probabilities, strict=True))
        return probabilities

    def search(threshold):
        asked.clear()
        checks = [RepetitionCheck(0.9), ContradictionCheck(contradicts, threshold, prefilter=False)]
        selector = Verifier(engine.model, tokenizer, yes=("y",))
        return PathFinder(engine, config, checks=checks, selector=selector).solve(["When the rain stopped"])[0]

    result = search(1.0)
    assert result.checks == ("repetition", "contradiction")
    assert "contradiction" not in result.reasons
    assert all(0 < score < 1 for score in result.scores)
    assert len(asked) > 10
    assert search(float(np.median(list(asked.values())))).reasons["contradiction"] > 0
