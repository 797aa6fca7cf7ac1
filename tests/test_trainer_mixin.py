"""SlimLossMixin in transformers' and TRL's trainers, against the same trainers with an eager loss on full logits."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from support.families import make_family
from support.tiny import VOCAB_SIZE, make_model, make_tokenizer, word_level
from tokenizers import pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

import slimkernels as sk
from slimkernels.store import Store, StoreWriter
from slimkernels.store.errors import NotAStoreError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

TOP_K = 9
RECIPE = {
    "max_steps": 5,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def make_rows(seed: int = 0, count: int = 20) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 15, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist()} for n in lengths]


def collate(rows) -> dict[str, torch.Tensor]:
    """Pads on the right and makes the first two tokens a prompt."""
    length = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.tensor([row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (length - len(r["input_ids"])) for r in rows])
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


class Distiller(sk.SlimLossMixin, Trainer):
    pass


def eager_loss(model, teacher, inputs, num_items, *, method: str = "slim"):
    """Computes CE + 3 w KL on the teacher's TOP_K largest logits, renormalised, from full logits in plain torch."""
    labels = inputs["labels"]
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    target = labels[:, 1:].flatten()
    is_label = target != -100
    target = target[is_label]
    logits = model(**inputs, use_cache=False).logits[:, :-1].float().flatten(0, 1)[is_label]
    loss = cross_entropy(logits, target, reduction="none")
    if method != "sft":
        with torch.no_grad():
            teacher_logits = teacher(**inputs, use_cache=False).logits[:, :-1].float().flatten(0, 1)[is_label]
        kept, ids = teacher_logits.topk(TOP_K)
        log_q = kept.log_softmax(-1)
        log_p = logits.log_softmax(-1).gather(-1, ids)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        log_t_y = teacher_logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        loss = loss + 3 * (1 - torch.exp(-torch.exp(log_t_y + loss.detach()))) * kl
    return loss.sum() / (len(target) if num_items is None else num_items)


def eagerly(trainer_class):
    """Returns a subclass of a trainer that uses ``eager_loss`` in place of the mixin."""

    class Eager(trainer_class):
        def __init__(self, *args, teacher_model, method="slim", **kwargs):
            super().__init__(*args, **kwargs)
            self.teacher, self.method = teacher_model.eval(), method
            self.model_accepts_loss_kwargs = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            with self.accelerator.autocast():
                return eager_loss(model, self.teacher, inputs, num_items_in_batch, method=self.method)

    return Eager


def curve(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make_plain(tmp_path, trainer_class, model, rows=None, **kwargs):
    options = kwargs.pop("options", {})
    args = TrainingArguments(output_dir=str(tmp_path), **RECIPE | options)
    rows = make_rows() if rows is None else rows
    return trainer_class(model=model, args=args, train_dataset=rows, data_collator=collate, **kwargs)


def assert_trained_alike(trainer, expected, rtol=5e-3, atol=5e-4) -> None:
    for (name, trained), parameter in zip(
        trainer.model.named_parameters(), expected.model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(trained, parameter[1], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


OBJECTIVE = sk.SlimObjective("slim", teacher_top_k=TOP_K)


def test_trainer_with_online_teacher_follows_the_eager_curve(tmp_path):
    model, teacher = make_model(), make_model(seed=9)
    expected = make_plain(tmp_path, eagerly(Trainer), copy.deepcopy(model), teacher_model=copy.deepcopy(teacher))
    trainer = make_plain(tmp_path, Distiller, model, teacher_model=teacher, objective=OBJECTIVE)
    assert curve(trainer) == pytest.approx(curve(expected), rel=1e-4)
    assert_trained_alike(trainer, expected)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 < logged["weight"] < 1
    assert logged["loss"] == pytest.approx(logged["ce"] + 3 * logged["kd"] * logged["weight"], rel=0.2)
    assert 0 < logged["teacher_mass"] <= 1
    assert logged["labels_per_second"] > 0
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_without_a_teacher_the_curve_is_the_trainers_own(tmp_path):
    expected = make_plain(tmp_path, Trainer, make_model())
    trainer = make_plain(tmp_path, Distiller, make_model())
    assert curve(trainer) == pytest.approx(curve(expected), rel=1e-4)
    assert_trained_alike(trainer, expected)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["ce"] == pytest.approx(logged["loss"], rel=1e-4)
    assert "kd" not in logged
    metrics = trainer.evaluate(make_rows(seed=5))
    assert metrics["eval_loss"] == pytest.approx(expected.evaluate(make_rows(seed=5))["eval_loss"], rel=1e-3)


def test_experts_keep_their_auxiliary_loss(tmp_path):
    def rows(vocab_size=60):
        return [{"input_ids": [token % vocab_size for token in row["input_ids"]]} for row in make_rows()]

    expected = make_plain(tmp_path, Trainer, make_family("mixtral"), rows())
    trainer = make_plain(tmp_path, Distiller, make_family("mixtral"), rows())
    assert curve(trainer) == pytest.approx(curve(expected), rel=1e-4)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] > logged["ce"] * 1.0001


def test_compute_metrics_still_gets_logits(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    trainer = make_plain(tmp_path, Distiller, make_model(), compute_metrics=metrics)
    assert trainer.evaluate(make_rows(seed=5))["eval_accuracy"] < 1
    assert seen[0][-1] == VOCAB_SIZE


def write_store(path, teacher, rows, top_k: int = TOP_K) -> Store:
    writer = StoreWriter(
        path,
        vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint="",
        teacher={},
        selection={"kind": "top_k", "value": top_k, "top_k": top_k},
        codec="float32",
    )
    with writer, torch.no_grad():
        for row in rows:
            tokens = torch.tensor(row["input_ids"])
            positions = torch.arange(1, len(tokens))
            logits = teacher(tokens[None]).logits[0, :-1]
            writer.add(tokens, positions, sk.topk_logits(logits, top_k=top_k, target=tokens[1:]))
    return Store(path)


def test_a_store_teaches_what_the_model_it_was_captured_from_teaches(tmp_path):
    teacher = make_model(seed=9).eval()
    store = write_store(tmp_path / "store", teacher, make_rows())
    online = make_plain(tmp_path, Distiller, make_model(), teacher_model=teacher, objective=OBJECTIVE)
    offline = make_plain(tmp_path, Distiller, make_model(), teacher_store=store, objective="slim")
    assert curve(offline) == pytest.approx(curve(online), rel=1e-4)
    with pytest.raises(ValueError, match=r"every document of a batch must be in the store, got one of \d+ tokens"):
        make_plain(tmp_path, Distiller, make_model(), make_rows(seed=1), teacher_store=store).train()


def test_the_teachers_rows_are_not_rounded_by_the_students_autocast(tmp_path):
    """Reads the rows inside the student's forward pass, which accelerate runs under autocast."""
    trainer = make_plain(
        tmp_path,
        Distiller,
        make_model(),
        teacher_model=make_model(seed=9),
        objective=sk.SlimObjective("sampled", teacher_rounds=2000),
        options={"bf16": True, "max_steps": 1},
    )
    rows, seen = trainer.online_teacher.rows, []

    def draw(hidden, target):
        torch.manual_seed(5)
        found = rows(hidden, target)
        seen.append((hidden, target, found))
        return found

    trainer.online_teacher.rows = draw
    trainer.train()
    hidden, target, under_autocast = seen[0]
    again = draw(hidden, target)
    assert torch.equal(under_autocast.ids, again.ids)
    assert torch.equal(under_autocast.logits, again.logits)


def test_learned_prompts_are_trained(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model, teacher = peft.get_peft_model(make_model(), config), make_model(seed=9)
    before = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    trainer = make_plain(tmp_path, Distiller, model, teacher_model=teacher, objective=OBJECTIVE)
    trainer.train()
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))


SFT = {
    "plain": {},
    "packing": {"packing": True, "max_length": 32},
    "padding-free": {"padding_free": True, "max_length": None},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "lora": {},
    "lora-whole-head": {},
}
PEFT = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "lora-whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def make_sft(tmp_path, trainer_class, case: str, **kwargs):
    trl = pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    from datasets import Dataset

    options = RECIPE | {"bf16": False, "gradient_checkpointing": False} | SFT[case]
    if case in PEFT:
        import peft

        kwargs["peft_config"] = peft.LoraConfig(r=3, lora_alpha=12, **PEFT[case])
    torch.manual_seed(0)
    return trainer_class(trl.SFTTrainer)(
        model=make_model(),
        args=trl.SFTConfig(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_list(make_rows(count=40)),
        processing_class=make_tokenizer(),
        **kwargs,
    )


def distilling(trainer_class):
    class DistilledSFT(sk.SlimLossMixin, trainer_class):
        pass

    return DistilledSFT


@pytest.mark.filterwarnings("ignore::UserWarning:trl")
@pytest.mark.parametrize("case", SFT)
def test_trl_sft_follows_the_eager_curve(tmp_path, case):
    expected = make_sft(tmp_path, eagerly, case, teacher_model=make_model(seed=9))
    trainer = make_sft(tmp_path, distilling, case, teacher_model=make_model(seed=9), objective=OBJECTIVE)
    losses = curve(trainer)
    assert losses == pytest.approx(curve(expected), rel=2e-2 if case == "bf16" else 1e-4)
    assert losses[-1] < losses[0]
    if case != "bf16":
        assert_trained_alike(trainer, expected)
    if "head" in case:
        head = trainer.model.get_output_embeddings()
        change = head.modules_to_save["default"].weight - head.original_module.weight
        assert change.abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning:trl")
@pytest.mark.parametrize("case", ["plain", "packing", "padding-free"])
def test_trl_sft_logs_the_metrics_of_trl(tmp_path, case):
    """Logs TRL's own keys with TRL's values, in training and evaluation, beside those of the loss."""
    from datasets import Dataset

    # A model with tied embeddings often repeats a token, so that some labels are right.
    held_out = Dataset.from_list([{"input_ids": [2 + token] * 9} for token in range(10)])
    alone = make_sft(tmp_path, lambda trainer_class: trainer_class, case, eval_dataset=held_out)
    distilled = make_sft(tmp_path, distilling, case, eval_dataset=held_out, objective="sft")
    logs = []
    for trainer in (alone, distilled):
        trainer.train()
        trainer.evaluate()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry])
    assert len(logs[0]) == len(logs[1]) > 2
    keys = [key for entry in logs[0] for key in entry if key.split("eval_")[-1] in TRL_METRICS]
    assert {*keys} == {*TRL_METRICS, *(f"eval_{name}" for name in TRL_METRICS)}
    for theirs, ours in zip(*logs, strict=True):
        assert {key: ours[key] for key in theirs if key in keys} == pytest.approx(
            {key: theirs[key] for key in theirs if key in keys}, rel=1e-4
        )
    assert logs[0][0]["entropy"] > 0
    assert logs[0][-1]["eval_mean_token_accuracy"] > logs[0][0]["mean_token_accuracy"]


TRL_METRICS = ("entropy", "mean_token_accuracy", "num_tokens")


@pytest.mark.filterwarnings("ignore::UserWarning:trl")
@pytest.mark.parametrize("case", ["plain", "packing"])
def test_trl_sft_learns_from_a_store(tmp_path, case):
    """Gives each document, packed or padded, the rows that it was captured with alone."""
    teacher = make_model(seed=9).eval()
    store = write_store(tmp_path / "store", teacher, make_rows(count=40))
    online = make_sft(tmp_path, distilling, case, teacher_model=teacher, objective=OBJECTIVE)
    offline = make_sft(tmp_path, distilling, case, teacher_store=store, objective=sk.SlimObjective("slim"))
    assert curve(offline) == pytest.approx(curve(online), rel=1e-4)


def test_lora_on_the_head_is_trained_with_the_eager_curve(tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "lm_head"])

    def make(trainer_class, **kwargs):
        torch.manual_seed(0)
        model = peft.get_peft_model(make_model(), config)
        return make_plain(tmp_path, trainer_class, model, teacher_model=make_model(seed=9), **kwargs)

    expected, trainer = make(eagerly(Trainer)), make(Distiller, objective=OBJECTIVE)
    assert curve(trainer) == pytest.approx(curve(expected), rel=1e-4)
    up = [parameter for name, parameter in trainer.model.named_parameters() if "lm_head.lora_B" in name]
    assert up[0].abs().max() > 1e-3
    assert_trained_alike(trainer, expected)


class PoisonModel(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.lm_head.weight.data.fill_(float("nan"))


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning")
def test_warns_of_nan_and_names_the_step(tmp_path, caplog):
    trainer = make_plain(tmp_path, Distiller, make_model(), callbacks=[PoisonModel()])
    with caplog.at_level(logging.WARNING, "slimkernels"):
        trainer.train()
    assert "the loss is not finite since optimizer step 3" in caplog.text


def test_warns_where_the_rows_are_not_about_the_labels(tmp_path, caplog):
    trainer = make_plain(tmp_path, Distiller, make_model(), teacher_model=make_model(seed=9), objective=OBJECTIVE)
    with caplog.at_level(logging.WARNING, "slimkernels"):
        trainer.train()
    assert caplog.text.count("% of the labels are among the ids that the teacher's rows keep") == 1


def test_heads_padded_differently_share_their_first_rows(tmp_path, caplog):
    teacher = make_model(seed=9)
    padded = copy.deepcopy(teacher)
    with caplog.at_level(logging.WARNING, "slimkernels"):
        padded.resize_token_embeddings(VOCAB_SIZE + 31, mean_resizing=False)
        trainer = make_plain(tmp_path, Distiller, make_model(), teacher_model=padded, objective=OBJECTIVE)
    assert "teacher's head has 128 rows and the student's 97: the first 97 are taken" in caplog.text
    expected = make_plain(tmp_path, Distiller, make_model(), teacher_model=teacher, objective=OBJECTIVE)
    assert curve(trainer) == pytest.approx(curve(expected), rel=1e-4)
    with pytest.raises(ValueError, match="same vocabulary, got heads of 5000 and 97 rows"):
        make_plain(tmp_path, Distiller, make_model(), teacher_model=make_model(vocab_size=5000), objective=OBJECTIVE)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"objective": sk.SlimObjective("kd")},
            "method 'kd' needs one of teacher_model, teacher_store and teacher_server",
        ),
        ({"objective": sk.SlimObjective("sft"), "teacher_model": make_model()}, "method 'sft' needs no teacher"),
        ({"objective": sk.SlimObjective("gkd"), "teacher_model": make_model()}, "as only SlimTrainer does"),
        ({"options": {"label_smoothing_factor": 0.1}}, "use label_smoothing"),
        ({"options": {"torch_compile": True}}, "torch_compile must be False"),
        ({"compute_loss_func": lambda *args, **kwargs: None}, "compute_loss_func must be None"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_plain(tmp_path, Distiller, make_model(), **kwargs)


def test_a_teacher_that_does_not_call_its_head_is_refused(tmp_path):
    teacher = make_model(seed=9)
    teacher.forward = lambda input_ids, **_: teacher.get_decoder()(input_ids)
    trainer = make_plain(tmp_path, Distiller, make_model(), teacher_model=teacher, objective=OBJECTIVE)
    with pytest.raises(ValueError, match="without calling its output embeddings"):
        trainer.train()


@pytest.mark.filterwarnings("ignore::UserWarning:trl")
def test_a_loss_that_trl_would_compute_from_the_logits_is_refused(tmp_path):
    trl = pytest.importorskip("trl", reason="needs the extra slimkernels[trl]")
    from datasets import Dataset

    args = trl.SFTConfig(output_dir=str(tmp_path), loss_type="dft", **RECIPE | {"bf16": False})
    with pytest.raises(
        ValueError, match="loss_type must be 'nll' with SlimLossMixin, which computes the loss, got 'dft'"
    ):
        distilling(trl.SFTTrainer)(
            model=make_model(),
            args=args,
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=make_tokenizer(),
        )


def test_a_forgotten_teacher_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "slimkernels"):
        make_plain(tmp_path, Distiller, make_model(), objective="sft")
        assert not caplog.text
        make_plain(tmp_path, Distiller, make_model())
    assert "trains on the labels alone (method 'sft'), as it has no teacher: pass teacher_model" in caplog.text


def test_paths_and_names_are_opened(tmp_path):
    teacher = make_model(seed=9).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    store = write_store(tmp_path / "store", teacher, make_rows())
    expected = curve(
        make_plain(tmp_path, Distiller, make_model(), teacher_store=store, objective=sk.SlimObjective("kd"))
    )
    given = {"teacher_store": str(tmp_path / "store"), "objective": "kd"}
    assert curve(make_plain(tmp_path, Distiller, make_model(), **given)) == expected
    given = {"teacher_model": tmp_path / "teacher", "objective": sk.SlimObjective("kd", teacher_top_k=TOP_K)}
    assert curve(make_plain(tmp_path, Distiller, make_model(), **given)) == pytest.approx(expected, rel=1e-4)


def test_a_teachers_folder_with_other_tokens_is_refused(tmp_path):
    """Refuses a tokenizer that gives one token two ids, and no tokenizer that merely has more tokens."""
    teacher, student = make_model(seed=9), make_tokenizer()
    teacher.save_pretrained(tmp_path)
    given = {"teacher_model": tmp_path, "objective": "kd", "processing_class": student}
    more = make_tokenizer()
    more.add_special_tokens({"pad_token": "<pad>"})
    more.add_tokens(["<chat>"])
    for tokenizer in (student, more, make_tokenizer(VOCAB_SIZE - 7)):
        tokenizer.save_pretrained(tmp_path)
        make_plain(tmp_path, Distiller, make_model(), **given)
    words = [f"w{index}" for index in range(2, VOCAB_SIZE)]
    word_level([*words[:-2], *words[:-3:-1]], pre_tokenizers.Whitespace()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"other ids for 2 of 96 tokens that both have, such as .w95., 96 of"):
        make_plain(tmp_path, Distiller, make_model(), **given)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"objective": "kdd"}, ValueError, "method must be one of"),
        ({"objective": {"method": "kd"}}, TypeError, "objective must be a SlimObjective or the name of a method"),
        ({"teacher_model": 3}, TypeError, "teacher_model must be a model or its folder, got int"),
        ({"teacher_model": "./nowhere"}, FileNotFoundError, "there is no folder or .gguf file"),
        ({"teacher_store": [1]}, TypeError, "teacher_store must be a Store or the path of one, got list"),
        ({"teacher_store": "nowhere"}, NotAStoreError, "nowhere holds no manifest.json"),
    ],
)
def test_what_is_neither_is_one_sentence(tmp_path, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_plain(tmp_path, Distiller, make_model(), **kwargs)


def test_evaluation_reports_the_terms_of_the_loss(tmp_path):
    """Compares the means of cross entropy and divergence over held-out labels with those of full logits."""
    model, teacher, rows = make_model(), make_model(seed=9).eval(), make_rows(seed=5)
    trainer = make_plain(
        tmp_path,
        Distiller,
        model,
        teacher_model=teacher,
        objective=sk.SlimObjective("kd", ce_weight=0.5, kd_weight=2.0),
    )
    metrics = trainer.evaluate(rows)
    ce, kd, count = 0.0, 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = collate([row])
            logprobs, log_q = (
                one.eval()(batch["input_ids"]).logits[0, :-1].log_softmax(-1) for one in (model, teacher)
            )
            target = batch["labels"][0, 1:]
            is_label = target != -100
            ce += cross_entropy(logprobs[is_label], target[is_label], reduction="sum")
            kd += (log_q.exp() * (log_q - logprobs)).sum(-1)[is_label].sum()
            count += int(is_label.sum())
    assert metrics["eval_ce"] == pytest.approx(float(ce) / count, rel=1e-4)
    assert metrics["eval_kd"] == pytest.approx(float(kd) / count, rel=1e-3)
    assert metrics["eval_teacher_mass"] == pytest.approx(1, rel=1e-4)
    assert "eval_labels_per_second" not in metrics
    for name, value in statistics_by_hand(model, teacher, rows).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-3), name
    prefixed = trainer.evaluate(rows, metric_key_prefix="test")
    assert prefixed["test_ce"] == pytest.approx(metrics["eval_ce"], rel=1e-6)
    trainer.train()
    assert training_ce(trainer) != metrics["eval_ce"]


def statistics_by_hand(model, teacher, rows) -> dict[str, float]:
    """Returns the means per label of what the log says of a student and of a teacher that keeps its whole rows."""
    parts = []
    with torch.no_grad():
        for row in rows:
            batch = collate([row])
            log_s, log_q = (one.eval()(batch["input_ids"]).logits[0, :-1].log_softmax(-1) for one in (model, teacher))
            target = batch["labels"][0, 1:]
            is_label = target != -100
            label = target.clamp(min=0).unsqueeze(-1)
            per_label = {
                "entropy": -(log_s.exp() * log_s).sum(-1),
                "teacher_entropy": -(log_q.exp() * log_q).sum(-1),
                "mean_token_accuracy": (log_s.argmax(-1) == target).float(),
                "teacher_surer": (log_q.gather(-1, label) > log_s.gather(-1, label)).squeeze(-1).float(),
                "argmax_kept": torch.ones(len(target)),
            }
            parts.append({name: values[is_label] for name, values in per_label.items()})
    return {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}


def test_the_overlap_is_logged_where_asked_for(tmp_path):
    rows, teacher = make_rows(), make_model(seed=9)
    means = []
    for asked in (False, True):
        objective = sk.SlimObjective("kd", teacher_top_k=TOP_K, log_overlap=asked)
        trainer = make_plain(tmp_path, Distiller, make_model(), rows=rows, teacher_model=teacher, objective=objective)
        trainer.train()
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert ("overlap" in logged) == asked
        means.append({name: logged[name] for name in ("loss", "ce", "entropy", "argmax_kept")})
    assert means[0] == means[1]
    assert 0 < logged["overlap"] < 1
    model, shares = make_model(), []
    with torch.no_grad():
        for row in rows:
            batch = collate([row])
            kept, best = (one.eval()(batch["input_ids"]).logits[0, :-1].topk(TOP_K).indices for one in (teacher, model))
            shared = (kept.unsqueeze(-1) == best.unsqueeze(-2)).any(-1).float().mean(-1)
            shares.append(shared[batch["labels"][0, 1:] != -100])
    metrics = make_plain(tmp_path, Distiller, model, rows=rows, teacher_model=teacher, objective=objective).evaluate(
        rows
    )
    assert metrics["eval_overlap"] == pytest.approx(float(torch.cat(shares).mean()), rel=1e-4)


def training_ce(trainer) -> float:
    return next(entry["ce"] for entry in trainer.state.log_history if "ce" in entry)


def test_a_batch_without_labels_is_refused(tmp_path):
    trainer = make_plain(tmp_path, Distiller, make_model())
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "labels"}
    with pytest.raises(ValueError, match="a batch must have labels"):
        trainer.train()
