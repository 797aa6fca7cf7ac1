"""Markers that need something of the machine, and threads few enough for a shared one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels", choices=("cpu", "triton", "cuda", "emulated"), default="cpu", help="see support/kernel_override.py"
    )
    parser.addoption("--shard", metavar="I/N", help="run every N-th test, from the I-th on; see scripts/run_on_gpu.py")
    parser.addoption("--data", metavar="DIR", help="public data sets, a folder each; tests that read them skip without")


def pytest_configure(config: pytest.Config) -> None:
    # The tensors are small: threads that wait for each other cost several times what they save. Tests that are about
    # threads ask for them.
    torch.set_num_threads(1)
    # A shell starts its background jobs deaf to Ctrl-C; the commands that tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Few threads for the commands that tests start, too: spinning threads starve each other on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if config.getoption("--kernels") != "cpu":
        from support import kernel_override

        kernel_override.install(config.getoption("--kernels"))
        # The interpreter takes maxima with numpy, which warns of rows of NaN.
        config.addinivalue_line("filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning")
        # That of Triton 3.6 takes a loop's bounds from arrays of one element.
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.hookimpl(trylast=True)  # after the selection by -k, so that every process gets as many tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shard"):
        index, processes = map(int, config.getoption("--shard").split("/"))
        config.hook.pytest_deselected(items=[item for at, item in enumerate(items) if at % processes != index])
        items[:] = items[index::processes]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("cpu_kernels") and config.getoption("--kernels") != "cpu":
            item.add_marker(pytest.mark.skip(reason="only CPU kernels raise for a bad row; on a GPU it is NaN"))
        if item.get_closest_marker("slow") and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("server") and "server" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="starts real servers: run make test-servers"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def public_data(request: pytest.FixtureRequest) -> Path:
    """The folder of ``--data``."""
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip("reads public data sets: run with --data DIR")
    return Path(folder)


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    """A source of random numbers that is the same in every test."""
    return torch.Generator().manual_seed(1)
