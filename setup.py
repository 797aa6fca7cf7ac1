"""Builds `slimkernels._C` on libtorch's stable ABI, with the CPU kernels compiled once per instruction set."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

MIN_TORCH = (2, 10)
CSRC = Path("csrc")
X86_ISAS = {
    "baseline": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx512_bf16": ["-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512vbmi2", "-mavx512bf16"],
}


def stop(message: str) -> None:
    sys.exit(f"slimkernels: {message}")


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
    if shutil.which(compiler.split()[0]) is None:
        stop(f"no C++ compiler ({compiler}) was found; install one, for example `apt-get install g++`, or set CXX")
    probe = subprocess.run(
        [*compiler.split(), "-std=c++17", "-x", "c++", "-fsyntax-only", "-"],
        input="#include <optional>\n#include <atomic>\n",
        text=True,
        capture_output=True,
        check=False,
    )
    if probe.returncode != 0:
        stop(f"{compiler} cannot compile C++17; install GCC 10, Clang 12 or later, or set CXX")
    os.environ["CXX"] = compiler


try:
    import torch
except ImportError:
    stop("torch is needed to build; run `pip install torch==2.13.0`, then install again with --no-build-isolation")
version = torch.__version__.split("+")[0]
if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
    stop(f"torch {version} is too old, 2.10 or later is needed; run `pip install 'torch>=2.10'`, then install again")

if "sdist" not in sys.argv:
    check_compiler()

import pybind11  # noqa: E402
from setuptools import Extension, setup  # noqa: E402 -- torch is checked first, for the one-sentence message
from setuptools.command.build_ext import build_ext  # noqa: E402


class BuildPerIsa(build_ext):
    """Compiles csrc/cpu/isa.cpp once per instruction set with that set's flags, and links the objects in."""

    def build_extension(self, ext: Extension) -> None:
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
                extra_postargs=[*ext.extra_compile_args, "-Wno-psabi", "-Wno-maybe-uninitialized", *flags],
                macros=[("SK_ISA", isa)],
                depends=ext.depends,
            )[0]
            for isa, flags in (X86_ISAS if on_x86 else {"baseline": []}).items()
        ]
        super().build_extension(ext)


torch_root = Path(torch.__file__).parent

setup(
    ext_modules=[
        Extension(
            "slimkernels._C",
            sources=[str(CSRC / name) for name in ("module.cpp", "ops.cpp", "store_codec.cpp", "cpu/dispatch.cpp")],
            depends=[str(path) for path in sorted(CSRC.rglob("*.[hi]*"))],
            include_dirs=[str(CSRC), str(torch_root / "include"), pybind11.get_include()],
            library_dirs=[str(torch_root / "lib")],
            libraries=["torch", "torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("SK_TORCH_VERSION", version)],
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildPerIsa},
)
