"""Models patched to compute their loss without logits, against the same models unpatched."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from support.families import FAMILIES, VOCAB_SIZE, make_family
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import slimkernels as sk
from slimkernels.models.make_student import make_student

pytestmark = [
    # peft still calls functions that transformers renamed, and warns that merging an adapter would untie Gemma's head.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def make_batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Makes two right-padded sequences whose first tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (2, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def loss_and_gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, rtol=1e-4, atol=1e-6) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            actual[1][name], gradient, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def generate(model) -> torch.Tensor:
    prompt = torch.tensor([[5, 6, 7]])
    router_logits = {"output_router_logits": False} if hasattr(model.config, "output_router_logits") else {}
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, **router_logits
    )


class NoLogits(TorchDispatchMode):
    """A mode that fails on a tensor (..., V) with as many rows as the batch has tokens."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.num_tokens = num_tokens

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCAB_SIZE,):
                assert tensor.numel() < self.num_tokens * VOCAB_SIZE, (func, tensor.shape)
        return out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_eager_loss_and_gradients(family):
    model, batch = make_family(family), make_batch()
    expected = loss_and_gradients(model, **batch)
    assert any("head" in name or "embed" in name or "wte" in name for name in expected[1])
    logits = model.eval()(**batch).logits
    tokens = generate(model)
    model.train()

    assert sk.patch_model(model) is model
    assert_same(loss_and_gradients(model, **batch), expected)
    with NoLogits(batch["input_ids"].numel()):
        output = model(**batch)
        output.loss.backward()
    assert output.logits is None
    assert "logits" not in output
    model.eval()
    torch.testing.assert_close(model(**batch).logits, logits)
    assert torch.equal(generate(model), tokens)
    model.train()

    sk.unpatch_model(model)
    assert_same(loss_and_gradients(model, **batch), expected, rtol=0, atol=0)
    assert model(**batch).logits.shape == (2, 12, VOCAB_SIZE)
    assert "forward" not in vars(model)
    assert "_loss_function" not in vars(model)


def test_no_logits_would_notice_them():
    with pytest.raises(AssertionError), NoLogits(24):
        make_family("llama")(**make_batch())


@pytest.mark.parametrize(
    "change",
    [
        {"num_items_in_batch": torch.tensor(37)},
        {"num_items_in_batch": 5},
        {"shift_labels": torch.arange(24).view(2, 12)},
        {"labels": torch.full((2, 12), -100), "num_items_in_batch": 3},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2]] * 2), "attention_mask": None},
    ],
    ids=["num_items", "num_items_int", "shift_labels", "no_labels", "packed"],
)
def test_arguments_of_the_loss_mean_the_same(change):
    model, batch = make_family("llama"), make_batch() | change
    expected = loss_and_gradients(model, **batch)
    assert_same(loss_and_gradients(sk.patch_model(model), **batch), expected)


def test_gradient_checkpointing_changes_nothing():
    model, batch = make_family("qwen2"), make_batch()
    expected = loss_and_gradients(model, **batch)
    sk.patch_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(loss_and_gradients(model, **batch), expected)


def relative_error(actual: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    return max(float((actual[n].float() - truth[n]).norm() / truth[n].norm()) for n in truth)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_bfloat16_is_as_near_to_float32_as_eager_is(family):
    batch = make_batch()
    truth = make_family(family).to(torch.bfloat16).float()
    loss, gradients = loss_and_gradients(truth, **batch)
    model = make_family(family, dtype=torch.bfloat16)
    eager_loss, eager = loss_and_gradients(model, **batch)
    patched_loss, patched = loss_and_gradients(sk.patch_model(model), **batch)
    assert abs(patched_loss - loss) <= abs(eager_loss - loss) + 5e-3 * loss
    assert relative_error(patched, gradients) <= 1.2 * relative_error(eager, gradients) + 5e-3


def test_autocast_multiplies_in_bfloat16():
    model, batch = make_family("llama"), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        actual = sk.patch_model(model)(**batch).loss
    torch.testing.assert_close(actual, expected, rtol=5e-3, atol=0)
    assert actual != model(**batch).loss


def test_a_bfloat16_head_has_its_gradient_in_a_float16_region():
    """Compares the gradient of tokens that are no label: it is far below the smallest number of float16."""
    model = make_student(vocab_size=16_000, hidden_size=8, num_heads=2, num_layers=1, dtype=torch.bfloat16)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 10)
    truth = copy.deepcopy(model).double()
    ids = torch.randint(100, (1, 256), generator=torch.Generator().manual_seed(0))
    (truth(input_ids=ids, labels=ids).loss * 65536).backward()
    with torch.autocast("cpu", torch.float16):
        loss = sk.patch_model(model)(input_ids=ids, labels=ids).loss
    (loss * 65536).backward()
    expected, actual = truth.lm_head.weight.grad[100:], model.lm_head.weight.grad[100:]
    assert (actual - expected).norm() <= 2e-2 * expected.norm()


def test_a_copy_of_a_patched_model_is_its_own():
    model, batch = sk.patch_model(make_family("llama")), make_batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    eager = sk.unpatch_model(copy.deepcopy(twin))
    torch.testing.assert_close(twin(**batch).loss, eager(**batch).loss)
    assert abs(twin(**batch).loss - model(**batch).loss) > 0.1


def test_patched_model_saves_loads_and_shows_its_signature(tmp_path):
    model, batch = make_family("llama"), make_batch()
    signature = inspect.signature(model.forward)
    sk.patch_model(model)
    assert inspect.signature(model.forward) == signature
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).train()
    torch.testing.assert_close(loaded(**batch).loss, model(**batch).loss)
    pickle.loads(pickle.dumps(model.state_dict()))  # noqa: S301 -- written here


def test_labels_by_position_and_tuples(recwarn):
    model, batch = make_family("llama"), make_batch()
    expected = model(**batch).loss
    sk.patch_model(model)
    positional = (batch["input_ids"], batch["attention_mask"], None, None, None, batch["labels"])
    assert model(*positional).logits is None
    torch.testing.assert_close(model(*positional).loss, expected)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], expected)


def test_evaluation_keeps_the_logits_unless_asked():
    model, batch = sk.patch_model(make_family("llama")).eval(), make_batch()
    expected = model(**batch)
    assert expected.logits is not None
    sk.unpatch_model(model)
    sk.patch_model(model, in_evaluation=True)
    output = model(**batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected.loss)
    assert model(input_ids=batch["input_ids"]).logits.shape == (2, 12, VOCAB_SIZE)


def test_compiled_decoder_inside_a_patched_model():
    """``torch.compile`` of the layers, where the time goes; the patched forward around them stays eager."""
    model, batch = make_family("llama"), make_batch()
    expected = model(**batch).loss
    model.model.compile(backend="aot_eager")
    torch.testing.assert_close(sk.patch_model(model)(**batch).loss, expected)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**batch).loss, expected)


def with_hook():
    model = make_family("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


def with_own_loss():
    model = make_family("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    return model


def with_inline_loss():
    class Inline(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output["loss"] = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
            return output

    return Inline(make_family("llama").config)


def encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def without_head():
    return make_family("llama").model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_hook, "logits of LlamaForCausalLM are not softcap.*call slimkernels.slim_loss"),
        (with_own_loss, "must be transformers' ForCausalLMLoss, got <lambda>"),
        (with_inline_loss, "Inline does not compute its loss with its loss_function"),
        (encoder_decoder, "T5ForConditionalGeneration does not compute its loss"),
        (without_head, "LlamaModel must be one torch.nn.Linear|causal language model with output embeddings"),
    ],
)
def test_a_model_with_another_loss_is_refused_and_left_as_it_was(make, message):
    model = make()
    before = dict(vars(model))
    with pytest.raises(ValueError, match=message):
        sk.patch_model(model)
    assert dict(vars(model)) == before


def test_patching_twice_or_not_at_all_is_an_error():
    model = sk.patch_model(make_family("llama"))
    with pytest.raises(ValueError, match="already patched: call unpatch_model"):
        sk.patch_model(model)
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="replaced again after patch_model"):
        sk.unpatch_model(model)
    model.forward = forward
    sk.unpatch_model(model)
    with pytest.raises(ValueError, match="not patched: nothing to undo"):
        sk.unpatch_model(model)
    with pytest.raises(TypeError, match="transformers causal LM or PEFT's wrapper of one, got Linear"):
        sk.patch_model(torch.nn.Linear(2, 2))


def test_sliced_logits_with_labels_are_refused():
    model, batch = sk.patch_model(make_family("llama")), make_batch()
    with pytest.raises(ValueError, match=r"one label for each hidden state .*\(2, 3\), got \(2, 12\)"):
        model(**batch, logits_to_keep=3)
    assert model(**batch).logits is None


LORA = {
    "layers": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head-dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.3},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("placement", LORA)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_lora_is_trained_as_it_is_by_the_eager_loss(family, placement):
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **LORA[placement])
    model, batch = peft.get_peft_model(make_family(family), config), make_batch()

    def run():
        torch.manual_seed(11)  # for the adapter's dropout
        return loss_and_gradients(model, **batch)

    expected = run()
    assert any("lm_head" in name for name in expected[1]) == (placement != "layers")
    assert all(gradient.abs().sum() > 0 for gradient in expected[1].values())
    sk.patch_model(model)
    assert_same(run(), expected)
    with model.disable_adapter():
        off = model(**batch).loss
    sk.unpatch_model(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss, off)
    assert abs(off - expected[0]) > 1e-4


def test_prompt_tuning_is_trained_as_by_the_eager_loss():
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, batch = peft.get_peft_model(make_family("llama"), config), make_batch()
    expected = loss_and_gradients(model, **batch)
    assert_same(loss_and_gradients(sk.patch_model(model), **batch), expected)
    assert len(expected[1]) == 1


def test_an_adapter_that_would_not_be_trained_is_refused():
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="'default' on the head of LlamaForCausalLM must be a plain one"):
        sk.patch_model(peft.get_peft_model(make_family("llama"), config))
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"output embeddings of LlamaForCausalLM must be one torch\.nn\.Linear"):
        sk.patch_model(peft.get_peft_model(make_family("llama"), config))
