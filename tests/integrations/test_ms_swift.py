"""SlimGKDTrainer in ``swift rlhf``, as its command line runs it, against ms-swift's own GKDTrainer."""

from __future__ import annotations

import json
import uuid

import pytest
import torch
from support.integrations import trainer_package
from support.tiny import VOCAB_SIZE, make_model, make_tokenizer

trainer_package("swift")
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4
OPTIONS = {
    "rlhf_type": "gkd",
    "model_type": "llama",
    "teacher_model_type": "llama",
    "template": "dummy",
    "lmbda": 0,
    "tuner_type": "full",
    "torch_dtype": "float32",
    "max_steps": STEPS,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": "false",
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_hf": "true",
}


@pytest.fixture
def curve(tmp_path, monkeypatch):
    """Returns the losses of a run of ``swift rlhf`` with options, and a plugin of one line where one is given."""
    from swift.pipelines import rlhf_main
    from swift.trainers import TrainerFactory

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
    for name, seed in {"model": 0, "teacher_model": 9}.items():
        make_model(seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    with open(tmp_path / "chats.jsonl", "w") as file:
        for length in torch.randint(3, 9, (16,), generator=generator).tolist():
            words = [f"w{i}" for i in torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()]
            roles = {"user": "w3 w4 w5", "assistant": " ".join(words)}
            file.write(
                json.dumps({"messages": [{"role": role, "content": text} for role, text in roles.items()]}) + "\n"
            )

    def run(plugin: str = "", **options) -> list[float]:
        given = OPTIONS | options | {name: tmp_path / name for name in ("model", "teacher_model")}
        given |= {"dataset": tmp_path / "chats.jsonl", "output_dir": tmp_path / "out"}
        if plugin:
            # A module of one name is imported once.
            given["external_plugins"] = file = tmp_path / f"plugin_{uuid.uuid4().hex}.py"
            file.write_text(f"import slimkernels.integrations.ms_swift as slim; {plugin}\n")
        result = rlhf_main([text for name, value in given.items() for text in (f"--{name}", str(value))])
        losses = [entry["loss"] for entry in result["log_history"] if "loss" in entry]
        assert len(set(losses)) == STEPS
        return losses

    return run


@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_all_logits_give_its_own_curve(curve, ran, beta, temperature):
    options = {"beta": beta, "temperature": temperature}
    expected = curve(**options)
    assert curve("slim.register()", **options) == pytest.approx(expected, rel=1e-4)
    ran("ms-swift", "GKDTrainer", f"{STEPS} steps with K = V, its own curve at beta 0, 0.5 and 1")


def test_its_largest_logits_give_its_own_curve(curve, ran):
    options = {"beta": 0.5, "gkd_logits_topk": 7}
    expected = curve(**options)
    assert curve('slim.register(rest="renorm_both")', **options) == pytest.approx(expected, rel=1e-4)
    assert curve("slim.register()", **options) != pytest.approx(expected, rel=1e-2)
    ran("ms-swift", "GKDTrainer", f'{STEPS} steps with K = 7 and rest="renorm_both", its own curve')


def test_options_that_do_not_go_together_are_refused(curve):
    import slimkernels.integrations.ms_swift as slim

    with pytest.raises(ValueError, match="rest"):
        slim.register(divergence="reverse_kl", rest="renorm")


def bare_trainer(**options):
    """Makes a trainer that computes losses and nothing else."""
    from slimkernels.integrations.ms_swift import SlimGKDTrainer

    trainer = object.__new__(SlimGKDTrainer)
    trainer.__dict__ |= {"beta": 0.3, "temperature": 1.0, "gkd_logits_topk": None, "options": options}
    return trainer


def loss_of(trainer, logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from swift.rlhf_trainers.gkd_loss import TeacherOutput

    return trainer._compute_jsd_loss(logits, TeacherOutput(full_logits=teacher, labels=labels), labels)


def test_its_beta_is_that_of_its_own_divergence_alone():
    import slimkernels as sk

    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(1, 4, 9), torch.randn(1, 4, 9), torch.tensor([[-100, 3, 1, 4]])
    target = labels[0, 1:]
    rows = sk.topk_logits(teacher[0, :3], top_k=9, target=target)
    options = {"rest": "ghost", "token_weight": "none", "ce_weight": 0.0}
    for divergence, beta in {"ab": None, "jsd": 0.6}.items():
        given = {"divergence": divergence} | ({} if beta is None else {"beta": beta})
        expected = sk.slim_loss(logits[0, :3], target, rows, **options, **given).loss
        found = loss_of(bare_trainer(**given), logits, teacher, labels)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_teacher_of_another_vocabulary_is_refused():
    labels = torch.tensor([[-100, 3, 1, 4]])
    with pytest.raises(ValueError, match="must have the student's vocabulary, got logits of 5000 and 97 ids"):
        loss_of(bare_trainer(), torch.randn(1, 4, VOCAB_SIZE), torch.randn(1, 4, 5000), labels)
