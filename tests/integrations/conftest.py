"""The summary of the runs: which release of which trainer did what."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.integrations import RUN, line_of


@pytest.fixture
def ran(record_property) -> Callable[[str, str, str], None]:
    """Records a run for the summary: ``ran("trl", "GKDTrainer", "4 steps from a store")``."""

    def record(package: str, trainer: str, did: str) -> None:
        record_property(RUN, line_of(package, trainer, did))

    return record


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = terminalreporter.getreports("passed")
    lines = [text for report in passed if report.when == "call" for name, text in report.user_properties if name == RUN]
    if lines:
        terminalreporter.section("trainers that ran")
        for line in dict.fromkeys(lines):
            terminalreporter.write_line(line)
