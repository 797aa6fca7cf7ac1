"""Phases of a long run: each is reused once it is finished, is timed, and shows its progress."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from slimkernels.durable import write_json

PHASE_NAME = "phase.json"


class Phase:
    """A context that runs one phase, and records its settings and finally its result in its folder, as ``phase.json``.

    A folder with other settings is emptied. A folder with files but without ``phase.json`` belongs to someone else and
    is not touched.

    Args:
        name: Name of the phase on the console and in ``seconds``.
        folder: Folder of this phase alone; created if absent.
        key: Settings that decide the result, as JSON values.
        seconds: Wall times by phase; receives that of this phase.
        console: Console that names a reused phase.

    Attributes:
        is_done: Whether the phase is finished; the body of the context has nothing to do then.
        result: Result of the finished phase.

    Raises:
        ValueError: The folder holds files of something else.
    """

    def __init__(
        self, name: str, folder: Path, key: dict[str, Any], seconds: dict[str, float], console: Console
    ) -> None:
        self.name, self.folder, self.key, self.seconds, self.console = name, folder, key, seconds, console
        self.result: dict[str, Any] = {}
        self.is_done = False

    def __enter__(self) -> Phase:
        recorded = self._recorded()
        if recorded is None and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} holds files that the demo did not write (no {PHASE_NAME}): choose another output_dir"
            )
        if recorded is not None and recorded["key"] != self.key:
            old = recorded["key"]
            names = ", ".join(sorted(name for name in {*old, *self.key} if old.get(name) != self.key.get(name)))
            say(self.console, f"{self.name}: {self.folder} was made with other settings ({names}), so it is made again")
            shutil.rmtree(self.folder)
            recorded = None
        if recorded is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded = {"key": self.key, "is_done": False}
            write_json(self.folder / PHASE_NAME, recorded)
        self.is_done = recorded["is_done"]
        if self.is_done:
            self.result, self.seconds[self.name] = recorded["result"], recorded["seconds"]
            say(self.console, f"{self.name}: reused from an earlier run (to run it again, remove {self.folder})")
        self._start = time.perf_counter()
        return self

    def finish(self, result: dict[str, Any]) -> None:
        """Records the result and marks the phase as done."""
        self.result, self.is_done = result, True
        self.seconds[self.name] = time.perf_counter() - self._start
        content = {"key": self.key, "is_done": True, "seconds": self.seconds[self.name], "result": result}
        write_json(self.folder / PHASE_NAME, content)

    def __exit__(self, *exception) -> None:
        """Does nothing: an unfinished phase is continued by the next run."""

    def _recorded(self) -> dict[str, Any] | None:
        path = self.folder / PHASE_NAME
        return json.loads(path.read_text()) if path.is_file() else None


def say(console: Console, line: str) -> None:
    """Prints one line without styling or line breaks of its own, so that a command can be copied from it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def progress_bar(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a live progress bar; yields the function that updates it, called with the number done and the total."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences the messages and bars of transformers about every file it reads; it still raises errors."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
