"""What the documents show is true: their examples run, their numbers come from committed results."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import VOCAB_SIZE, make_model, make_tokenizer
from transformers import AutoModelForCausalLM

import slimkernels as sk
from bench.ops_table import OPS, support_of

ROOT = Path(__file__).parent.parent
# sample_distinct is documented in the module of sample_logits.
OP_MODULES = [op for op in OPS if op != "sample_distinct"]


@pytest.mark.parametrize("op", OP_MODULES)
def test_docs_op_examples_run(op):
    result = doctest.testmod(importlib.import_module(f"slimkernels.ops.{op}"))
    assert result.attempted > 0
    assert result.failed == 0


def snippet(name: str) -> str:
    readme = (ROOT / "README.md").read_text()
    return re.search(rf"<!-- {name}:begin -->\n```python\n(.*?)```\n<!-- {name}:end -->", readme, re.S)[1]


def test_docs_readme_loop_runs():
    done = subprocess.run([sys.executable, "-c", snippet("example")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d+\.\d\d, CE \d+\.\d\d, KL \d+\.\d\d, w 0\.\d\d\n", done.stdout)


def test_docs_readme_patch_computes_the_models_own_loss():
    model, input_ids = make_model().train(), torch.randint(VOCAB_SIZE, (2, 9))
    expected = model(input_ids, labels=input_ids)
    exec(snippet("patch"), {"sk": sk, "model": model})  # noqa: S102 -- the README's
    output = model(input_ids, labels=input_ids)
    assert output.get("logits") is None
    torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_docs_readme_distiller_trains(tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra trl")
    from datasets import Dataset

    for name, seed in (("teacher", 9), ("student", 0)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    options = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    names = {
        "sk": sk,
        "SFTTrainer": trl.SFTTrainer,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "model": AutoModelForCausalLM.from_pretrained(tmp_path / "student"),
        "args": trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, bf16=False, **options),
        "dataset": Dataset.from_list([{"input_ids": [2, 3, 5, 8, 13]}] * 4),
    }
    code = snippet("mixin").replace('"./teacher"', repr(str(tmp_path / "teacher")))
    exec(code, names)  # noqa: S102 -- the README's
    names["trainer"].train()
    logs = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logs) == 2
    assert all(0 < entry["weight"] < 1 and entry["kd"] > 0 for entry in logs)


def test_docs_readme_search_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = snippet("pathfinder").replace("max_tokens=2000", "max_tokens=200, max_step_tokens=4, max_depth=2")
    names = {"model": make_model(), "tokenizer": make_tokenizer(), "questions": ["w3 w5", "w8"]}
    exec(code, names)  # noqa: S102 -- the README's
    assert names["result"].num_tokens > 0
    assert names["result"].text in capsys.readouterr().out
    assert (tmp_path / "search.jsonl").stat().st_size > 0


def test_docs_readme_tables_come_from_the_results():
    command = [sys.executable, "-m", "bench.table", "--results", "bench/results", "--readme", "README.md", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_docs_readme_links_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{document}: {link}"


def call(op: str, dtype: torch.dtype) -> torch.Tensor:
    """Something that a call of the op returns, and that has a gradient where there is one."""
    if op == "decode_logits":  # uint8 is a dtype of its alone, and of no logits
        words = torch.tensor([[0x5E, 0x93]], dtype=torch.int32)
        affine = torch.ones(1, 2) if dtype == torch.uint8 else None
        packed = sk.PackedLogits(words, torch.ones(1, 4).to(dtype), torch.ones(1, 1), vocab_size=20, affine=affine)
        return sk.decode_logits(packed).logits
    logits = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    weight = torch.zeros(8, 8, dtype=dtype, requires_grad=True)
    target = torch.tensor([1, 2])
    teacher = sk.topk_logits(torch.zeros(2, 8, dtype=dtype), 2, target=target)
    calls = {
        "topk_logits": lambda: sk.topk_logits(logits, 2).logits,
        "linear_topk_logits": lambda: sk.linear_topk_logits(logits, weight, 2).logits,
        "sparse_softmax": lambda: sk.sparse_softmax(sk.topk_logits(logits, 2)).logprobs,
        "slim_loss": lambda: sk.slim_loss(logits, target, teacher).loss,
        "linear_slim_loss": lambda: sk.linear_slim_loss(logits, weight, target, teacher).loss,
        "sample_logits": lambda: sk.sample_logits(logits, seed=0, position=0).logprob,
        "sample_distinct": lambda: sk.sample_distinct(logits, 2, seed=0, position=0).logprob,
        "sample_targets": lambda: sk.sample_targets(logits, 2, 0, position=0).logits,
        "mixed_targets": lambda: sk.mixed_targets(logits, 2, 2, 0, position=0).logits,
    }
    return calls[op]()


ROW_OPERATORS = {
    "linear_topk_logits": "topk_logits",
    "linear_slim_loss": "slim_loss",
    "sample_distinct": "sample_logits",
    "mixed_targets": "sample_targets",
}


@pytest.mark.parametrize("op", OPS)
def test_docs_ops_table_is_true(op):
    support = support_of(op)
    operator = f"slimkernels::{ROW_OPERATORS.get(op, op)}_rows"
    registered = [
        device for device in ("cpu", "cuda") if torch._C._dispatch_has_kernel_for_dispatch_key(operator, device.upper())
    ]
    assert list(support.devices) == registered
    for name in support.dtypes:
        assert call(op, getattr(torch, name)).requires_grad == (support.backward != "no")
