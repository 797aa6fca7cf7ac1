"""What the documents show is true: their examples run, their numbers come from committed results."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPS = [
    "decode_logits",
    "topk_logits",
    "linear_topk_logits",
    "sparse_softmax",
    "slim_loss",
    "linear_slim_loss",
    "sample_logits",
    "sample_targets",
]


@pytest.mark.parametrize("op", OPS)
def test_docs_op_examples_run(op):
    result = doctest.testmod(importlib.import_module(f"slimkernels.ops.{op}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_docs_readme_loop_runs():
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"<!-- example:begin -->\n```python\n(.*?)```\n<!-- example:end -->", readme, re.S)
    done = subprocess.run([sys.executable, "-c", code[1]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d+\.\d\d, CE \d+\.\d\d, KL \d+\.\d\d, w 0\.\d\d\n", done.stdout)


def test_docs_readme_tables_come_from_the_results():
    command = [sys.executable, "-m", "bench.table", "--results", "bench/results", "--readme", "README.md", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_docs_readme_links_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{document}: {link}"


def test_docs_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"(?:`|^    )make ([a-z]+)", readme, re.M))
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
