"""The ids on which teacher and student are compared: the sets, both trainers on each of them, and padded heads."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import hostile_rows, sparse_fields
from support.tiny import TOP_K, VOCAB_SIZE, make_model, make_store
from test_trainer import RECIPE, make_trainer, training_logs
from test_trainer_mixin import Distiller, make_plain, make_rows, write_store

import slimkernels as sk
from slimkernels import reference
from slimkernels.models.batch import SlimCollator
from slimkernels.models.head_loss import BatchTeacher, loss_of_batch
from slimkernels.store import Store
from slimkernels.trainer import SlimConfig, SlimTrainer
from slimkernels.trainer.support import intersection, student_ids, union

F64 = torch.float64
SUPPORTS = ("teacher", "student", "union", "intersection")
STUDENT_TOP_K = 7


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_store(tmp_path_factory.mktemp("store") / "train"))


def supported(teacher_logits, student_logits, support, top_k, student_top_k, **options) -> sk.SparseLogits:
    """Computes ``reference.supported_logits`` with the package's ops."""
    vocab_size = teacher_logits.shape[-1]
    ids = sk.topk_logits(student_logits, student_top_k).ids
    rows = sk.topk_logits(teacher_logits, top_k, **options)
    if support == "teacher":
        return rows
    if support == "intersection":
        return intersection(rows, ids)
    return sk.gather_logits(
        teacher_logits, ids if support == "student" else union(rows.ids, ids, vocab_size), **options
    )


def test_the_sets_of_a_worked_row():
    teacher = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0]], dtype=F64)
    student = torch.tensor([[0.0, 5.0, 4.0, 3.0, 1.0]], dtype=F64)
    expected = {
        "teacher": ([[0, 2]], [[3.0, 2.0]]),
        "student": ([[1, 2, 3]], [[1.0, 2.0, 0.0]]),
        "union": ([[0, 1, 2, 3, -1]], [[3.0, 1.0, 2.0, 0.0, 0.0]]),
        "intersection": ([[2, -1]], [[2.0, 0.0]]),
    }
    for support, (ids, logits) in expected.items():
        for rows in (
            supported(teacher, student, support, 2, 3),
            reference.supported_logits(teacher, student, support, top_k=2, student_top_k=3),
        ):
            assert rows.ids.tolist() == ids
            assert rows.logits.tolist() == logits
            kept = [i for i in ids[0] if i >= 0]
            rest = torch.logsumexp(teacher[0, [i for i in range(5) if i not in kept]], -1)
            assert rows.rest_lse.item() == pytest.approx(rest.item(), rel=1e-12)


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(("top_k", "student_top_k"), [(1, 1), (9, 30), (30, 9), (203, 5)])
def test_the_sets_of_hostile_rows_are_those_of_the_reference(support, top_k, student_top_k):
    teacher = torch.stack(list(hostile_rows(203, F64).values()))
    student = torch.stack(list(hostile_rows(203, F64, seed=3).values())).roll(11, 0)
    options = {"target": torch.arange(len(teacher)) % 203, "temperatures": (1.0, 1.7)}
    actual = supported(teacher, student, support, top_k, student_top_k, **options)
    expected = reference.supported_logits(
        teacher, student, support, top_k=top_k, student_top_k=student_top_k, **options
    )
    for one, other in zip(sparse_fields(actual), sparse_fields(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_ragged_rows_keep_no_padding_and_every_id_once():
    ids = torch.tensor([[1, 4, -1], [0, 2, 5], [-1, -1, -1]], dtype=torch.int32)
    others = torch.tensor([[4, -1], [2, 3], [1, -1]], dtype=torch.int32)
    assert union(ids, others, 9).tolist() == [[1, 4, -1, -1, -1], [0, 2, 3, 5, -1], [1, -1, -1, -1, -1]]
    logits = torch.randn(3, 9, dtype=F64)
    rows = sk.gather_logits(logits, ids, temperatures=(1.0, 2.0))
    common = intersection(rows, others)
    kept = torch.tensor([[4, -1, -1], [2, -1, -1], [-1, -1, -1]], dtype=torch.int32)
    expected = sk.gather_logits(logits, kept, temperatures=(1.0, 2.0))
    for one, other in zip(sparse_fields(common), sparse_fields(expected), strict=True):
        torch.testing.assert_close(one, other)
    common.validate(9)


def test_a_rest_that_is_not_known_stays_unknown():
    rows = sk.topk_logits(torch.randn(3, 9), 4)
    unknown = sk.SparseLogits(rows.ids, rows.logits, rows.lse, rest_lse=torch.full_like(rows.lse, math.nan))
    assert intersection(unknown, rows.ids[:, :2]).rest_lse.isnan().all()
    assert intersection(sk.SparseLogits(rows.ids, rows.logits, rows.lse), rows.ids[:, :2]).rest_lse is None


def test_the_students_ids_leave_out_what_pads_its_head():
    hidden, weight, bias = torch.randn(4, 8), torch.randn(20, 8), torch.randn(20)
    weight[15:] *= 100
    student = {"hidden": hidden, "weight": weight, "bias": bias, "softcap": None, "logit_scale": 1.0}
    expected = (hidden @ weight.T + bias)[:, :15].topk(6).indices.sort().values
    assert student_ids(lambda: student, 6, 15).tolist() == expected.tolist()
    assert student_ids(lambda: student, 16, 15).shape == (4, 15)


def dense_losses(model, teacher, steps, objective, student_top_k=STUDENT_TOP_K, top_k=TOP_K) -> list[float]:
    """Returns the losses of an eager loop over (ids, positions) of the documents of each step, from full logits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["learning_rate"], weight_decay=0.0)
    losses = []
    for documents in steps:
        sums, count = 0.0, 0
        for ids, positions in documents:
            logits = model(ids[None]).logits[0, positions - 1].double()
            with torch.no_grad():
                teacher_logits = teacher(ids[None]).logits[0, positions - 1].double()
            common = min(logits.shape[-1], teacher_logits.shape[-1])
            rows = reference.supported_logits(
                teacher_logits[:, :common],
                logits.detach()[:, :common],
                objective.support,
                top_k=min(top_k, common),
                student_top_k=student_top_k,
                target=ids[positions],
                temperatures=(1.0, objective.temperature),
            )
            sums = (
                sums + reference.slim_loss(logits, ids[positions], rows, reduction="sum", **objective.loss_options).loss
            )
            count += len(positions)
        loss = sums / count
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


OBJECTIVES = [
    {"method": "reverse_kl"},
    {"method": "jsd", "temperature": 1.7, "rest": "renorm_both"},
    {"method": "slim", "rest": "zero"},
]


def online(output, store, model=None, teacher=None, **options) -> SlimTrainer:
    args = SlimConfig(output_dir=str(output), **RECIPE | {"max_steps": 3, "gradient_accumulation_steps": 2} | options)
    model = make_model() if model is None else model
    teacher = make_model(seed=1234) if teacher is None else teacher
    return SlimTrainer(model=model, args=args, train_dataset=store, teacher_model=teacher)


def steps_of(store, num_steps: int = 3, size: int = 8):
    documents = [(store[i].input_ids, store[i].positions) for i in range(len(store))]
    return [[documents[(size * step + i) % len(store)] for i in range(size)] for step in range(num_steps)]


@pytest.mark.parametrize("support", SUPPORTS[1:])
@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda options: options["method"])
def test_slim_trainer_follows_the_dense_curve_on_every_support(tmp_path, store, support, options, caplog):
    options = options | {"support": support, "teacher_top_k": TOP_K, "student_top_k": STUDENT_TOP_K}
    trainer = online(tmp_path, store, **options)
    trainer.train()
    expected = dense_losses(make_model(), make_model(seed=1234), steps_of(store), sk.SlimObjective(**options))
    assert [entry["loss"] for entry in training_logs(trainer)] == pytest.approx(expected, rel=1e-4)
    assert support == "union" or "of the labels are among the ids" not in caplog.text
    others = dense_losses(make_model(), make_model(seed=1234), steps_of(store, 1), sk.SlimObjective(options["method"]))
    assert others[0] != pytest.approx(expected[0], rel=1e-3)


@pytest.mark.parametrize("support", SUPPORTS[1:])
def test_the_mixin_follows_the_dense_curve_on_every_support(tmp_path, support):
    objective = sk.SlimObjective("reverse_kl", support=support, teacher_top_k=TOP_K, student_top_k=STUDENT_TOP_K)
    rows = make_rows()
    options = {"train_sampling_strategy": "sequential"}
    trainer = make_plain(
        tmp_path, Distiller, make_model(), rows, teacher_model=make_model(seed=9), objective=objective, options=options
    )
    trainer.train()
    documents = [(torch.tensor(row["input_ids"]), torch.arange(2, len(row["input_ids"]))) for row in rows]
    steps = [documents[4 * step : 4 * step + 4] for step in range(5)]
    expected = dense_losses(make_model(), make_model(seed=9), steps, objective)
    assert [entry["loss"] for entry in training_logs(trainer)] == pytest.approx(expected, rel=1e-4)
    metrics = trainer.evaluate(rows)
    assert 0 < metrics["eval_label_kept"] < 1


def test_a_store_gives_the_intersection_that_its_teacher_gives(tmp_path, store):
    options = {"method": "reverse_kl", "support": "intersection", "max_steps": 3, "gradient_accumulation_steps": 2}
    curves = []
    for trainer in (
        make_trainer(tmp_path, store, **options),
        make_trainer(tmp_path, store, **options | {"student_top_k": TOP_K}),
        online(tmp_path, store, **options | {"teacher_top_k": TOP_K}),
    ):
        trainer.train()
        curves.append([(entry["loss"], entry["label_kept"]) for entry in training_logs(trainer)])
    assert curves[0] == curves[1]
    for one, other in zip(curves[0], curves[2], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_the_mixin_finds_the_intersection_in_a_store(tmp_path):
    rows, teacher = make_rows(), make_model(seed=9).eval()
    objective = sk.SlimObjective("reverse_kl", support="intersection", teacher_top_k=9, student_top_k=9)
    stored = sk.SlimObjective("reverse_kl", support="intersection")
    given = {"teacher_store": write_store(tmp_path / "store", teacher, rows), "objective": stored}
    curves = []
    for arguments in (given, {"teacher_model": teacher, "objective": objective}):
        trainer = make_plain(tmp_path, Distiller, make_model(), rows, **arguments)
        trainer.train()
        curves.append([entry["loss"] for entry in training_logs(trainer)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("of_student", [0, 31])
@pytest.mark.parametrize(
    "options",
    [{"method": "kd", "token_weight": "none"}, {"method": "slim"}]
    + [{"method": "reverse_kl", "support": support} for support in SUPPORTS[1:]],
    ids=lambda options: options.get("support", options["method"]),
)
def test_a_head_that_is_padded_more_trains_on_the_common_ids(tmp_path, store, of_student, options):
    def padded(model, rows):
        if rows:
            # Rows that are trained on or taken for tokens would dominate.
            model.resize_token_embeddings(VOCAB_SIZE + rows, mean_resizing=False)
            with torch.no_grad():
                model.get_output_embeddings().weight[VOCAB_SIZE:] *= 50
        return model

    def models():
        torch.manual_seed(0)
        return padded(make_model(), of_student), padded(make_model(seed=1234), 31 - of_student)

    top_k = {"kd": VOCAB_SIZE, "slim": math.ceil(0.05 * VOCAB_SIZE)}.get(options["method"], TOP_K)
    if "support" in options:
        options = options | {"teacher_top_k": TOP_K, "student_top_k": STUDENT_TOP_K}
    model, teacher = models()
    trainer = online(tmp_path, store, model, teacher, **options)
    trainer.train()
    expected = dense_losses(*models(), steps_of(store), sk.SlimObjective(**options), top_k=top_k)
    assert [entry["loss"] for entry in training_logs(trainer)] == pytest.approx(expected, rel=1e-4)


def test_rows_that_the_loss_makes_train_as_rows_that_are_held(tmp_path, store):
    curves = []
    for in_chunks in (False, True):
        trainer = online(tmp_path, store, teacher_top_k=TOP_K, teacher_in_chunks=in_chunks)
        trainer.train()
        assert all(("label_kept" in entry) != in_chunks for entry in training_logs(trainer))
        curves.append([(entry["loss"], entry["kd"], entry["teacher_mass"]) for entry in training_logs(trainer)])
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("trained_by", ["SlimTrainer", "the mixin"])
def test_a_teacher_of_the_whole_vocabulary_is_never_held(tmp_path, store, trained_by):
    if trained_by == "SlimTrainer":
        trainer = online(tmp_path, store, method="kd", max_steps=1)
    else:
        trainer = make_plain(
            tmp_path,
            Distiller,
            make_model(),
            teacher_model=make_model(seed=9),
            objective="kd",
            options={"max_steps": 1},
        )
    with torch.profiler.profile() as profile:
        trainer.train()
    names = {event.name for event in profile.events()}
    assert "slimkernels::slim_loss_rows" in names
    assert not {"slimkernels::linear_topk_logits", "slimkernels::topk_logits_rows"} & names
    assert training_logs(trainer)[0]["label_kept"] == 1


def test_rows_are_made_once_where_the_backward_pass_makes_the_gradient(store):
    batch = SlimCollator(with_teacher=False)([store[0], store[1]])
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(VOCAB_SIZE, 4, generator=generator), torch.randn(len(batch["target"]), 4, generator=generator)
    losses = []
    for dtype in (torch.float32, torch.float16):
        model = make_model().to(dtype)
        teacher = BatchTeacher(lambda *_: sk.HeadTeacher(head[1], head[0], top_k=5))
        with torch.profiler.profile() as profile:
            loss = loss_of_batch(model, batch, teacher=teacher, temperature=1.7).loss
            loss.backward()
        losses.append(loss.item())
        names = [event.name for event in profile.events()]
        assert names.count("slimkernels::linear_topk_logits") == 1
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"support": "both"}, "support must be one of"),
        ({"student_top_k": 4}, "student_top_k must stay None with support 'teacher', got 4"),
        ({"support": "student", "student_top_k": 0}, "student_top_k must be an int of at least 1, got 0"),
        ({"method": "sft", "support": "student"}, "support must stay 'teacher' with method 'sft'"),
        ({"method": "sampled", "support": "union"}, "support must stay 'teacher' with method 'sampled'"),
        ({"support": "union", "teacher_in_chunks": True}, "teacher_in_chunks must be False with support 'union'"),
    ],
)
def test_an_objective_refuses_a_support_without_meaning(fields, message):
    with pytest.raises(ValueError, match=message):
        sk.SlimObjective(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"support": "student"}, "support 'student' must choose among the 97 ids .*: set student_top_k or"),
        (
            {"support": "union", "student_top_k": 4},
            "support 'union' must choose among the 97 ids .*: set teacher_top_k",
        ),
        ({"support": "student", "student_top_k": 98}, "student_top_k must be at most the vocabulary's 97, got 98"),
    ],
)
def test_an_online_teacher_refuses_a_support_of_everything(tmp_path, store, fields, message):
    with pytest.raises(ValueError, match=message):
        online(tmp_path, store, method="reverse_kl", **fields)


@pytest.mark.parametrize("support", ["student", "union"])
def test_a_store_refuses_ids_that_it_does_not_hold(tmp_path, store, support):
    message = f"support must be 'teacher' or 'intersection' with a store, .*its own ids only, got '{support}'"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, store, method="reverse_kl", support=support, student_top_k=4)
    rows, teacher = make_rows(), make_model(seed=9).eval()
    given = {"teacher_store": write_store(tmp_path / "store", teacher, rows)}
    with pytest.raises(ValueError, match=message):
        make_plain(tmp_path, Distiller, make_model(), rows, objective=sk.SlimObjective(support=support), **given)


def test_a_store_that_does_not_say_what_it_keeps_needs_the_students_number(tmp_path, store):
    class Documents(torch.utils.data.Dataset):
        def __len__(self):
            return len(store)

        def __getitem__(self, index):
            return store[index]

    options = {"method": "reverse_kl", "support": "intersection", "max_steps": 1}
    with pytest.raises(ValueError, match="student_top_k must be given where"):
        make_trainer(tmp_path, Documents(), **options)
    trainer = make_trainer(tmp_path, Documents(), student_top_k=TOP_K, **options)
    expected = make_trainer(tmp_path, store, **options)
    trainer.train()
    expected.train()
    assert training_logs(trainer)[0]["loss"] == training_logs(expected)[0]["loss"]


def test_a_checkpoint_of_another_support_is_refused(tmp_path, store):
    options = {"method": "reverse_kl", "teacher_top_k": TOP_K, "support": "union", "save_strategy": "steps"}
    options |= {"save_steps": 1, "max_steps": 2}
    online(tmp_path, store, **options).train()
    with pytest.raises(ValueError, match=r"support=\['union', None\] there, \['student', None\] here"):
        online(tmp_path, store, **options | {"support": "student"}).train(resume_from_checkpoint=True)
