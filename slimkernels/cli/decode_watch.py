"""The progress of ``slimkernels decode``: a drawing in a terminal, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slimkernels.cli.terminal import finite

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from slimkernels.search import PathFinderConfig
    from slimkernels.search.question import Progress

# Seconds without a line after which one says what is being done.
SILENCE_S = 1.5


@contextlib.contextmanager
def watch_of(args: argparse.Namespace) -> Iterator[Watch]:
    """Yields what shows the progress of a command, as its options and the terminal ask."""
    from rich.console import Console

    console = Console(stderr=True)
    if args.json:
        watch = JsonWatch()
    else:
        watch = TerminalWatch(console) if console.is_terminal else Watch()
    with watch.shown():
        yield watch


class Watch:
    """Plain lines on standard error, at least one every two seconds; results on standard output."""

    def __init__(self) -> None:
        self._stage, self._since = "starting", time.monotonic()
        self._drawn = 0  # tokens of the search so far, in this run
        # Python has been starting for about a second, in silence.
        self._last_line = time.monotonic() - 1.0
        self._lock = threading.Lock()
        self._config: PathFinderConfig | None = None
        self._numbers: Sequence[int] = ()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Writes a line in every silence, from a thread of its own, within the context."""
        end = threading.Event()
        thread = threading.Thread(target=self._break_silence, args=(end,), name="slimkernels-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def stage(self, text: str) -> None:
        """Begins something that may take long; ``text`` says what, as in "loading the model"."""
        self._stage, self._since = text, time.monotonic()

    def search(self, numbers: Sequence[int], titles: Sequence[str], config: PathFinderConfig) -> None:
        """Begins the search.

        Args:
            numbers: Numbers of the questions in the input, from 1, by their places in the search.
            titles: Texts of the questions.
            config: Settings of the search.
        """
        self._numbers, self._config = numbers, config
        self.stage(f"searching {len(numbers)} question{'' if len(numbers) == 1 else 's'}")

    def tokens(self, count: int) -> None:
        """Counts tokens that were drawn."""
        self._drawn += count

    def depth(self, place: int, progress: Progress) -> None:
        """Shows a question of which a depth is complete."""
        from slimkernels.search.tree_text import count_statuses, progress_line

        facts = {
            "question": self._numbers[place],
            "depth": progress.depth,
            "nodes": count_statuses(progress.tree),
            "tokens": progress.num_tokens,
            **self._left(progress),
            "tokens_per_s": self._rate(),
        }
        line = progress_line(self._numbers[place] - 1, progress.tree)
        self._write("depth", facts, f"{line}; {self._spent(progress)}")

    def note(self, text: str) -> None:
        """Shows a remark."""
        self._write("note", {"text": text}, text)

    def result(self, place: int, record: Mapping[str, Any], summary: str) -> None:
        """Shows the result of a question: ``summary``, or ``record`` where machines read."""
        print(summary)

    def end(self, num_tokens: int) -> None:
        """Shows what the search of all questions took."""
        count, seconds = len(self._numbers), time.monotonic() - self._since
        facts = {"questions": count, "tokens": num_tokens, "seconds": round(seconds, 3), "tokens_per_s": self._rate()}
        questions = f"{count} question{'' if count == 1 else 's'}"
        self._write("end", facts, f"{questions}, {num_tokens} tokens, {seconds:.1f} s, {self._rate()} tokens/s")

    def _break_silence(self, end: threading.Event) -> None:
        while not end.wait(0.1):
            if time.monotonic() - self._last_line >= SILENCE_S:
                seconds = time.monotonic() - self._since
                facts = {"doing": self._stage, "seconds": round(seconds, 1)}
                if self._config is not None:
                    facts |= {"tokens": self._drawn, "tokens_per_s": self._rate()}
                self._write("working", facts, self._status())

    def _status(self) -> str:
        """Returns one line about what is being done."""
        text = f"{self._stage}: {time.monotonic() - self._since:.0f} s"
        return text if self._config is None else f"{text}, {self._drawn} tokens, {self._rate()} tokens/s"

    def _rate(self) -> float:
        return round(self._drawn / max(time.monotonic() - self._since, 1e-9), 1)

    def _left(self, progress: Progress) -> dict[str, float | None]:
        """Returns what is left of the budgets; None without one."""
        assert self._config is not None  # noqa: S101 -- for the type checker; a depth is of a search
        tokens, limit = self._config.max_tokens, self._config.time_limit_s
        return {
            "tokens_left": None if tokens is None else max(0, tokens - progress.num_tokens),
            "seconds_left": None if limit is None else round(max(0.0, limit - progress.seconds), 1),
        }

    def _spent(self, progress: Progress) -> str:
        left = self._left(progress)
        parts = [f"{progress.num_tokens} tokens"]
        if left["tokens_left"] is not None:
            parts.append(f"{left['tokens_left']} left")
        if left["seconds_left"] is not None:
            parts.append(f"{left['seconds_left']:.0f} s left")
        return ", ".join([*parts, f"{self._rate()} tokens/s"])

    def _write(self, event: str, facts: Mapping[str, Any], text: str) -> None:
        """Writes one line; ``facts`` are for machines, ``text`` for people."""
        with self._lock:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
            self._last_line = time.monotonic()


class JsonWatch(Watch):
    """A JSON object on each line of standard output, with the kind of the line as ``event``."""

    def result(self, place: int, record: Mapping[str, Any], summary: str) -> None:
        """Writes the record of a question."""
        self._write("result", record, summary)

    def _write(self, event: str, facts: Mapping[str, Any], text: str) -> None:
        with self._lock:
            print(json.dumps(finite({"event": event, **facts}), ensure_ascii=False), flush=True)
            self._last_line = time.monotonic()


class TerminalWatch(Watch):
    """A drawing on standard error that is renewed four times a second: the tree of a question, or a line for each.

    Args:
        console: Terminal.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live: Live | None = None
        self._titles: Sequence[str] = ()
        self._shown: dict[int, RenderableType] = {}

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Draws within the context."""
        from rich.live import Live

        # Answers that go to a file must not go through the terminal.
        options: dict[str, Any] = {"transient": True, "redirect_stdout": sys.stdout.isatty()}
        with Live(console=self._console, get_renderable=self._drawing, refresh_per_second=4, **options) as self._live:
            yield

    def search(self, numbers: Sequence[int], titles: Sequence[str], config: PathFinderConfig) -> None:
        """Begins the search."""
        super().search(numbers, titles, config)
        self._titles = titles

    def depth(self, place: int, progress: Progress) -> None:
        """Draws the tree of the only question, or the line of one of several."""
        from rich.console import Group
        from rich.text import Text

        from slimkernels.search.tree_text import progress_line, render_tree

        assert self._config is not None  # noqa: S101 -- for the type checker; a depth is of a search
        line = Text(f"{progress_line(self._numbers[place] - 1, progress.tree)}; {self._spent(progress)}", no_wrap=True)
        if len(self._numbers) == 1:
            height = max(3, self._console.height - 4)
            tree = render_tree(self._titles[place], progress.tree, height, self._config.pruning_score)
            self._shown[place] = Group(tree, line)
        else:
            self._shown[place] = line
        self._refresh()

    def result(self, place: int, record: Mapping[str, Any], summary: str) -> None:
        """Prints the result above the drawing, which the question leaves."""
        self._shown.pop(place, None)
        self._refresh()
        print(summary)

    def _drawing(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        room = max(1, self._console.height - 2)
        return Group(*list(self._shown.values())[-room:], Text(self._status(), style="dim", no_wrap=True))

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _write(self, event: str, facts: Mapping[str, Any], text: str) -> None:
        self._console.print(text, markup=False, highlight=False)
