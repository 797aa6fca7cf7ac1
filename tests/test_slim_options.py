"""The options and stages of ``slim_loss``: every place that spells them has the same names in the same order."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from support.helpers import random_problem, recorded_ops

import slimkernels as sk
from slimkernels import _checks, reference
from slimkernels.ops import _divergences, _slim_options
from slimkernels.ops._slim_options import OPTIONS_SCHEMA, SlimOptions, resolve_options
from slimkernels.ops.slim_result import NUM_STATS

CSRC = Path(__file__).parents[1] / "csrc"
NUM_TENSORS = OPTIONS_SCHEMA.count("Tensor?")
SETTINGS = SlimOptions._fields[NUM_TENSORS:]
OPERATORS = ("slim_loss_rows", "slim_loss_fwd", "slim_loss_over_logits", "linear_slim_loss_fwd")


def schema_of(operator: str) -> list[tuple[str, str]]:
    schema = getattr(torch.ops.slimkernels, operator).default._schema
    return [(argument.name, str(argument.type)) for argument in schema.arguments]


PUBLIC_NAMES = ["token_weight" if name == "weighting" else name for name in SETTINGS]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_schema_ends_with_the_options(operator):
    options = schema_of(operator)[-len(SlimOptions._fields) :]
    assert [name for name, _ in options] == list(SlimOptions._fields)
    assert {kind for _, kind in options[:NUM_TENSORS]} == {"Optional[Tensor]"}
    assert {kind for _, kind in options[NUM_TENSORS:]} == {"float", "str", "bool", "int"}


@pytest.mark.parametrize("function", [sk.slim_loss, sk.linear_slim_loss, resolve_options])
def test_a_signature_has_the_settings_in_order(function):
    names = list(inspect.signature(function).parameters)
    first = names.index("temperature")
    assert [name for name in names[first:] if name in PUBLIC_NAMES] == PUBLIC_NAMES


SETTING_VALUES = {
    "temperature": 1.25,
    "rest": "ghost",
    "divergence": "gated",
    "weighting": "student_over_teacher",
    "detach_weight": False,
    "beta": 0.375,
    "alpha": 0.625,
    "forward_weight": 8.0,
    "entropy_threshold": 9.0,
    "teacher_blend": 0.75,
    "tail_weight": 10.0,
    "ce_weight": 2.0,
    "kd_weight": 3.0,
    "label_smoothing": 0.125,
    "z_loss_weight": 4.0,
    "softcap": 5.0,
    "logit_scale": 6.0,
    "ignore_index": 7,
    "statistics": "without_overlap",
}
PUBLIC_VALUES = {name: value for name, value in SETTING_VALUES.items() if name != "weighting"}


def test_tensors_and_settings_are_the_two_parts_of_the_options():
    logits, _, teacher = random_problem(temperature=1.25)
    options = resolve_options(logits, "logits", teacher, token_weight=torch.rand(7), **PUBLIC_VALUES)
    assert all(isinstance(value, torch.Tensor) for value in options.tensors)
    assert (*options.tensors, *options.settings) == tuple(options)
    assert [t.shape[0] for t in options.rows(slice(1, 4)).tensors] == [3] * NUM_TENSORS
    assert options.rows(slice(1, 4)).settings == options.settings


@pytest.mark.parametrize("linear", [False, True])
def test_every_setting_reaches_the_operator_under_its_name(linear):
    logits, target, teacher = random_problem(temperature=1.25, ignored=())
    weight = SETTING_VALUES["weighting"]
    with recorded_ops() as mode:
        if linear:
            hidden, head = torch.zeros(len(target), 2), torch.zeros(logits.shape[1], 2)
            sk.linear_slim_loss(hidden, head, target, teacher, token_weight=weight, **PUBLIC_VALUES)
        else:
            sk.slim_loss(logits, target, teacher, token_weight=weight, **PUBLIC_VALUES)
    ((operator, arguments, _),) = mode.calls
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, arguments, strict=True))
    assert {name: given[name] for name in SETTINGS} == SETTING_VALUES


def test_the_triton_launcher_takes_the_arguments_of_the_schema():
    pytest.importorskip("triton", reason="Triton is not installed")
    from slimkernels.ops.triton.slim_loss import slim_loss_rows

    assert list(inspect.signature(slim_loss_rows).parameters) == [name for name, _ in schema_of("slim_loss_rows")]


def test_the_native_function_takes_the_arguments_of_the_schema():
    source = (CSRC / "slim_loss/operator.h").read_text()
    parameters = re.search(r"slim_loss_rows\((.*?)\)", source, re.DOTALL)[1]
    types = {
        "Tensor": "Tensor",
        "OptionalTensor": "Optional[Tensor]",
        "double": "float",
        "std::string": "str",
        "bool": "bool",
        "int64_t": "int",
    }
    found = [parameter.split() for parameter in parameters.split(",")]
    assert [(name, types[kind]) for kind, name in found] == schema_of("slim_loss_rows")


def native_names(enum: str) -> tuple[list[str], dict[str, str]]:
    """The enumerators of ``enum`` in order, and the enumerator of every name that the operators accept for it."""
    enumerators = re.search(rf"enum {enum} : int {{(.*?)}}", (CSRC / "slim_loss/args.h").read_text())[1]
    sources = [(CSRC / name).read_text() for name in ("operands.h", "slim_loss/operator.h")]
    pairs = re.findall(r'{"(\w+)", (k\w+)}', "\n".join(sources))
    enumerators = [part.split("=")[0].strip() for part in enumerators.split(",")]
    return enumerators, {name: value for name, value in pairs if value in enumerators}


def enumerator(name: str, weight: bool = False) -> str:
    words = {"none": "weight_one", "tensor": "weight_tensor"}.get(name, name) if weight else name
    return "k" + "".join(word.capitalize() for word in words.split("_"))


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        ("Rest", _checks.RESTS),
        ("Divergence", _divergences.DIVERGENCES),
        ("Weighting", (*_slim_options.WEIGHTS, "tensor")),
        ("Statistics", tuple(NUM_STATS)),
    ],
)
def test_the_native_enums_have_the_names_of_the_options(enum, names):
    enumerators, accepted = native_names(enum)
    assert accepted == {name: enumerator(name, enum == "Weighting") for name in names}
    assert sorted(enumerators) == sorted(accepted.values())


def test_the_reference_knows_the_same_names():
    assert (reference.RESTS, reference.DIVERGENCES) == (_checks.RESTS, _divergences.DIVERGENCES)
    assert (reference.WEIGHTS, reference.SlimLoss._fields) == (_slim_options.WEIGHTS, sk.SlimLoss._fields)
    ours, theirs = (inspect.signature(function).parameters for function in (sk.slim_loss, reference.slim_loss))
    assert theirs.keys() >= {*PUBLIC_NAMES, "reduction", "num_items"}
    assert {name: ours[name].default for name in theirs} == {name: theirs[name].default for name in theirs}


def test_the_native_statistics_are_the_fields_of_the_result():
    source = (CSRC / "slim_loss/args.h").read_text()
    numbers = ", ".join(map(str, NUM_STATS.values()))
    assert f"constexpr int kNumStats[] = {{{numbers}}};" in source
    named = re.search(r"// \(M, N\) acc: (.*?);", source, re.DOTALL)[1]
    assert re.split(r",[\s/]+", named) == list(sk.SlimLoss._fields)


STAGES = {
    "CPU C++": ["csrc/cpu/slim_row.h"],
    "CUDA C++": ["csrc/cuda/slim_loss.cuh"],
    "Triton": ["slimkernels/ops/triton/slim_loss.py"],
    "vocabulary-parallel": ["slimkernels/ops/vocab_parallel/rows.py", "slimkernels/ops/vocab_parallel/gradient.py"],
    "reference": ["slimkernels/reference/loss.py", "slimkernels/reference/divergences.py"],
}


def test_every_backend_has_the_functions_of_the_stages():
    root = CSRC.parent
    lines = (root / "slimkernels/ops/README.md").read_text().splitlines()
    rows = [line.strip("|").split("|")[1:] for line in lines if re.match(r"\| \d\. ", line)]
    assert len(rows) == 4
    for backend, cells in zip(STAGES, zip(*rows, strict=True), strict=True):
        source = "\n".join((root / path).read_text() for path in STAGES[backend])
        named = [name for cell in cells for name in re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", cell)]
        assert len(named) >= 4
        assert [
            name for name in named if not re.search(rf"^\s*(def|(__device__ )?\w+) {name}\(", source, re.MULTILINE)
        ] == []
