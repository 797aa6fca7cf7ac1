"""slimkernels/_C_cuda.so: compiled for GPUs that are not there, built only where it should be, and loaded."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bench.sass import find_tool

ROOT = Path(__file__).parent.parent
# The most registers of a thread with which two blocks of 256 threads fit a multiprocessor, or three of slim_loss.
KERNELS = {"topk_logits": 128, "slim_loss": 80, "sample_logits": 128}
# What the sources use of torch, all of which torch 2.10 has. A macro of a later release would not compile beside it.
TORCH_MACROS = {
    "AOTI_TORCH_SUCCESS",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK",
    "TORCH_ABI_VERSION",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
}
# setup.py as it is, but that torch is of CUDA_OF_TORCH, the CPU extension is left out, and HIDE_NVCC does so.
BUILD = """
import os, runpy, setuptools, shutil, sys
run = runpy.run_path
def run_path(path, **options):
    found = run(path, **options)
    return found | {"cuda": os.environ.get("CUDA_OF_TORCH")} if path.endswith("version.py") else found
runpy.run_path = run_path
if "HIDE_NVCC" in os.environ:
    which = shutil.which
    shutil.which = lambda name, **options: None if name == "nvcc" else which(name, **options)
setup = setuptools.setup
def setup_cuda(ext_modules, **options):
    setup(ext_modules=[ext for ext in ext_modules if ext.name != "slimkernels._C"], **options)
setuptools.setup = setup_cuda
sys.argv[0] = "setup.py"
run("setup.py", run_name="__main__")
"""


class Kernel(NamedTuple):
    """What ptxas -v says of a kernel, per thread."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int


class Built(NamedTuple):
    library: Path
    architectures: tuple[str, ...]
    log: str


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs setup.py build_ext for what would be built beside the CPU extension."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("SLIMKERNELS_CUDA", "CUDA_HOME")}
    return subprocess.run(
        [sys.executable, "-c", BUILD, "build_ext", f"--build-lib={folder}", f"--build-temp={folder / 'temp'}"],
        cwd=ROOT,
        env=inherited | {"TORCH_CUDA_ARCH_LIST": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=10800,
    )


def kernels_of(log: str) -> list[Kernel]:
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores,"
        r" (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return [
        Kernel(name, architecture, int(registers), int(stack), int(stored) + int(loaded))
        for name, architecture, stack, stored, loaded, registers in found
    ]


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(("9.0a",), id="sm_90a"),
        pytest.param(("8.0", "9.0a", "10.0"), id="all", marks=pytest.mark.slow),  # a minute of nvcc each
    ],
)
def built(tmp_path_factory, request) -> Built:
    """The library as an install makes it, for one or all architectures, with the report of the assembler."""
    nvcc = shutil.which("nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout if nvcc else ""
    if "compute_100" not in known:
        pytest.skip("needs nvcc of CUDA 12.8 or later")
    folder = tmp_path_factory.mktemp("cuda")
    listed = {} if len(request.param) > 1 else {"TORCH_CUDA_ARCH_LIST": request.param[0]}
    done = build(folder, SLIMKERNELS_CUDA="1", NVCC_APPEND_FLAGS="-Xptxas=-v", **listed)
    assert done.returncode == 0, done.stdout + done.stderr
    architectures = tuple(f"sm_{name.replace('.', '')}" for name in request.param)
    return Built(folder / "slimkernels/_C_cuda.so", architectures, done.stdout + done.stderr)


def test_cuda_kernels_compile_without_warning_or_spill(built):
    assert not re.search(r"warning|error", built.log, re.IGNORECASE), built.log
    kernels = kernels_of(built.log)
    assert {each.architecture for each in kernels} == set(built.architectures)
    # Of three dtypes, staged and not.
    for op, most in KERNELS.items():
        found = {(each.name, each.architecture): each.registers for each in kernels if f"{op}_kernel" in each.name}
        assert len(found) == 6 * len(built.architectures), op
        assert max(found.values()) <= most, found
    assert len(kernels) == 6 * len(built.architectures) * len(KERNELS)
    for each in kernels:
        print(f"{each.architecture}: {each.registers} registers, {each.name}")  # noqa: T201 -- shown by pytest -s
        assert (each.stack_bytes, each.spilled_bytes) == (0, 0), each


def test_cuda_kernels_move_16_bytes_at_a_time(built):
    cuobjdump = find_tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump, from the CUDA toolkit or Triton")
    listing = subprocess.run(
        [cuobjdump, "-sass", str(built.library)], capture_output=True, text=True, check=True
    ).stdout
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\t*Function : |\Z)", listing, re.DOTALL))
    for op in KERNELS:
        found = {name: body for name, body in bodies.items() if f"{op}_kernel" in name}
        assert len(found) == 6
        for name, body in found.items():
            # Rows at any address: vectors of 16 bytes are loaded, shifted if they are not aligned, and stored. The
            # compiler splits loads of vectors that are shifted, unless load_vector keeps it from that.
            assert re.search(r"\bLDG\.E\S*\.128\b", body), name
            if op == "slim_loss":
                assert re.search(r"\bSTG\.E\S*\.128\b", body), name
                assert bool(re.search(r"\bLDGSTS\.E\S*\.128\b", body)) == ("Lb1E" in name), name


def test_sources_use_only_macros_of_the_oldest_torch():
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    used = {name for text in sources for name in re.findall(r"\b(?!SK_)[A-Z]*_?TORCH_[A-Z_]+", text)}
    assert used == TORCH_MACROS


def test_spills_are_read_from_the_assembler():
    log = """
ptxas info    : Compiling entry function 'kernel' for 'sm_100'
ptxas info    : Function properties for kernel
    16 bytes stack frame, 12 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size
"""
    assert kernels_of(log) == [Kernel("kernel", "sm_100", 64, 16, 64)]


LOAD = """
import ctypes, sys, torch
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
torch.version.cuda = sys.argv[2] or None
if sys.argv[3]:
    ctypes.CDLL(sys.argv[3], mode=ctypes.RTLD_GLOBAL)
import slimkernels.ops
assert slimkernels.__file__.startswith(sys.argv[1])
assert not torch.cuda.is_initialized()
"""


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder with a copy of the package."""
    shutil.copytree(ROOT / "slimkernels", tmp_path / "slimkernels", ignore=shutil.ignore_patterns("_C_cuda.so"))
    return tmp_path


def load(package: Path, code: str, cuda: str = "", stub: Path | str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", LOAD + code, str(package), cuda, str(stub)],
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
        timeout=10800,
    )


def test_cuda_library_is_loaded_where_torch_has_cuda(built, package):
    # All that a torch without CUDA lacks is the function that gives the current stream.
    source, stub = package / "stub.cpp", package / "stub.so"
    source.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(stub)], check=True)
    shutil.copy(built.library, package / "slimkernels/_C_cuda.so")
    code = """
ops = torch.ops.slimkernels
tensor = torch.zeros(1, 4)

# The library serves three operators, and hands float64 to Triton with all arguments as they are.
assert slimkernels.build_info()["cuda_kernels"]["topk_logits_rows"] == "CUDA C++"
assert slimkernels.build_info()["cuda_kernels"]["slim_loss_rows"] == "CUDA C++"
assert slimkernels.build_info()["cuda_kernels"]["sample_logits_rows"] == "CUDA C++"
assert slimkernels.build_info()["cuda_kernels"]["softmax_gradient_rows"] == "Triton"
given, seen = [], []
for argument in ops.slim_loss_rows.default._schema.arguments:
    kind = str(argument.type)
    value = {"Tensor": tensor.double(), "float": 0.25, "int": 7, "bool": True, "str": "renorm"}.get(kind)
    given.append(value)
torch.library.impl("slimkernels::slim_loss_rows_triton", "CPU", lambda *arguments: seen.append(arguments) or 5)
keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
assert ops.slim_loss_rows.default.redispatch(keys, *given) == 5
assert len(seen[0]) == len(given) == 31
assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(seen[0], given))

seen.clear()
torch.library.impl("slimkernels::topk_logits_rows_triton", "CPU", lambda *arguments: seen.append(arguments) or 6)
kept, lse = tensor[:, :2].double(), tensor[:, :1].double()
given = [tensor.double(), 2, None, [1.0, 2.0], kept, kept.int(), lse, lse, None]
assert ops.topk_logits_rows.default.redispatch(keys, *given) == 6
assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(seen[0], given))
given = [tensor, 2, None, [1.0] * 33, *given[4:]]
assert ops.topk_logits_rows.default.redispatch(keys, *given) == 6
assert len(seen) == 2

# Besides, many draws of a row, and several from a row that is not truncated.
seen.clear()
torch.library.impl("slimkernels::sample_logits_rows_triton", "CPU", lambda *arguments: seen.append(arguments) or 7)
seeds, temperatures = torch.tensor([3]), torch.tensor([0.5], dtype=torch.float64)
outputs = [tensor.long(), tensor, tensor, tensor[:, 0]]
for logits, m, top_k, top_p in ((tensor.double(), 1, 0, 1.0), (tensor, 33, 5, 0.9), (tensor, 2, 0, 1.0)):
    given = [logits, m, 0, seeds, 4, None, 0.0, temperatures, top_k, None, top_p, None, 0.0, None, *outputs]
    assert ops.sample_logits_rows.default.redispatch(keys, *given) == 7
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(seen[-1], given))
assert len(seen) == 3
"""
    done = load(package, code, cuda="13.0", stub=stub)
    assert (done.returncode, done.stderr) == (0, "")


def test_cuda_library_is_left_alone_where_triton_is_wanted(package, monkeypatch):
    (package / "slimkernels/_C_cuda.so").write_text("not a library")
    monkeypatch.setenv("SLIMKERNELS_CUDA_KERNELS", "triton")
    code = 'assert set(slimkernels.build_info()["cuda_kernels"].values()) == {"Triton"}\n'
    done = load(package, code, cuda="13.0")
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.setenv("SLIMKERNELS_CUDA_KERNELS", "c++")
    done = load(package, code, cuda="13.0")
    assert "SLIMKERNELS_CUDA_KERNELS must be 'triton', to leave out the CUDA C++ kernels, or unset" in done.stderr


def test_cuda_library_is_left_alone_where_torch_has_no_cuda(package):
    (package / "slimkernels/_C_cuda.so").write_text("not a library")
    done = load(package, 'assert not hasattr(torch.ops.slimkernels, "topk_logits_rows_triton")\n')
    assert (done.returncode, done.stderr) == (0, "")


def test_cuda_library_that_does_not_load_is_a_warning(package):
    (package / "slimkernels/_C_cuda.so").write_text("not a library")
    done = load(package, "slimkernels.topk_logits(torch.zeros(1, 4), top_k=2)\n", cuda="13.0")
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" in done.stderr
    assert "_C_cuda.so does not load with this torch" in done.stderr
    assert "install slimkernels again" in done.stderr


@pytest.fixture
def broken_nvcc(tmp_path) -> str:
    """The CUDA_HOME of an nvcc of CUDA 13.0 that compiles nothing."""
    compiler = tmp_path / "toolkit/bin/nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi\n'
        "echo nvcc: no such architecture >&2; exit 1\n"
    )
    compiler.chmod(0o755)
    return str(tmp_path / "toolkit")


def test_cuda_build_that_was_not_asked_for_may_fail(tmp_path, broken_nvcc):
    done = build(tmp_path, CUDA_HOME=broken_nvcc, CUDA_OF_TORCH="13.1")
    assert done.returncode == 0, done.stderr
    assert 'building extension "slimkernels._C_cuda" failed' in done.stderr
    assert "nvcc: no such architecture" in done.stderr
    assert "CUDA tensors work without it, with Triton kernels; set SLIMKERNELS_CUDA=0 to skip" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_build_that_was_asked_for_must_not_fail(tmp_path, broken_nvcc):
    done = build(tmp_path, CUDA_HOME=broken_nvcc, SLIMKERNELS_CUDA="1")
    assert done.returncode != 0
    assert "nvcc failed, see above" in done.stderr


def test_cuda_build_by_another_cuda_is_a_warning(tmp_path, broken_nvcc):
    done = build(tmp_path, CUDA_HOME=broken_nvcc, CUDA_OF_TORCH="12.8")
    assert done.returncode == 0, done.stderr
    assert "nvcc is of CUDA 13.0, but torch needs CUDA 12.8; set CUDA_HOME" in done.stderr
    assert "no such architecture" not in done.stderr


@pytest.mark.parametrize(
    "environment",
    [{"CUDA_OF_TORCH": "13.0", "SLIMKERNELS_CUDA": "0"}, {}, {"CUDA_OF_TORCH": "13.0", "HIDE_NVCC": "1"}],
    ids=["0", "no CUDA", "no nvcc"],
)
def test_cuda_build_is_not_tried(tmp_path, broken_nvcc, environment):
    done = build(tmp_path, CUDA_HOME=broken_nvcc, **environment)
    assert done.returncode == 0, done.stderr
    assert "nvcc" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLIMKERNELS_CUDA": "yes"}, "slimkernels: SLIMKERNELS_CUDA must be 0, 1 or unset, got 'yes'"),
        (
            {"SLIMKERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "Turing;7.5"},
            "TORCH_CUDA_ARCH_LIST must name compute capabilities from 8.0 on, such as 8.0;9.0a;10.0+PTX; "
            "got Turing;7.5",
        ),
        (
            {"SLIMKERNELS_CUDA": "1", "HIDE_NVCC": "1"},
            "slimkernels: SLIMKERNELS_CUDA=1, but no nvcc was found; install the CUDA toolkit, set CUDA_HOME, or set "
            "SLIMKERNELS_CUDA=0",
        ),
    ],
    ids=["switch", "architectures", "no nvcc"],
)
def test_cuda_build_of_nonsense_says_what_is_expected(tmp_path, broken_nvcc, environment, said):
    done = build(tmp_path, CUDA_HOME=broken_nvcc, **environment)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].removeprefix("error: ") == said
