"""Includes of the kernels, and the modules that an import loads, tried in fresh processes."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "slimkernels"


# A kernel source is compiled once per instruction set: what a header defines inline would be shared by all of them, and
# a process without AVX-512 could end up in code that was compiled for it.
SHARED_SOURCES = [ROOT / f"csrc/slim_loss/{name}.h" for name in ("args", "row_math", "terms", "sums")]
KERNEL_SOURCES = sorted([*ROOT.glob("csrc/cpu/*.inl"), *ROOT.glob("csrc/cpu/*.h"), *SHARED_SOURCES])
FORBIDDEN_IN_KERNELS = re.compile(
    r'#include\s*[<"](?!(?:stdint|stdlib|string|math|stddef|float|limits|immintrin|arm_neon)\.h>'
    rf'|(?:\.\./slim_loss/)?(?:{"|".join(re.escape(path.name) for path in KERNEL_SOURCES)})")'
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
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_import_loads_no_other_package():
    loaded = in_fresh_process(
        "before = set(sys.modules)\nimport slimkernels\nresult = sorted(set(sys.modules) - before)"
    )
    assert [name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names] == [PACKAGE]


def test_import_of_the_operators_is_light():
    code = """
import torch
before = set(sys.modules)
import slimkernels.ops
result = {"new": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized()}
"""
    result = in_fresh_process(code)
    assert {name.partition(".")[0] for name in result["new"]} - set(sys.stdlib_module_names) == {PACKAGE}
    rooms = {name.split(".")[1] for name in result["new"] if name.startswith(f"{PACKAGE}.")}
    assert rooms <= {"_C", "_checks", "mixture", "ops", "packed_logits", "sparse_logits"}
    assert not result["cuda"]


def test_first_use_of_an_operator_registers_all():
    code = """
import slimkernels
slimkernels.decode_logits
import torch
names = ("slim_loss_rows", "softmax_gradient_rows", "topk_logits_rows")
result = [hasattr(torch.ops.slimkernels, name) for name in names]
"""
    assert in_fresh_process(code) == [True, True, True]


def test_import_of_the_oracle_brings_no_ops_of_its_own():
    # An empty package stands for this one, so that nothing that __init__ might load is there for the oracle to use.
    code = """
import importlib.util, types
package = types.ModuleType("slimkernels")
package.__path__ = ["slimkernels"]
sys.modules["slimkernels"] = package
import slimkernels.reference, slimkernels.reference_sampling
result = sorted(m for m in sys.modules if m.startswith("slimkernels."))
"""
    mixture = ("mixture", "mixture.fields", "mixture.unions")
    definitions = [f"reference.{name}" for name in ("arithmetic", "divergences", "loss", "mixture", "rows")]
    names = ("_checks", *mixture, "reference", *definitions, "reference_sampling", "sparse_logits")
    assert in_fresh_process(code) == [f"slimkernels.{name}" for name in names]


def test_lazy_names_are_found_and_others_are_not():
    code = """
import slimkernels
loaded = [name for name in slimkernels.__all__ if name in vars(slimkernels)]
hidden = sorted(set(slimkernels.__all__) - set(dir(slimkernels)))
store, finder = slimkernels.Store, slimkernels.PathFinder
heavy = "transformers" in sys.modules
error = ""
try:
    slimkernels.no_such_name
except AttributeError as raised:
    error = str(raised)
result = {"loaded": loaded, "hidden": hidden, "heavy": heavy, "error": error}
result["modules"] = [store.__module__, finder.__module__]
result["kept"] = vars(slimkernels)["Store"] is store
"""
    result = in_fresh_process(code)
    assert result["loaded"] == result["hidden"] == []
    assert result["modules"] == ["slimkernels.store.reader", "slimkernels.search.pathfinder"]
    assert "no_such_name" in result["error"]
    assert result["kept"]
    assert not result["heavy"]


def test_lazy_names_are_those_that_a_type_checker_sees():
    """The imports under TYPE_CHECKING, the table of modules and ``__all__`` name the same objects."""
    import slimkernels

    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"{PACKAGE}.{module}" for name, module in slimkernels._MODULES.items()}
    assert sorted(typed) == sorted(slimkernels.__all__)
    for name in typed:
        assert getattr(slimkernels, name) is getattr(importlib.import_module(typed[name]), name)


def test_lazy_names_are_imported_by_a_star():
    code = """
from slimkernels import *
import slimkernels
result = [name for name in slimkernels.__all__ if globals().get(name) is not getattr(slimkernels, name)]
"""
    assert in_fresh_process(code) == []


def test_lazy_names_are_pickled():
    code = """
import pickle, slimkernels, subprocess
data = pickle.dumps([slimkernels.slim_loss, slimkernels.SparseLogits, slimkernels.Store])
load = "import pickle, sys; print([thing.__name__ for thing in pickle.load(sys.stdin.buffer)])"
result = subprocess.run([sys.executable, "-c", load], input=data, capture_output=True, check=True).stdout.decode()
"""
    assert in_fresh_process(code).strip() == "['slim_loss', 'SparseLogits', 'Store']"


def test_lazy_names_do_not_hide_modules():
    code = """
import slimkernels
function = slimkernels.slim_loss
import slimkernels.ops.slim_loss
result = [slimkernels.slim_loss is function, slimkernels.ops.slim_loss.slim_loss is function]
"""
    assert in_fresh_process(code) == [True, True]


def test_lazy_operator_compiles_on_first_use():
    """Its module is loaded while dynamo traces, where the operators are not defined yet."""
    code = """
import torch, slimkernels as sk
loss = torch.compile(lambda logits, target: sk.slim_loss(logits, target).loss, fullgraph=True, backend="eager")
logits, target = torch.zeros(2, 8), torch.tensor([1, 2])
result = [loss(logits, target).item() for _ in range(2)]
"""
    assert in_fresh_process(code) == pytest.approx([math.log(8)] * 2)
