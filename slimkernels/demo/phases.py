"""What every phase of the demonstration does alike: is it done, how far is it, how long did it take."""

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
    """A context for one phase, which leaves ``phase.json`` in its folder: its settings and, once done, its result.

    A folder with other settings is emptied; one without ``phase.json`` is not the demo's and is left alone.

    Args:
        name: For the console and for ``seconds``.
        folder: Belongs to this phase; made when absent.
        key: Settings that decide the result, JSON values.
        seconds: Gets how long the phase took, when it ran.
        console: Is told what is reused.

    Raises:
        ValueError: The folder holds something else.
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
            shutil.rmtree(self.folder)
            recorded = None
        if recorded is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded = {"key": self.key, "is_done": False}
            write_json(self.folder / PHASE_NAME, recorded)
        self.is_done = recorded["is_done"]
        if self.is_done:
            self.result, self.seconds[self.name] = recorded["result"], recorded["seconds"]
            self.console.print(
                f"{self.name}: reused from an earlier run (to do it again, remove {self.folder})",
                highlight=False,
                soft_wrap=True,
            )
        self._start = time.perf_counter()
        return self

    def finish(self, result: dict[str, Any]) -> None:
        """Records the result; from now on the phase is done."""
        self.result, self.is_done = result, True
        self.seconds[self.name] = time.perf_counter() - self._start
        content = {"key": self.key, "is_done": True, "seconds": self.seconds[self.name], "result": result}
        write_json(self.folder / PHASE_NAME, content)

    def __exit__(self, *exception) -> None:
        """Nothing to clean up: an unfinished phase is continued by the next run."""

    def _recorded(self) -> dict[str, Any] | None:
        path = self.folder / PHASE_NAME
        return json.loads(path.read_text()) if path.is_file() else None


@contextlib.contextmanager
def progress_bar(console: Console, description: str) -> Iterator[Callable[[int, int], None]]:
    """A live bar; yields update(done, total)."""
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
    """Silences what transformers says and draws about every file it reads; errors are raised as ever."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
