"""PathFinder as a model of lm-eval: a greedy tree against lm-eval's own model, limits, seeds, and the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import textwrap

import pytest
from support.evaluation import GSM8K
from support.teachers import END, make_teacher, make_tokenizer, save_teacher

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'slimkernels[harness]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from slimkernels.evaluate.lm_eval import __main__ as command_line
from slimkernels.evaluate.lm_eval.model import LimitedEngine, PathFinderLM
from slimkernels.search import StepRequest, TransformersEngine

# lm-eval and its dependencies warn; no warning is about this package's calls.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = ["When the rain stopped", "Anna", "A black cat was sleeping on the old wall, and"]
GREEDY = {"branching_factor": 1, "beam": 1, "temperature": 0, "max_attempts": 1, "repetition_check": False}
GREEDY |= {"step_delimiter": " ", "max_depth": 40}
TREE = {"branching_factor": 2, "beam": 2, "max_depth": 3, "max_step_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return make_teacher(max_position_embeddings=256)


def searcher(model, **options):
    return PathFinderLM(model, tokenizer=make_tokenizer(), **options)


def requests_of(*settings, questions=QUESTIONS):
    return [
        Instance("generate_until", {}, (question, dict(setting)), index)
        for index, (question, setting) in enumerate((q, s) for s in settings for q in questions)
    ]


def test_pathfinder_model_with_one_greedy_branch_answers_as_lm_evals_own(model):
    # One call has two settings, one of them with a stop string of several characters that occurs in the answers.
    own = HFLM(model, tokenizer=make_tokenizer())
    free = own.generate_until(requests_of({"max_gen_toks": 24, "until": []}), disable_tqdm=True)
    stop = next(answer[6:9] for answer in free if len(answer.strip()) > 12 and answer[6:9].strip() == answer[6:9])
    settings = {"max_gen_toks": 24, "until": []}, {"max_gen_toks": 17, "until": [stop], "do_sample": False}
    expected = own.generate_until(requests_of(*settings), disable_tqdm=True)
    assert any(len(short) < len(long) for long, short in zip(expected[:3], expected[3:], strict=True))
    assert searcher(model, **GREEDY).generate_until(requests_of(*settings), disable_tqdm=True) == expected


def test_pathfinder_model_stops_at_special_tokens_as_lm_evals_own(model):
    tokenizer = make_tokenizer()
    own = HFLM(model, tokenizer=tokenizer)
    free = own.generate_until(requests_of({"max_gen_toks": 24, "until": []}), disable_tqdm=True)
    # A token of the greedy answers becomes a special one, which is no end of text.
    drawn = tokenizer(free[0])["input_ids"][3:]
    until = [next(text for text in map(tokenizer.decode, drawn) if text.isascii() and text.isalnum())]
    tokenizer.add_special_tokens({"additional_special_tokens": until})
    assert set(tokenizer.all_special_ids) & set(drawn)
    own = HFLM(model, tokenizer=tokenizer)
    requests = requests_of({"max_gen_toks": 24, "until": until}, {"max_gen_toks": 24, "until": []})
    expected = own.generate_until(requests, disable_tqdm=True)
    searched = PathFinderLM(model, tokenizer=tokenizer, **GREEDY).generate_until(requests, disable_tqdm=True)
    assert searched == expected
    assert len(searched[0]) < len(searched[3])


def test_pathfinder_model_repeats_a_prompt_with_another_seed_and_a_tree_does_not_depend_on_the_others(model):
    [setting] = settings = [{"max_gen_toks": 20, "until": []}]
    answers = searcher(model, **TREE, seed=4).generate_until(requests_of(setting, setting), disable_tqdm=True)
    assert all(first != second for first, second in zip(answers[:3], answers[3:], strict=True))
    alone = requests_of(*settings, questions=QUESTIONS[1:2])
    assert searcher(model, **TREE, seed=4).generate_until(alone, disable_tqdm=True) == [answers[1]]
    assert searcher(model, **TREE, seed=5).generate_until(alone, disable_tqdm=True) == [answers[4]]


def test_pathfinder_model_takes_sampling_only_from_tasks_that_sample(model):
    [short] = requests_of({"max_gen_toks": 12, "until": []}, questions=QUESTIONS[:1])
    context, settings = short.args
    greedy = searcher(model, **GREEDY).generate_until([short], disable_tqdm=True)
    assert greedy != [""]
    for do_sample, same in ((False, True), (True, False)):
        asked = Instance("generate_until", {}, (context, settings | {"do_sample": do_sample, "temperature": 5.0}), 0)
        assert (searcher(model, **GREEDY).generate_until([asked], disable_tqdm=True) == greedy) is same


def test_pathfinder_model_likelihoods_are_lm_evals(model):
    asked = [Instance("loglikelihood", {}, (question, " and then"), 0) for question in QUESTIONS]
    found = searcher(model, **TREE).loglikelihood(asked, disable_tqdm=True)
    assert found == HFLM(model, tokenizer=make_tokenizer()).loglikelihood(asked, disable_tqdm=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "best"}, "selector must be one of 'consensus'"),
        ({"selector": "majority_vote"}, "give an answer_kind or answer_pattern"),
        ({"beam": 0}, "beam must be an integer of at least 1"),
    ],
)
def test_pathfinder_model_bad_settings_are_clear_errors(model, options, message):
    with pytest.raises(ValueError, match=message):
        searcher(model, **options)


def test_pathfinder_model_without_room_for_a_prompt_is_a_clear_error(model):
    with pytest.raises(ValueError, match="room for a prompt in the model's 256 tokens, got 256"):
        searcher(model, **TREE).generate_until(requests_of({"max_gen_toks": 256}), disable_tqdm=True)


class Scripted:
    """An engine with scripted texts of steps, which is real in all other respects."""

    def __init__(self, model, texts):
        engine = TransformersEngine(model, make_tokenizer())
        self.check, self.count_tokens, self.cache_bytes = engine.check, engine.count_tokens, engine.cache_bytes
        self.start, self.free, self._engine, self.texts = engine.start, engine.free, engine, list(texts)

    def extend(self, requests, step_end, *, embed):
        steps = self._engine.extend(requests, step_end, embed=embed)
        return [dataclasses.replace(step, text=self.texts.pop(0), end="step") for step in steps]


@pytest.mark.parametrize(
    ("until", "texts", "cut"),
    [
        (["\n\n"], ["one\n", "\ntwo\n"], ["one\n", "\n"]),  # across two steps: the stop string is kept
        (["STOP"], ["a", "ST", "OP", "x"], ["a", "ST", "OP"]),  # also across two steps
        (["c", "bc"], ["a", "abcd"], ["a", "a"]),  # the first stop string counts
        (["STOP"], ["aSTO", "b", "aSTOP"], ["aSTO", "b", "a"]),  # the first one is not completed
    ],
)
def test_limited_engine_ends_branches_at_stop_strings(model, until, texts, cut):
    engine = LimitedEngine(Scripted(model, texts), until, max_tokens=100)
    [branch] = engine.start(["Anna"])
    request = StepRequest(branch, (0,), 0, 0, 1.0, 0, 1.0, 3)
    seen = []
    while not seen or seen[-1].end == "step":
        [step] = engine.extend([dataclasses.replace(request, branch=branch)], lambda _: False, embed=False)
        engine.free(branch)
        branch = step.branch
        seen.append(step)
    assert [step.text for step in seen] == cut
    assert seen[-1].end == "end_of_text"


def test_limited_engine_ends_branches_at_a_number_of_tokens(model):
    engine = LimitedEngine(TransformersEngine(model, make_tokenizer(), eos_token_ids=()), [], max_tokens=7)
    [branch] = engine.start(["Anna"])
    lengths = []
    for end in ("length", "length", "context"):
        [step] = engine.extend([StepRequest(branch, (0,), 0, 0, 1.0, 0, 1.0, 3)], lambda _: False, embed=False)
        assert step.end == end
        lengths.append(len(step.token_ids))
        branch = step.branch
    assert lengths == [3, 3, 1]


def test_command_line_runs_the_model_on_a_generative_task(tmp_path, monkeypatch, capsys):
    folder = save_teacher(tmp_path / "model")
    rows = [{"question": question, "answer": "yes"} for question in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "three_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [END], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "three.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    settings = ",".join(f"{name}={value}" for name, value in TREE.items())
    command = ["run", "--model", "slimkernels-pathfinder", "--model_args", f"pretrained={folder},{settings}"]
    command += ["--tasks", "three_questions", "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    # lm-eval takes ten seconds to read its own tasks, which this test does not need.
    monkeypatch.setattr("lm_eval.tasks.TaskManager.__init__", _only_included(), raising=True)
    command_line.main()

    [path] = (tmp_path / "out").rglob("samples_three_questions_*.jsonl")
    answers = [json.loads(line)["filtered_resps"][0] for line in path.read_text(encoding="utf-8").splitlines()]
    model = make_teacher()
    expected = searcher(model, **TREE).generate_until(
        requests_of({"until": [END], "max_gen_toks": 9}), disable_tqdm=True
    )
    assert sorted(answers) == sorted(expected)
    assert all(answer for answer in answers)
    assert "three_questions" in capsys.readouterr().out


def test_local_files_by_the_recipe_of_the_docstring(tmp_path):
    import lm_eval
    from lm_eval.tasks import TaskManager

    (tmp_path / "gsm8k").mkdir()
    for name, rows in (("train", GSM8K[1:]), ("test", GSM8K[:1])):
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [recipe] = re.findall(r"::\n\n(.*?)\n\n", command_line.__doc__, re.DOTALL)
    for name, folder in (("LM_EVAL", lm_eval.__path__[0]), ("DATA", str(tmp_path))):
        recipe = recipe.replace(f"{name}/", f"{folder}/")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "gsm8k.yaml").write_text(textwrap.dedent(recipe))
    manager = TaskManager(include_path=tmp_path / "tasks", include_defaults=False)
    task = manager.load(["gsm8k"])["tasks"]["gsm8k"]
    assert [doc["question"] for doc in task.eval_docs] == [GSM8K[0]["question"]]
    assert len(list(task.fewshot_docs())) == len(GSM8K) - 1
    assert task.doc_to_text(task.eval_docs[0]) == f"Question: {GSM8K[0]['question']}\nAnswer:"


def _only_included():
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options | {"include_defaults": False})

    return init
