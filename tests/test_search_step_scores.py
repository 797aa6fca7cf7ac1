"""Searches pruned by scores of steps: worked out by hand, batched, resumed, failing, and with models and servers."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from support.served import RECORDINGS, _Server
from support.teachers import END, make_teacher, make_tokenizer, save_teacher, smollm2
from support.toy_engines import CharacterEngine, find, nodes_of
from transformers import LlamaConfig, LlamaForTokenClassification

from slimkernels.search import (
    Candidate,
    PathFinder,
    PathFinderConfig,
    ProcessRewardModel,
    PruningScore,
    Question,
    ServedStepVerifier,
    Status,
    StepScoreError,
    StepVerifier,
    TraceMismatchError,
    TransformersEngine,
    read_trace,
    step_score,
)
from slimkernels.search.tree_page import tree_page

# The model prefers a (-1 a token) to b (-2), the scorer b (0.9) to a (0.1). Under b, x finishes, and c goes on.
SCRIPT = {
    "": [("a\n", -1.0), ("b\n", -2.0)],
    "a\n": [("u$", -1.0), ("v$", -1.0)],
    "b\n": [("x$", -9.0), ("c\n", -1.0)],
    "b\nc\n": [("$", -1.0), ("y$", -1.0)],
}
VALUES = {"a": 0.1, "b": 0.9, "x": 0.7, "c": 0.5, "y": 0.2, "u": 0.3, "v": 0.4}


class Scorer:
    """A scorer by the text of the last step, which records its calls."""

    def __init__(self, value=lambda step: VALUES[step.strip()]) -> None:
        self.value, self.calls = value, []

    def __call__(self, texts, context):
        self.calls.append(list(zip(texts, context, strict=True)))
        return [self.value(steps[-1]) for steps in texts]


def test_step_scores_prune_instead_of_log_probabilities_as_worked_out_by_hand():
    scorer = Scorer()
    _, [result] = find(SCRIPT, beam=1, score_steps=scorer, selector=step_score)
    assert nodes_of(result.tree) == {
        (0,): ("a\n", "PRUNED", "pruned"),
        (1,): ("b\n", "EXPANDED", ""),
        (1, 0): ("x", "FINISHED", "finished"),
        (1, 1): ("c\n", "EXPANDED", ""),
        (1, 1, 0): ("", "FINISHED", "finished"),
        (1, 1, 1): ("y", "FINISHED", "finished"),
    }
    # One call a depth; a step without text has no score, so its branch keeps that of the step before it.
    assert scorer.calls == [
        [(("a\n",), "Q"), (("b\n",), "Q")],
        [(("b\n", "x"), "Q"), (("b\n", "c\n"), "Q")],
        [(("b\n", "c\n", "y"), "Q")],
    ]
    assert (result.scores, result.text) == ([0.7, 0.5, 0.2], "b\nx")
    assert math.isnan(result.tree.step_score[result.tree.with_status(Status.FINISHED)[1]])


@pytest.mark.parametrize(
    ("weight", "kept"),
    # a: -(1 - w) + 0.1 w; b: -2 (1 - w) + 0.9 w. They are equal at w = 5/9.
    [(1.0, "b\n"), (0.6, "b\n"), (0.5, "a\n"), (0.0, "a\n")],
)
def test_step_scores_are_weighted_beside_log_probabilities(weight, kept):
    _, [result] = find(SCRIPT, beam=1, max_depth=1, score_steps=Scorer(), score_weight=weight)
    assert [result.tree.steps[node] for node in result.tree.with_status(Status.ENDED)] == [kept]


@pytest.mark.parametrize(
    ("reduction", "expected"), [("last", 0.8), ("min", 0.2), ("mean", 0.5), ("product", 0.5 * 0.2 * 0.8)]
)
def test_step_scores_of_a_branch_are_combined(reduction, expected):
    score = PruningScore(1.0, 1.0, reduction)
    assert score.reduce([0.5, 0.2, 0.8]) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(score.reduce([]))
    _, [result] = find(SCRIPT, beam=1, score_steps=Scorer(), score_reduction=reduction, selector=step_score)
    branch = {"last": 0.2, "min": 0.2, "mean": 1.6 / 3, "product": 0.9 * 0.5 * 0.2}[reduction]  # b, c, y
    assert result.scores[2] == pytest.approx(branch, rel=1e-12)


def test_step_scores_are_not_asked_for_steps_that_were_cut():
    class NoB:
        name = "no b"

        def __call__(self, branches):
            return ["b" in branch.step.text for branch in branches]

    scorer = Scorer()
    _, [result] = find(SCRIPT, beam=1, max_depth=1, score_steps=scorer, checks=[NoB()])
    assert scorer.calls == [[(("a\n",), "Q")]]
    assert result.reasons == {"no b": 1, "depth": 1}


LETTERS = PathFinderConfig(branching_factor=3, beam=2, buffer_size=5, max_depth=4, max_step_tokens=6)
QUESTIONS = ["p", "q", Question("r", "what is r?")]


def letters(batch_questions=2, scorer=None):
    scorer = scorer or Scorer(lambda step: (hash_of(step) % 7) / 7)
    config = dataclasses.replace(LETTERS, batch_questions=batch_questions, score_steps=scorer, score_weight=0.7)
    return PathFinder(CharacterEngine(-2.0), config, checks=(), selector=step_score), scorer


def hash_of(text):
    return sum(map(ord, text))


def comparable(results):
    return [(nodes_of(result.tree), result._replace(tree=None, seconds=0)) for result in results]


def test_step_scores_are_asked_for_once_a_depth_and_do_not_depend_on_the_batch():
    (together, scorer), (alone, _) = letters(3), letters(1)
    results = together.solve(QUESTIONS)
    assert comparable(results) == comparable(alone.solve(QUESTIONS))
    assert 3 <= len(scorer.calls) <= LETTERS.max_depth
    assert {context for _, context in scorer.calls[0]} == {"p", "q", "what is r?"}


def test_step_scores_are_in_the_trace_from_which_a_search_resumes_without_asking_again(tmp_path):
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    whole, scorer = letters()
    results = comparable(whole.solve(QUESTIONS, trace=path))
    asked = sum(map(len, scorer.calls))
    lines = path.read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        cut.write_bytes(b"".join(lines[:kept]))
        before = [traced.progress.tree for traced in read_trace(cut).questions]
        known = sum(int((~np.isnan(tree.step_score)).sum()) for tree in before)
        resumed, scorer = letters()
        assert comparable(resumed.solve(QUESTIONS, trace=cut)) == results
        assert sum(map(len, scorer.calls)) == asked - known
        assert cut.read_bytes().count(b"step_score") == path.read_bytes().count(b"step_score")
    assert known == asked


def test_step_scores_are_part_of_what_a_trace_must_share(tmp_path):
    path = tmp_path / "trace.jsonl"
    PathFinder(CharacterEngine(-2.0), LETTERS, checks=()).solve(["p"], trace=path)
    assert b"score_" not in path.read_bytes(), "as in the traces of earlier releases"
    with pytest.raises(TraceMismatchError, match="config score_reduction is None, this search's 'last'"):
        letters()[0].solve(["p"], trace=path)


class Failing(Scorer):
    """A scorer that fails once it is broken."""

    def __init__(self, outcome) -> None:
        super().__init__(lambda step: hash_of(step) % 5)
        self.outcome, self.is_broken = outcome, True

    def __call__(self, texts, context):
        scores = super().__call__(texts, context)
        return self.outcome(scores) if self.is_broken and len(self.calls) > 1 else scores


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (
            lambda scores: scores[1:],
            r"must return one number for each of the 18 branches of depth 2, got shape \(17,\)",
        ),
        (lambda scores: 0.5, r"must return one number for each .* got shape \(\)"),
        (lambda scores: [math.nan, *scores[1:]], r"must return finite numbers, got nan for the step '.*' of depth 2"),
        (lambda scores: [*scores[:-1], -math.inf], "must return finite numbers, got -inf"),
        (lambda scores: [None] * len(scores), "must return finite numbers, got nan"),
        (lambda scores: ["good"] * len(scores), "raised ValueError for the 18 branches of depth 2"),
        (lambda scores: raises(KeyError("step")), r"raised KeyError for the 18 branches of depth 2 \('step'\)"),
    ],
)
def test_step_scores_that_fail_are_one_sentence_and_lose_nothing(tmp_path, outcome, message):
    path = tmp_path / "trace.jsonl"
    finder, scorer = letters(3, Failing(outcome))
    with pytest.raises(StepScoreError, match=f"score_steps {message}.*: a trace holds every depth before") as error:
        finder.solve(QUESTIONS, trace=path)
    assert "\n" not in str(error.value)
    assert finder.engine.texts == {}, "every branch is freed"
    assert [traced.progress.depth for traced in read_trace(path).questions] == [1, 1, 1]
    scorer.is_broken = False
    whole, _ = letters(3, Scorer(lambda step: hash_of(step) % 5))
    assert comparable(finder.solve(QUESTIONS, trace=path)) == comparable(whole.solve(QUESTIONS))


def test_step_scores_pass_on_the_error_of_a_server():
    finder, _ = letters(3, Failing(lambda scores: raises(OSError("the server did not answer"))))
    with pytest.raises(OSError, match=r"^the server did not answer$"):
        finder.solve(QUESTIONS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score_steps": "prm"}, "score_steps must be a function of the texts of branches .* got 'prm'"),
        ({"score_steps": Scorer(), "score_weight": 1.5}, r"score_weight must be finite and in \[0, 1\], got 1.5"),
        ({"score_steps": Scorer(), "score_reduction": "sum"}, "score_reduction must be one of 'last', .* got 'sum'"),
        ({"score_weight": 0.5}, "score_weight has no meaning without score_steps"),
        ({"score_reduction": "min"}, "score_reduction has no meaning without score_steps"),
    ],
)
def test_step_scores_refuse(fields, message):
    with pytest.raises(ValueError, match=message):
        PathFinderConfig(**fields)


def test_step_score_as_selector_needs_step_scores():
    with pytest.raises(ValueError, match="selector step_score needs scores of steps"):
        PathFinder(CharacterEngine(), selector=step_score)
    assert step_score([Candidate(1, "", None, 0.0, 1), Candidate(2, "", None, 0.0, 1, step_score=0.5)]) == [
        -math.inf,
        0.5,
    ]


def test_step_scores_are_on_the_page(tmp_path):
    path = tmp_path / "trace.jsonl"
    letters()[0].solve(["p"], trace=path)
    page = tree_page(read_trace(path))
    scored = read_trace(path).questions[0].progress.tree.step_score
    assert page.count("step score ") == int((~np.isnan(scored)).sum()) > 3
    assert "0.7 times the score of a branch's last step" in page


STEPS, QUESTION = ("One bag has 4.", "So 3 bags have 12.\n", "The answer is 12"), "How many are 3 bags of 4?"


def make_classifier(num_labels=2):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": 300, "max_position_embeddings": 128, "initializer_range": 0.4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForTokenClassification(LlamaConfig(num_labels=num_labels, **sizes)).eval()


@pytest.mark.parametrize("num_labels", [1, 2])
def test_process_reward_model_reads_the_end_of_each_step_as_it_was_trained(num_labels):
    model, tokenizer = make_classifier(num_labels), make_tokenizer()
    # As TRL's trainer makes its examples: the start, the prompt, and each step with the separator.
    ids, ends = [tokenizer.bos_token_id, *tokenizer(QUESTION)["input_ids"]], []
    for step in STEPS:
        ids += tokenizer(step.strip())["input_ids"] + tokenizer("\n")["input_ids"]
        ends.append(len(ids) - 1)
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, ends]
    expected = logits[:, 0].sigmoid() if num_labels == 1 else logits.softmax(-1)[:, 1]
    branches = [STEPS[:count] for count in (1, 2, 3)]
    for batch_size in (1, 3):
        scores = ProcessRewardModel(model, tokenizer, batch_size=batch_size)(branches, [QUESTION] * 3)
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01
    scorer = ProcessRewardModel(model, tokenizer)
    long = ("word " * 100, *STEPS[:1])
    assert scorer([long], [QUESTION]) == scorer(branches[:1], [QUESTION]), "without the first step, which has no room"
    assert scorer(branches[:1], [QUESTION]) == scorer(branches, [QUESTION] * 3)[:1], "to the last bit"


def test_process_reward_model_in_a_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
        "{% endif %}"
    )
    scorer = ProcessRewardModel(make_classifier(), tokenizer, separator=END, chat=True, system="Think.")
    text = tokenizer.decode(scorer.encode(STEPS, QUESTION))
    assert text == (f"[system]Think.[user]{QUESTION}[assistant]{STEPS[0]}{END}{STEPS[1].strip()}{END}{STEPS[2]}{END}")


def test_process_reward_model_refuses(tmp_path):
    tokenizer, model = make_tokenizer(), make_classifier(3)
    with pytest.raises(ValueError, match="one or two labels, got 3"):
        ProcessRewardModel(model, tokenizer)([STEPS], [QUESTION])
    with pytest.raises(
        ValueError, match="last step must have at most 128 tokens, the context of the scorer's model, got"
    ):
        ProcessRewardModel(make_classifier(), tokenizer)([("word " * 200,)], [QUESTION])
    for options, message in (
        ({"chat": True}, "chat must be False for a tokenizer without a chat template"),
        ({"system": "Think."}, "system has no meaning without chat=True"),
        ({"separator": ""}, "separator must have at least one token"),
    ):
        with pytest.raises(ValueError, match=message):
            ProcessRewardModel(model, tokenizer, **options)
    folder = save_teacher(tmp_path / "causal")
    with pytest.raises(ValueError, match=r"has no weights for score.*: give a language model to StepVerifier, and"):
        ProcessRewardModel.from_pretrained(str(folder))


def test_step_verifier_is_the_probability_of_yes_against_no():
    model, tokenizer = make_teacher(), make_tokenizer()
    scorer = StepVerifier(
        model, tokenizer, template="{question} {steps} ({step})?", separator=" / ", yes=("y", "Y"), no=("n",)
    )
    prompt = f"{QUESTION} One bag has 4. / So 3 bags have 12. (So 3 bags have 12.)?"
    with torch.inference_mode():
        row = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].softmax(-1)
    yes, no = row[[tokenizer("y")["input_ids"][0], tokenizer("Y")["input_ids"][0]]].sum(), row[tokenizer("n").input_ids]
    [score] = scorer([STEPS[:2]], [QUESTION])
    assert score == pytest.approx((yes / (yes + no)).item(), rel=1e-4)
    # "yes" is no single token here: it is told from "no" by its first one.
    [first] = StepVerifier(model, tokenizer, template="{question} {step}?", yes=("yes", " yes"), no=("no", " no"))(
        [STEPS[:1]], [QUESTION]
    )
    assert 0 < first < 1
    with pytest.raises(ValueError, match="yes and no must begin with different tokens"):
        StepVerifier(model, tokenizer, yes=("yes",), no=("yellow",))
    with pytest.raises(ValueError, match=r"template must contain \{steps\} or \{step\}"):
        StepVerifier(model, tokenizer, template="{question}")


class YesServer(_Server):
    """Answers yes with probability 0.7 and no with 0.1 where the last step has a 4, and "Hm" elsewhere."""

    def reply(self, path, body):
        assert path == "/v1/chat/completions"
        [message] = body["messages"]
        says = {" Yes": 0.5, "yes": 0.2, "No": 0.1, "Hm": 0.1} if "4" in message["content"] else {"Hm": 0.9}
        likeliest = [{"token": token, "logprob": math.log(value)} for token, value in says.items()]
        choice = {"logprobs": {"content": [{"token": "Yes", "top_logprobs": likeliest}]}}
        return 200, {}, json.dumps({"choices": [choice]})


def test_served_step_verifier_asks_for_all_branches_of_a_depth():
    pytest.importorskip("httpx2", reason="needs the extra server")
    with YesServer() as server:
        scorer = ServedStepVerifier(server.url, "judge", template="{step}?", max_retries=0)
        assert scorer([STEPS[:1], STEPS[:1], ("4 + 4",)], ["Q", "Q", "Q"]) == pytest.approx([0.875] * 3)
        assert len(server.seen) == 2, "equal questions once"
        assert server.seen[0]["body"]["top_logprobs"] == 20
        with pytest.raises(
            ValueError, match="must begin with one of 'yes' and 'no', but neither is among its 1 likeli"
        ):
            scorer([("none",)], ["Q"])
        server.faults += 2 * ["disconnect"]
        config = PathFinderConfig(branching_factor=2, beam=1, max_depth=2, max_step_tokens=4, score_steps=scorer)
        with pytest.raises(OSError, match="/v1/chat/completions"):
            PathFinder(CharacterEngine(), config, checks=()).solve(["p"])


@pytest.mark.parametrize("kind", ["llama.cpp", "vllm"])
def test_served_step_verifier_reads_what_real_servers_answered(kind):
    pytest.importorskip("httpx2", reason="needs the extra server")
    recorded = [json.loads(line) for line in RECORDINGS[kind].read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(e["answer"]) for e in recorded if e["path"] == "/v1/chat/completions" and e["status"] == 200]
    # Some requests asked for ids or for emojis, whose answers begin with no words.
    read = 0
    for answer in answers:
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        words = [entry for entry in likeliest if entry["token"].strip().isalpha()][:2]
        if len(words) < 2:
            continue
        read += 1
        scorer = ServedStepVerifier("http://localhost:1/v1", "m", yes=words[0]["token"], no=words[1]["token"])
        yes, no = (math.exp(entry["logprob"]) for entry in words)
        assert scorer._read(answer) == pytest.approx(yes / (yes + no), rel=1e-6)
    assert read >= 2


def test_step_scores_of_a_real_model_decide_who_is_kept(tmp_path):
    engine, path = TransformersEngine(*smollm2()), tmp_path / "trace.jsonl"
    settings = {"branching_factor": 3, "beam": 1, "max_depth": 2, "max_step_tokens": 4, "step_delimiter": " "}
    scorer = StepVerifier(engine.model, engine.tokenizer, template="{steps}? Answer yes or no:")
    config = PathFinderConfig(**settings, score_steps=scorer)
    finder, questions = PathFinder(engine, config, checks=(), chat=False), ["Question: What is 7 + 8?\nAnswer:"]
    [result] = finder.solve(questions, trace=path)
    tree = result.tree
    scores = [float(tree.step_score[node]) for node in range(1, len(tree))]
    assert len(set(scores)) > 4
    assert all(0 < score < 1 for score in scores)
    [kept] = tree.with_status(Status.EXPANDED)[1:]
    assert kept - 1 == int(np.argmax(scores[:3]))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    [resumed] = finder.solve(questions, trace=path)
    assert comparable([resumed]) == comparable([result])
