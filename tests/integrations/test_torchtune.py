"""The loss of the torchtune example in torchtune's own recipe step, against its logits and its own loss."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE, make_model
from test_trainer_mixin import write_store

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"vocab_size": VOCAB_SIZE, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "embed_dim": 16}
SIZES |= {"max_seq_len": 32}
PAD = 0

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield load_recipe("full_finetune_single_device").FullFinetuneRecipeSingleDevice
    sys.modules.pop("torchtune_loss", None)


def load_recipe(name: str) -> ModuleType:
    trainer_package("torchtune")
    root = Path(importlib.util.find_spec("torchtune").origin).parents[1]
    spec = importlib.util.spec_from_file_location(name, root / f"recipes/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    lengths = (7, 12, 9, 12)
    return [{"input_ids": torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist()} for n in lengths]


def batches() -> list[dict[str, torch.Tensor]]:
    """Makes batches as torchtune does: padded on the right, with prompts of two tokens that have no labels."""
    rows = documents()
    made = []
    for pair in (rows[:2], rows[2:]):
        tokens = torch.full((2, 12), PAD)
        labels = torch.full((2, 12), -100)
        for index, row in enumerate(pair):
            ids = torch.tensor(row["input_ids"])
            tokens[index, : len(ids)] = ids
            labels[index, 2 : len(ids)] = ids[2:]
        made.append({"tokens": tokens, "labels": labels})
    return made


def curve(recipe, model, loss, **fields) -> list[float]:
    """Returns the losses of six steps of the recipe's own step; a list of two losses counts half of each."""
    fields |= {"_model": model, "_loss_fn": loss, "ignore_labels_cache": torch.full((2, 1), -100)}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    this = SimpleNamespace(**fields, activations_handling_ctx=torch.autograd.graph.save_on_cpu())
    for batch in batches() * 3:
        value = recipe._loss_step(this, dict(batch))
        value = sum(value) / 2 if isinstance(value, tuple) else value
        losses.append(value.item())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def eager_slim(store):
    """Returns a loss on full logits, from its definition, with the teacher's rows in the order of the labels."""
    of_documents = [
        store[index].teacher[torch.arange(1, len(row["input_ids"]) - 1)] for index, row in documents_of(store)
    ]
    pairs = [of_documents[:2], of_documents[2:]]
    state = {"step": 0}

    def loss(logits, labels):
        rows = pairs[state["step"] % 2]
        state["step"] += 1
        kept = labels != -100
        logprobs, target = logits[kept].log_softmax(-1), labels[kept]
        ids, teacher_logits = (torch.cat([getattr(row, name) for row in rows]) for name in ("ids", "logits"))
        log_t = torch.cat([row.target_logit - row.lse[:, 0] for row in rows])
        ce = -logprobs.gather(-1, target[:, None])[:, 0]
        log_q = teacher_logits.log_softmax(-1)
        kl = (log_q.exp() * (log_q - logprobs.gather(-1, ids.long()))).sum(-1)
        return (ce + (1 - torch.exp(-(log_t + ce).exp())).detach() * kl).mean()

    return loss


def documents_of(store):
    return [(store.find(torch.tensor(row["input_ids"])), row) for row in documents()]


def build(component: str, **arguments):
    from torchtune import config

    torch.manual_seed(0)
    model = config.instantiate(make_config(_component_=component, **SIZES, **arguments))
    with torch.no_grad():
        model.output.weight.mul_(3)
    return model


def make_config(**fields):
    from omegaconf import OmegaConf

    return OmegaConf.create(fields)


def test_cross_entropy_follows_torchtunes_own_curve(recipe, ran):
    from torchtune import config

    loss = config.instantiate(make_config(_component_="torchtune_loss.StoreLoss"))
    model = build("torchtune_loss.without_logits", builder="torchtune.models.llama3.llama3")
    expected = curve(recipe, build("torchtune.models.llama3.llama3"), torch.nn.CrossEntropyLoss(ignore_index=-100))
    assert curve(recipe, model, loss) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    ran("torchtune", "FullFinetuneRecipeSingleDevice", "6 of its steps on the labels, the curve of its own loss")


def test_all_logits_from_a_store_follow_the_curve_of_torchtunes_distillation(recipe, tmp_path, ran):
    from torchtune import config
    from torchtune.modules.loss import ForwardKLLoss

    teacher = make_model(seed=9).eval()
    write_store(tmp_path / "store", teacher, documents(), top_k=VOCAB_SIZE)
    # torchtune's forward KL leaves out the teacher's entropy.
    options = {"divergence": "soft_ce", "token_weight": "none", "ce_weight": 0.5, "kd_weight": 0.5}
    loss = config.instantiate(
        make_config(_component_="torchtune_loss.StoreLoss", store=str(tmp_path / "store"), **options)
    )
    model = build("torchtune_loss.without_logits", builder="torchtune.models.llama3.llama3")
    expected = curve(
        load_recipe("knowledge_distillation_single_device").KDRecipeSingleDevice,
        build("torchtune.models.llama3.llama3"),
        torch.nn.CrossEntropyLoss(ignore_index=-100),
        _kd_loss_fn=ForwardKLLoss(),
        _teacher_model=lambda tokens, mask, input_pos: teacher(tokens).logits,
    )
    assert curve(recipe, model, loss) == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
    ran("torchtune", "KDRecipeSingleDevice", "6 of its steps, whose own curve is that of a store with K = V")


def test_slim_from_a_store_follows_the_eager_curve(recipe, tmp_path, ran):
    from torchtune import config

    store = write_store(tmp_path / "store", make_model(seed=9).eval(), documents())
    loss = config.instantiate(make_config(_component_="torchtune_loss.StoreLoss", store=str(tmp_path / "store")))
    model = build("torchtune_loss.without_logits", builder="torchtune.models.llama3.llama3")
    expected = curve(recipe, build("torchtune.models.llama3.llama3"), eager_slim(store))
    assert curve(recipe, model, loss) == pytest.approx(expected, rel=1e-4)
    ran("torchtune", "FullFinetuneRecipeSingleDevice", "6 of its steps from a store, the curve of an eager loss")
    with pytest.raises(ValueError, match="must not be packed"):
        model(batches()[0]["tokens"], mask=torch.ones(2, 12, 12, dtype=torch.bool))
