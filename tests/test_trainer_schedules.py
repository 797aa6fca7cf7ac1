"""Schedules of the loss's numbers: their values, TAID's rule, the losses that use them, and runs that are continued."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny import make_model, make_store
from test_trainer import make_trainer, training_logs
from test_trainer_methods import make_teacher, online
from test_trainer_mixin import Distiller, make_plain

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.store import Store
from slimkernels.trainer.objective import SCHEDULED
from slimkernels.trainer.schedules import Schedules, parse_schedule

# Every kind of schedule at once; TAID's with a step size at which it leaves its lower bound.
MOVING = {"kd_weight": "linear:0:1", "beta": "taid:0.1:0.9:0.9:0.5", "temperature": "cosine:2:1", "alpha": 0.25}
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "method": "jsd", "rest": "renorm_both"}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_store(tmp_path_factory.mktemp("store") / "train"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, store):
    """A run of six steps, with checkpoints at 3 and 6."""
    trainer = make_trainer(tmp_path_factory.mktemp("finished"), store, **SAVING, schedules=MOVING)
    trainer.train()
    return trainer


def values(text, num_steps: int) -> list[float]:
    schedules = Schedules({"beta": parse_schedule(text, "beta")})
    return [schedules.values(step, num_steps)["beta"] for step in range(num_steps)]


def test_a_schedule_goes_from_its_first_to_its_last_value():
    assert values("linear:0.2:0.9", 5) == pytest.approx([0.2, 0.375, 0.55, 0.725, 0.9])
    assert values("cosine:1:3", 5) == pytest.approx([1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3])
    assert values(0.3, 2) == values("0.3", 2) == values("constant:0.3", 2) == [0.3, 0.3]
    for text in ("linear:0.1:0.7", "cosine:0.1:0.7"):
        assert values(text, 7)[0] == 0.1
        assert values(text, 7)[-1] == 0.7
        assert values(text, 1) == [0.1]


def test_taid_grows_with_the_relative_change_of_the_divergence():
    start, end, alpha, beta, steps = 0.2, 0.8, 0.5, 0.6, 40
    schedules = Schedules({"beta": parse_schedule(f"taid:{start}:{end}:{alpha}:{beta}", "beta")})
    t, momentum, last = start, 0.0, None
    for step in range(steps):
        assert schedules.values(step, steps)["beta"] == pytest.approx(t, rel=1e-12)
        divergence = 3.0 * math.exp(-step / 5) + 0.4 * math.sin(step)
        schedules.observe(divergence, step + 1, steps)
        if last is not None:
            momentum = beta * momentum + (1 - beta) * (last - divergence) / last
            t_linear = start + (end - start) * min((step + 1) / (steps - 1), 1)
            t = min(end, max(t_linear, t + alpha / (1 + math.exp(-momentum)) * (1 - t)))
        last = divergence
    assert t == end
    # A divergence of 0 makes the next change infinite but for rounding, and NaN is passed over.
    before = schedules.state_dict()
    schedules.observe(math.nan, steps, steps)
    assert schedules.state_dict() == before
    for divergence in (0.0, 1.0, 0.0):
        schedules.observe(divergence, steps, steps)
    assert schedules.values(0, steps)["beta"] == end


def test_the_loss_of_a_step_has_the_values_of_that_step(tmp_path, store):
    trainer = make_trainer(tmp_path, store, method="kd", max_steps=4, schedules={"kd_weight": "linear:0:1"})
    trainer.train()
    logs = training_logs(trainer)
    assert [entry["kd_weight"] for entry in logs] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kd_weight"] * entry["kd"], rel=1e-5)


@pytest.mark.parametrize("rows", ["stored", "scored", "in chunks"])
def test_a_constant_schedule_is_the_option(tmp_path, store, rows):
    """A temperature of rest "ghost" takes a log-sum-exp of the teacher at that temperature."""
    make = make_trainer if rows == "stored" else online
    options = {"rest": "renorm" if rows == "stored" else "ghost", "teacher_in_chunks": rows == "in chunks"}
    options |= {"method": "kd", "max_steps": 3} | ({} if rows == "stored" else {"teacher_top_k": 11})
    trainers = [make(tmp_path / name, store, **options, **given) for name, given in
                (("a", {"temperature": 2.0}), ("b", {"schedules": {"temperature": 2}}))]  # fmt: skip
    for trainer in trainers:
        trainer.train()
    fixed, scheduled = map(training_logs, trainers)
    assert [entry["loss"] for entry in fixed] == [entry["loss"] for entry in scheduled]
    assert {entry["temperature"] for entry in scheduled} == {2.0}


def test_the_divergence_is_logged_where_it_has_no_weight_yet(tmp_path, store):
    """The loss makes the rows of this teacher, and makes none at a weight of 0."""
    trainer = online(tmp_path, store, method="kd", max_steps=2, schedules={"kd_weight": "linear:0:1"})
    trainer.train()
    first, second = training_logs(trainer)
    assert (first["loss"], first["kd_weight"]) == (pytest.approx(first["ce"], rel=1e-6), 0.0)
    assert first["kd"] > 0.1
    assert first["teacher_entropy"] == pytest.approx(second["teacher_entropy"], rel=0.2)


def test_a_run_continues_exactly_where_it_stopped(tmp_path, store, finished):
    run = tmp_path / "run"
    shutil.copytree(Path(finished.args.output_dir) / "checkpoint-3", run / "checkpoint-3")
    resumed = make_trainer(run, store, **SAVING, schedules=MOVING)
    resumed.train(resume_from_checkpoint=True)

    def seen(trainer) -> list[dict]:
        return [{n: v for n, v in e.items() if n != "labels_per_second"} for e in training_logs(trainer)]

    assert seen(resumed) == seen(finished)
    assert all(map(torch.equal, resumed.model.parameters(), finished.model.parameters()))
    grown = [entry["beta"] for entry in training_logs(finished)]
    # TAID's value has left its lower bound, so that the state counts.
    assert any(value > 0.1 + 0.8 * step / 5 + 0.01 for step, value in enumerate(grown))


def test_a_checkpoint_without_the_state_is_refused(tmp_path, store, finished):
    shutil.copytree(Path(finished.args.output_dir) / "checkpoint-3", tmp_path / "checkpoint-3")
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    content = json.loads(path.read_text())
    del content["stateful_callbacks"]["slimkernels.schedules"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must be a checkpoint with the state of the schedules"):
        make_trainer(tmp_path, store, **SAVING, schedules=MOVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": MOVING | {"kd_weight": "linear:0:2"}}, r"schedules=.*'linear', 0.0, 1.0.*'linear', 0.0, 2.0"),
        ({"schedules": None}, "schedules=.* there, {} here"),
        # The learning rate is constant, but the schedules depend on the length.
        ({"max_steps": 9}, "max_steps=6 there, 9 here"),
    ],
)
def test_a_run_is_another_with_other_schedules(tmp_path, store, finished, options, message):
    shutil.copytree(finished.args.output_dir, tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", store, **SAVING | {"schedules": MOVING} | options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)


def test_the_mixin_has_schedules_too(tmp_path):
    objective = sk.SlimObjective("kd", schedules={"kd_weight": "taid:0.4:1"})
    trainer = make_plain(tmp_path, Distiller, make_model(), teacher_model=make_teacher(), objective=objective)
    trainer.train()
    assert [e["kd_weight"] for e in training_logs(trainer)] == pytest.approx([0.4, 0.4, 0.7, 0.85, 1.0])


def test_every_number_of_the_loss_can_have_a_schedule():
    options = sk.SlimObjective().loss_options
    # None is the default of a number that each divergence has its own of.
    assert set(SCHEDULED) == {name for name, value in options.items() if value is None or type(value) is float}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedules": {"rest": 1}}, "schedules must name numbers of the loss, kd_weight, .*, got 'rest'"),
        ({"schedules": {"beta": "liner:0:1"}}, "schedule of beta must be a number, 'linear:FROM:TO'.*got 'liner:0:1'"),
        ({"schedules": {"beta": "linear:0"}}, "schedule of beta must be a number.*got 'linear:0'"),
        ({"schedules": {"beta": "linear:0:inf"}}, "schedule of beta must be a number.*got 'linear:0:inf'"),
        ({"schedules": {"beta": True}}, "schedule of beta must be a number.*got True"),
        ({"schedules": {"beta": "taid:0.9:0.1"}}, r"schedule of beta must grow within \[0, 1\]"),
        ({"schedules": {"beta": "taid:0.1:0.9:2"}}, r"schedule of beta must have ALPHA in \[0, 1\]"),
        ({"schedules": {"beta": "linear:0.1:2"}}, r"schedule of beta leaves its range: beta must be in \(0, 1\)"),
        ({"schedules": {"beta": 0.2}, "beta": 0.3}, "beta must not be given with a schedule of it, got 0.3 and 0.2"),
        ({"schedules": {"beta": 0.2}, "method": "sft"}, "with method 'sft', which has no teacher, got 'beta': 0.2"),
        ({"schedules": {"ce_weight": "taid:0.1:1"}, "method": "sft"}, "not 'taid' with method 'sft'"),
        ({"schedules": {"temperature": "linear:1:2"}}, "temperature must not have a schedule with rest='ghost'"),
    ],
)
def test_a_wrong_schedule_is_one_sentence(tmp_path, store, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, store, **{"method": "jsd"} | options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule kd_weight", "must be NAME=SCHEDULE, as in kd_weight=linear:0:1, got 'kd_weight'"),
        ("--schedule beta=0.1 --schedule beta=0.2", "--schedule must name an option once, got 'beta' twice"),
        ("--schedule beta=linear:0.1:0.9", "--schedule beta has no meaning without the divergence jsd"),
        ("--schedule kd_weight=linear:0:x", "the schedule of --kd-weight must be a number, 'linear:FROM:TO'"),
        ("--schedule kd_weight=linear:0:1 --kd-weight 2", "--kd-weight must not be given with a schedule of it"),
        ("--order hard-first", "--order: invalid choice: 'hard-first'"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, store, capsys, words, message):
    command = ["train", "--store", str(store.path), "--method", "kd", "--out", str(tmp_path), *words.split()]
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
