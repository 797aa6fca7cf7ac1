"""Includes of the kernels, and the modules that an import loads, tried in fresh processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "slimkernels"


# A kernel source is compiled once per instruction set: what a header defines inline would be shared by all of them, and
# a process without AVX-512 could end up in code that was compiled for it.
KERNEL_SOURCES = sorted([*ROOT.glob("csrc/cpu/*.inl"), *ROOT.glob("csrc/cpu/*.h")])
FORBIDDEN_IN_KERNELS = re.compile(
    r'#include\s*[<"](?!(?:stdint|stdlib|string|math|stddef|float|limits|immintrin|arm_neon)\.h>'
    rf'|(?:{"|".join(re.escape(path.name) for path in KERNEL_SOURCES)})")'
    r"|\bstd::|\bprintf\b|\babort\b|\bassert\s*\("
)


def kernel_violations(source: str) -> list[str]:
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    return [match.group(0) for match in FORBIDDEN_IN_KERNELS.finditer(code)]


def test_kernel_sources_include_c_headers_only():
    assert len(KERNEL_SOURCES) >= 4
    assert {str(path): found for path in KERNEL_SOURCES if (found := kernel_violations(path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "#include <torch/csrc/stable/library.h>",
        "#include <Python.h>",
        '#include "store_codec.h"',
        "#include <vector>",
        "#include <algorithm>",
        "float x = std::max(a, b);",
        'printf("%f", x);',
        "abort();",
    ],
)
def test_a_forbidden_line_in_a_kernel_is_found(line):
    assert kernel_violations(f"#include <stdint.h>\n// std::max in a comment\n{line}\n") != []


def in_fresh_process(code: str) -> dict:
    """Runs ``code``, which leaves a JSON-able ``result``, in a new interpreter."""
    script = f"import json, sys\n{code}\nprint(json.dumps(result))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


IMPORT_COST = """
import time
begin = time.perf_counter()
import torch
between = time.perf_counter()
before = set(sys.modules)
import slimkernels
end = time.perf_counter()
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
result = {"new": new, "torch": between - begin, "ours": end - between, "cuda": torch.cuda.is_initialized()}
"""


def test_import_is_light():
    result = in_fresh_process(IMPORT_COST)
    assert [name for name in result["new"] if name not in sys.stdlib_module_names] == [PACKAGE]
    assert not result["cuda"]
    assert result["ours"] < result["torch"] / 10


def test_import_brings_no_room_above_the_ops():
    modules = in_fresh_process("import slimkernels\nresult = sorted(m for m in sys.modules if 'slimkernels.' in m)")
    rooms = {name.split(".")[1] for name in modules}
    assert rooms <= {"_C", "_checks", "_library", "ops", "packed_logits", "sparse_logits"}


def test_import_of_the_oracle_brings_no_ops_of_its_own():
    # The package's __init__ imports the ops; the oracle must not lean on them.
    code = """
import importlib.util, types
package = types.ModuleType("slimkernels")
package.__path__ = ["slimkernels"]
sys.modules["slimkernels"] = package
import slimkernels.reference, slimkernels.reference_sampling
result = sorted(m for m in sys.modules if m.startswith("slimkernels."))
"""
    names = ("reference", "reference_sampling", "sparse_logits")
    assert in_fresh_process(code) == [f"slimkernels.{name}" for name in names]


def test_lazy_names_are_found_and_others_are_not():
    code = """
import slimkernels
lazy = [name for name in slimkernels.__all__ if name not in vars(slimkernels)]
store = slimkernels.Store
try:
    slimkernels.no_such_name
    error = ""
except AttributeError as raised:
    error = str(raised)
names = sorted(set(slimkernels.__all__) - set(dir(slimkernels)))
finder = slimkernels.PathFinder
heavy = "transformers" in sys.modules
found = {"store": store.__module__, "finder": finder.__module__}
result = {"lazy": lazy, "error": error, "hidden": names, "heavy": heavy} | found
"""
    result = in_fresh_process(code)
    assert "Store" in result["lazy"]
    assert "SlimTrainer" in result["lazy"]
    assert result["finder"] == "slimkernels.search.pathfinder"
    assert result["store"].startswith("slimkernels.store")
    assert "no_such_name" in result["error"]
    assert result["hidden"] == []
    assert not result["heavy"]
