"""Method "minillm": TRL's trainer on a store's prompts, its advantage against the definition, and its errors."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from support.tiny import VOCAB_SIZE, make_model, make_store, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from slimkernels.cli import main
from slimkernels.store import Store
from slimkernels.trainer import train

RECIPE = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "max_completion_length": 6,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
pytestmark = [
    # TRL reads settings that transformers has since renamed, and warns that its trainer is experimental.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
try:
    from slimkernels.trainer import minillm as trainer_minillm
except ImportError:
    trainer_minillm = None
needs_trl = pytest.mark.skipif(trainer_minillm is None, reason="needs the extra minillm: TRL 1.14")


@pytest.fixture(scope="module")
def store_path(tmp_path_factory) -> str:
    return make_store(tmp_path_factory.mktemp("store") / "train")


@torch.no_grad()
def reverse_kl(student, teacher, store) -> float:
    """Computes KL(student || teacher) of the next token after every prompt, over the whole vocabulary."""
    terms = []
    for document in (store[index] for index in range(len(store))):
        prompt = document.input_ids[None, : int(document.positions[0])]
        log_p, log_q = (model.eval()(prompt).logits[0, -1].log_softmax(-1) for model in (student, teacher))
        terms.append((log_p.exp() * (log_p - log_q)).sum())
    return float(torch.stack(terms).mean())


@needs_trl
def test_minillm_brings_the_student_to_the_teacher_on_its_own_words(tmp_path, store_path):
    store, student, teacher = Store(store_path), make_model(), make_model(seed=1234)
    before = reverse_kl(student, teacher, store)
    metrics = train(
        store_path,
        student,
        "minillm",
        tmp_path,
        tokenizer=make_tokenizer(),
        teacher_model=teacher,
        eval_store_path=store_path,
        max_steps=20,
        **RECIPE,
    )
    assert reverse_kl(student, teacher, store) < 0.7 * before
    assert torch.isfinite(torch.tensor([metrics["train_loss"], metrics["eval_perplexity"]])).all()
    saved = type(student).from_pretrained(tmp_path)
    torch.testing.assert_close(saved.state_dict(), student.state_dict())


class Casts(TorchDispatchMode):
    """Counts casts of tensors of one shape to bfloat16."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_cast = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16
        self.count += is_cast and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


@needs_trl
def test_minillm_casts_the_weights_once_for_all_tokens_of_a_batch(tmp_path, store_path):
    counts = []
    for length in (2, 6):
        student = make_model()
        options = RECIPE | {"max_completion_length": length, "bf16": True, "max_steps": 1}
        with Casts(student.model.layers[0].mlp.up_proj.weight.shape) as casts:
            train(
                store_path,
                student,
                "minillm",
                tmp_path / str(length),
                tokenizer=make_tokenizer(),
                teacher_model=make_model(seed=1234),
                **options,
            )
        counts.append(casts.count)
    assert counts[0] == counts[1] > 0


@needs_trl
def test_minillm_changes_nothing_where_the_student_is_the_teacher(tmp_path, store_path):
    """Trains with a teacher equal to the student, where every reward is 0 whatever the student writes."""
    student, teacher = make_model(seed=1234), make_model(seed=1234)
    options = {"tokenizer": make_tokenizer(), "teacher_model": teacher, "max_steps": 2, "optim": "sgd"}
    train(store_path, student, "minillm", tmp_path, **RECIPE | options)
    torch.testing.assert_close(student.state_dict(), teacher.state_dict(), rtol=0, atol=1e-6)


@needs_trl
def test_minillm_that_was_stopped_ends_where_one_that_was_not_ends(tmp_path):
    store_path, students = make_store(tmp_path / "store", num_documents=16), []
    for name, stops in (("whole", [4]), ("stopped", [2, 4])):
        for max_steps in stops:
            students.append(make_model())
            options = {"tokenizer": make_tokenizer(), "teacher_model": make_model(seed=1234), "save_steps": 2}
            train(store_path, students[-1], "minillm", tmp_path / name, max_steps=max_steps, **options, **RECIPE)
    torch.testing.assert_close(students[0].state_dict(), students[2].state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"gamma=0\.95 there, 0.5 here"):
        train(store_path, make_model(), "minillm", tmp_path / "whole", max_steps=6, gamma=0.5, **options, **RECIPE)


@needs_trl
@pytest.mark.parametrize("length_normalization", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_minillm_advantage_is_the_discounted_sum_over_written_tokens(gamma, length_normalization):
    lengths = [5, 2, 1]
    student = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    written = torch.arange(5) < torch.tensor(lengths)[:, None]
    trainer = SimpleNamespace(_written=written, gamma=gamma, length_normalization=length_normalization)
    found = trainer_minillm.MiniLLMTrainer._compute_advantage(trainer, student, teacher)
    assert not found.requires_grad
    for row, length in enumerate(lengths):
        for place in range(length):
            discounts = gamma ** torch.arange(length - place)
            expected = (discounts * (teacher - student)[row, place:length]).sum()
            if length_normalization:
                expected = expected / discounts.sum()
            torch.testing.assert_close(found[row, place], expected.detach())


@needs_trl
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher_model": None}, "needs a teacher_model"),
        ({"tokenizer": None}, "needs the student's tokenizer"),
        ({"tokenizer": make_tokenizer(VOCAB_SIZE - 1)}, "the one the store was captured with"),
        ({"teacher_model": make_model(vocab_size=VOCAB_SIZE + 1)}, "heads of as many rows, got 97 and 98"),
        ({"max_completion_length": 60}, "must leave room for the longest prompt"),
        ({"gamma": 1.5}, "gamma must be in"),
    ],
)
def test_minillm_refuses_what_does_not_fit(tmp_path, store_path, changed, message):
    options = RECIPE | {"tokenizer": make_tokenizer(), "teacher_model": make_model()} | changed
    with pytest.raises(ValueError, match=message):
        train(store_path, make_model(), "minillm", tmp_path, **options)


@needs_trl
def test_minillm_runs_by_the_same_command(tmp_path, store_path, capsys):
    for name, seed in (("student", 0), ("teacher", 1234), ("tokenizer", 0)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    command = ["train", "--store", store_path, "--method", "minillm", "--out", str(tmp_path / "out")]
    for name in ("student", "teacher", "tokenizer"):
        command += [f"--{name}", str(tmp_path / name)]
    for flag, name in (("--rest", "ghost"), ("--temperature", "2"), ("--kd-weight", "1")):
        assert main([*command, flag, name]) == 2
        assert f"{flag} has no meaning with --method minillm" in capsys.readouterr().err
    options = ["--option", "max_completion_length=4", "--option", "use_cpu=true", "--max-steps", "1"]
    assert main([*command, *options, "--batch-size", "2", "--eval-store", store_path]) == 0
    assert "eval_perplexity" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_minillm_without_trl_names_the_extra(tmp_path, store_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.minillm", None)
    monkeypatch.delitem(sys.modules, "slimkernels.trainer.minillm", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'slimkernels\[minillm\]'"):
        train(store_path, make_model(), "minillm", tmp_path)
