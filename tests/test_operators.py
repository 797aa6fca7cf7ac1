"""Tests that importing the ops registers every torch operator, without the rest of the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

CODE = """
import json, sys, types
package = types.ModuleType("slimkernels")
package.__path__ = ["slimkernels"]
sys.modules["slimkernels"] = package
import slimkernels.ops, torch
print(json.dumps([name for name in torch._C._dispatch_get_all_op_names() if name.startswith("slimkernels::")]))
"""


def test_importing_the_ops_registers_every_operator():
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    registered = {name.removeprefix("slimkernels::") for name in json.loads(run.stdout)}
    sources = [path.read_text() for path in (ROOT / "slimkernels/ops").rglob("*.py")]
    defined = {name for source in sources for name in re.findall(r'\bdefine\(\s*f?"(\w+)\(', source)}
    assert {"topk_logits", "topk_logits_rows", "softmax_gradient_rows", "decode_logits"} <= defined
    assert defined <= registered
