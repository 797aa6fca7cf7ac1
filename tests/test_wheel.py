"""The wheel of `make wheel`, installed into a fresh environment: `make test-wheel`."""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import slimkernels.ops

pytestmark = [pytest.mark.slow]  # an environment with torch takes a minute to make

ROOT = Path(__file__).parents[1]
# The torch of the environment: `make test-wheel TORCH=torch==2.10.0`.
TORCH = os.environ.get("WHEEL_TORCH") or re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.M)[1]


@pytest.fixture(scope="module")
def wheel() -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted((ROOT / "dist").glob(f"slimkernels-*-{tag}-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip("there is no wheel for this Python in dist: run make wheel")
    return found[-1]


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """An interpreter of an environment that has the wheel and what it requires, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-compile", TORCH, str(wheel))
    return python


def run(python: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SLIMKERNELS_CPU_ISA")}
    done = subprocess.run(
        [python, *arguments],
        env=inherited | environment,
        cwd=python.parent,  # not the source tree, whose package would be imported instead
        capture_output=True,
        text=True,
        timeout=3600,  # pip takes minutes on a machine that does something else
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_wheel_has_one_library_and_leaves_torch_to_the_environment(wheel):
    assert "manylinux_2_28" in wheel.name
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name]
    assert len(libraries) == 1
    assert libraries[0].startswith("slimkernels/_C.")


def test_source_distribution_has_what_is_built_and_no_tests(wheel):
    [source] = (ROOT / "build/wheel").glob("slimkernels-*.tar.gz")
    with tarfile.open(source) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"LICENSE", "setup.py", "slimkernels/py.typed", "slimkernels/data/launch_settings.json"} <= files
    assert {name.partition("/")[0] for name in files if "/" in name} == {"csrc", "slimkernels", "slimkernels.egg-info"}


def test_source_distribution_says_what_its_isolated_build_lacks(wheel, tmp_path):
    [source] = (ROOT / "build/wheel").glob("slimkernels-*.tar.gz")  # from which the wheel was built
    venv.create(tmp_path, with_pip=True)
    command = [tmp_path / "bin/python", "-m", "pip", "install", "--no-deps", source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode != 0
    assert "[1 lines of output]" in done.stderr, done.stderr
    assert "slimkernels: torch is needed to build; run `pip install torch==2.13.0 pybind11" in done.stderr


def test_wheel_runs_the_first_example(python):
    [example, *_] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.S | re.M)
    done = run(python, "-c", f"{example}\nprint(sk.__file__, loss.item(), hidden.grad.norm().item())")
    file, loss, gradient = done.stdout.split()
    assert Path(file).is_relative_to(python.parents[1])
    assert float(loss) > 0
    assert float(gradient) > 0


def test_wheel_works_on_every_instruction_set(python):
    report = json.loads(run(python, "-m", "slimkernels", "doctor", "--json").stdout)
    wanted = TORCH.partition("==")[2]
    assert report["versions"]["torch"].startswith(wanted)
    isas = report["cpu_kernels"]["instruction_sets"]
    assert isas == slimkernels._C.supported_cpu_isas()  # the extension of the source tree, by another compiler
    for isa in isas:
        done = run(python, "-m", "slimkernels", "doctor", "--json", SLIMKERNELS_CPU_ISA=isa)
        found = json.loads(done.stdout)["cpu_kernels"]
        assert (found["cpu_tensors"], found["check"]) == (f"C++ ({isa})", "works")
