"""The adapters to other projects' trainers against what is recorded of these projects' sources."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from support.signatures import imported, problems, record

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "tests/data/signatures.json").read_text())
NAMES = {name: entry for package in RECORDED.values() for name, entry in package["names"].items()}
ADAPTERS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in sorted([*ROOT.glob("slimkernels/integrations/*.py"), *ROOT.glob("examples/*.py")])
    if {name.split(".")[0] for name in imported(ast.parse(path.read_text())).values()} & RECORDED.keys()
}


@pytest.mark.parametrize("path", ADAPTERS)
def test_an_adapter_calls_what_is_recorded(path):
    assert problems(ADAPTERS[path], NAMES) == []


def test_every_recorded_package_has_an_adapter_and_a_version():
    used = {name for source in ADAPTERS.values() for name in imported(ast.parse(source)).values()}
    assert used == NAMES.keys()
    for name, package in RECORDED.items():
        assert re.fullmatch(r"[\w-]+==[\d.]+|[0-9a-f]{40}", package["version"]), name


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("slimkernels/integrations/verl.py", "use_topk=True", "use_top_k=True", "has no field use_top_k"),
        ("slimkernels/integrations/verl.py", "    compute_forward_kl_topk,", "    compute_topk,", "is not recorded"),
        ("slimkernels/integrations/torchtitan.py", "global_valid_tokens: Tensor, extra", "extra", "in place of"),
        ("slimkernels/integrations/torchtitan.py", "pred: Tensor,", "logits: Tensor,", "in place of pred"),
        ("slimkernels/integrations/megatron.py", "model_parallel_rank()", "parallel_number()", "has no get_tensor_"),
        ("slimkernels/integrations/axolotl.py", "self, cfg: Any, is_eval", "self, is_eval", "in place of cfg"),
        ("slimkernels/integrations/ms_swift.py", "teacher_output: Any, labels", "labels", "in place of"),
        ("examples/nemo_rl_loss.py", "LossInputType.LOGIT", "LossInputType.LOGITS", "has no LOGITS"),
        ("examples/kdflow_algorithm.py", '@register_algorithm("slim")', "@register_algorithm()", "needs name"),
    ],
)
def test_a_call_that_does_not_fit_is_found(path, old, new, message):
    assert ADAPTERS[path].count(old) == 1
    assert message in "; ".join(problems(ADAPTERS[path].replace(old, new), NAMES))


def test_names_are_recorded_from_sources_through_lazy_imports_and_base_classes(tmp_path):
    package = tmp_path / "other"
    package.mkdir()
    (package / "__init__.py").write_text("if TYPE_CHECKING:\n    from .losses import Loss as Public\n")
    (package / "losses.py").write_text(
        "class Base:\n    x: int\n    def a(self, b: int, *c, d=1, **e): ...\nclass Loss(Base):\n    y = 2\n"
    )
    expected = {"kind": "class", "members": ["x", "y"], "methods": {"a": "self, b, *c, d=..., **e"}}
    assert record("other.Public", tmp_path) == expected
    assert record("other.losses", tmp_path) == {"kind": "module", "names": ["Base", "Loss"]}
    with pytest.raises(ValueError, match="must define Missing"):
        record("other.losses.Missing", tmp_path)
