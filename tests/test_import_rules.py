"""Who may import whom: the table in CONTRIBUTING, held for every module, and shown to be able to fail."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "slimkernels"
FOUNDATION = ("_checks", "durable", "mixture", "packed_logits", "sparse_logits")
NUM_ROWS_BELOW_FOUNDATION = 4
EVERYTHING = "everything"


class Rule(NamedTuple):
    """A row of the table: its rooms, the imports that they may have anywhere, and those for functions only."""

    rooms: tuple[str, ...]
    anywhere: tuple[str, ...]
    in_functions: tuple[str, ...]


class Import(NamedTuple):
    """An import statement's target: a module of this package without the package's name, or another package."""

    target: str
    is_own: bool
    line: int
    kind: str  # "module", "function" or "typing"


def rules() -> list[Rule]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Who may import whom") :]
    rows = re.findall(r"^\|(.*)\|(.*)\|(.*)\|$", section, re.M)[2:]
    found = [Rule(*(tuple(re.findall(r"`([\w.]+)`|(everything)", cell)) for cell in row)) for row in rows]
    table = [Rule(*(tuple(a or b for a, b in cell) for cell in rule)) for rule in found]
    lowest = table[:NUM_ROWS_BELOW_FOUNDATION]
    return lowest + [rule._replace(anywhere=rule.anywhere + FOUNDATION) for rule in table[len(lowest) :]]


def is_within(module: str, rooms: tuple[str, ...]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def name_of(path: Path, root: Path) -> str:
    """``slimkernels/ops/slim_loss.py`` is "ops.slim_loss", and the package itself is "slimkernels"."""
    parts = path.relative_to(root / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or PACKAGE


def modules(root: Path) -> dict[str, Path]:
    return {name_of(path, root): path for path in sorted(root.glob(f"{PACKAGE}/**/*.py"))}


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    """Every import of a module, those inside functions and under ``if TYPE_CHECKING`` too."""
    package = [] if name == PACKAGE else name.split(".")
    if path.stem != "__init__":
        package = package[:-1]

    def own(dotted: str) -> str:
        """Finds the longest prefix that is a module; ``slimkernels.ops.slim_loss.slim_loss`` is "ops.slim_loss"."""
        rest = dotted.removeprefix(PACKAGE).removeprefix(".")
        while rest and rest not in known and rest != "_C":
            rest = rest.rpartition(".")[0]
        return rest or PACKAGE

    def visit(node: ast.AST, kind: str) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = [PACKAGE, *package][: len(package) + 2 - node.level]
                base = ".".join([*above, base] if base else above)
            names = [f"{base}.{alias.name}" for alias in node.names] if base.split(".")[0] == PACKAGE else [base]
        for dotted in names:
            top = dotted.split(".")[0]
            yield Import(own(dotted) if top == PACKAGE else top, top == PACKAGE, node.lineno, kind)
        for child in ast.iter_child_nodes(node):
            inner = kind
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                inner = "typing" if child in node.body else kind
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                inner = "function"
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text()), "module")


def rule_of(name: str, table: list[Rule]) -> Rule | None:
    return next((rule for rule in table if is_within(name, rule.rooms)), None)


def is_allowed(imported: Import, rule: Rule, table: list[Rule]) -> bool:
    """A room stands for all modules of the row that names it first; a single module stands for itself."""
    allowed = rule.anywhere + (() if imported.kind == "module" else rule.in_functions)
    target = imported.target
    if EVERYTHING in allowed:
        return True
    if not imported.is_own:
        return imported.kind == "typing" or target in sys.stdlib_module_names or target in allowed
    if target == "_C":
        return "_C" in allowed
    home = rule_of(target, table)
    if home is rule:
        return True
    rooms = [room for room in allowed if rule_of(room, table) is home]
    return any((home is not None and room in home.rooms) or is_within(target, (room,)) for room in rooms)


def violations(root: Path) -> list[str]:
    table, known, found = rules(), modules(root), []
    for name, path in known.items():
        rule = rule_of(name, table)
        if rule is None:
            found.append(f"{name} is in no row of CONTRIBUTING's table")
            continue
        found += [
            f"{name}:{imported.line} imports {imported.target} ({imported.kind})"
            for imported in imports_of(name, path, known)
            if not is_allowed(imported, rule, table)
        ]
    return found


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Finds modules that import each other in a circle, or returns an empty list."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(edges.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(edges) if (found := walk(name, []))), [])


def edges_of(root: Path) -> dict[str, set[str]]:
    """Imports between modules when they are loaded or their types are checked."""
    known = modules(root)
    return {
        name: {i.target for i in imports_of(name, path, known) if i.is_own and i.kind != "function"} - {name, "_C"}
        for name, path in known.items()
    }


def test_every_import_is_allowed():
    assert violations(ROOT) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(edges_of(ROOT)) == []


def test_every_row_has_modules():
    table, names = rules(), modules(ROOT)
    assert len(table) > 15
    for rule in table:
        for room in rule.rooms:
            assert any(is_within(name, (room,)) and rule_of(name, table) is rule for name in names), room


def test_the_root_holds_few_modules():
    """Shims of old import paths are not counted: they hold nothing."""
    assert len([path for path in ROOT.glob(f"{PACKAGE}/*.py") if "DeprecationWarning" not in path.read_text()]) <= 9


@pytest.fixture
def tree(tmp_path) -> Path:
    """The package's modules, all of them empty."""
    for path in ROOT.glob(f"{PACKAGE}/**/*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")
    assert violations(tmp_path) == []
    return tmp_path


TABLE = rules()


@pytest.mark.parametrize("rule", [rule for rule in TABLE if EVERYTHING not in rule.anywhere], ids=lambda r: r.rooms[0])
def test_a_forbidden_import_is_found(rule, tree):
    known = modules(tree)
    path = next(path for name, path in known.items() if rule_of(name, TABLE) is rule)
    allowed = rule.anywhere + rule.in_functions
    # One module of every row that this one does not name, and of other packages those that others may import.
    others = [next(name for name in known if rule_of(name, TABLE) is other) for other in TABLE if other is not rule]
    planted = [f"{PACKAGE}.{name}" if name != PACKAGE else PACKAGE for name in others]
    planted = [
        target
        for target, other in zip(planted, (o for o in TABLE if o is not rule), strict=True)
        if not any(is_within(room, other.rooms) for room in allowed)
    ]
    packages = {name for other in TABLE for name in other.anywhere + other.in_functions}
    packages -= {EVERYTHING, "_C", *allowed, *(name for other in TABLE for name in other.rooms)}
    planted += sorted(package for package in packages if rule_of(package, TABLE) is None)
    if EVERYTHING in rule.in_functions:
        planted = ["torch", f"{PACKAGE}.trainer"]
    assert planted
    for target in planted:
        path.write_text(f"import {target}\n")
        assert len(violations(tree)) == 1, target
        path.write_text(f"def load():\n    import {target}\n")
        assert len(violations(tree)) == (EVERYTHING not in rule.in_functions), target
    for room in rule.in_functions:
        if room != EVERYTHING:
            target = room if rule_of(room, TABLE) is None else f"{PACKAGE}.{room}"
            path.write_text(f"import {target}\n")
            assert len(violations(tree)) == 1, target
            path.write_text(f"def load():\n    import {target}\n")
            assert violations(tree) == []


@pytest.mark.parametrize(
    "source",
    [
        "from slimkernels import reference",
        "from slimkernels.reference import slim_loss",
        "from ..reference import slim_loss",
        "from .. import reference",
        "import slimkernels.reference as truth",
        "def f():\n    from slimkernels import reference",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from slimkernels import reference",
        "class A:\n    if True:\n        from slimkernels import reference",
        "import triton.language as tl",
        "from slimkernels.ops.triton import slim_loss",
        "from slimkernels import Store",
    ],
)
def test_an_import_is_found_however_it_is_written(source, tree):
    (tree / "slimkernels/ops/slim_loss.py").write_text(source)
    assert len(violations(tree)) == 1


def test_a_module_in_no_row_is_found(tree):
    (tree / "slimkernels/utils.py").write_text("")
    assert violations(tree) == ["utils is in no row of CONTRIBUTING's table"]


@pytest.mark.parametrize("typing", [False, True])
def test_a_circle_is_found(typing, tree):
    source = "from slimkernels.store.{} import anything\n"
    if typing:
        source = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {source}"
    (tree / "slimkernels/store/reader.py").write_text(source.format("codec"))
    (tree / "slimkernels/store/codec.py").write_text(source.format("format"))
    assert circle(edges_of(tree)) == []
    (tree / "slimkernels/store/format.py").write_text(source.format("reader"))
    assert circle(edges_of(tree)) == ["store.codec", "store.format", "store.reader", "store.codec"]


def test_bench_imports_no_tests():
    for path in ROOT.glob("bench/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in ("tests", "support", "scripts")], path
