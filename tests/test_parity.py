"""Tests of the comparison with other trainers' losses: the judge, its table, and the peers torch and TRL."""

import dataclasses
import importlib.util
import math

import pytest
import torch

from bench.losses import judge, peers
from bench.losses.cases import VOCAB, Case, all_cases
from bench.losses.table import _nearly_equal, parity_block

CASES = {case.name: case for case in all_cases()}


def mean_kl(batch: judge.Batch) -> torch.Tensor:
    """Computes the forward KL by its definition, in the dtype of the logits."""
    kept = batch.labelled()
    log_p, log_q = ((logits[kept] / batch.temperature).log_softmax(-1) for logits in (batch.student, batch.teacher))
    return (log_q.exp() * (log_q - log_p)).sum() / kept.sum()


KL = judge.Loss("kl", "forward KL", mean_kl, {"divergence": "forward_kl"})


@pytest.mark.parametrize("name", ["plain", "temperature", "ignored", "large"])
def test_parity_judge_agrees_with_the_definition(name):
    row = judge.compare(KL, CASES[name], "float32")
    assert judge.agrees(row["theirs"], "float32")
    assert judge.agrees(row["ours"], "float32")


def test_parity_judge_by_hand():
    """Two outcomes, q = (3/4, 1/4) and p = (1/2, 1/2); all others have probability 0."""
    student, teacher = torch.full((2, 1, VOCAB), -math.inf, dtype=torch.float64)
    student[0, :2] = 0.0
    teacher[0, :2] = torch.tensor([math.log(3), 0.0])
    case = Case("hand", "by hand", student, teacher, torch.tensor([0]))
    exact = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)

    def right(batch):
        log_p = batch.student[:, :2].log_softmax(-1)
        return exact + (torch.tensor([-0.75, -0.25]) * (log_p - log_p.detach())).sum()

    row = judge.compare(dataclasses.replace(KL, call=right), case, "float32")
    assert row["judge"] == pytest.approx(exact, rel=1e-6)
    assert judge.agrees(row["theirs"], "float32")
    assert judge.agrees(row["ours"], "float32")


def test_parity_judge_finds_a_factor_of_the_gradient():
    def scaled(batch):
        value = mean_kl(batch)
        return 2 * value - value.detach()

    row = judge.compare(dataclasses.replace(KL, call=scaled), CASES["plain"], "float32")
    assert row["theirs"]["value"] < 1e-6
    assert row["theirs"]["scale"] == pytest.approx(2)
    assert row["theirs"]["direction"] < 1e-5 < row["theirs"]["gradient"]
    assert not judge.agrees(row["theirs"], "float32")


def test_parity_judge_finds_what_is_not_finite_or_raises():
    row = judge.compare(KL, CASES["padded vocabulary"], "float32")
    assert row["value"] == "nan"
    assert row["theirs"]["value"] is None
    assert not judge.agrees(row["theirs"], "float32")
    assert judge.agrees(row["ours"], "float32")

    def refuse(batch):
        raise NotImplementedError("no such rows")

    row = judge.compare(dataclasses.replace(KL, call=refuse), CASES["plain"], "float32")
    assert row["raised"] == "NotImplementedError: no such rows"


def test_parity_losses_without_a_temperature_or_with_a_head_skip_what_they_cannot_take():
    plain, temperature, padded = (CASES[name] for name in ("plain", "temperature", "padded vocabulary"))
    fixed, linear = (dataclasses.replace(KL, **{name: value}) for name, value in NARROWED.items())
    assert [judge.applies(loss, plain) for loss in (KL, fixed, linear)] == [True, True, True]
    assert [judge.applies(loss, temperature) for loss in (KL, fixed, linear)] == [True, False, True]
    assert [judge.applies(loss, padded) for loss in (KL, fixed, linear)] == [True, True, False]


NARROWED = {"takes_temperature": False, "is_linear": True}


@pytest.mark.parametrize("module", ["torch_functions", "trl"])
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_parity_real_peers_agree_on_plain_rows(module):
    """In bfloat16 GKDTrainer's JSD, which is computed in the dtype of the logits, is off, so float32 alone is held."""
    if module == "trl" and importlib.util.find_spec("trl.experimental.server_distillation") is None:
        pytest.skip("this TRL has no ServerDistillationTrainer")
    found = peers.load_peer(module)
    assert len(found.losses) >= 3
    for loss in found.losses:
        row = judge.compare(loss, CASES["plain"], "float32")
        assert "raised" not in row, loss.name
        assert judge.agrees(row["theirs"], "float32"), (loss.name, loss.options)
        assert judge.agrees(row["ours"], "float32"), (loss.name, loss.options)


def test_parity_peer_that_is_not_installed_has_no_losses(monkeypatch):
    monkeypatch.setitem(peers.DISTRIBUTIONS, "torchtune", "no-such-distribution")
    assert peers.load_peer("torchtune") == judge.Peer("no-such-distribution", None)


def test_parity_sentence_about_rows_that_nearly_agree_counts_what_is_no_number():
    def sentence(*sides, **changes):
        rows = [
            {"case": "nearly equal", "dtype": "float32", "equals": {"divergence": "forward_kl"}, **changes}
            | {side: {"nats": nats} for side, nats in pair.items()}
            for pair in sides
        ]
        return _nearly_equal(rows)

    small, large = {"ours": 1e-8, "theirs": 3e-8}, {"ours": 2e-8, "theirs": 1e-7}
    at_most = "a divergence in float32 is wrong by at most"
    assert f"{at_most} 2e-08 nats (ours) and 1e-07 nats (theirs), which" in sentence(small, large)
    # Neither a value that is not finite nor a loss that raises is an error of 0 nats.
    not_finite, raised = {"ours": 1e-8, "theirs": None}, {"ours": 1e-8}
    found = sentence(small, not_finite, raised)
    assert f"{at_most} 1e-08 nats (ours) and 3e-08 nats (theirs; 2 of 3 give no number), which" in found
    assert "inf nats (theirs; 1 of 1 give no number)" in sentence(raised)
    assert sentence(small, dtype="bfloat16") == sentence(small, case="plain") == ""
    # A cross entropy is no divergence, and of several nats, of which float32 rounds off more.
    assert sentence(small, equals={"ce_weight": 1.0, "kd_weight": 0.0}) == ""


def test_parity_table_by_hand():
    fine = {"value": 1e-7, "gradient": 2e-7, "nats": 1e-7, "scale": 1.0, "direction": 1e-7}
    row = {
        "peer": "other",
        "version": "1.0",
        "function": "kl",
        "options": "beta=0",
        "says": "forward KL",
        "equals": {"divergence": "forward_kl"},
        "squares_temperature": False,
        "shape": {"rows": 2, "vocab": 8, "top_k": None},
        "device": "a CPU",
        "commit": "abc",
        "date": "2026-01-02T00:00:00Z",
        "case": "plain",
        "case_says": "normal logits",
        "dtype": "float32",
        "judge": 0.5,
        "value": 0.5,
        "theirs": fine,
        "ours": fine | {"value": 3e-7},
    }
    lost = fine | {"value": None}
    quarter = fine | {"gradient": 0.75, "scale": 0.25}
    rows = [
        row,
        row | {"case": "hot", "case_says": "temperature 2", "theirs": quarter},
        row | {"dtype": "bfloat16", "case": "inf", "case_says": "-inf", "value": "nan", "theirs": lost},
        row | {"dtype": "bfloat16", "case": "odd", "case_says": "odd", "raised": "TypeError: no", "ours": quarter},
    ]
    saturated = quarter | {"gradient": 4e-4, "scale": -6e13}
    rows.append(row | {"case": "far", "case_says": "far", "theirs": saturated})
    lines = parity_block(rows).splitlines()
    assert "| far | other `kl`, beta=0 | gradient off by 4.0e-04 | agrees |" in lines
    assert '| other `kl`, beta=0 | forward KL | `divergence="forward_kl"`, not times T² |' in lines
    assert "| other `kl`, beta=0 | 1 of 5 | 1e-07 / 2e-07 | 3e-07 / 2e-07 | - | 3e-07 / 8e-01 |" in lines
    assert "| temperature 2 | other `kl`, beta=0 | gradient 0.25 times the right one | agrees |" in lines
    assert "| -inf | other `kl`, beta=0 | agrees | value NaN for 0.5 |" in lines
    assert "| odd | other `kl`, beta=0 | agrees | raises TypeError |" in lines
    assert any(line.startswith("| odd | **ours**") and "gradient off by 7.5e-01" in line for line in lines)
    assert "other 1.0; a CPU, commits abc, 2026-01-02" in lines[-1]
