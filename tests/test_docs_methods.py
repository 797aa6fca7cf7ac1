"""``docs/methods.md``: every paper that it names has two lines, which train."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs/methods.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```\n", re.S)
# The name of a method, the text about it, and its lines.
METHODS = re.findall(r"^\*\*([^*]+)\*\*(.*?)```python\n(.*?)```$", PAGE, re.S | re.M)


def test_methods_are_of_at_least_15_papers():
    papers = {link for _, text, _ in METHODS for link in re.findall(r"\((https://(?:arxiv|openreview)\S+)\)", text)}
    assert len(papers) >= 15
    assert all("```" not in text for _, text, _ in METHODS)
    assert len(METHODS) == len(BLOCK.findall(PAGE)) - 1


@pytest.mark.parametrize(("lines"), [pytest.param(lines, id=name) for name, _, lines in METHODS])
def test_method_is_two_lines_that_train(lines):
    names = {}
    exec(BLOCK.search(PAGE)[1], names)  # noqa: S102 -- the document's own code
    assert len(lines.splitlines()) == 2
    exec(lines, names)  # noqa: S102
    (gradient,) = torch.autograd.grad(names["loss"], names["hidden"])
    assert names["loss"].isfinite()
    assert gradient.isfinite().all()
    assert gradient.abs().amax(-1).all()
