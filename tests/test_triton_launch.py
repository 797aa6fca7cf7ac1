"""The launch settings that are shipped, how one is chosen, and how they are measured."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

import slimkernels.ops  # noqa: F401 -- registers the operators
from bench import tune
from slimkernels.ops import _library
from slimkernels.ops.triton import launch
from slimkernels.ops.triton.launch import Settings

ROWS = torch.empty(4, 128256, dtype=torch.bfloat16, device="meta")


def entry(op="op", architecture="sm_90", itemsize=2, vocab_size=32768, block=1024, num_warps=4) -> dict:
    return {
        "op": op,
        "architecture": architecture,
        "itemsize": itemsize,
        "vocab_size": vocab_size,
        "block": block,
        "num_warps": num_warps,
        "source": "estimated",
    }


@pytest.fixture
def shipped(monkeypatch):
    """Replaces the table and the device's architecture."""

    def ship(*entries: dict, architecture: str = "sm_90") -> None:
        monkeypatch.setattr(launch, "_table", lambda: list(entries))
        monkeypatch.setattr(launch, "architecture_of", lambda _device: architecture)
        launch._nearest.cache_clear()

    yield ship
    launch._nearest.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "block"),
    [("sm_90", 1), ("sm_80", 2), ("sm_86", 2), ("sm_100", 1), ("sm_120", 1), ("gfx942", 3), ("gfx950", 3)],
)
def test_launch_settings_come_from_the_nearest_architecture(shipped, architecture, block):
    entries = [entry(block=1), entry(architecture="sm_80", block=2), entry(architecture="gfx942", block=3)]
    shipped(*entries, architecture=architecture)
    assert launch.settings_of("op", ROWS).block == block


def test_launch_settings_come_from_the_nearest_size(shipped):
    shipped(entry(block=1), entry(vocab_size=131072, block=2), entry(itemsize=4, vocab_size=131072, block=3))
    assert launch.settings_of("op", ROWS).block == 2
    assert launch.settings_of("op", ROWS[:, :20000]).block == 1
    assert launch.settings_of("op", ROWS.float()).block == 3


@pytest.mark.parametrize(
    ("release", "architecture", "expected"),
    [((3, 6), "gfx942", False), ((3, 6), "sm_90", True), ((3, 7), "gfx942", True)],
)
def test_old_compilers_of_amd_gpus_use_no_buffer_instructions(monkeypatch, release, architecture, expected):
    monkeypatch.setattr(launch, "_RELEASE", release)
    monkeypatch.setattr(launch, "architecture_of", lambda _device: architecture)
    monkeypatch.setattr(launch.triton.knobs.amd, "use_buffer_ops", True)
    seen = []

    class Kernel:
        def __getitem__(self, _grid):
            return lambda *_arguments, **_options: seen.append(launch.triton.knobs.amd.use_buffer_ops)

    launch.run(Kernel(), 1, Settings(64, 4), torch.empty(1))
    assert seen == [expected]
    assert launch.triton.knobs.amd.use_buffer_ops


def test_every_kernel_has_settings_that_are_powers_of_two():
    table = json.loads(tune.TABLE.read_text())["settings"]
    operators = {name.removesuffix("_rows") for name in _library.triton_launchers}
    # The sampling ops share a kernel that reads the row first; softmax_gradient takes the settings of slim_loss.
    assert {line["op"] for line in table} == operators - {"softmax_gradient"} | {"row_softmax"}
    for line in table:
        assert set(line) - {"max_registers"} == set(entry())
        assert line["source"] in ("estimated", "measured")
        assert line["block"] & (line["block"] - 1) == 0
        assert line["num_warps"] in (1, 2, 4, 8, 16, 32)


def test_tuning_takes_the_fastest_that_works():
    seconds = {Settings(1, 1): 3.0, Settings(2, 1): 1.0, Settings(4, 1): 2.0}

    def seconds_of(candidate: Settings) -> float:
        if candidate == Settings(8, 1):
            raise RuntimeError("out of resource: shared memory")
        return seconds[candidate]

    assert tune.best_of([*seconds, Settings(8, 1)], seconds_of) == (Settings(2, 1), 1.0)
    with pytest.raises(RuntimeError, match="no candidate"):
        tune.best_of([Settings(8, 1)], seconds_of)


def test_tuning_replaces_the_entry_of_its_case_alone(tmp_path):
    old = [entry(), entry(vocab_size=131072)]
    table = {"note": "n", "settings": tune.merged(old, entry(block=64))}
    tune.write(tmp_path / "table.json", table)
    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert [line["block"] for line in table["settings"]] == [1024, 64]
