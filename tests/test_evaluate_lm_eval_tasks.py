"""lm-eval as a library: its tasks with local files, every sample kept, and scores equal to those of its own model."""

from __future__ import annotations

import bz2
import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from support.evaluation import needs_lm_eval
from support.teachers import make_teacher, make_tokenizer, save_teacher

from slimkernels.evaluate.lm_eval.local_data import write_local_tasks

# lm-eval and its dependencies warn; no warning is about this package's calls.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    ("Which one barks?", ["a cat", "a dog", "a stone", "rain"], 1),
    ("What is wet?", ["rain", "sand"], 0),
    ("What is hard?", ["water", "milk", "a stone"], 2),
]
MMLU = [("1 + 1", ["1", "2", "3", "4"], 1), ('"Red" is', ["a number", "a colour, or hue", "a town", "wet"], 1)]
TRUTH = [
    ("Are fish wet?", "They are wet", "They are wet; Yes.; Mostly", "No; They are dry"),
    ("Do stones talk?", "Stones do not talk.", "Stones do not talk; No", "They do"),
]


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def foundry_arc(query, choices, gold):
    return json.dumps({"query": f"Question: {query}", "choices": choices, "gold": gold})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "arc/arc_easy.jsonl", [foundry_arc(*question) for question in QUESTIONS])
    write_lines(folder / "arc/ARC-Challenge-Train.jsonl", ["not to be read"])
    authors = {"stem": "What is wet?", "choices": [{"text": "sand", "label": "1"}, {"text": "rain", "label": "2"}]}
    write_lines(
        folder / "arc/ARC-Challenge-Test.jsonl", [json.dumps({"id": "x", "question": authors, "answerKey": "2"})]
    )
    hellaswag = ["Sport: A man runs. He is fast. the man", "2", "a.", "b.", "c.", "d."]
    hellaswag += ["Home: How to sit. Take a Chair.", "0", "e.", "f.", "g.", "h."]
    (folder / "hellaswag").mkdir()
    (folder / "hellaswag/hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join(hellaswag).encode()))
    with_header = ["question,choice0,choice1,choice2,choice3,answer"]
    write_lines(
        folder / "mmlu/test/anatomy_test.csv",
        with_header
        + [f"{question.replace(chr(34), '')},{','.join(map(json.dumps, c))},{g}" for question, c, g in MMLU],
    )
    write_lines(folder / "mmlu/dev/anatomy_dev.csv", ["What is 2?,1,2,3,4,B"] * 5)
    rows = ["", "Type,Question,Best Answer,Correct Answers,Incorrect Answers", *(f"x,{','.join(row)}" for row in TRUTH)]
    write_lines(folder / "truthfulqa/TruthfulQA.csv", rows)
    return folder


@pytest.fixture(scope="module")
def model():
    return make_teacher(max_position_embeddings=1024)


def evaluate(*arguments, **options):
    from slimkernels.evaluate.lm_eval.tasks import evaluate_multiple_choice

    return evaluate_multiple_choice(*arguments, **options)


@pytest.fixture(scope="module")
def outcome(model, data):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'slimkernels[harness]'")
    tasks = ["ai2_arc", "hellaswag", "mmlu_anatomy", "truthfulqa_mc1", "truthfulqa_mc2"]
    return evaluate(model, make_tokenizer(), tasks, data=data)


def samples_of(outcome, task):
    return [sample for sample in outcome.samples if sample.task == task]


@needs_lm_eval
def test_lm_eval_asks_what_lm_eval_asks_of_the_hubs_data(outcome):
    # The expected texts are written by hand from lm-eval's definitions.
    easy = samples_of(outcome, "arc_easy")
    assert [sample.prompt for sample in easy] == [f"Question: {question}\nAnswer:" for question, _, _ in QUESTIONS]
    assert [sample.choices for sample in easy] == [[f" {choice}" for choice in c] for _, c, _ in QUESTIONS]
    assert [sample.targets for sample in easy] == [[1], [0], [2]]

    [challenge] = samples_of(outcome, "arc_challenge")
    assert (challenge.choices, challenge.targets) == ([" sand", " rain"], [1])

    sport, home = samples_of(outcome, "hellaswag")
    assert (sport.prompt, sport.choices, sport.targets) == (
        "Sport: A man runs. He is fast. The man",
        [" a.", " b.", " c.", " d."],
        [2],
    )
    assert (home.prompt, home.targets) == ("Home: How to sit. Take a Chair.", [0])

    anatomy = samples_of(outcome, "mmlu_anatomy")
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert anatomy[1].prompt == head + "Red is\nA. a number\nB. a colour, or hue\nC. a town\nD. wet\nAnswer:"
    assert anatomy[1].choices == [" A", " B", " C", " D"]
    assert [sample.targets for sample in anatomy] == [[1], [1]]

    single, several = samples_of(outcome, "truthfulqa_mc1")[0], samples_of(outcome, "truthfulqa_mc2")[0]
    assert single.prompt.endswith("Barcelona, Spain.\n\nQ: Are fish wet?\nA:")
    assert (single.choices, single.targets) == ([" They are wet.", " No.", " They are dry."], [0])
    assert several.choices == [" They are wet.", " Yes.", " Mostly.", " No.", " They are dry."]
    assert several.targets == [0, 1, 2]


@needs_lm_eval
def test_lm_eval_likelihoods_are_the_models_and_scores_follow_from_them(model, outcome):
    tokenizer = make_tokenizer()
    for sample in [*samples_of(outcome, "arc_easy"), *samples_of(outcome, "hellaswag")]:
        for choice, loglikelihood in zip(sample.choices, sample.loglikelihoods, strict=True):
            prompt, whole = (tokenizer(text)["input_ids"] for text in (sample.prompt, sample.prompt + choice))
            with torch.inference_mode():
                logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            expected = sum(float(logprobs[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            assert loglikelihood == pytest.approx(expected, rel=1e-4)

    for task, found in outcome.tasks.items():
        samples = samples_of(outcome, task)
        assert found.num_samples == len(samples)
        for metric, score in found.scores.items():
            assert score == pytest.approx(np.mean([sample.scores[metric] for sample in samples]))
        if task != "truthfulqa_mc2":
            assert [s.scores["acc"] for s in samples] == [float(s.prediction in s.targets) for s in samples]
    several = samples_of(outcome, "truthfulqa_mc2")[0]
    mass = np.exp(np.array(several.loglikelihoods) - max(several.loglikelihoods))
    assert several.scores["acc"] == pytest.approx(mass[:3].sum() / mass.sum())


@needs_lm_eval
def test_lm_eval_samples_of_two_models_pair_up_and_json_holds_them(model, data, outcome):
    other = evaluate(make_teacher(seed=5), make_tokenizer(), ["arc_easy"], data=data, limit=2)
    ours = samples_of(outcome, "arc_easy")[:2]
    assert [sample.doc_hash for sample in other.samples] == [sample.doc_hash for sample in ours]
    assert [sample.loglikelihoods for sample in other.samples] != [sample.loglikelihoods for sample in ours]
    assert json.loads(json.dumps(other.records()))[1]["prompt"] == ours[1].prompt
    assert not evaluate(model, make_tokenizer(), ["arc_easy"], data=data, limit=1, log_samples=False).samples


@needs_lm_eval
def test_lm_eval_leaves_model_tokenizer_and_random_states_as_they_were(data):
    model, tokenizer = make_teacher(max_position_embeddings=1024).train(), make_tokenizer()
    draws = []
    for run in (lambda: None, lambda: evaluate(model, tokenizer, ["arc_easy"], data=data, limit=1)):
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002 -- the generator that lm-eval seeds
        torch.manual_seed(3)
        run()
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert model.training
    assert tokenizer.pad_token is None


@needs_lm_eval
def test_lm_eval_takes_fewshot_examples_from_the_split_that_the_task_names(model, data):
    result = evaluate(model, make_tokenizer(), ["mmlu_anatomy"], data=data, num_fewshot=2, limit=1)
    assert result.samples[0].prompt.count("What is 2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n") == 2
    assert result.tasks["mmlu_anatomy"].num_fewshot == 2
    with pytest.raises(ValueError, match="num_fewshot must be 0 for arc_easy"):
        evaluate(model, make_tokenizer(), ["arc_easy"], data=data, num_fewshot=1)


@needs_lm_eval
def test_lm_eval_equals_lm_evals_own_model_to_the_last_digit(tmp_path, data):
    import lm_eval
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_teacher(tmp_path / "model")
    tasks = write_local_tasks(tmp_path / "tasks", ["arc_easy", "hellaswag", "mmlu_anatomy"], data)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder}",
        tasks=tasks,
        task_manager=TaskManager(include_path=tmp_path / "tasks", include_defaults=False),
        batch_size=3,
        device="cpu",
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    ours = evaluate(model, AutoTokenizer.from_pretrained(folder), tasks, data=data, batch_size=3)
    for task in tasks:
        for metric, score in ours.tasks[task].scores.items():
            assert score == theirs["results"][task][f"{metric},none"]
            assert ours.tasks[task].standard_errors[metric] == theirs["results"][task][f"{metric}_stderr,none"]
        assert [sample.loglikelihoods for sample in samples_of(ours, task)] == [
            [loglikelihood for loglikelihood, _ in sample["filtered_resps"]] for sample in theirs["samples"][task]
        ]


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_equals_lm_evals_command_line(tmp_path, data, capfd):
    from bench import lm_eval_parity

    folder = save_teacher(tmp_path / "model")
    arguments = ["--model", str(folder), "--data", str(data), "--tasks", "arc_easy", "hellaswag", "truthfulqa_mc2"]
    assert lm_eval_parity.main(arguments) == 0
    assert "7 samples of 3 tasks: no differences" in capfd.readouterr().out


@needs_lm_eval
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"tasks": ["mmlu_astronomy"]},
            FileNotFoundError,
            r"mmlu_astronomy needs a file mmlu/test/astronomy_test\.csv",
        ),
        ({"tasks": ["mmlu_magic"]}, ValueError, "got 'mmlu_magic'"),
        ({"tasks": ["truthfulqa"]}, ValueError, "got 'truthfulqa_gen'"),
        ({"tasks": "arc_easy"}, ValueError, "tasks must be a sequence of names"),
        ({"data": "/nowhere"}, FileNotFoundError, "data must be a folder with the tasks' files, got '/nowhere', which"),
        ({"limit": 0}, ValueError, "limit must be an integer of at least 1"),
        ({"batch_size": "auto"}, ValueError, "batch_size must be an integer of at least 1"),
    ],
)
def test_lm_eval_bad_input_is_a_clear_error(model, data, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(model, make_tokenizer(), **{"tasks": ["arc_easy"], "data": data} | options)


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("arc/a_easy.jsonl", ['{"query": "x"}'], r"question 0 \(counted from 0\) does not: KeyError"),
        ("arc/a_easy.jsonl", [foundry_arc("x", ["a"], 0), foundry_arc("x", ["a"], 3)], "but question 1 "),
        ("arc/a_easy.jsonl", [], "must have at least one question, got none"),
        ("hellaswag/hellaswag_val.txt", ["a: b", "4", "c", "d", "e", "f"], "four endings on six lines"),
        ("mmlu/test/anatomy_test.csv", ["What?,1,2,3,4,5"], "but question 0 "),
        ("truthfulqa/TruthfulQA.csv", ["Question,Best", "a,b"], "KeyError: 'Incorrect Answers'"),
    ],
)
def test_lm_eval_names_the_file_and_question_that_are_not_as_expected(tmp_path, name, lines, message):
    path = write_lines(tmp_path / "data" / name, lines)
    task = {"arc": "arc_easy", "hella": "hellaswag", "mmlu": "mmlu_anatomy", "truth": "truthfulqa_mc1"}
    [name_of_task] = [task[key] for key in task if name.startswith(key)]
    with pytest.raises(ValueError, match=message) as caught:
        write_local_tasks(tmp_path / "tasks", [name_of_task], tmp_path / "data")
    assert str(path) in str(caught.value)


def test_lm_eval_without_lm_eval_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'slimkernels\[harness\]'"):
        write_local_tasks(tmp_path, ["arc_easy"], tmp_path)
    with pytest.raises(ImportError, match=r"pip install 'slimkernels\[harness\]'"):
        evaluate(None, None, ["arc_easy"])
