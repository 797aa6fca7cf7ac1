"""SlimLoss in torchtitan's own chunked loss, against torchtitan's cross entropy and a dense loss."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE

trainer_package("torchtitan")
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, BATCH, LENGTH = 3, 2, 12


class Decoder(torch.nn.Module):
    """Hidden states (B, T, D) of tokens (B, T), as torchtitan's decoders return them to its chunked loss."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tok_embeddings = torch.nn.Embedding(VOCAB_SIZE, 16)
        self.lm_head = torch.nn.Linear(16, VOCAB_SIZE, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tok_embeddings(tokens).tanh()


def batches() -> list[dict]:
    generator, teacher = torch.Generator().manual_seed(1), Decoder(seed=7)
    made = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB_SIZE, (BATCH, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[0, :5] = -100
        with torch.no_grad():
            logits = 3 * teacher.lm_head(teacher(tokens[:, :-1]))
        made.append({"inputs": tokens[:, :-1], "labels": labels, "teacher": logits.log_softmax(-1)})
    return made


def curve(loss_config, inputs_of) -> list[float]:
    from torchtitan.components.loss import ChunkedLossWrapper

    model = Decoder(seed=0)
    loss_fn = ChunkedLossWrapper.Config(num_chunks=4, loss_fn=loss_config).build(compile_config=None)
    loss_fn.set_lm_head(model.lm_head)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for batch in batches():
        valid = batch["labels"].ne(-100).sum()
        loss, _ = loss_fn(model(batch["inputs"]), batch["labels"], valid, **inputs_of(batch))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def rows(batch: dict) -> dict:
    kept = batch["teacher"].topk(VOCAB_SIZE)
    return {"teacher_ids": kept.indices, "teacher_logprobs": kept.values}


def test_all_logits_give_the_curve_of_dense_losses(ran):
    from torchtitan.components.loss import BaseLoss, CrossEntropyLoss

    from slimkernels.integrations.torchtitan import SlimLoss

    class DenseLoss(BaseLoss):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseLoss.Config):
            pass

        def __init__(self, config, *, compile_config=None) -> None:
            self.compile_config = compile_config

        def __call__(self, pred, labels, global_valid_tokens=None, *, teacher, **_unused):
            is_label = labels.ne(-100)
            logprobs, log_q = pred[is_label].log_softmax(-1), teacher[is_label]
            ce = torch.nn.functional.nll_loss(logprobs, labels[is_label], reduction="sum")
            return (ce + (log_q.exp() * (log_q - logprobs)).sum()) / global_valid_tokens, {}

    own = curve(CrossEntropyLoss.Config(), lambda batch: {})
    assert curve(SlimLoss.Config(kd_weight=0.0), rows) == pytest.approx(own, rel=1e-5)
    dense = curve(DenseLoss.Config(), lambda batch: {"teacher": batch["teacher"]})
    assert curve(SlimLoss.Config(token_weight="none", rest="ghost"), rows) == pytest.approx(dense, rel=1e-4)
    assert dense != pytest.approx(own, rel=1e-2)
    ran("torchtitan", "ChunkedLossWrapper", f"{STEPS} steps of a loop with K = V, the curve of dense losses")


def test_what_it_cannot_honour_it_refuses():
    from torchtitan.config import CompileConfig

    from slimkernels.integrations.torchtitan import SlimLoss

    loss = SlimLoss.Config().build(compile_config=None)
    with pytest.raises(ValueError, match="teacher_ids"):
        loss(torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="compile"):
        SlimLoss.Config().build(compile_config=CompileConfig(enable=True, components=["loss"]))


def test_a_trainer_without_rows_of_a_teacher_says_so():
    from slimkernels.integrations.torchtitan import SlimTrainer

    trainer = object.__new__(SlimTrainer)  # a whole one needs a GPU
    with pytest.raises(ValueError, match=r"must have .*teacher_ids.*, got further entries \['positions'\]"):
        trainer._forward_backward_body(torch.zeros(1), torch.zeros(1), torch.ones(1), {"positions": torch.zeros(1)})
