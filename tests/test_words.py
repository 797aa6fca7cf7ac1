"""The mechanical part of the language rules of CONTRIBUTING: how docstrings, descriptions and comments begin."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("slimkernels/**/*.py"),
        *ROOT.glob("bench/**/*.py"),
        *ROOT.glob("examples/*.py"),
        *ROOT.glob("kernels/**/*.py"),
    ]
)
NATIVE = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("csrc/**/*"), *ROOT.glob("kernels/**/*.cpp")]
    if path.is_file()
)

# A sentence that begins with one of these is a fragment, which only its neighbours explain.
FRAGMENTS = ("What", "Which", "Of", "That", "Whose", "Who", "How", "Where", "Is", "Are", "It", "As", "But", "Beside")
# A description of a parameter or an attribute is a noun: these begin a fragment as well.
LOOSE = ("By", "In", "From", "To", "With", "At", "On", "For", "When", "Because")
# Functions do something: the third person of a verb, or the formula that an op computes.
VERB = re.compile(r"[A-Z][a-z-]*s\b|``|:math:")


def first_word(text: str) -> str:
    found = re.match(r"\W*([\w-]+)", text)
    return "" if found is None else found[1]


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """The entries of the sections Args and Attributes: their names, and the first words of what is said of them."""
    section = ""
    for line in docstring.splitlines():
        heading = re.match(r"\s*(Args|Attributes|Returns|Raises|Yields|Supports|References|Precision)\b.*:", line)
        if heading is not None and not line.startswith(" " * 12):
            section = heading[1]
        elif section in ("Args", "Attributes"):
            found = re.match(r"^\s{4,12}\**(\w+)(?: \([^)]*\))?: (\w+)", line)
            if found is not None:
                yield found[1], found[2]


def faults_of_docstrings(source: str) -> list[str]:
    """Every docstring, description and help text of a module that begins as none should."""
    found = []

    def acts(node: ast.AST) -> bool:
        """Tells a function from a property, which is a noun."""
        names = [getattr(d, "id", getattr(d, "attr", "")) for d in getattr(node, "decorator_list", ())]
        return not isinstance(node, (ast.Module, ast.ClassDef)) and not {"property", "cached_property"} & set(names)

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if not text:
                continue
            name, line = getattr(node, "name", "the module"), getattr(node, "lineno", 1)
            if first_word(text) in FRAGMENTS:
                found.append(f"{line}: {name} begins with {first_word(text)!r}")
            elif acts(node) and not VERB.match(text):
                found.append(f"{line}: {name} must begin with a verb, got {first_word(text)!r}")
            for entry, word in entries(text):
                if word in FRAGMENTS + LOOSE:
                    found.append(f"{line}: {name}: {entry} must begin with a noun, got {word!r}")
        elif isinstance(node, ast.keyword) and node.arg == "help" and isinstance(node.value, ast.Constant):
            word = first_word(str(node.value.value)).capitalize()
            if word in FRAGMENTS + LOOSE:
                found.append(f"{node.value.lineno}: help must begin with a noun or a verb, got {word!r}")
    return found


def faults_of_comments(source: str) -> list[str]:
    """Every comment above a line of Python that begins as none should."""
    found, before = [], -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            row = token.start[0]
            if row != before + 1 and first_word(token.string) in FRAGMENTS:
                found.append(f"{row}: a comment begins with {first_word(token.string)!r}")
            before = row
    return found


def faults_of_native_comments(source: str) -> list[str]:
    found, is_inside = [], False
    for number, line in enumerate(source.splitlines(), 1):
        comment = re.match(r"\s*// (.*)", line)
        if comment is not None and not is_inside and first_word(comment[1]) in FRAGMENTS:
            found.append(f"{number}: a comment begins with {first_word(comment[1])!r}")
        is_inside = comment is not None
    return found


@pytest.mark.parametrize("path", PYTHON)
def test_words_of_python(path):
    source = (ROOT / path).read_text()
    assert faults_of_docstrings(source) + faults_of_comments(source) == []


@pytest.mark.parametrize("path", NATIVE)
def test_words_of_native_code(path):
    assert faults_of_native_comments((ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        '"""What the kernels share."""',
        'def f():\n    """The rows of a store."""',
        'class A:\n    """Which of them is meant."""',
        'def f(a):\n    """Reads it.\n\n    Args:\n        a: Of the file.\n    """',
        'class A:\n    """A row.\n\n    Attributes:\n        a (int): By default 3.\n    """',
        "# Of two rows, the first.\nx = 1",
        'add("--seed", help="of the draws")',
    ],
)
def test_a_fragment_is_found(source):
    assert len(faults_of_docstrings(source) + faults_of_comments(source)) == 1


def test_sentences_are_not_found():
    source = '"""Reads rows."""\nclass A:\n    """A row.\n\n    Attributes:\n        a: Number of ids.\n    """\n'
    source += '    @property\n    def b(self):\n        """The ids."""\n'
    source += "# Ids are sorted.\n# Of these, some are padding.\nx = 1\nadd('--seed', help='seed of the draws')\n"
    assert faults_of_docstrings(source) + faults_of_comments(source) == []
    assert len(faults_of_native_comments("// What is it?\n// Of that.\nint x;\n  // Which one?\n")) == 2
