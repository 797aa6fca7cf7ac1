"""What the commands share: quiet libraries, progress bars and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def be_quiet() -> None:
    """Silences what the libraries below say about each file they read; errors come through as exceptions."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)


@contextlib.contextmanager
def progress_bars(*, is_shown: bool = True) -> Iterator[Progress]:
    """Bars on standard error, for ``progress_task``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as progress:
        yield progress


def progress_task(progress: Progress, description: str) -> Callable[[int, int | None], None]:
    """A bar, as what is told how many are done, and of how many."""
    task = progress.add_task(description, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def print_table(content: dict[str, str]) -> None:
    """A line for each name, folded to the width of the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in content.items():
        table.add_row(name, value)
    Console().print(table)


def shown(value: object) -> str:
    """Four digits of a float; anything else whole."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
