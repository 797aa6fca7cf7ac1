"""``slimkernels doctor``: this environment, faulty ones in fresh processes, and what it tells about each."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

import slimkernels
from slimkernels.cli import doctor, main

ROOT = Path(__file__).parents[1]
# An editable installation would find the extension of the source tree for a package without one.
WITHOUT_EDITABLE = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
runpy.run_module("slimkernels", run_name="__main__", alter_sys=True)
"""


def examine(capsys) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    return code, json.loads(capsys.readouterr().out)


def doctor_in(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """Runs the command with the modules of ``folder`` before those that are installed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLIMKERNELS_")}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EDITABLE, "doctor", "--json"],
        env=inherited | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return done, json.loads(done.stdout)


def write_metadata(folder: Path, *lines: str) -> None:
    """Writes what pip would record for an installed package, which is found before the real record."""
    info = folder / "slimkernels-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: slimkernels\nVersion: 0.1.0\n" + "\n".join(lines))


def words(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_this_environment_is_described(capsys):
    code, report = examine(capsys)
    assert (code, report["problems"]) == (0, [])
    versions = report["versions"]
    assert versions["slimkernels"] == slimkernels.__version__
    assert versions["folder"] == str(ROOT / "slimkernels")
    assert (versions["torch"], versions["python"]) == (torch.__version__, platform.python_version())
    assert report["needed_packages"]["numpy"] == metadata.version("numpy")
    extension = slimkernels._C
    assert report["cpu_kernels"]["cpu_tensors"] == f"C++ ({extension.cpu_isa()})"
    assert report["cpu_kernels"]["instruction_sets"] == extension.supported_cpu_isas()
    assert report["cpu_kernels"]["built_with_torch"] == extension.build_info()["torch"]
    assert report["cpu_kernels"]["check"] == "works"
    assert list(report["optional_parts"]) == metadata.metadata("slimkernels").get_all("Provides-Extra")
    assert len(report["gpu_kernels"]["devices"]) == torch.cuda.device_count()


def test_text_has_every_section_and_fact(capsys):
    code, report = examine(capsys)
    assert main(["doctor"]) == code
    printed = words(capsys)
    for title, rows in report.items():
        assert title.replace("_", " ") in printed
        for name in rows:
            assert name.replace("_", " ") in printed or name.isupper()
    assert f"train transformers {metadata.version('transformers')}, accelerate " in printed
    assert printed.endswith("no problems")


def test_values_of_variables_stand_in_one_column(capsys):
    rows = {"SLIMKERNELS_CACHE": "", "SLIMKERNELS_CUDA_KERNELS": "triton", "SLIMKERNELS_LOCKS": None}
    doctor._print_rows(rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["SLIMKERNELS_CACHE", "empty"],
        ["SLIMKERNELS_CUDA_KERNELS", "triton"],
        ["SLIMKERNELS_LOCKS", "not set"],
    ]
    assert {line.index(value) for line, value in zip(lines, ("empty", "triton", "not set"), strict=True)} == {27}


def test_package_without_its_extension(tmp_path):
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "slimkernels", tmp_path / "slimkernels", ignore=ignored)
    done, report = doctor_in(tmp_path)
    assert done.returncode == 1
    assert report["versions"]["folder"] == str(tmp_path / "slimkernels")
    assert report["cpu_kernels"]["extension"].startswith("fails: ")
    assert report["cpu_kernels"]["cpu_tensors"] == "no kernels"
    [problem] = report["problems"]
    assert problem.startswith("the native extension slimkernels._C is not built for this Python and torch (")
    assert "pip install --no-build-isolation ." in problem
    assert report["optional_parts"]["train"]["install"] is None


@pytest.mark.parametrize(
    ("package", "source", "state", "remedy"),
    [
        ("numpy", "raise ModuleNotFoundError(name='numpy')", "is missing", "--force-reinstall --no-deps 'numpy>=1.26'"),
        ("numpy", "raise ImportError('no BLAS')", "is broken (ImportError: no BLAS)", "--no-deps 'numpy>=1.26'"),
        (
            "torch",
            "raise OSError('libtorch.so: bad ELF')",
            "is broken (OSError: libtorch.so: bad ELF)",
            "'torch>=2.10'",
        ),
    ],
)
def test_broken_package(tmp_path, package, source, state, remedy):
    (tmp_path / f"{package}.py").write_text(source)
    if package != "torch":  # which is slow to load, and is not needed to find the fault
        (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    done, report = doctor_in(tmp_path)
    assert done.returncode == 1
    assert report["needed_packages"][package].endswith(state)
    [problem] = [problem for problem in report["problems"] if problem.startswith(package)]
    assert state in problem
    assert problem.endswith(remedy)
    assert report["cpu_kernels"]["extension"] == "not examined"
    assert report["optional_parts"]["train"]["packages"]["rich"] == metadata.version("rich")


def test_parts_that_lack_something(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    extras = ["one", "two", "whole"]
    write_metadata(
        tmp_path,
        *(f"Provides-Extra: {extra}" for extra in extras),
        'Requires-Dist: no-such-package>=1; extra == "one"',
        'Requires-Dist: numpy>=99; extra == "one"',
        'Requires-Dist: numpy<1; extra == "two"',
        'Requires-Dist: slimkernels[one]; extra == "two"',
        'Requires-Dist: numpy>=1; extra == "whole"',
        'Requires-Dist: other>=1; extra == "whole" and platform_system == "Plan 9"',
        "Requires-Dist: pytest>=999",
    )
    done, report = doctor_in(tmp_path)
    numpy = metadata.version("numpy")
    assert report["optional_parts"] == {
        "one": {
            "packages": {"no-such-package": "missing", "numpy": f"{numpy} is too old (needs >=99)"},
            "install": "pip install 'slimkernels[one]'",
            "excluded_by": None,
        },
        "two": {
            "packages": {"numpy": f"{numpy} is too new (needs <1)", "slimkernels[one]": "incomplete"},
            "install": None,
            "excluded_by": "whole",
        },
        "whole": {"packages": {"numpy": numpy}, "install": None, "excluded_by": None},
    }
    assert report["needed_packages"] == {"pytest": f"{metadata.version('pytest')} is too old (needs >=999)"}
    assert (
        f"pytest {metadata.version('pytest')} is too old (needs >=999): pip install 'pytest>=999'" in report["problems"]
    )
    assert done.returncode == 1


def test_a_missing_optional_part_is_no_fault(tmp_path, monkeypatch, capsys):
    write_metadata(tmp_path, "Provides-Extra: one", 'Requires-Dist: no-such-package; extra == "one"')
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor"]) == 0
    assert "one no-such-package missing install with: pip install 'slimkernels[one]'" in words(capsys)


def test_a_part_that_a_complete_one_excludes_is_not_advised(tmp_path, monkeypatch, capsys):
    """Two parts that ask for different releases of one package, as trl and minillm do."""
    write_metadata(
        tmp_path,
        *(f"Provides-Extra: {extra}" for extra in ("new", "old", "older", "either")),
        'Requires-Dist: numpy>=1.5; extra == "new"',
        'Requires-Dist: numpy<1.5,>=1.4; extra == "old"',
        'Requires-Dist: slimkernels[old]; extra == "older"',
        'Requires-Dist: numpy!=1.5,>1.4; extra == "either"',
        'Requires-Dist: no-such-package; extra == "either"',
    )
    monkeypatch.syspath_prepend(tmp_path)
    _, report = examine(capsys)
    excluded_by = {name: part["excluded_by"] for name, part in report["optional_parts"].items()}
    assert excluded_by == {"new": None, "old": "new", "older": "new", "either": None}
    installs = {name: part["install"] for name, part in report["optional_parts"].items()}
    assert installs == {"new": None, "old": None, "older": None, "either": "pip install 'slimkernels[either]'"}
    main(["doctor"])
    assert "needs an environment without slimkernels[new], which excludes it" in words(capsys)


def test_the_releases_of_trl_that_two_parts_need_exclude_each_other():
    assert doctor._exclude_each_other("trl", "minillm")
    assert doctor._exclude_each_other("minillm", "test")
    assert not doctor._exclude_each_other("train", "test")


@pytest.mark.parametrize(
    ("specifier", "has_release"),
    [
        ("", True),
        ("<1", True),
        (">1", True),
        (">1,<=1.0.post1", False),
        ("==2.*,>=2.3", True),
        ("~=1.4,<1.5", True),
        (">=2.0rc1,<2.0rc3", True),
        ("<1.15,>=1.15", False),
        ("<1.15,>=1.14,>=1.15", False),
        ("==1.4,!=1.4", False),
        ("~=1.4,>=2", False),
    ],
)
def test_requirements_that_no_release_meets(specifier, has_release):
    assert doctor._has_release(SpecifierSet(specifier)) is has_release


def test_without_metadata_or_its_reader(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    (tmp_path / "packaging.py").write_text("raise ModuleNotFoundError(name='packaging')")
    done, report = doctor_in(tmp_path)
    assert done.returncode == 1
    assert "packaging is missing, by which versions are compared: pip install packaging" in report["problems"]
    assert report["optional_parts"] == {}


def test_an_unknown_instruction_set(tmp_path):
    done, report = doctor_in(tmp_path, SLIMKERNELS_CPU_ISA="mmx", SLIMKERNELS_CPUISA="avx2")
    assert done.returncode == 1
    [problem] = report["problems"]
    assert problem.startswith("SLIMKERNELS_CPU_ISA must be one of '")
    assert problem.endswith("got 'mmx': unset it to use the best one")
    assert report["cpu_kernels"]["cpu_tensors"] == "no kernels"
    assert report["environment_variables"]["SLIMKERNELS_CPU_ISA"] == "mmx"
    assert report["environment_variables"]["SLIMKERNELS_CPUISA"] == "avx2 (unknown to this version: no effect)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {"ids": found.ids + 1}, "fails: it keeps the ids ["),
        (lambda found: {"logits": found.logits + 1}, "fails: it keeps [["),
        (lambda found: {"lse": found.lse + 1}, "fails: its log-sum-exp is "),
        (lambda found: {"lse": found.lse * float("nan")}, "fails: its log-sum-exp is nan"),
        (lambda found: {"lse": None}, "fails: TypeError: lse must be a torch.Tensor, got NoneType"),
    ],
)
def test_kernels_that_are_wrong(monkeypatch, capsys, change, message):
    right = slimkernels.topk_logits
    monkeypatch.setattr(
        slimkernels,
        "topk_logits",
        lambda *args, **options: dataclasses.replace(found := right(*args, **options), **change(found)),
    )
    assert main(["doctor"]) == 1
    assert f"problems - topk_logits on the CPU {message}" in words(capsys)


def test_a_library_of_cuda_kernels_that_does_not_load(monkeypatch, tmp_path):
    """A torch with CUDA tries to load it; one without says that it does not."""
    folder = tmp_path / "slimkernels"
    (folder / "cli").mkdir(parents=True)
    (folder / "_C_cuda.so").write_text("not a library")
    monkeypatch.setattr(doctor, "__file__", str(folder / "cli" / "doctor.py"))
    problems: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor._cuda_library(torch, problems) == "built, but not loaded, as this torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert doctor._cuda_library(torch, problems).startswith("fails: ")
    [problem] = problems
    assert problem.endswith("; install slimkernels again to rebuild it")


def test_a_gpu_without_a_c_compiler(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(doctor, "_devices", lambda *_: ["a GPU"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CC", raising=False)
    (tmp_path / "clang").touch(mode=0o755)
    for path, compiler, count in [(tmp_path, str(tmp_path / "clang"), 0), (tmp_path / "nothing", "missing", 1)]:
        monkeypatch.setenv("PATH", str(path))
        problems: list[str] = []
        assert doctor._gpu(problems)["c_compiler"] == compiler
        assert len(problems) == count
    assert "there is none: apt-get install gcc, or set CC" in problems[0]


def test_variables_are_all_that_the_sources_read(capsys):
    sources = [ROOT / "setup.py", *ROOT.glob("slimkernels/**/*.py"), *ROOT.glob("csrc/**/*.*")]
    text = "".join(path.read_text() for path in sources if path.name != "doctor.py")
    assert set(re.findall(r'"(SLIMKERNELS_[A-Z_]+)"', text)) == set(doctor.VARIABLES)
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and meaning in shown for name, meaning in doctor.VARIABLES.items())


@pytest.mark.gpu
def test_devices_are_named(capsys):
    _, report = examine(capsys)
    major, minor = torch.cuda.get_device_capability(0)
    expected = f"{torch.cuda.get_device_name(0)} (compute capability {major}.{minor})"
    assert report["gpu_kernels"]["devices"][0] == expected
