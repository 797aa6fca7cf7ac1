"""Writes the ops alone as a kernel of the Hugging Face Hub, from ``slimkernels/`` and ``csrc/``, and builds it here.

``make kernels`` runs it. The folder that it writes has the layout of kernel-builder (``build.toml``, ``torch-ext/``,
``csrc/``), with which a kernel is built for the Hub, and under ``build/`` the variants for this machine, which
``kernels.get_local_kernel(folder)`` loads: the CPU kernels, compiled with g++ or CXX, and the Triton kernels for CUDA
and ROCm, which need no compiler. The package imports torch, triton and nothing else; its modules import each other by
relative names, and its operators are in a namespace of their own, so that a process can load several builds.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
ROOT = HERE.parent
PACKAGE = "slimkernels"
# Modules that the ops import and a file that they read. The build information is that of another extension.
PARTS = ("_checks.py", "data/launch_settings.json", "mixture", "ops", "packed_logits.py", "sparse_logits.py")
LEFT_OUT = ("ops/build_info.py", "ops/README.md")
HEADERS = "  # generate.py lists the headers here.\n"
OPERATORS = re.compile(rf"\btorch\.ops\.{PACKAGE}\b")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/kernels", help="folder to write (default: %(default)s)"
    )
    parser.add_argument(
        "--id", help="name of this build in the operators' namespace (default: a digest of the sources)"
    )
    parser.add_argument("--sources", action="store_true", help="write the sources and build nothing")
    args = parser.parse_args()
    if args.id is not None and not re.fullmatch(r"[a-z0-9]+", args.id):
        parser.error(f"--id must consist of lower-case letters and digits, got {args.id!r}")
    generate(args.out)
    if args.sources:
        return
    identifier = args.id or digest(args.out)
    for backend in build_config(args.out)["general"]["backends"]:
        if backend != "cpu":
            print(build_triton(args.out, backend, identifier))
        elif platform.machine() == "x86_64":
            print(build_cpu(args.out, identifier))
        else:
            print(f"no variant for CPUs: its kernels are compiled for x86-64 only, this is {platform.machine()}")


def generate(out: Path) -> None:
    """Writes the sources into a folder that is empty or not there yet.

    Raises:
        FileExistsError: There are files in the folder.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out must be an empty folder or none, but there are files in {out}: delete it")
    package = out / "torch-ext" / PACKAGE
    for path in package_files():
        text = (ROOT / PACKAGE / path).read_text()
        write(package / path, relative(text, path) if path.suffix == ".py" else text)
    write(package / "__init__.py", public_names())
    for path in sorted(file for file in (HERE / "torch-ext").rglob("*.*") if file.suffix in (".py", ".cpp")):
        write(out / path.relative_to(HERE), path.read_text())
    shutil.copy(HERE / "CARD.md", out)
    text = (HERE / "build.toml").read_text()
    headers = write_csrc(out, tomllib.loads(text))
    write(out / "build.toml", text.replace(HEADERS, "".join(f'  "{path}",\n' for path in headers)))


def package_files() -> list[Path]:
    """Returns the files that the package takes from ``slimkernels``, relative to it."""
    folder = ROOT / PACKAGE
    found = [file for part in PARTS for file in ([folder / part] if "." in part else (folder / part).rglob("*.py"))]
    files = sorted(file.relative_to(folder) for file in found)
    return [file for file in files if file.as_posix() not in LEFT_OUT]


def relative(text: str, path: Path) -> str:
    """Returns a module's text with relative imports, and with the operators of this build.

    Args:
        text: Text of the module.
        path: Path of the module in the package.

    Raises:
        ValueError: The module imports the package in a way that has no relative form.
    """
    dots = "." * len(path.parts)
    lines = text.splitlines(keepends=True)
    first = None
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(name.name.partition(".")[0] == PACKAGE for name in node.names):
            raise ValueError(f"{path}:{node.lineno}: write `from {PACKAGE} import ...`, which has a relative form")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            number = node.lineno - 1
            old, new = f"from {node.module} import", f"from {dots}{node.module.partition('.')[2]} import"
            lines[number] = lines[number].replace(old, new)
            first = number if first is None or (node.col_offset == 0 and number < first) else first
    if OPERATORS.search(text):
        lines = [OPERATORS.sub("_operators", line) for line in lines]
        if first is None:
            raise ValueError(f"{path} uses the operators and imports nothing of the package")
        lines.insert(first, f"from {dots}_ops import ops as _operators\n")
    # Modules of launchers, which ops._library imports by name.
    return "".join(lines).replace(f'"{PACKAGE}.ops.triton.', '".triton.')


def public_names() -> str:
    """Returns the text of the package's ``__init__.py``: those public names of ``slimkernels`` that its files have."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    [table] = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_MODULES"]
    files = package_files()
    names = {
        name: module
        for name, module in ast.literal_eval(table).items()
        if Path(f"{module.replace('.', '/')}.py") in files
    }
    imports = "".join(f"from .{module} import {name}\n" for name, module in names.items())
    listed = "".join(f'    "{name}",\n' for name in names)
    return (
        '"""Kernels for learning from and searching with large-vocabulary logits: the ops of slimkernels."""\n\n'
        f"from . import ops  # registers the operators\n{imports}\n__all__ = [\n{listed}]\n"
    )


def write_csrc(out: Path, config: dict[str, Any]) -> list[str]:
    """Writes the C++ sources of ``build.toml`` and the headers that they include; returns the headers' paths."""
    pending = []
    for name, kernel in config["kernel"].items():
        for source in kernel["src"]:
            if source == f"csrc/cpu/isa_{name}.cpp":
                text = (ROOT / "csrc/cpu/isa.cpp").read_text()
                write(out / source, f"#define SK_ISA {name}\n{text}")
                pending.append(Path("csrc/cpu/isa.cpp"))
            else:
                write(out / source, (ROOT / source).read_text())
                pending.append(Path(source))
    headers: set[str] = set()
    while pending:
        path = pending.pop()
        for included in re.findall(r'^#include "(.+)"$', (ROOT / path).read_text(), re.M):
            header = Path(os.path.normpath(path.parent / included))
            if header.as_posix() not in headers:
                headers.add(header.as_posix())
                pending.append(header)
                write(out / header, (ROOT / header).read_text())
    return sorted(headers)


def build_config(out: Path) -> dict[str, Any]:
    """Returns the content of ``build.toml``."""
    return tomllib.loads((out / "build.toml").read_text())


def digest(out: Path) -> str:
    """Returns ten digits that differ if a source differs."""
    sources = sorted(file for part in ("torch-ext", "csrc") for file in (out / part).rglob("*.*") if file.is_file())
    text = "".join(f"{file.relative_to(out)}\n{file.read_text()}" for file in [*sources, out / "build.toml"])
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def build_triton(out: Path, backend: str, identifier: str) -> Path:
    """Builds the variant for a backend without compiled kernels; returns its folder."""
    return write_variant(out, f"torch-{backend}", backend, identifier)


def build_cpu(out: Path, identifier: str) -> Path:
    """Compiles the variant for CPUs with g++ or CXX, as ``build.toml`` says; returns its folder."""
    import torch

    config = build_config(out)
    torch_root = Path(torch.__file__).parent
    name = f"_{PACKAGE}_cpu_{identifier}"
    abi = config["torch"]["stable-abi"]
    major, minor = (int(part) for part in abi.split("."))
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    options = ["-std=c++17", "-O3", "-fPIC", f"-DTORCH_EXTENSION_NAME={name}", "-DPy_LIMITED_API=0x030A0000"]
    options += [f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}ULL", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    options += [f"-isystem{torch_root / 'include'}", f"-isystem{sysconfig.get_path('include')}"]
    objects, commands = [], []
    for part in [config["torch"], *config["kernel"].values()]:
        for source in part["src"]:
            if source.endswith(".cpp"):
                objects.append(out / "build/objects" / f"{Path(source).stem}.o")
                commands.append(
                    [*compiler, *options, *part.get("cxx-flags", []), "-c", str(out / source), "-o", str(objects[-1])]
                )
    objects[0].parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    variant = write_variant(out, f"torch-stable-abi{major}{minor}-cpu-x86_64-linux", "cpu", identifier)
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    library = variant / f"{name}.abi3.so"
    subprocess.run([*compiler, "-shared", *map(str, objects), *libraries, "-o", str(library)], check=True)
    shutil.rmtree(out / "build/objects")
    return variant


def write_variant(out: Path, variant: str, backend: str, identifier: str) -> Path:
    """Writes the Python part and the metadata of a variant; returns its folder."""
    general = build_config(out)["general"]
    folder = out / "build" / variant
    shutil.copytree(out / "torch-ext" / PACKAGE, folder)
    name = f"_{PACKAGE}_{backend}_{identifier}"
    write(folder / "_ops.py", OPS_MODULE.format(name=name, extension=f"from . import {name}\n" * (backend == "cpu")))
    metadata = {
        "name": general["name"],
        "id": name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
    }
    write(folder / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    return folder


# The module that kernel-builder makes for every build.
OPS_MODULE = '''\
"""The operators of this build, in a namespace of their own."""

import torch

{extension}
ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    """Returns the name of an operator with its namespace."""
    return f"{name}::{{op_name}}"
'''


def write(path: Path, text: str) -> None:
    """Writes a file and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if __name__ == "__main__":
    main()
