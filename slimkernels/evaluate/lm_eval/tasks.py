"""Multiple-choice benchmarks with lm-eval as a library: its tasks and its scores, with every sample kept."""

# lm-eval is an optional dependency. Without it, pyright takes this folder for the package lm_eval.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slimkernels.evaluate.lm_eval.local_data import require_lm_eval, write_local_tasks
from slimkernels.evaluate.records import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimkernels.evaluate.lm_eval.journal import BatchJournal


@dataclasses.dataclass(frozen=True)
class ChoiceSample:
    """One question, as lm-eval asked and scored it.

    Attributes:
        task: lm-eval's name of the task.
        doc_id: Index of the question in the task's data.
        doc_hash: lm-eval's hash of all fields of the question, which is the same for every model.
        prompt: Text that the model read, with few-shot examples and the task's description.
        choices: Continuations whose likelihoods were computed, each with the space that precedes it.
        loglikelihoods: log P(choice | prompt) of every choice, in nats.
        prediction: Index of the choice with the highest log-likelihood.
        targets: Indices of the right choices: exactly one, except in truthfulqa_mc2.
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
    """lm-eval's scores of a task, or of a group of tasks.

    Attributes:
        scores: Metrics, such as acc and acc_norm.
        standard_errors: Standard errors of the metrics that have one.
        num_samples: Number of questions asked.
        num_fewshot: Number of examples before each question; None for a group.
        version: Version of the task's definition.
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
        tasks: Scores of single tasks, by name.
        groups: Scores of the groups that were asked for, such as mmlu, by name.
        samples: Samples of all tasks in the order of their data; empty without ``log_samples``.
        lm_eval_version: Version of lm-eval.
    """

    tasks: dict[str, ChoiceScores]
    groups: dict[str, ChoiceScores]
    samples: list[ChoiceSample]
    lm_eval_version: str

    def records(self) -> list[dict[str, Any]]:
        """Returns the samples as dictionaries that JSON can represent."""
        return [dataclasses.asdict(sample) for sample in self.samples]


@dataclasses.dataclass(frozen=True)
class ChoiceQuestions:
    """The questions of a task, before any model is asked.

    Attributes:
        task: lm-eval's name of the task.
        questions: Questions as a model reads them, without few-shot examples, in the order of the data.
        content_hash: Hash of all fields of the questions and of the few-shot examples, and of the versions of lm-eval
            and of the task's definition.
        num_fewshot: Number of examples before each question.
        lm_eval_version: Version of lm-eval.
    """

    task: str
    questions: list[str]
    content_hash: str
    num_fewshot: int
    lm_eval_version: str


def read_multiple_choice(
    tasks: Sequence[str], *, data: Path | str | None = None, num_fewshot: int | None = None
) -> list[ChoiceQuestions]:
    """Reads the questions that ``evaluate_multiple_choice`` would ask with the same arguments, by single task.

    Raises:
        ImportError, FileNotFoundError, ConnectionError, ValueError: ``evaluate_multiple_choice`` raises them as well.
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
            # A definition that fixes the number at 0 keeps it, as in lm-eval.
            fixed = num_fewshot is None or task.get_config("num_fewshot") == 0
            questions = list(task.eval_docs)
            examples = list(task.fewshot_docs()) if (own if fixed else num_fewshot) else []
            content = json.dumps([lm_eval.__version__, task.VERSION, questions, examples], sort_keys=True, default=str)
            found.append(
                ChoiceQuestions(
                    task=name,
                    questions=[str(task.doc_to_text(question)) for question in questions],
                    content_hash=content_hash([content.encode()]),
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

    The scores equal, to the last digit, those of ``lm_eval --model hf --model_args pretrained=FOLDER`` with the same
    data, batch size, limit and number of threads. Another batch size sums in another order and may change the last
    digits.

    Args:
        model: Causal language model on its device. It is evaluated in eval mode, and its mode is restored.
        tokenizer: Tokenizer of the model, which is not modified.
        tasks: Names of lm-eval's tasks: with ``data``, those that ``write_local_tasks`` supports; without, any
            multiple-choice task.
        data: Folder with local files, laid out as ``write_local_tasks`` describes. None takes the data from the hub.
        limit: Number of questions to ask from the start of each task. None asks all.
        num_fewshot: Number of examples before each question. None uses that of the task's definition. A definition that
            fixes the number at 0, as TruthfulQA's does, keeps it.
        batch_size: Sequences per forward pass.
        log_samples: Whether to keep the samples.
        journal: Journal that keeps the result of every forward pass and serves the results that it has:
            ``BatchJournal(path, [identity])``, where ``identity`` covers everything that decides the model's outputs.
            The scores do not depend on it.

    Returns:
        Scores by task and the samples. Two evaluations with the same tasks, data, limit and few-shot examples have
        the same samples in the same order, so that they can be compared pair by pair.

    Raises:
        ImportError: lm-eval is not installed; the extra ``harness`` installs it.
        FileNotFoundError: A task's local file does not exist.
        ConnectionError: ``data`` is None, and the hub does not answer.
        ValueError: A task is unknown or not multiple choice, or a setting is outside its range.
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
    """Loads lm-eval's task manager, the single tasks by name, and the tasks and groups for ``simple_evaluate``."""
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
            f"the hub must answer for the data of {', '.join(tasks)}, but it did not ({error}): pass local files as "
            "data"
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
                f"num_fewshot must be 0 for {name}, whose data have no split to take examples from, got {num_fewshot}"
            )


def _sample(name: str, logged: dict[str, Any], task: Any) -> ChoiceSample:
    num_choices = len(task.doc_to_choice(logged["doc"]))
    arguments = logged["arguments"][:num_choices]
    choices = [choice for _, choice in arguments]
    loglikelihoods = [float(loglikelihood) for loglikelihood, _ in logged["filtered_resps"][:num_choices]]
    if name == "truthfulqa_mc2":  # scored by its labels, while the definition's single target is unused
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
    # lm-eval's keys are "acc,none" and "acc_stderr,none": the metric and the filter of the answers, which is "none".
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
    """Returns the single tasks of a group, whose members may be groups themselves."""
    children = outcome["group_subtasks"].get(group) or []
    return [
        task for child in children for task in ([child] if child in outcome["n-samples"] else _members(outcome, child))
    ]


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restores the random states of Python, numpy and torch, which ``simple_evaluate`` seeds."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 -- lm-eval seeds the legacy generator
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
