"""Multiple-choice benchmarks through lm-eval, used as a library: its tasks, its scores, every sample kept."""

# lm-eval is an extra; without it, pyright takes the lm_eval.py beside this file for it.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimkernels.evaluate.lm_eval.local_data import require_lm_eval, write_local_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.evaluate.lm_eval.journal import BatchJournal


@dataclasses.dataclass(frozen=True)
class ChoiceSample:
    """One question, as lm-eval asked and scored it.

    Attributes:
        task: lm-eval's name of the task.
        doc_id: The question's index in the task's data.
        doc_hash: lm-eval's hash of the question with all its fields: the same for every model that was asked it.
        prompt: What the model read, few-shot examples and description included.
        choices: The continuations whose likelihoods were taken, with the space before them.
        loglikelihoods: log P(choice | prompt), in nats.
        prediction: The index of the likeliest choice.
        targets: The indices of right choices: one, but for truthfulqa_mc2.
        scores: lm-eval's metrics of this sample, such as acc and acc_norm.
    """

    task: str
    doc_id: int
    doc_hash: str
    prompt: str
    choices: list[str]
    loglikelihoods: list[float]
    prediction: int
    targets: list[int]
    scores: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """What lm-eval says of a task, or of a group of tasks.

    Attributes:
        scores: Its metrics, such as acc and acc_norm.
        standard_errors: Of the metrics that have one.
        num_samples: Questions asked.
        num_fewshot: Examples before each; None for a group.
        version: Of the task's definition.
    """

    scores: dict[str, float]
    standard_errors: dict[str, float]
    num_samples: int
    num_fewshot: int | None
    version: Any


@dataclasses.dataclass(frozen=True)
class ChoiceEvaluation:
    """The outcome of ``evaluate_multiple_choice``.

    Attributes:
        tasks: By name.
        groups: Groups such as mmlu, by name, where one was asked for.
        samples: Of all tasks, in the order of their data; empty without ``log_samples``.
        lm_eval_version: Of the package.
    """

    tasks: dict[str, ChoiceScores]
    groups: dict[str, ChoiceScores]
    samples: list[ChoiceSample]
    lm_eval_version: str

    def records(self) -> list[dict[str, Any]]:
        """The samples as dictionaries that JSON can hold."""
        return [dataclasses.asdict(sample) for sample in self.samples]


@dataclasses.dataclass(frozen=True)
class ChoiceQuestions:
    """The questions of a task, before any model is asked.

    Attributes:
        task: lm-eval's name of the task.
        questions: In the order of its data, as a model reads them, without few-shot examples.
        content_hash: Of all fields of the questions and of those that examples are taken from, and of lm-eval's version
            of the task.
        num_fewshot: Examples before each question.
        lm_eval_version: Of the package.
    """

    task: str
    questions: list[str]
    content_hash: str
    num_fewshot: int
    lm_eval_version: str


def read_multiple_choice(
    tasks: Sequence[str], *, data: Path | str | None = None, num_fewshot: int | None = None
) -> list[ChoiceQuestions]:
    """What ``evaluate_multiple_choice`` would ask with the same arguments, by single task.

    Raises:
        ImportError, FileNotFoundError, ConnectionError, ValueError: As ``evaluate_multiple_choice``.
    """
    _check_fewshot(num_fewshot)
    require_lm_eval()
    import lm_eval

    found = []
    with _random_states_kept(), tempfile.TemporaryDirectory() as folder:
        _, tasks_of, _ = _load(tasks, data, folder)
        _check_tasks(tasks_of, num_fewshot)
        for name, task in tasks_of.items():
            own = task.get_config("num_fewshot") or 0
            # As lm-eval has it: a definition that fixes none keeps none.
            fixed = num_fewshot is None or task.get_config("num_fewshot") == 0
            questions = list(task.eval_docs)
            examples = list(task.fewshot_docs()) if (own if fixed else num_fewshot) else []
            content = json.dumps([lm_eval.__version__, task.VERSION, questions, examples], sort_keys=True, default=str)
            found.append(
                ChoiceQuestions(
                    task=name,
                    questions=[str(task.doc_to_text(question)) for question in questions],
                    content_hash=hashlib.blake2b(content.encode(), digest_size=12).hexdigest(),
                    num_fewshot=own if fixed else num_fewshot or 0,
                    lm_eval_version=lm_eval.__version__,
                )
            )
    return found


def evaluate_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    data: Path | str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    log_samples: bool = True,
    journal: BatchJournal | None = None,
) -> ChoiceEvaluation:
    """Scores a model on multiple-choice tasks by lm-eval's ``simple_evaluate``.

    Equal, to the last digit, to ``lm_eval --model hf --model_args pretrained=FOLDER`` with the same data, batch size,
    limit and number of threads. Batches of another size, as other sums, may change the last digits.

    Args:
        model: A causal language model on its device; evaluated in eval mode, its mode restored.
        tokenizer: Its tokenizer; left as it is.
        tasks: Names of lm-eval: with ``data``, those of ``write_local_tasks``; without, any multiple-choice task.
        data: A folder with local files, laid out as ``write_local_tasks`` says. None: the hub.
        limit: The first so many questions of each task. None: all.
        num_fewshot: Examples before each question. None: what the task's definition says. A definition that fixes
            none, as TruthfulQA's, keeps none.
        batch_size: Sequences in a forward.
        log_samples: Whether to keep the samples.
        journal: Keeps what every forward gave, and spares those that it has: ``BatchJournal(path, [identity])``, with
            all that decides the model's outputs. The result is the same.

    Returns:
        Scores by task and the samples. Two evaluations with the same tasks, data, limit and few-shot examples have
        the same samples in the same order, so that they can be compared pair by pair.

    Raises:
        ImportError: lm-eval is not installed: it comes with the extra ``harness``.
        FileNotFoundError: A task's local file is not there.
        ConnectionError: ``data`` was left out, and the hub does not answer.
        ValueError: An unknown task, one that is not multiple choice, or a setting outside its range.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if not (value is None and name == "limit") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    _check_fewshot(num_fewshot)
    require_lm_eval()
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from slimkernels.evaluate.lm_eval.journal import JournalledLM

    options = {"tokenizer": copy.deepcopy(tokenizer), "batch_size": batch_size}
    was_training = model.training
    with _random_states_kept(), tempfile.TemporaryDirectory() as folder:
        manager, tasks_of, items = _load(tasks, data, folder)
        _check_tasks(tasks_of, num_fewshot)
        try:
            outcome = lm_eval.simple_evaluate(
                model=HFLM(model, **options) if journal is None else JournalledLM(model, journal=journal, **options),
                tasks=items,
                task_manager=manager,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                log_samples=log_samples,
            )
        finally:
            model.train(was_training)
    samples = [
        _sample(name, sample, tasks_of[name])
        for name, logged in (outcome.get("samples") or {}).items()
        for sample in sorted(logged, key=lambda sample: sample["doc_id"])
    ]
    return ChoiceEvaluation(
        tasks={name: _scores(outcome, name) for name in tasks_of},
        groups={name: _scores(outcome, name) for name in outcome.get("groups") or {}},
        samples=samples,
        lm_eval_version=lm_eval.__version__,
    )


def _load(tasks: Sequence[str], data: Path | str | None, folder: str) -> tuple[Any, dict[str, Any], list[Any]]:
    """lm-eval's task manager, the single tasks by name, and what ``simple_evaluate`` is to be given."""
    from lm_eval.tasks import TaskManager

    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a sequence of names that is not empty, got {tasks!r}")
    if data is not None:
        write_local_tasks(folder, tasks, data)
        manager = TaskManager(include_path=folder, include_defaults=False)
    else:
        manager = TaskManager()
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown:
            raise ValueError(f"tasks must be names of lm-eval, got {', '.join(unknown)}: see `lm_eval ls tasks`")
    try:
        loaded = manager.load(list(tasks))
    except ConnectionError as error:
        raise ConnectionError(
            f"the hub must answer for the data of {', '.join(tasks)}, it did not ({error}): give local files by data"
        ) from error
    groups = [loaded["groups"][name] for name in tasks if name in loaded["groups"]]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    single = [task for name, task in loaded["tasks"].items() if name not in grouped]
    return manager, loaded["tasks"], [*groups, *single]


def _check_fewshot(num_fewshot: int | None) -> None:
    if num_fewshot is not None and (not isinstance(num_fewshot, int) or num_fewshot < 0):
        raise ValueError(f"num_fewshot must be an integer of at least 0, got {num_fewshot!r}")


def _check_tasks(tasks: dict[str, Any], num_fewshot: int | None) -> None:
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
            what = "one with the choices in its prompts" if task.OUTPUT_TYPE == "multiple_choice" else task.OUTPUT_TYPE
            raise ValueError(f"tasks must be multiple choice, with the choices after the prompt, got {name}: {what}")
        fixed = task.get_config("num_fewshot") == 0
        if num_fewshot and not fixed and not (task.has_training_docs() or task.get_config("fewshot_split")):
            raise ValueError(
                f"num_fewshot must be 0 for {name}, whose data here have no split to take examples from, got "
                f"{num_fewshot}"
            )


def _sample(name: str, logged: dict[str, Any], task: Any) -> ChoiceSample:
    num_choices = len(task.doc_to_choice(logged["doc"]))
    arguments = logged["arguments"][:num_choices]
    choices = [choice for _, choice in arguments]
    loglikelihoods = [float(loglikelihood) for loglikelihood, _ in logged["filtered_resps"][:num_choices]]
    if name == "truthfulqa_mc2":  # scored by its labels; the definition's one target is without meaning
        targets = [index for index, label in enumerate(logged["doc"]["mc2_targets"]["labels"]) if label]
    else:
        found = logged["target"] if isinstance(logged["target"], list) else [logged["target"]]
        texts = task.doc_to_choice(logged["doc"])
        targets = [texts.index(target) if isinstance(target, str) else int(target) for target in found]
    return ChoiceSample(
        task=name,
        doc_id=logged["doc_id"],
        doc_hash=logged["doc_hash"],
        prompt=arguments[0][0],
        choices=choices,
        loglikelihoods=loglikelihoods,
        prediction=int(np.argmax(loglikelihoods)),
        targets=targets,
        scores={metric: float(logged[metric]) for metric in logged["metrics"]},
    )


def _scores(outcome: dict[str, Any], name: str) -> ChoiceScores:
    # lm-eval's keys are "acc,none" and "acc_stderr,none": the metric, and the filter of the answers, here none.
    metrics = {
        key.partition(",")[0]: value
        for key, value in outcome["results"].get(name, outcome.get("groups", {}).get(name)).items()
        if "," in key and isinstance(value, (int, float))
    }
    scores = {metric: float(value) for metric, value in metrics.items() if not metric.endswith("_stderr")}
    errors = {metric: float(metrics[f"{metric}_stderr"]) for metric in scores if f"{metric}_stderr" in metrics}
    members = [name] if name in outcome["n-samples"] else _members(outcome, name)
    return ChoiceScores(
        scores=scores,
        standard_errors=errors,
        num_samples=sum(outcome["n-samples"][member]["effective"] for member in members),
        num_fewshot=outcome["n-shot"].get(name) if members == [name] else None,
        version=outcome["versions"].get(name),
    )


def _members(outcome: dict[str, Any], group: str) -> list[str]:
    """The single tasks of a group of tasks and groups."""
    children = outcome["group_subtasks"].get(group) or []
    return [
        task for child in children for task in ([child] if child in outcome["n-samples"] else _members(outcome, child))
    ]


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Undoes what ``simple_evaluate`` does to the process: it seeds Python's, numpy's and torch's generators."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 -- it seeds the generator of old
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
