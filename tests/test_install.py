"""An install that cannot work says so in one sentence, and so does a package whose extension is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
    ("module", "said"),
    [
        ("__version__ = '2.9.1+cpu'", "torch 2.9.1 is too old, 2.10 or later is needed; run `pip install 'torch>="),
        ("raise ImportError('no torch')", "torch is needed to build; run `pip install torch==2.13.0`, then install"),
    ],
)
def test_install_with_another_torch_is_one_sentence(tmp_path, module, said):
    (tmp_path / "torch.py").write_text(module)
    done = setup_name(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"slimkernels: {said}")


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
    assert last.endswith("install it with `pip install --no-build-isolation slimkernels`")
