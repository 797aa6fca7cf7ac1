"""What adapters import from other projects' packages: recorded from their sources, and compared with the adapters."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Packages that are installed where the adapters are tested, so that nothing about them is recorded.
INSTALLED = {"slimkernels", "torch", "transformers", "datasets", "pydantic", "numpy", *sys.stdlib_module_names}
Recorded = dict[str, dict[str, Any]]


class _Signature(NamedTuple):
    """The names of a function's parameters."""

    positional: list[str]
    optional: list[str]
    keyword_only: list[str]
    required_keywords: list[str]
    any_positional: bool
    any_keyword: bool


def imported(tree: ast.Module) -> dict[str, str]:
    """Returns the full names that a module imports from packages that are not installed, by the names it gives them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] not in INSTALLED:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] not in INSTALLED]
            found |= {alias.asname or alias.name: alias.name for alias in names}
    return found


def record(name: str, root: Path) -> dict[str, Any]:
    """Returns what the sources below ``root`` say of a name: a module, a function or a class.

    Raises:
        ValueError: They do not hold the name.
    """
    if (file := _file_of(name, root)) is not None:
        return {"kind": "module", "names": sorted(_defined(ast.parse(file.read_text())))}
    module, _, attribute = name.rpartition(".")
    file = _file_of(module, root)
    if file is None:
        raise ValueError(f"{root} must hold {module}, of which {attribute} is imported")
    node = _defined(ast.parse(file.read_text())).get(attribute)
    if isinstance(node, ast.ImportFrom):
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == attribute)
        return record(".".join(part for part in (base, node.module, original) if part), root)
    if isinstance(node, ast.FunctionDef):
        return {"kind": "function", "call": _written(node)}
    if isinstance(node, ast.ClassDef):
        return {"kind": "class", **_class(node, module, root)}
    raise ValueError(f"{file} must define {attribute}")


def problems(source: str, recorded: Recorded) -> list[str]:
    """Compares a module with what is recorded of the packages that it imports, and names each difference."""
    tree = ast.parse(source)
    names = imported(tree)
    found = [f"{name} is not recorded" for name in names.values() if name not in recorded]
    known = {local: recorded[name] for local, name in names.items() if name in recorded}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in (known[part.id] for part in node.bases if isinstance(part, ast.Name) and part.id in known):
                found += _override_problems(node, base)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            if node.attr not in _attributes(known[node.value.id]):
                found.append(f"line {node.lineno}: {node.value.id} has no {node.attr}")
        elif isinstance(node, ast.Call) and (entry := _called(node.func, known)) is not None:
            found += [f"line {node.lineno}: {text}" for text in _call_problems(node, entry)]
    return found


def _file_of(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _defined(tree: ast.AST) -> dict[str, ast.AST]:
    """Returns what a module defines or imports on its top level, also under conditions."""
    found: dict[str, ast.AST] = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {part.id: node for part in node.targets if isinstance(part, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, ast.If | ast.Try):
            found = _defined(node) | found
    return found


def _written(node: ast.FunctionDef) -> str:
    """Returns the parameters of a function as its source has them, without types, and with "..." as each default."""
    arguments = node.args
    for part in ast.walk(arguments):
        if isinstance(part, ast.arg):
            part.annotation = None
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.kw_defaults = [None if default is None else ast.Constant(...) for default in arguments.kw_defaults]
    return ast.unparse(arguments)


def _signature(written: str | ast.FunctionDef) -> _Signature:
    if isinstance(written, str):
        written = ast.parse(f"def function({written}): ...").body[0]
    arguments = written.args
    positional = [part.arg for part in arguments.posonlyargs + arguments.args]
    pairs = list(zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True))
    return _Signature(
        positional,
        optional=positional[len(positional) - len(arguments.defaults) :],
        keyword_only=[part.arg for part, _ in pairs],
        required_keywords=[part.arg for part, default in pairs if default is None],
        any_positional=arguments.vararg is not None,
        any_keyword=arguments.kwarg is not None,
    )


def _class(node: ast.ClassDef, module: str, root: Path) -> dict[str, Any]:
    """Returns the methods of a class, those inherited within its package too, and its other attributes."""
    methods: dict[str, Any] = {}
    members: list[str] = []
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id != node.name:
            try:
                inherited = record(f"{module}.{base.id}", root)
            except ValueError:  # a class of another package
                continue
            if inherited["kind"] == "class":
                methods |= inherited["methods"]
                members += inherited["members"]
    defined = _defined(node)
    methods |= {name: _written(part) for name, part in defined.items() if isinstance(part, ast.FunctionDef)}
    members = sorted({*members, *defined} - methods.keys())
    # A class without a constructor of its own is called with its fields.
    return {"methods": methods, "members": members}


def _attributes(entry: dict[str, Any]) -> set[str]:
    return {*entry.get("names", ()), *entry.get("methods", ()), *entry.get("members", ())}


def _called(func: ast.expr, known: Recorded) -> dict[str, Any] | None:
    return known.get(func.id) if isinstance(func, ast.Name) else None


def _override_problems(node: ast.ClassDef, base: dict[str, Any]) -> Iterator[str]:
    """Yields what keeps a method from being called as the base class's method of that name is."""
    for method in (part for part in node.body if isinstance(part, ast.FunctionDef)):
        if method.name not in base.get("methods", {}) or method.name == "__init__":
            continue
        theirs, ours = _signature(base["methods"][method.name]), _signature(method)
        called = f"{node.name}.{method.name}"
        for place, name in enumerate(theirs.positional):
            if ours.positional[place : place + 1] != [name] and not (ours.any_positional and ours.any_keyword):
                yield f"{called} has {ours.positional[place : place + 1]} in place of {name}"
        for name in theirs.keyword_only:
            if name not in ours.keyword_only and not ours.any_keyword:
                yield f"{called} lacks {name}"
        new = [name for name in ours.positional[len(theirs.positional) :] if name not in ours.optional]
        for name in new + ours.required_keywords:
            if name not in theirs.keyword_only:
                yield f"{called} needs {name}, which is not given"


def _call_problems(node: ast.Call, entry: dict[str, Any]) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = [keyword.arg for keyword in node.keywords]
    if entry["kind"] == "module":
        yield f"{called} is a module"
        return
    written = entry.get("call", entry.get("methods", {}).get("__init__"))
    if written is None:
        yield from (f"{called} has no field {name}" for name in given if name not in entry["members"])
        return
    call = _signature(written)
    positional = call.positional if entry["kind"] == "function" else call.positional[1:]
    if len(node.args) > len(positional) and not call.any_positional:
        yield f"{called} takes {len(positional)} arguments"
    known = {*positional, *call.keyword_only}
    yield from (f"{called} takes no {name}" for name in given if name and name not in known and not call.any_keyword)
    if None not in given and not any(isinstance(part, ast.Starred) for part in node.args):
        needed = [name for name in positional[len(node.args) :] if name not in call.optional]
        needed += call.required_keywords
        yield from (f"{called} needs {name}" for name in needed if name not in given)
