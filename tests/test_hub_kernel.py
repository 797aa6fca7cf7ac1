"""The kernel of the Hugging Face Hub that ``kernels/generate.py`` makes: its sources, its variants, and its values."""

import ast
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimkernels as sk

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("generate", ROOT / "kernels/generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

# Not what a session without the package finds, this repository's folder of that name.
needs_kernels = pytest.mark.skipif(
    importlib.util.find_spec("kernels.load") is None, reason="the package kernels is not installed: make test-kernels"
)
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="CPU kernels are built for x86-64 only")
ALLOWED = {"torch", "triton", *sys.stdlib_module_names}
WITHOUT_OTHERS = """
import sys
for name in ("numpy", "safetensors", "transformers", "packaging", "slimkernels", "triton"):
    sys.modules[name] = None  # importing it fails
"""
# As the package kernels imports a variant.
LOAD = """
import importlib.util, json
from pathlib import Path

def load(folder):
    name = json.loads(Path(folder, "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, Path(folder, "__init__.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources") / "kernel"
    generate.generate(folder)
    return folder


@pytest.fixture(scope="module")
def triton_variant(sources, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("triton") / "kernel"
    shutil.copytree(sources, copy)
    return generate.build_triton(copy, "cuda", "abc")


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("built") / "kernel"
    shutil.copytree(sources, copy)
    generate.build_cpu(copy, "abc")
    generate.build_triton(copy, "cuda", "abc")
    return copy


def run(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sources_are_all_that_build_toml_names(sources):
    config = generate.build_config(sources)
    named = [path for part in (config["torch"], *config["kernel"].values()) for path in part["src"]]
    found = [
        path.relative_to(sources).as_posix() for path in sources.rglob("*.*") if path.suffix in (".cpp", ".h", ".inl")
    ]
    assert sorted(named) == sorted(found)


def test_instruction_sets_are_those_of_setup(sources):
    assignments = {
        ast.unparse(n.targets[0]): n.value
        for n in ast.parse((ROOT / "setup.py").read_text()).body
        if isinstance(n, ast.Assign)
    }
    config = generate.build_config(sources)
    kernels = {name: kernel["cxx-flags"] for name, kernel in config["kernel"].items() if name != "operators"}
    expected = {
        name: ["-fvisibility=hidden", *flags] for name, flags in ast.literal_eval(assignments["X86_ISAS"]).items()
    }
    assert kernels == expected
    assert list(kernels) == list(expected)
    for name in kernels:
        assert config["kernel"][name]["src"] == [f"csrc/cpu/isa_{name}.cpp"]
        assert f"#define SK_ISA {name}\n" in (sources / f"csrc/cpu/isa_{name}.cpp").read_text()


def test_modules_import_torch_and_triton_only(sources):
    files = list((sources / "torch-ext/slimkernels").rglob("*.py"))
    assert len(files) > 50
    for path in files:
        tree = ast.parse(path.read_text())
        for_types = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= ALLOWED, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node not in for_types:
                assert node.module.partition(".")[0] in ALLOWED, path
            elif isinstance(node, ast.Attribute):
                assert ast.unparse(node) != "torch.ops.slimkernels", path
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.fullmatch(r"slimkernels(\.\w+)+|slimkernels::.*", node.value), (path, node.value)


def test_names_are_the_ops_of_the_package(triton_variant):
    listed = ast.parse((triton_variant / "__init__.py").read_text()).body[-1]
    names = ast.literal_eval(listed.value)
    tools = {"PathFinder", "SlimConfig", "SlimLossMixin", "SlimObjective", "SlimTrainer", "Store", "build_info"}
    assert set(names) == set(sk.__all__) - tools - {"patch_model", "unpatch_model"}


def test_import_needs_nothing_else(triton_variant):
    code = f"""{WITHOUT_OTHERS}
import warnings
warnings.simplefilter("ignore")  # torch warns that it has no numpy
import torch
before = set(sys.modules)
{LOAD}
kernel = load(sys.argv[1])
loaded = sorted(set(sys.modules) - before)
try:
    kernel.topk_logits(torch.zeros(2, 50), top_k=3)
except RuntimeError as error:
    message = str(error)
print(json.dumps([loaded, message, kernel.__name__]))
"""
    loaded, message, name = json.loads(run(code, triton_variant))
    assert name == "_slimkernels_cuda_abc"
    assert {module.partition(".")[0] for module in loaded} - set(sys.stdlib_module_names) == {name}
    assert message.startswith("this build of the kernels is for cuda and has none for CPU tensors")


def test_triton_kernels_are_found_and_right(triton_variant):
    code = f"""
import sys
{LOAD}
import importlib, torch
kernel = load(sys.argv[1])
library = importlib.import_module(f"{{kernel.__name__}}.ops._library")
library.check_built = lambda: None
for name, module in library.triton_launchers.items():
    function = getattr(importlib.import_module(module, f"{{kernel.__name__}}.ops"), name)
    library._library.impl(name, function, "CPU")
import slimkernels as sk
logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
found, expected = kernel.topk_logits(logits, top_k=5), sk.topk_logits(logits, top_k=5)
print(torch.equal(found.ids, expected.ids), (found.lse - expected.lse).abs().max().item() < 1e-5)
"""
    assert run(code, triton_variant, TRITON_INTERPRET="1").split() == ["True", "True"]


def test_generator_leaves_files_of_others_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match=r"there are files in .*: delete it"):
        generate.generate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_imports_become_relative():
    text = """\
from slimkernels import _checks
from slimkernels.ops.x import (
    y,
)
z = torch.ops.slimkernels.g(y)
"""
    expected = """\
from .._ops import ops as _operators
from .. import _checks
from ..ops.x import (
    y,
)
z = _operators.g(y)
"""
    assert generate.relative(text, Path("ops/z.py")) == expected
    with pytest.raises(ValueError, match=r"z\.py:1: write `from slimkernels import \.\.\.`"):
        generate.relative("import slimkernels.ops\n", Path("z.py"))
    with pytest.raises(ValueError, match="uses the operators and imports nothing"):
        generate.relative("torch.ops.slimkernels.g()\n", Path("z.py"))


def test_name_of_a_build_follows_its_sources(sources, tmp_path):
    copy = tmp_path / "kernel"
    shutil.copytree(sources, copy)
    assert generate.digest(copy) == generate.digest(sources)
    path = copy / "torch-ext/slimkernels/_checks.py"
    path.write_text(path.read_text() + "\n")
    assert generate.digest(copy) != generate.digest(sources)


def loaded(built: Path):
    from kernels import get_local_kernel

    return get_local_kernel(built, backend="cpu")


@pytest.mark.slow
@needs_kernels
@needs_x86
def test_hub_loads_the_variant_for_cpus(built):
    from kernels._rust import Build

    from kernels import get_loaded_kernels

    Build.open(built)  # raises if it does not understand build.toml
    kernel = loaded(built)
    [found] = [one for one in get_loaded_kernels() if one.module is kernel]
    assert (str(found.metadata.name), found.metadata.id, found.metadata.version) == (
        "slimkernels",
        "_slimkernels_cpu_abc",
        1,
    )
    assert Path(kernel.__file__).parent.name == "torch-stable-abi210-cpu-x86_64-linux"


@pytest.mark.slow
@needs_kernels
@needs_x86
def test_hub_kernel_computes_what_the_package_computes(built):
    """Bitwise: it is compiled from the same sources by the same compiler, and neither disturbs the other."""
    kernel = loaded(built)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=generator)
    weight = torch.randn(3001, 32, generator=generator)
    target = torch.randint(3001, (6,), generator=generator)

    def results(ops) -> list[torch.Tensor]:
        student = (hidden @ weight.T).requires_grad_()
        teacher = ops.topk_logits(student.detach() * 0.7, top_k=20, target=target, temperatures=(2.0,))
        loss = ops.slim_loss(student, target, teacher, rest="ghost", temperature=2.0).loss
        loss.backward()
        leaf = hidden.clone().requires_grad_()
        linear = ops.linear_slim_loss(leaf, weight, target, teacher).loss
        linear.backward()
        kept = ops.linear_gather_logits(hidden, weight, teacher.ids)
        probs = ops.sparse_softmax(teacher, rest="ghost")
        drawn = ops.sample_logits(student.detach(), seed=3, position=0, top_p=0.9)
        targets = ops.sample_targets(student.detach(), rounds=9, seed=4, position=0)
        return [
            *(teacher.ids, teacher.logits, teacher.lse, loss, student.grad, linear, leaf.grad, kept.logits),
            *(probs.logprobs, drawn.token, drawn.logprob, targets.ids, targets.logits),
        ]

    for found, expected in zip(results(kernel), results(sk), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.slow
@needs_x86
def test_hub_kernel_computes_without_other_packages(built):
    code = f"""{WITHOUT_OTHERS}
import warnings
warnings.simplefilter("ignore")  # torch warns that it has no numpy
import torch
{LOAD}
kernel = load(sys.argv[1])
logits = torch.arange(12.0).reshape(3, 4).requires_grad_()
teacher = kernel.topk_logits(logits.detach(), top_k=2)
kernel.slim_loss(logits, torch.tensor([3, 2, 1]), teacher).loss.backward()
print(json.dumps([teacher.ids.tolist(), logits.grad.abs().sum().item()]))
"""
    [variant] = built.glob("build/torch-stable*")
    ids, gradient = json.loads(run(code, variant))
    assert ids == [[2, 3]] * 3
    assert gradient > 0


@pytest.mark.slow
@needs_kernels
@needs_x86
def test_hub_kernel_compiles_without_graph_breaks(built):
    kernel = loaded(built)
    target = torch.tensor([1, 2, 3])
    logits = torch.randn(3, 500, requires_grad=True)

    def step(logits):
        return kernel.slim_loss(logits, target).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    [expected] = torch.autograd.grad(step(logits), logits)
    [found] = torch.autograd.grad(compiled(logits), logits)
    assert torch.equal(found, expected)
    operators = torch.ops._slimkernels_cpu_abc
    arguments = (logits.detach(), 4, None, [1.0], None)
    torch.library.opcheck(operators.topk_logits.default, arguments)


@pytest.mark.slow
@needs_x86
def test_hub_library_stands_on_torch_alone(built):
    [library] = built.glob("build/torch-stable*/*.abi3.so")
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"Shared library: \[(\w+)", needed))
    assert libraries <= {"libtorch", "libtorch_cpu", "libc10", "libstdc", "libm", "libgcc_s", "libc"}
    undefined = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\b_?Py\w+", undefined) == ["PyModule_Create2"]  # of the limited API
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r" T (\w+)", exported) == ["PyInit__slimkernels_cpu_abc"]


@pytest.mark.slow
@needs_kernels
@needs_x86
def test_example_of_the_card_runs(built):
    [example] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "kernels/CARD.md").read_text(), re.S | re.M)
    environment = {"LOCAL_KERNELS": f"ORGANISATION/slimkernels={built}", "CUDA_VISIBLE_DEVICES": ""}
    assert float(re.search(r"tensor\((.*)\)", run(example, **environment))[1]) > 0
