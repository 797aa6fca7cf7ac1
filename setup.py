"""Builds `slimkernels._C` on libtorch's stable ABI, with the CPU kernels compiled once per instruction set.

If torch has CUDA and nvcc of the same major version is found, the CUDA C++ kernels are built as well, into
`slimkernels/_C_cuda.so`. The build needs no GPU. Environment variables:

SLIMKERNELS_CUDA: 1 builds the CUDA kernels with any nvcc and fails if that is impossible; 0 never builds them.
TORCH_CUDA_ARCH_LIST: compute capabilities to build for, by default 8.0;9.0a;10.0+PTX. Those below 8.0 are ignored; 10.0
    needs nvcc of CUDA 12.8 or later.
CUDA_HOME: the place where nvcc is searched first.
"""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

MIN_TORCH = (2, 10)
MIN_SETUPTOOLS = 77
CSRC = Path("csrc")
CUDA_LIBRARY = Path("slimkernels/_C_cuda.so")  # loaded as torch's operators are, not as a Python module
CUDA_CAPABILITIES = "8.0;9.0a;10.0+PTX"  # later devices use the PTX
WITHOUT_CUDA = "CUDA tensors work without it, with Triton kernels; set SLIMKERNELS_CUDA=0 to skip this build"
X86_ISAS = {
    "baseline": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vbmi2", "-mavx512bf16"],
}
QUIET = ["-Wno-psabi", "-Wno-maybe-uninitialized"]  # warnings of GCC that are about its own vectors


def stop(message: str) -> None:
    """Ends the build with a message."""
    sys.exit(f"slimkernels: {message}")


def check_compiler() -> None:
    """Ends the build unless there is a C++17 compiler; sets CXX to it."""
    compiler = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
    if shutil.which(compiler.split()[0]) is None:
        stop(f"no C++ compiler ({compiler}) was found; install one, for example `apt-get install g++`, or set CXX")
    with tempfile.TemporaryDirectory() as folder:  # Zig's compiler does not know -fsyntax-only
        probe = subprocess.run(
            [*compiler.split(), "-std=c++17", "-x", "c++", "-c", "-", "-o", f"{folder}/probe.o"],
            input="#include <optional>\n#include <atomic>\n",
            text=True,
            capture_output=True,
            check=False,
        )
    if probe.returncode != 0:
        stop(f"{compiler} cannot compile C++17; install GCC 10, Clang 12 or later, or set CXX")
    os.environ["CXX"] = compiler


AGAIN = "then install again with --no-build-isolation"
# Found and not imported, which takes seconds and may need libraries of CUDA that a building machine does not have.
found = importlib.util.find_spec("torch")
if found is None or not found.submodule_search_locations:
    stop(f"torch is needed to build; run `pip install torch==2.13.0 pybind11 'setuptools>=77'`, {AGAIN}")
torch_root = Path(found.submodule_search_locations[0])
torch_version = runpy.run_path(str(torch_root / "version.py"))
version = torch_version["__version__"].split("+")[0]
if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
    stop(f"torch {version} is too old, 2.10 or later is needed; run `pip install 'torch>=2.10'`, {AGAIN}")
try:
    import pybind11
except ImportError:
    stop(f"pybind11 is needed to build; run `pip install pybind11 'setuptools>=77'`, {AGAIN}")
import setuptools  # noqa: E402 -- torch is checked first, for the one-sentence message

# An earlier one would reject the licence in pyproject.toml, in many words.
if int(setuptools.__version__.partition(".")[0]) < MIN_SETUPTOOLS:
    stop(f"setuptools {setuptools.__version__} is too old; run `pip install 'setuptools>=77'`, {AGAIN}")

if "sdist" not in sys.argv:
    check_compiler()

from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.errors import CompileError  # noqa: E402

stable_abi = ("TORCH_TARGET_VERSION", "0x020a000000000000")


def as_spelled(flags: list[str]) -> list[str]:
    """Returns options as the compiler spells them: Zig's names of processors have underscores."""
    program, *arguments = os.environ["CXX"].split()
    is_zig = Path(program).name == "zig" or "ziglang" in arguments  # zig c++, python -m ziglang c++
    return [flag.replace("x86-64-", "x86_64_") if is_zig else flag for flag in flags]


def find_nvcc() -> str | None:
    """Returns the path of nvcc, from CUDA_HOME, PATH or the default location; None if it is not found."""
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def cuda_extensions() -> list[Extension]:
    """Returns the CUDA library if it is wanted; it may fail to build unless SLIMKERNELS_CUDA=1 asks for it."""
    wanted = os.environ.get("SLIMKERNELS_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"SLIMKERNELS_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0" or (wanted == "" and torch_version["cuda"] is None):
        return []
    if wanted == "1" and find_nvcc() is None:
        remedy = "install the CUDA toolkit, set CUDA_HOME, or set SLIMKERNELS_CUDA=0"
        stop(f"SLIMKERNELS_CUDA=1, but no nvcc was found; {remedy}")
    if find_nvcc() is None:
        return []
    sources = [str(path) for path in sorted(CSRC.glob("cuda/*.cu"))]
    return [Extension("slimkernels._C_cuda", sources=sources, optional=wanted == "")]


def check_nvcc_release(nvcc: str) -> None:
    """Raises if nvcc has another major version than torch's CUDA: its runtime might need a later driver."""
    said = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=False).stdout
    release = re.search(r"release ((\d+)\.\d+)", said)
    if release is None or release[2] != torch_version["cuda"].split(".")[0]:
        found = f"of CUDA {release[1]}" if release else "of no known version"
        wanted = f"torch needs CUDA {torch_version['cuda']}"
        raise CompileError(f"{nvcc} is {found}, but {wanted}; set CUDA_HOME. {WITHOUT_CUDA}")


def nvcc_architectures() -> list[str]:
    """Returns the options of nvcc for the requested compute capabilities."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_CAPABILITIES
    options = []
    for number, suffix, ptx in re.findall(r"(\d+\.\d)([af]?)(\+PTX)?", listed):
        if float(number) >= 8:
            architecture = number.replace(".", "") + suffix
            for code in ("sm", "compute") if ptx else ("sm",):
                options.append(f"-gencode=arch=compute_{architecture},code={code}_{architecture}")
    if not options:
        expected = f"compute capabilities from 8.0 on, such as {CUDA_CAPABILITIES}"
        raise CompileError(f"TORCH_CUDA_ARCH_LIST must name {expected}; got {listed}")
    return options


class BuildNative(build_ext):
    """Build step that compiles csrc/cpu/isa.cpp once per instruction set, and the CUDA library with nvcc."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_C_cuda"):
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def copy_extensions_to_source(self) -> None:
        CUDA_LIBRARY.unlink(missing_ok=True)  # a library that is not rebuilt would be out of date
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        if ext.name.endswith("_C_cuda"):
            self.build_with_nvcc(ext)
        else:
            self.build_per_isa(ext)

    def build_with_nvcc(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        if ext.optional:
            check_nvcc_release(nvcc)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        compiler = os.environ["CXX"].split()
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "-shared",
            "--threads=0",
            *(["-ccbin", *compiler] if len(compiler) == 1 else []),
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
            *nvcc_architectures(),
            "-DUSE_CUDA",
            f"-D{'='.join(stable_abi)}",
            f"-isystem={torch_root / 'include'}",
            *ext.sources,
            f"-L{torch_root / 'lib'}",
            # libtorch_cuda.so is reached through libtorch.so, because a torch without CUDA does not have it.
            "-Xlinker=--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            "-o",
            str(library),
        ]
        if subprocess.run(command, check=False).returncode != 0:
            raise CompileError(f"{nvcc} failed, see above. {WITHOUT_CUDA}")

    def build_per_isa(self, ext: Extension) -> None:
        self.compiler.set_executable("compiler_so_cxx", [*os.environ["CXX"].split(), "-fPIC"])
        self.compiler.set_executable("compiler_so", [*os.environ["CXX"].split(), "-fPIC"])
        self.compiler.set_executable("linker_so", [*os.environ["CXX"].split(), "-shared"])
        self.compiler.set_executable("linker_so_cxx", [*os.environ["CXX"].split(), "-shared"])
        on_x86 = platform.machine().lower() in ("x86_64", "amd64")
        if on_x86:
            ext.define_macros.append(("SK_X86", "1"))
        ext.extra_objects = [
            self.compiler.compile(
                [str(CSRC / "cpu/isa.cpp")],
                output_dir=str(Path(self.build_temp) / isa),
                extra_postargs=[*ext.extra_compile_args, *QUIET, *as_spelled(flags)],
                macros=[("SK_ISA", isa)],
                depends=ext.depends,
            )[0]
            for isa, flags in (X86_ISAS if on_x86 else {"baseline": []}).items()
        ]
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "slimkernels._C",
            sources=[str(CSRC / name) for name in ("module.cpp", "ops.cpp", "store/codec.cpp", "cpu/dispatch.cpp")],
            depends=[str(path) for path in sorted(CSRC.rglob("*.[hi]*"))],
            # pybind11 precedes torch, because the copy in some releases of torch rejects the stable ABI.
            include_dirs=[str(CSRC), pybind11.get_include(), str(torch_root / "include")],
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[stable_abi, ("SK_TORCH_VERSION", version)],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
            language="c++",
        ),
        *cuda_extensions(),
    ],
    cmdclass={"build_ext": BuildNative},
)
