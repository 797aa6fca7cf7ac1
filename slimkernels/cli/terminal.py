"""Output of the commands: quiet libraries, progress bars, tables and numbers."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# More columns would not fit 80 characters: four numbers of ten digits and the longest name of a metric do.
_MODELS_PER_TABLE = 4


def be_quiet() -> None:
    """Silences the messages that transformers and datasets print about each file they read; they still raise errors."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)


def warn_deprecated(what: str) -> None:
    """Issues a DeprecationWarning, which is shown as one line whatever filters are set.

    Args:
        what: Clause that names the old form and the new one.
    """
    message = f"{what}; the old form will be removed in the next release"
    formatwarning = warnings.formatwarning
    warnings.formatwarning = lambda text, *_: f"slimkernels: {text}\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DeprecationWarning)
            warnings.warn(message, DeprecationWarning, stacklevel=2)
    finally:
        warnings.formatwarning = formatwarning


@contextlib.contextmanager
def progress_bars(*, is_shown: bool = True) -> Iterator[Progress]:
    """Yields a display of progress bars on standard error, for ``progress_task``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Count(MofNCompleteColumn):
        """The number that is done and the total, where that is known."""

        def render(self, task: Task) -> Text:
            if task.total is None:
                return Text(str(int(task.completed)), style="progress.download")
            return super().render(task)

    columns = (TextColumn("{task.description}"), BarColumn(), Count(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as progress:
        yield progress


def progress_task(progress: Progress, description: str) -> Callable[[int, int | None], None]:
    """Adds a bar and returns the function that updates it, called with the number done and the total."""
    task = progress.add_task(description, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def print_table(content: Mapping[str, str], console: Console | None = None) -> None:
    """Prints one line per name, wrapped to the width of the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in content.items():
        table.add_row(name, Text(value))
    (Console() if console is None else console).print(table)


def print_columns(columns: Mapping[str, Mapping[str, str]], console: Console | None = None) -> None:
    """Prints columns of named numbers side by side, in several tables where one would be too wide.

    Args:
        columns: Numbers by row, by heading; a row may be missing from a column.
        console: Console to print to; None is standard output.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if console is None else console
    rows = list(dict.fromkeys(name for column in columns.values() for name in column))
    headings = list(columns)
    for first in range(0, len(headings), _MODELS_PER_TABLE):
        table = Table(box=None)
        table.add_column("", no_wrap=True)
        shown_headings = headings[first : first + _MODELS_PER_TABLE]
        for heading in shown_headings:
            table.add_column(Text(heading), overflow="fold", justify="right")
        for row in rows:
            table.add_row(row, *(columns[heading].get(row, "") for heading in shown_headings))
        console.print(table)


def print_histogram(edges: Sequence[float], counts: Sequence[int]) -> None:
    """Prints a line per bin: its range, its count and a bar of up to 40 characters."""
    most = max(*counts, 1)
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        print(f"{low:8.3f} to {high:8.3f} {count:10d} {'#' * math.ceil(40 * count / most)}".rstrip())


def print_json(content: Any) -> None:
    """Prints JSON; a number that JSON cannot hold, infinite or NaN, is null."""
    print(json.dumps(finite(content), indent=2, allow_nan=False))


def finite(content: Any) -> Any:
    """Returns JSON values with None in place of numbers that JSON cannot hold."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def shown(value: object) -> str:
    """Formats a float with four significant digits, and anything else with ``str``."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
