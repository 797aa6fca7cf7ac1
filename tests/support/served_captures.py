"""Captures from recorded servers, and what their documents must be."""

from __future__ import annotations

from pathlib import Path

import torch
from support import served

from slimkernels.store import Store
from slimkernels.teacher import ServerReport, capture_server

# What the options of served.OPTIONS leave to a test.
QUICK = {"backoff_s": 0.01, "timeout_s": 5.0}


def run(server, tokenizer, path, name=None, kind="vllm", **options) -> ServerReport:
    """Captures into a store what was recorded of a kind of server under a name, with other options if given."""
    recorded = {entry[0]: entry[2] for entry in served.captures(kind, tokenizer)}[name or "generated"]
    return capture_server(server.url, served.MODEL, tokenizer, path, **served.OPTIONS | recorded | QUICK | options)


def posts(server) -> list[dict]:
    """Returns the requests that the server has seen, those with a body."""
    return [seen for seen in server.seen if seen["body"] is not None]


def assert_same_documents(left: Path, right: Path) -> None:
    """Asserts that two stores hold the same documents and rows, to the last bit."""
    stores = Store(left), Store(right)
    assert len(stores[0]) == len(stores[1]) > 0
    for one, other in zip(*stores, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.teacher.ids, other.teacher.ids)
        assert torch.equal(one.teacher.logits, other.teacher.logits)
        torch.testing.assert_close(one.teacher.target_logit, other.teacher.target_logit, rtol=0, atol=0, equal_nan=True)


def assert_close_to_local(document, model) -> None:
    """Asserts that a document's rows are nearly those of the same model here.

    The server computes in 4 bits (llama.cpp) or bfloat16 (vLLM): means are off by up to 0.11 nats.
    """
    with torch.inference_mode():
        local = model(document.input_ids[None]).logits[0].log_softmax(-1)[document.positions - 1]
    teacher, labels = document.teacher, document.input_ids[document.positions]
    kept = teacher.ids >= 0
    expected = local.gather(-1, teacher.ids.clamp(min=0).long())
    assert (expected - teacher.logits)[kept].abs().mean() < 0.2
    assert (expected.exp() - teacher.logits.exp())[kept].abs().max() < 0.15
    assert (local.gather(-1, labels[:, None])[:, 0] - teacher.target_logit).abs().mean() < 0.3
    # The kept entries are the most probable ones, and what is missing to 1 is the mass of all others.
    mass = teacher.logits.exp().masked_fill(~kept, 0.0).sum(-1)
    most = torch.stack(
        [row.topk(int(count)).values.exp().sum() for row, count in zip(local, kept.sum(-1), strict=True)]
    )
    assert (mass - most)[kept.all(-1)].abs().max() < 0.15
    rest = teacher.rest_lse[:, 0].exp()
    assert torch.allclose(rest.nan_to_num(0.0) + mass, torch.ones(len(mass)), atol=2e-3)
    assert rest.isfinite().sum() >= 0.8 * len(rest)
