"""Students made of some of a teacher's layers, against the teacher with the other layers removed."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from support.families import _SIZES, FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from slimkernels.models.make_student import drop_layers

IDS = torch.tensor([[1, 5, 9, 3, 7, 7, 2, 11]])
NAMES = {"llama-tied": "model.layers", "gemma2": "model.layers", "gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}


def make_teacher(name: str, num_layers: int = 6, dtype: torch.dtype = torch.float32):
    """Makes a family's model; Gemma's sliding layers, which are every other one, look back two tokens."""
    config, options = FAMILIES[name]
    torch.manual_seed(0)
    sizes = _SIZES | {"num_hidden_layers": num_layers} | ({"sliding_window": 2} if name == "gemma2" else {})
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes | options), dtype=dtype).eval()
    with torch.no_grad():
        # Freshly initialised layers would hardly change their input.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [3, [0, 2, 5], [1, 3, 4]], ids=["number", "same", "listed"])
@torch.no_grad()
def test_drop_layers_is_the_teacher_without_the_others(name, layers):
    kept = layers if isinstance(layers, list) else [0, 2, 5]
    teacher = make_teacher(name)
    before = copy.deepcopy(teacher.state_dict())
    student = drop_layers(teacher, layers)
    assert student.training
    assert student.config.num_hidden_layers == 3
    shortened = copy.deepcopy(teacher)
    parent, _, attribute = NAMES[name].rpartition(".")
    owner = shortened.get_submodule(parent)
    # Some decoders rely on having as many layers as their configuration says.
    setattr(owner, attribute, nn.ModuleList(getattr(owner, attribute)[index] for index in kept))
    owner.config.num_hidden_layers = 3
    if name == "gemma2":
        types = teacher.config.layer_types
        assert types[0] != types[5]
        owner.config.layer_types = [types[index] for index in kept]
        assert student.config.layer_types == owner.config.layer_types
    expected = shortened(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(student.eval()(input_ids=IDS, use_cache=False).logits, expected)
    assert not torch.allclose(expected, teacher(input_ids=IDS, use_cache=False).logits)
    written = student.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    whole = student(input_ids=written, use_cache=False).logits[0, IDS.shape[1] - 1 : -1]
    assert written[0, IDS.shape[1] :].tolist() == whole.argmax(-1).tolist()
    for parameter in student.parameters():
        parameter.zero_()
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


@torch.no_grad()
def test_drop_layers_of_every_number():
    teacher = make_teacher("llama", num_layers=4, dtype=torch.bfloat16)
    layers = teacher.model.layers
    for num_layers, kept in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])):
        student = drop_layers(teacher, num_layers)
        assert student.dtype == torch.bfloat16
        for index, layer in zip(kept, student.model.layers, strict=True):
            torch.testing.assert_close(layer.state_dict(), layers[index].state_dict(), rtol=0, atol=0)
    for num_layers in (0, 5):
        with pytest.raises(ValueError, match=f"from 1 to 4, the teacher's layers, got {num_layers}"):
            drop_layers(teacher, num_layers)
    for layers in ([], [0, 4], [-1, 2], [2, 1], [1, 1]):
        message = f"increasing indices from 0 to 3, as the teacher has 4 layers, got {layers}"
        with pytest.raises(ValueError, match=re.escape(message)):
            drop_layers(teacher, layers)
