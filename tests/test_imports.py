"""Who may import whom, read from the source and tried in fresh processes; and that the reading can fail."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "slimkernels"


class Room(NamedTuple):
    """The modules whose path matches ``where`` but not ``except_for``, and what they may import. Patterns: fnmatch.

    ``own`` lists the modules of this package that they may import (None: any), ``packages`` the other packages beside
    the standard library (None: any), ``never`` what none of their functions may import either, and ``lazily`` what only
    their functions may import (``*``: anything).
    """

    where: str
    own: tuple[str, ...] | None = None
    packages: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()
    except_for: str = ""


_RECORDS = (f"{PACKAGE}.sparse_logits", f"{PACKAGE}.packed_logits")
_FOUNDATION = (*_RECORDS, *(f"{PACKAGE}.{name}" for name in ("_checks", "_library", "ops", "ops.*")))
_SEARCH_MODELS = tuple(
    f"slimkernels.search.{name}" for name in ("engine_*", "server_*", "branch*", "judges", "transformers_*")
)
ROOMS = (
    Room(
        "slimkernels/ops/triton/*.py",
        own=("slimkernels.ops.triton.launch", "slimkernels.ops._*_triton"),
        packages=("torch", "triton"),
    ),
    Room(
        "slimkernels/ops/*.py",
        except_for="*_triton.py",
        own=_FOUNDATION,
        packages=("torch",),
        lazily=("triton", "slimkernels.ops.*_triton"),
    ),
    Room("slimkernels/reference*.py", own=("slimkernels.sparse_logits",), packages=("torch",)),
    Room("slimkernels/sparse_logits.py", own=(), packages=("torch",)),
    Room("slimkernels/packed_logits.py", own=("slimkernels.sparse_logits",), packages=("torch",)),
    Room("slimkernels/_checks.py", own=(), packages=("torch",)),
    Room("slimkernels/*", never=("slimkernels.reference*", "tests", "helpers", "bench")),
    Room(
        "slimkernels/store/*",
        own=(*_RECORDS, "slimkernels.store", "slimkernels.store.*", "slimkernels", "slimkernels._C"),
        packages=("numpy", "torch", "safetensors"),
    ),
    Room(
        "slimkernels/exchange/*",
        own=(f"{PACKAGE}.sparse_logits", f"{PACKAGE}._checks", "slimkernels.store*", "slimkernels.exchange*"),
        packages=("numpy", "torch"),
        lazily=("pyarrow", "yaml", "slimkernels.models.sanity"),
    ),
    Room("slimkernels/server_client*.py", own=("slimkernels.serving.client",), packages=("httpx2",)),
    Room("slimkernels/teacher*.py", never=("triton", "slimkernels.search*")),
    Room("slimkernels/trainer*.py", never=("triton", "slimkernels.search*")),
    Room("slimkernels/search/*", never=("slimkernels.trainer*", "slimkernels.store*", "slimkernels.teacher*")),
    *(
        Room(f"slimkernels/search/{name}.py", own=("slimkernels.search.*",), packages=("numpy",), never=_SEARCH_MODELS)
        for name in ("pathfinder", "question", "plan", "checks", "config", "engine", "presets", "trace", "json_lines")
    ),
    Room("slimkernels/models/head_loss.py", never=("triton", "slimkernels.search*", "slimkernels.trainer*")),
    Room("slimkernels/models/patch.py", never=("triton", "slimkernels.search*", "slimkernels.trainer*")),
    Room("slimkernels/search/*", never=("slimkernels.trainer*", "slimkernels.store*")),
    Room("slimkernels/search/tree.py", own=(), packages=("torch", "numpy")),
    Room("slimkernels/search/selection.py", own=("slimkernels.search.tree",), packages=("torch", "numpy")),
    Room("slimkernels/cli*.py", own=("slimkernels.cli*",), packages=("typer",), lazily=("*",)),
    Room("bench/*", never=("tests", "helpers", "conftest")),
)


class Import(NamedTuple):
    module: str
    line: int
    in_function: bool


def imports_of(source: str, path: str) -> list[Import]:
    """Every import of a module's source; ``from a import b`` counts as ``a.b`` where ``a`` is of this package."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = Path(path).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            # What follows may be a module or a name in one; only this package's modules are told apart further.
            names = [f"{base}.{a.name}" if base.split(".")[0] == PACKAGE else base for a in node.names]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        found.extend(Import(name, node.lineno, in_function) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(ast.parse(source), False)
    return found


def module_of(name: str, root: Path) -> str:
    """``slimkernels.ops.slim_loss.slim_loss`` is the module ``slimkernels.ops.slim_loss``."""
    while "." in name:
        path = root / name.replace(".", "/")
        if path.with_suffix(".py").exists() or path.is_dir() or name == f"{PACKAGE}._C":
            break
        name = name.rpartition(".")[0]
    return name


def violations(root: Path) -> list[str]:
    """Every import under ``root`` that its room forbids."""
    found = []
    for file in sorted([*root.glob(f"{PACKAGE}/**/*.py"), *root.glob("bench/**/*.py")]):
        path = file.relative_to(root).as_posix()
        for imported in imports_of(file.read_text(), path):
            module = module_of(imported.module, root) if imported.module.startswith(PACKAGE) else imported.module
            rooms = [room for room in ROOMS if fnmatch(path, room.where) and not fnmatch(path, room.except_for)]
            reasons = [reason for room in rooms for reason in judge(module, imported, room)]
            if reasons:
                found.append(f"{path}:{imported.line} imports {module}: {', '.join(reasons)}")
    return found


def judge(module: str, imported: Import, room: Room) -> list[str]:
    def matches(patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(module, pattern) or fnmatch(module, f"{pattern}.*") for pattern in patterns)

    if matches(room.never):
        return [f"never in {room.where}"]
    if room.lazily != ("*",) and matches(room.lazily):
        return [] if imported.in_function else [f"only inside functions in {room.where}"]
    top = module.split(".")[0]
    if top == PACKAGE:
        allowed = room.own is None or any(fnmatch(module, own) for own in room.own)
    else:
        allowed = top in sys.stdlib_module_names or room.packages is None or top in room.packages
    if allowed or (imported.in_function and room.lazily == ("*",)):
        return []
    return [f"not for {room.where}"]


def test_every_import_is_allowed():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("slimkernels/ops/slim_loss.py", "import triton"),
        ("slimkernels/ops/slim_loss.py", "import triton.language as tl"),
        ("slimkernels/ops/slim_loss.py", "from slimkernels.ops import slim_loss_triton"),
        ("slimkernels/ops/slim_loss.py", "def f():\n    from slimkernels import reference"),
        ("slimkernels/ops/slim_loss.py", "from slimkernels.reference import slim_loss"),
        ("slimkernels/ops/slim_loss.py", "from ..reference import slim_loss"),
        ("slimkernels/ops/slim_loss.py", "from slimkernels import store"),
        ("slimkernels/ops/slim_loss.py", "def f():\n    import transformers"),
        ("slimkernels/ops/triton/slim_loss.py", "from slimkernels.ops.slim_loss import slim_loss"),
        ("slimkernels/reference.py", "from slimkernels.ops.slim_loss import SlimLoss"),
        ("slimkernels/reference.py", "import numpy"),
        ("slimkernels/trainer/slim_trainer.py", "from slimkernels import reference_sampling"),
        ("slimkernels/trainer/slim_trainer.py", "import triton"),
        ("slimkernels/store/reader.py", "from slimkernels.ops.slim_loss import slim_loss"),
        ("slimkernels/store/reader.py", "from slimkernels import topk_logits, trainer"),
        ("slimkernels/packed_logits.py", "from slimkernels.store import Store"),
        ("slimkernels/store/reader.py", "def f():\n    import transformers"),
        ("slimkernels/teacher/__init__.py", "def f():\n    from slimkernels.search.pathfinder import PathFinder"),
        ("slimkernels/search/tree.py", "import transformers"),
        ("slimkernels/search/pathfinder.py", "import torch"),
        ("slimkernels/search/engine_hf.py", "from slimkernels.store import Store"),
        ("slimkernels/cli/__init__.py", "import torch"),
        ("slimkernels/cli/__init__.py", "import rich.table"),
        ("slimkernels/cli/__init__.py", "if True:\n    from slimkernels import trainer"),
        ("bench/ops/cases.py", "from helpers import hostile_rows"),
        ("bench/ops/cases.py", "from tests.helpers import hostile_rows"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, path, source):
    write_tree(tmp_path, {path: source})
    assert len(violations(tmp_path)) == 1


def test_allowed_imports_are_not_found(tmp_path):
    write_tree(
        tmp_path,
        {
            "slimkernels/ops/slim_loss.py": "import math\nimport torch\nfrom slimkernels import _checks\n"
            "def f():\n    from slimkernels.ops import slim_loss_triton\n",
            "slimkernels/ops/triton/slim_loss.py": "import triton.language as tl\nfrom slimkernels import launch",
            "slimkernels/trainer/slim_trainer.py": "import transformers\nfrom slimkernels import SparseLogits, slim_loss",
            "slimkernels/cli/__init__.py": "import argparse\ndef f():\n    import torch\n    from slimkernels import trainer",
            "bench/ops/cases.py": "from slimkernels import reference",
        },
    )
    assert violations(tmp_path) == []


def write_tree(root: Path, files: dict[str, str]) -> None:
    """A tree with the modules that the rules talk about, empty but for ``files``."""
    modules = ("reference", "reference_sampling", "sparse_logits", "_checks", "_library", "launch", "trainer")
    paths = [f"slimkernels/{module}.py" for module in modules]
    paths += ["slimkernels/ops/slim_loss.py", "slimkernels/ops/triton/slim_loss.py", "slimkernels/store/reader.py"]
    paths += ["slimkernels/search/pathfinder.py"]
    for path, source in {**dict.fromkeys(paths, ""), **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source)


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
