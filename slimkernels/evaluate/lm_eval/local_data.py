"""Local files of ARC, HellaSwag, MMLU and TruthfulQA as tasks of lm-eval: its definitions with other data.

``write_local_tasks`` writes a folder of YAML files that include lm-eval's definitions, and of rows in the hub's layout.
``lm_eval --include_path FOLDER`` reads the folder as well.
"""

# lm-eval is an optional dependency. Without it, pyright takes this folder for the package lm_eval.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import bz2
import csv
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Source(NamedTuple):
    """The local files of one split of a task, and their reader.

    Attributes:
        split: Name of the split in lm-eval's definition of the task.
        patterns: Patterns of lower-case paths below the data folder; the first with a matching file is used.
        read: Function that reads a file as rows with the columns of the hub's data set.
    """

    split: str
    patterns: tuple[str, ...]
    read: Callable[[Path], Iterable[Row]]


def write_local_tasks(folder: Path | str, tasks: Sequence[str], data: Path | str) -> list[str]:
    """Writes lm-eval tasks of the same names whose rows come from local files.

    A task's prompt, choices, metrics and few-shot settings are those of the installed lm-eval: the YAML file written
    here includes lm-eval's file and replaces only the source of the data. Splits without a file are switched off.

    The files lie below ``data``, with names in upper or lower case. The ``.jsonl`` files are those of the sets'
    authors, of llm-foundry (ARC), or exports from the hub:

    - ``arc/*easy*.jsonl`` and ``arc/*challenge*.jsonl``; of several files, the one with "test" in its name.
    - ``hellaswag/hellaswag_val*``: ``.jsonl``, or llama.cpp's text of six lines per question (``.txt``, ``.txt.bz2``).
      lm-eval capitalises the unfinished last sentence of a question. The text does not mark its beginning, which is
      assumed to be after the last ``.``, ``!`` or ``?``.
    - ``mmlu/test/SUBJECT_test.csv`` and ``mmlu/dev/SUBJECT_dev.csv``, with or without a header.
    - ``truthfulqa/mc_task.json`` or ``truthfulqa/TruthfulQA.csv``. Answers of the latter get a full stop, and the best
      answer comes first, as in the authors' evaluation.

    Args:
        folder: Folder to write, created if it does not exist.
        tasks: Names of lm-eval's tasks: arc_easy, arc_challenge, hellaswag, truthfulqa_mc1, truthfulqa_mc2,
            mmlu_anatomy and the other subjects, and groups or tags of these, such as mmlu and ai2_arc.
        data: Folder with the files.

    Returns:
        The names of the single tasks.

    Raises:
        ImportError: lm-eval is not installed.
        FileNotFoundError: A task's file does not exist.
        ValueError: A task is not one of these, or a file does not have the expected layout.
    """
    require_lm_eval()
    import yaml

    index = _definitions()
    folder, data = Path(folder), Path(data)
    if not data.is_dir():
        raise FileNotFoundError(f"data must be a folder with the tasks' files, got {str(data)!r}, which does not exist")
    names, groups = _expand(tasks, index)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        definition = index[name]
        files = {}
        for source in _sources(name):
            path = _find(data, source, name, required=source.split == _evaluated_split(definition.cfg))
            if path is not None:
                files[source.split] = str(_write_rows(folder / f"{name}.{source.split}.jsonl", path, source))
        splits = {key: definition.cfg.get(key) for key in ("training_split", "validation_split", "test_split")}
        local = {
            "include": str(definition.yaml_path),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str((folder / "cache").absolute())},
            **{key: split if split in files else None for key, split in splits.items()},
        }
        if definition.cfg.get("fewshot_split") not in files:
            local["fewshot_split"] = None
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(local, sort_keys=False), encoding="utf-8")
    for group in groups:
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(index[group].cfg, sort_keys=False), encoding="utf-8")
    return names


def require_lm_eval() -> None:
    """Raises ImportError, with the command that installs it, if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-eval is not installed: pip install 'slimkernels[harness]'")


def _definitions() -> dict[str, Any]:
    """Returns lm-eval's entries of the supported tasks, their groups and their tags, by name."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders: list[Path | str] = [root / name for name in ("arc", "hellaswag", "mmlu/default", "truthfulqa")]
    return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False).task_index


def _expand(tasks: Sequence[str], index: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Resolves names to single tasks and the groups among them."""
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must be a sequence of names that is not empty, got {tasks!r}")
    names: dict[str, None] = {}
    groups: dict[str, None] = {}

    def visit(name: str) -> None:
        entry: Any = index.get(name)
        kind = entry.kind.name if entry else ""
        if kind == "GROUP":
            groups[name] = None
            for child in entry.cfg["task"]:
                visit(child)
        elif kind == "TAG":
            for child in sorted(entry.tags):
                visit(child)
        elif kind == "TASK" and entry.cfg.get("output_type") == "multiple_choice" and _sources(name):
            names[name] = None
        else:
            known = sorted(known for known in index if _sources(known) and not known.startswith("mmlu_"))
            raise ValueError(
                "tasks must be multiple-choice tasks with a supported layout of local files "
                f"({', '.join(known)}, mmlu, mmlu_SUBJECT), got {name!r}: omit data to take another task's data from "
                "the hub"
            )

    for name in tasks:
        visit(name)
    return list(names), list(groups)


def _evaluated_split(definition: dict[str, Any]) -> str:
    return definition.get("test_split") or definition["validation_split"]


def _sources(task: str) -> tuple[Source, ...]:
    """Returns the local files of a task's splits, or an empty tuple for an unsupported task."""
    if task in ("arc_easy", "arc_challenge"):
        kind = task.removeprefix("arc_")
        return (Source("test", (f"arc/*{kind}*test*.jsonl", f"arc/*{kind}*.jsonl"), _read_arc),)
    if task == "hellaswag":
        patterns = tuple(f"hellaswag/hellaswag_val*{suffix}" for suffix in (".jsonl", ".txt", ".txt.bz2"))
        return (Source("validation", patterns, _read_hellaswag),)
    if task in ("truthfulqa_mc1", "truthfulqa_mc2"):
        return (Source("validation", ("truthfulqa/mc_task.json", "truthfulqa/truthfulqa.csv"), _read_truthfulqa),)
    if task.startswith("mmlu_") and not task.endswith("_tasks"):
        subject = task.removeprefix("mmlu_")
        return tuple(Source(split, (f"mmlu/{split}/{subject}_{split}.csv",), _read_mmlu) for split in ("test", "dev"))
    return ()


def _find(data: Path, source: Source, task: str, *, required: bool) -> Path | None:
    folder = source.patterns[0].rpartition("/")[0]
    files = sorted(path for path in (data / folder).glob("*") if path.is_file())
    for pattern in source.patterns:
        found = [path for path in files if fnmatch(path.relative_to(data).as_posix().lower(), pattern)]
        if len(found) > 1:
            raise ValueError(
                f"data must have one file for {task} that matches {pattern}, got "
                f"{', '.join(path.name for path in found)}: keep only one in {str(data / folder)!r}"
            )
        if found:
            return found[0]
    if required:
        raise FileNotFoundError(
            f"{task} needs a file {' or '.join(source.patterns)} in data = {str(data)!r}, which has none: add the "
            "file, or omit data to take it from the hub"
        )
    return None


def _write_rows(target: Path, path: Path, source: Source) -> Path:
    count = 0
    with target.open("w", encoding="utf-8") as file:
        try:
            for row in source.read(path):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
            raise ValueError(
                f"{path} must have the layout that is documented at write_local_tasks, but question {count} (counted "
                f"from 0) does not: {type(error).__name__}: {error}"
            ) from error
    if not count:
        raise ValueError(f"{path} must have at least one question, got none")
    return target.absolute()


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _csv_rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file) if any(cell.strip() for cell in row)]


def _read_arc(path: Path) -> Iterator[Row]:
    for row in _json_lines(path):
        if "query" in row:  # llm-foundry: {"query", "choices", "gold"}
            question, texts = row["query"].removeprefix("Question: "), row["choices"]
            labels = list(_LETTERS[: len(texts)])
            answer = labels[row["gold"]]
        elif isinstance(row["question"], dict):  # the authors': {"question": {"stem", "choices"}, "answerKey"}
            question, answer = row["question"]["stem"], row["answerKey"]
            texts, labels = ([choice[key] for choice in row["question"]["choices"]] for key in ("text", "label"))
        else:  # the hub's: {"question", "choices": {"text", "label"}, "answerKey"}
            question, answer = row["question"], row["answerKey"]
            texts, labels = row["choices"]["text"], row["choices"]["label"]
        labels.index(answer)
        yield {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": answer}


def _read_hellaswag(path: Path) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        for row in _json_lines(path):
            kept = {key: row[key] for key in ("activity_label", "ctx_a", "ctx_b", "endings")}
            yield kept | {"label": str(int(row["label"]))}
        return
    text = bz2.decompress(path.read_bytes()) if path.suffix == ".bz2" else path.read_bytes()
    lines = text.decode("utf-8").rstrip("\n").split("\n")
    for first in range(0, len(lines), 6):
        context, label, *endings = lines[first : first + 6]
        activity, colon, context = context.partition(": ")
        if not colon or len(endings) != 4 or int(label) not in range(4):
            raise ValueError("expected 'ACTIVITY: CONTEXT', the right ending's index, and four endings on six lines")
        unfinished = "" if context.endswith((".", "!", "?", '"', "'", ")")) else re.split(r"(?<=[.!?])\s", context)[-1]
        finished = context.removesuffix(unfinished).rstrip()
        yield {"activity_label": activity, "ctx_a": finished, "ctx_b": unfinished, "endings": endings, "label": label}


def _read_mmlu(path: Path) -> Iterator[Row]:
    rows = _csv_rows(path)
    if rows and rows[0][0].strip().lower() == "question":
        rows = rows[1:]
    for question, *choices, answer in rows:
        gold = _LETTERS.index(answer) if answer.isalpha() else int(answer)
        if len(choices) != 4 or gold not in range(4):
            raise ValueError(f"expected four choices and the right one's letter or index, got {choices} and {answer!r}")
        yield {"question": question, "choices": choices, "answer": gold}


def _read_truthfulqa(path: Path) -> Iterator[Row]:
    if path.suffix == ".json":
        for row in json.loads(path.read_text(encoding="utf-8-sig")):
            yield {"question": row["question"]} | {
                key: _labelled(row[key].items()) for key in ("mc1_targets", "mc2_targets")
            }
        return
    header, *rows = _csv_rows(path)
    for cells in rows:
        row = dict(zip(header, cells, strict=True))
        wrong = [(answer, 0) for answer in _answers(row["Incorrect Answers"])]
        right = [(answer, 1) for answer in _answers(row["Correct Answers"])]
        best = [(answer, 1) for answer in _answers(row["Best Answer"], separator=None)]
        yield {
            "question": row["Question"],
            "mc1_targets": _labelled([*best, *wrong]),
            "mc2_targets": _labelled([*right, *wrong]),
        }


def _answers(cell: str, separator: str | None = ";") -> list[str]:
    answers = [answer.strip() for answer in (cell.split(separator) if separator else [cell])]
    return [answer if answer.endswith(".") else answer + "." for answer in answers if answer]


def _labelled(answers: Iterable[tuple[str, int]]) -> Row:
    choices, labels = zip(*answers, strict=True)
    return {"choices": list(choices), "labels": list(labels)}
