"""``slimkernels doctor``: what works in this environment, what does not, and the command that mends it."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import os
import platform
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from slimkernels.cli.errors import EXIT_FAILED
from slimkernels.cli.options import add_command
from slimkernels.cli.terminal import print_json

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

# Every environment variable of this package that changes what it does, and its meaning.
VARIABLES = {
    "SLIMKERNELS_CACHE": "folder of converted GGUF files",
    "SLIMKERNELS_CPU_ISA": "instruction set of the CPU kernels",
    "SLIMKERNELS_CUDA": "1 or 0: build the CUDA C++ kernels or leave them out (read by setup.py)",
    "SLIMKERNELS_CUDA_KERNELS": "triton: leave CUDA tensors to Triton where CUDA C++ kernels are built",
    "SLIMKERNELS_LOCKS": "0: take no locks, on file systems that have none",
}
_EXPLAINED = f"""\
examples:
  slimkernels doctor
  slimkernels doctor --json
Nothing is installed or changed, and no network is needed. The exit code is 1 if something does not work that the
kernels need, else 0; an optional part that is missing is not a fault. Attach the output to a report of a problem.
environment variables:
{chr(10).join(f"  {name:<24}  {meaning}" for name, meaning in VARIABLES.items())}
"""
_PACKAGE = "slimkernels"
_LABEL_WIDTH = 21


def add_parser(commands: Any) -> None:
    """Adds the command ``doctor``."""
    summary = "tell what works in this environment, and how to mend the rest"
    parser = add_command(commands, "doctor", run, summary, _EXPLAINED)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the sections one by one and then the problems; returns 1 if there are any, else 0."""
    problems: list[str] = []
    report: dict[str, Any] = {}
    for title, examine in _SECTIONS.items():
        report[title] = examine(problems)
        if not args.json:
            # Flushed, so that the sections before it remain if a library crashes while it is examined.
            print("" if title == "versions" else "\n", title.replace("_", " "), sep="")
            _print_rows(report[title] or {"packages": "not examined"})
    if args.json:
        print_json(report | {"problems": problems})
    else:
        print("\nno problems" if not problems else "\nproblems")
        for problem in problems:
            print(textwrap.fill(problem, _width(), initial_indent="- ", subsequent_indent="  ", **_WHOLE_WORDS))
    return EXIT_FAILED if problems else 0


def _versions(problems: list[str]) -> dict[str, Any]:
    package = importlib.import_module(_PACKAGE)
    torch = _loaded("torch")
    found = {
        "slimkernels": package.__version__,
        "folder": str(Path(str(package.__file__)).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__ if isinstance(torch, ModuleType) else torch,
    }
    return found | ({"torch_is_built_for": _platform_of(torch)} if isinstance(torch, ModuleType) else {})


def _needed(problems: list[str]) -> dict[str, str]:
    """Returns the version of every package that slimkernels cannot do without, or what is wrong with it."""
    found = {}
    with _own_metadata(problems):
        for requirement in _requirements(""):
            name, (state, fits) = requirement.name, _state(requirement)
            options = ""
            if fits and not isinstance(module := _loaded(name), ModuleType):
                state, fits, options = f"{state} is {module}", False, "--force-reinstall --no-deps "
            found[name] = state
            if not fits:
                verb = "is " if state == "missing" else ""
                problems.append(f"{name} {verb}{state}: pip install {options}'{name}{requirement.specifier}'")
    return found


def _cpu(problems: list[str]) -> dict[str, Any]:
    """Returns the state of the extension, its instruction sets, and whether a kernel agrees with plain torch."""
    if not isinstance(error := _loaded("torch"), ModuleType):
        remedy = "install torch, then slimkernels again if its extension does not load"
        problems.append(f"the kernels cannot be examined, because torch is {error}: {remedy}")
        return {"extension": "not examined"}
    from slimkernels._checks import missing_extension

    try:
        extension = importlib.import_module(f"{_PACKAGE}._C")
    except ImportError as error:
        problems.append(missing_extension(error))
        return {"extension": f"fails: {error}", "cpu_tensors": "no kernels"}
    found: dict[str, Any] = {"extension": "loads", **{f"built_with_{k}": v for k, v in extension.build_info().items()}}
    found["instruction_sets"] = extension.supported_cpu_isas()
    try:
        found["cpu_tensors"] = f"C++ ({extension.cpu_isa()})"
    except ValueError as error:
        problems.append(_one_line(error))
        return found | {"cpu_tensors": "no kernels"}
    found["check"] = _check_kernels()
    if found["check"] != "works":
        problems.append(f"topk_logits on the CPU {found['check']}; install slimkernels again to rebuild its extension")
    return found


def _check_kernels() -> str:
    """Compares ``topk_logits`` with plain torch on a small random row."""
    import torch

    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    values, ids = logits.topk(8)
    try:
        found = importlib.import_module(_PACKAGE).topk_logits(logits, top_k=8)
    except Exception as error:  # whatever it is, the report goes on
        return f"fails: {type(error).__name__}: {_one_line(error)}"
    if found.ids.tolist() != ids.sort().values.tolist():
        return f"fails: it keeps the ids {found.ids.tolist()}, torch.topk keeps {ids.sort().values.tolist()}"
    if found.logits.sort(descending=True).values.tolist() != values.tolist():
        return f"fails: it keeps {found.logits.tolist()}, torch.topk keeps {values.tolist()}"
    expected = logits.double().logsumexp(-1).item()
    if not abs(found.lse.item() - expected) < 1e-5:
        return f"fails: its log-sum-exp is {found.lse.item()}, that of torch is {expected}"
    return "works"


def _gpu(problems: list[str]) -> dict[str, Any]:
    """Returns the state of Triton, of its compiler and of the library of CUDA C++ kernels, and what serves devices."""
    torch = _loaded("torch")
    if not isinstance(torch, ModuleType):
        return {"cuda_tensors": "not examined"}
    triton = _loaded("triton")
    has_triton = isinstance(triton, ModuleType)
    found: dict[str, Any] = {
        "triton": triton.__version__ if has_triton else triton,
        "c_compiler": _c_compiler() or "missing",
        "cuda_library": _cuda_library(torch, problems),
        "devices": _devices(torch, problems),
    }
    if torch.version.cuda is None and torch.version.hip is None:
        return found | {"cuda_tensors": "none, as this torch is built for CPUs"}
    if found["devices"] and not has_triton:
        problems.append(f"CUDA tensors need triton, which is {triton}: pip install --force-reinstall triton")
    if found["devices"] and has_triton and _c_compiler() is None:
        remedy = "apt-get install gcc, or set CC to the path of one"
        problems.append(f"Triton compiles the launchers of its kernels with a C compiler, and there is none: {remedy}")
    return found | {"cuda_tensors": _cuda_kernels(has_triton, str(triton))}


def _c_compiler() -> str | None:
    """Returns the path of the C compiler that Triton calls, None if it finds none."""
    wanted = os.environ.get("CC")
    return shutil.which(wanted) if wanted else shutil.which("gcc") or shutil.which("clang")


def _cuda_kernels(has_triton: bool, triton: str) -> str:
    """Returns what serves CUDA tensors, from what the operators were registered with."""
    kernels = {}
    if isinstance(_loaded(f"{_PACKAGE}.ops"), ModuleType):
        kernels = importlib.import_module(f"{_PACKAGE}.ops._library").cuda_kernels
    compiled = ", ".join(name.removesuffix("_rows") for name, kernel in kernels.items() if kernel != "Triton")
    others = "Triton kernels" if has_triton else f"no kernels, as triton is {triton}"
    return f"CUDA C++: {compiled}; all others: {others}" if compiled else others


def _cuda_library(torch: ModuleType, problems: list[str]) -> str:
    path = Path(__file__).parents[1] / "_C_cuda.so"
    if not path.exists():
        return "not built"
    if torch.version.cuda is None:
        return "built, but not loaded, as this torch has no CUDA"
    if os.environ.get("SLIMKERNELS_CUDA_KERNELS"):
        return "built, but not loaded, as SLIMKERNELS_CUDA_KERNELS asks for Triton"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a library that does not load: raised as an error below
            importlib.import_module(f"{_PACKAGE}.ops")
        torch.ops.load_library(str(path))  # does nothing if it is loaded
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(f"{path} does not load ({_one_line(error)}); install slimkernels again to rebuild it")
        return f"fails: {_one_line(error)}"
    return "loads"


def _devices(torch: ModuleType, problems: list[str]) -> list[str]:
    """Returns the name and the compute capability of every device."""
    try:
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # a driver that is too old, or a device that another process holds
        problems.append(f"torch cannot use its CUDA devices ({_one_line(error)}): check the driver with nvidia-smi")
        return []
    return [f"{device.name} (compute capability {device.major}.{device.minor})" for device in found]


def _optional(problems: list[str]) -> dict[str, dict[str, Any]]:
    """Returns for every extra the packages that it asks for, and the command that installs what lacks, or None.

    An extra that excludes a complete one has no such command, since that would break the other.
    """
    found = {}
    with _own_metadata([]):  # reported once, by _needed
        extras = metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
        complete = [extra for extra in extras if _is_complete(extra)]
        for extra in extras:
            states = {_label(requirement): _state(requirement)[0] for requirement in _requirements(extra)}
            excluding = next((other for other in complete if _exclude_each_other(extra, other)), None)
            command = f"pip install '{_PACKAGE}[{extra}]'" if extra not in complete and excluding is None else None
            found[extra] = {"packages": states, "install": command, "excluded_by": excluding}
    return found


def _variables(problems: list[str]) -> dict[str, str | None]:
    """Returns the values of the environment variables, None for those that are not set."""
    found = {name: os.environ.get(name) for name in VARIABLES}
    unknown = sorted(name for name in os.environ if name.startswith("SLIMKERNELS_") and name not in VARIABLES)
    return found | {name: f"{os.environ[name]} (unknown to this version: no effect)" for name in unknown}


_SECTIONS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "versions": _versions,
    "needed_packages": _needed,
    "cpu_kernels": _cpu,
    "gpu_kernels": _gpu,
    "optional_parts": _optional,
    "environment_variables": _variables,
}


@functools.cache
def _loaded(name: str) -> ModuleType | str:
    """Imports a package of that name; returns the sentence that says why it fails instead."""
    module = name.replace("-", "_")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "missing" if error.name == module else f"broken ({_one_line(error)})"
    except Exception as error:  # a library that does not load raises OSError, an unfit version anything
        return f"broken ({type(error).__name__}: {_one_line(error)})"


def _platform_of(torch: ModuleType) -> str:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return "CPUs" if torch.version.hip is None else f"ROCm {torch.version.hip}"


@contextlib.contextmanager
def _own_metadata(problems: list[str]) -> Iterator[None]:
    """Ends the reading of requirements, with a problem, where there is none or nothing that understands it."""
    try:
        yield
    except metadata.PackageNotFoundError:
        problems.append(
            f"{_PACKAGE} is imported from a folder in which it is not installed, so what it requires is not known: "
            "run `pip install --no-build-isolation .` in its source tree"
        )
    except ModuleNotFoundError as error:
        problems.append(f"{error.name} is missing, by which versions are compared: pip install {error.name}")


def _requirements(extra: str) -> list[Requirement]:
    """Returns what an extra asks for beyond the package itself, or what the package needs ("") on this machine."""
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in metadata.requires(_PACKAGE) or []]
    always = [item for item in listed if item.marker is None or item.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [item for item in listed if item.marker and item not in always and item.marker.evaluate({"extra": extra})]


def _label(requirement: Requirement) -> str:
    """Returns the name of a package, and of another part of this one the name by which it is installed."""
    extras = ",".join(sorted(requirement.extras))
    return f"{_PACKAGE}[{extras}]" if requirement.name == _PACKAGE else requirement.name


def _is_complete(extra: str) -> bool:
    return all(_state(requirement)[1] for requirement in _requirements(extra))


def _exclude_each_other(extra: str, other: str) -> bool:
    """Returns whether two extras ask for releases of one package that cannot be the same."""
    return any(
        not _has_release(ours.specifier & theirs.specifier)
        for ours in _all_requirements(extra)
        for theirs in _all_requirements(other)
        if ours.name == theirs.name
    )


def _all_requirements(extra: str) -> Iterator[Requirement]:
    """Yields what an extra asks for, and in place of other extras of this package what these ask for."""
    for requirement in _requirements(extra):
        if requirement.name == _PACKAGE:
            for part in requirement.extras:
                yield from _all_requirements(part)
        else:
            yield requirement


def _has_release(specifier: SpecifierSet) -> bool:
    """Returns whether some version fits: the lowest, each bound, and the next release after each are tried."""
    from packaging.version import Version

    bounds = [Version(one.version.removesuffix(".*")) for one in specifier]
    next_releases = [f"{bound.base_version}.0.1" for bound in bounds]
    return any(specifier.contains(version, prereleases=True) for version in ["0", *map(str, bounds), *next_releases])


def _state(requirement: Requirement) -> tuple[str, bool]:
    """Returns the installed version of a package and whether it fits, with what is wrong otherwise."""
    if requirement.name == _PACKAGE:
        fits = all(_is_complete(extra) for extra in requirement.extras)
        return ("complete" if fits else "incomplete"), fits
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "missing", False
    if version is None:
        return "missing, but its metadata is left over", False
    unmet = [one for one in requirement.specifier if not one.contains(version, prereleases=True)]
    if not unmet:
        return version, True
    word = "too old" if unmet[0].operator in (">", ">=", "~=") else "too new"
    return f"{version} is {word} (needs {requirement.specifier})", False


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# A version, a command or a path is found by searching only if it is not broken at its hyphens.
_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _width() -> int:
    return shutil.get_terminal_size().columns


def _print_rows(rows: dict[str, Any]) -> None:
    labels = [name if name.isupper() else name.replace("_", " ") for name in rows]
    width = max(_LABEL_WIDTH, *map(len, labels))
    for label, value in zip(labels, rows.values(), strict=True):
        lines = [_text(value)]
        if isinstance(value, dict):
            lines = [_text([f"{package} {state}" for package, state in value["packages"].items()])]
            lines += [] if value["install"] is None else [f"install with: {value['install']}"]
            other = value["excluded_by"]
            lines += [] if other is None else [f"needs an environment without {_PACKAGE}[{other}], which excludes it"]
        for number, line in enumerate(lines):
            first = f"  {label if number == 0 else '':<{width}} "
            indent = " " * (width + 3)
            print(
                textwrap.fill(line, _width(), initial_indent=first, subsequent_indent=indent, **_WHOLE_WORDS),
                flush=True,
            )


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value) or "empty"
