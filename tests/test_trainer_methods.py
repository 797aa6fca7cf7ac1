"""The methods of SlimTrainer, offline and online, against their definitions on full logits."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from support.tiny import TOP_K, VOCAB_SIZE, make_model, make_store, make_tokenizer
from test_trainer import RECIPE, make_trainer, training_logs
from transformers import AutoModelForCausalLM, MixtralConfig, TrainerCallback

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.models.batch import SlimCollator
from slimkernels.models.heldout import evaluate_store
from slimkernels.models.load import load_model, load_teacher
from slimkernels.models.make_student import make_student
from slimkernels.store import Document, Store, StoreDataset, StoreWriter
from slimkernels.teacher import capture
from slimkernels.trainer import SlimConfig, SlimTrainer
from slimkernels.trainer.objective import METHODS
from slimkernels.trainer.on_policy import continue_prompts

pytestmark = [
    # peft still calls functions that transformers renamed, and warns that merging an adapter would untie the head.
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_store(tmp_path_factory.mktemp("store") / "train"))


def make_teacher():
    """Makes the model that ``make_store`` captured."""
    return make_model(seed=1234)


def online(tmp_path, store, **options) -> SlimTrainer:
    callbacks = options.pop("callbacks", None)
    return SlimTrainer(
        model=options.pop("model", None) or make_model(),
        args=SlimConfig(output_dir=str(tmp_path), **RECIPE | options),
        train_dataset=store,
        teacher_model=make_teacher(),
        callbacks=callbacks,
    )


def dense_divergence(method: str, logits, teacher_logits, beta: float = 0.5) -> torch.Tensor:
    """Computes the divergence (N,) over the whole vocabulary, straight from the definitions."""
    log_p, log_q = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if method in ("kd", "slim"):
        return (q * (log_q - log_p)).sum(-1)
    if method == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - m)).sum(-1) + (1 - beta) * (p * (log_p - m)).sum(-1)


# The defaults, where they are not 1.
KD_WEIGHTS = {"kd": 3, "slim": 3, "jsd": 3}


def eager_losses(method: str, store, steps: int, temperature: float = 1.0, beta: float = 0.5) -> list[float]:
    """Returns the losses of an eager loop with a dense teacher over documents in order, four a step."""
    model, teacher = make_model().train(), make_teacher().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["learning_rate"], weight_decay=0.0)
    losses = []
    for step in range(steps):
        terms = []
        for index in range(4 * step % len(store), 4 * step % len(store) + 4):
            ids, positions = store[index].input_ids, store[index].positions
            logits = model(ids[None]).logits[0, positions - 1]
            with torch.no_grad():
                teacher_logits = teacher(ids[None]).logits[0, positions - 1]
            ce = torch.nn.functional.cross_entropy(logits, ids[positions], reduction="none")
            kd = dense_divergence(method, logits / temperature, teacher_logits / temperature, beta) * temperature**2
            weight = 1.0
            if method == "slim":
                log_t_y = teacher_logits.log_softmax(-1).gather(-1, ids[positions, None])[:, 0]
                weight = 1 - torch.exp(-torch.exp(log_t_y + ce.detach()))
            terms.append(kd if method == "gkd" else ce + KD_WEIGHTS.get(method, 1) * weight * kd)
        loss = torch.cat(terms).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kd", {}),
        ("kd", {"temperature": 2.0}),
        ("slim", {"teacher_top_fraction": 1.0}),
        ("reverse_kl", {}),
        ("jsd", {}),
        ("jsd", {"beta": 0.2, "temperature": 1.5}),
        ("gkd", {"on_policy_fraction": 0.0, "beta": 0.7}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "default",
)
def test_online_methods_follow_the_dense_curve(tmp_path, store, method, options):
    trainer = online(tmp_path, store, method=method, max_steps=5, **options)
    trainer.train()
    dense = {name: options[name] for name in ("temperature", "beta") if name in options}
    expected = eager_losses(method, store, steps=5, **dense)
    assert [entry["loss"] for entry in training_logs(trainer)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["kd", "slim", "reverse_kl", "jsd"])
def test_offline_equals_online_where_the_same_logits_are_kept(tmp_path, store, method):
    losses = []
    for trainer in (
        make_trainer(tmp_path, store, method=method, max_steps=5),
        online(tmp_path, store, method=method, max_steps=5, teacher_top_k=TOP_K),
    ):
        trainer.train()
        losses.append([(entry["loss"], entry["kd"], entry["label_kept"]) for entry in training_logs(trainer)])
    for offline, of_model in zip(*losses, strict=True):
        assert offline == pytest.approx(of_model, rel=1e-4)


def make_drawn_store(path, rounds: int, kind: str = "sample") -> Store:
    """Writes the documents of ``make_store`` with draws in place of the largest logits."""
    documents = Store(make_store(Path(path) / "documents"))
    teacher = make_teacher().eval()
    writer = StoreWriter(
        Path(path) / "drawn",
        vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint="",
        teacher={},
        selection={"kind": kind, "top_k": 0, "rounds": rounds, "seed": 0},
        codec="float32",
    )
    with writer, torch.no_grad():
        for number, document in enumerate(documents):
            tokens, positions = document.input_ids, document.positions
            logits = teacher(tokens[None]).logits[0, positions - 1]
            writer.add(
                tokens,
                positions,
                sk.sample_targets(logits, rounds, number, position=positions, target=tokens[positions]),
            )
    return Store(Path(path) / "drawn")


def drawn_losses(model, document) -> torch.Tensor:
    """Computes CE + 3 KL (N,) to the shares of draws from the full logits."""
    ids, positions = document.input_ids, document.positions
    logprobs = model(ids[None]).logits[0, positions - 1].log_softmax(-1)
    losses = []
    for row, label, kept, log_share in zip(
        logprobs, ids[positions], document.teacher.ids, document.teacher.logits, strict=True
    ):
        log_share, drawn = log_share[kept >= 0], kept[kept >= 0].long()
        assert float(log_share.exp().sum()) == pytest.approx(1, rel=1e-5)
        losses.append(3 * (log_share.exp() * (log_share - row[drawn])).sum() - row[label])
    return torch.stack(losses)


def test_sampled_learns_from_draws(tmp_path, store):
    """Compares the loss with that of the store's rows, and with the dense loss when there are many draws."""
    few = make_drawn_store(tmp_path / "few", rounds=20)
    trainer = make_trainer(tmp_path, few, method="sampled", max_steps=1)
    trainer.train()
    with torch.no_grad():
        expected = torch.cat([drawn_losses(make_model(), few[index]) for index in range(4)]).mean()
    assert training_logs(trainer)[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)

    dense = eager_losses("kd", store, steps=3)
    many = make_trainer(tmp_path, make_drawn_store(tmp_path / "many", rounds=20_000), method="sampled", max_steps=3)
    drawn = online(tmp_path, store, method="sampled", teacher_rounds=20_000, max_steps=3)
    for trainer in (many, drawn):
        trainer.train()
        assert [entry["loss"] for entry in training_logs(trainer)] == pytest.approx(dense, rel=1e-2)
    with pytest.raises(ValueError, match=r"'sampled' needs a store of draws, captured .* got one of 'top_k'"):
        make_trainer(tmp_path, store, method="sampled")
    with pytest.raises(ValueError, match="'sampled' needs a store of draws"):
        make_trainer(tmp_path, StoreDataset(store), method="sampled")


def documents_of(batch: dict) -> list[tuple[list[int], list[int]]]:
    """Returns the tokens and the labels of every document of a batch."""
    length = batch["input_ids"].shape[1]
    found = []
    for number, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        mine = batch["rows"] // length == number
        found.append((ids[mask.bool()].tolist(), batch["target"][mine].tolist()))
    return found


def test_student_continues_every_document_from_its_prompt():
    model = make_model()
    teacher = sk.SparseLogits(torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, 1), torch.zeros(0, 1))
    documents = [
        Document(torch.tensor([7, 8, 9, 10]), torch.tensor([2, 3]), teacher),
        Document(torch.tensor([3, 4, 5, 6, 2]), torch.tensor([4]), teacher),
        Document(torch.tensor([3, 4]), torch.tensor([], dtype=torch.int64), teacher),
        Document(torch.tensor([11, 12]), torch.tensor([1]), teacher),
    ]
    batch = SlimCollator(with_teacher=False)(documents)
    options = {"max_new_tokens": 6, "temperature": 1.0, "pad_token_id": 1}
    model.generation_config.eos_token_id = None
    torch.manual_seed(3)
    written = documents_of(continue_prompts(model, batch, **options))
    prompts = [[7, 8], [3, 4, 5, 6], [11]]
    assert [ids[: len(prompt)] for (ids, _), prompt in zip(written, prompts, strict=True)] == prompts
    assert [ids[len(prompt) :] for (ids, _), prompt in zip(written, prompts, strict=True)] == [t for _, t in written]
    assert [len(target) for _, target in written] == [6, 6, 6]
    assert model.training

    # The draws are the same, but one of the first document's tokens now ends the text.
    tokens = written[0][1]
    end = next(place for place, token in enumerate(tokens) if place and token not in tokens[:place])
    model.generation_config.eos_token_id = [tokens[end], VOCAB_SIZE + 5]
    torch.manual_seed(3)
    ended = documents_of(continue_prompts(model, batch, **options))
    assert ended[0] == (prompts[0] + tokens[: end + 1], tokens[: end + 1])
    assert 0 < end < 5
    # A prompt of four tokens leaves room for one more.
    short = documents_of(continue_prompts(model, batch, max_length=5, **options))
    assert [len(target) for _, target in short] == [1, 1, 1]
    assert continue_prompts(model, batch, max_length=4, **options) is batch


def test_student_writes_from_its_own_distribution():
    """Compares four thousand continuations of one prompt by one token with softmax(logits / T)."""
    model = make_model().eval()
    model.generation_config.eos_token_id = None
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]).repeat(4000, 1),
        "attention_mask": torch.ones(4000, 3, dtype=torch.int64),
        "rows": torch.arange(4000) * 3 + 1,
        "target": torch.full((4000,), 7),
    }
    drawn = continue_prompts(model, batch, max_new_tokens=1, temperature=2.0, pad_token_id=0)["target"]
    expected = (model(torch.tensor([[5, 6]])).logits[0, -1] / 2).softmax(-1)
    share = torch.bincount(drawn, minlength=VOCAB_SIZE) / 4000
    assert (share - expected).abs().sum() < 0.15
    assert (share - torch.full((VOCAB_SIZE,), 1 / VOCAB_SIZE)).abs().sum() > 0.3


class KeepWeights(TrainerCallback):
    """A callback that keeps the student's weights before each step."""

    def __init__(self):
        self.weights = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights.append(copy.deepcopy(model.state_dict()))


def test_gkd_is_the_jsd_of_what_the_student_wrote(tmp_path, store):
    callback = KeepWeights()
    trainer = online(
        tmp_path,
        store,
        method="gkd",
        on_policy_fraction=1.0,
        max_new_tokens=7,
        max_steps=3,
        callbacks=[callback],
        gradient_accumulation_steps=2,
    )
    seen = []
    compute = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, **kwargs: seen.append(inputs) or compute(model, inputs, **kwargs)
    trainer.train()
    logs = training_logs(trainer)
    assert len(seen) == 6
    teacher, student = make_teacher().eval(), make_model().train()
    for step, logged in enumerate(logs):
        student.load_state_dict(callback.weights[step])
        terms = []
        for batch in seen[2 * step : 2 * step + 2]:
            for ids, target in documents_of(batch):
                rows = slice(len(ids) - len(target) - 1, len(ids) - 1)
                assert ids[rows.start + 1 :] == target
                assert len(target) <= 7
                logits = student(torch.tensor([ids])).logits[0, rows]
                terms.append(dense_divergence("jsd", logits, teacher(torch.tensor([ids])).logits[0, rows]))
        assert logged["loss"] == pytest.approx(torch.cat(terms).mean().item(), rel=1e-4)
        assert logged["ce"] > 0
    own = {tuple(store[index].input_ids.tolist()) for index in range(len(store))}
    assert not own & {tuple(ids) for batch in seen for ids, _ in documents_of(batch)}


def test_gkd_mixes_both_kinds_of_batches_and_resumes_to_the_same_weights(tmp_path, store):
    options = {"method": "gkd", "max_new_tokens": 5, "max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    options |= {"train_sampling_strategy": "random"}
    whole = online(tmp_path / "whole", store, **options)
    seen = []
    compute = whole.compute_loss
    whole.compute_loss = lambda model, inputs, **kwargs: seen.append(inputs) or compute(model, inputs, **kwargs)
    whole.train()
    stored = {tuple(store[index].input_ids.tolist()) for index in range(len(store))}
    kinds = [{tuple(ids) in stored for ids, _ in documents_of(batch)} for batch in seen]
    assert sorted(kinds, key=str) == [{False}] * kinds.count({False}) + [{True}] * kinds.count({True})
    assert 0 < kinds.count({True}) < 8
    resumed = online(tmp_path / "again", store, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for expected, parameter in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    with pytest.raises(ValueError, match="online_teacher="):
        online(tmp_path / "again", store, **options | {"max_new_tokens": 6}).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5")
        )


def test_observability_of_every_step(tmp_path, store):
    trainer = make_trainer(tmp_path, store, method="slim", max_steps=2)
    trainer.train()
    labels = [sum(len(store[i].positions) for i in range(4 * step, 4 * step + 4)) for step in range(2)]
    for step, logged in enumerate(training_logs(trainer)):
        rows = [store[i] for i in range(4 * step, 4 * step + 4)]
        kept = sum(int((d.teacher.ids == d.input_ids[d.positions][:, None]).sum()) for d in rows)
        assert logged["label_kept"] == pytest.approx(kept / labels[step])
        assert 0 < logged["labels_per_second"] < labels[step] / 1e-4
        assert math.isfinite(logged["grad_norm"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "gkd"}, "'gkd' needs a teacher_model"),
        ({"method": "kd", "teacher_top_k": 4}, "teacher_model, got {'teacher_top_k': 4} without one"),
    ],
)
def test_a_method_without_its_teacher_is_refused(tmp_path, store, fields, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, store, **fields)


def test_sft_with_a_teacher_model_is_refused(tmp_path, store):
    with pytest.raises(ValueError, match="method 'sft' has no teacher"):
        online(tmp_path, store, method="sft")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "kd", "teacher_rounds": 4}, "teacher_rounds must stay None with method 'kd'"),
        ({"method": "sampled", "teacher_top_k": 4}, "not with method 'sft' or 'sampled'"),
        ({"method": "kd", "teacher_top_k": 4, "teacher_top_fraction": 0.1}, "set one or the other"),
        ({"method": "gkd", "on_policy_fraction": 1.5}, r"on_policy_fraction must be in \[0, 1\], got 1.5"),
        ({"method": "gkd", "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"method": "gkd", "sampling_temperature": 0.0}, "sampling_temperature must be positive"),
    ],
)
def test_an_objective_refuses_what_it_would_ignore(fields, message):
    with pytest.raises(ValueError, match=message):
        sk.SlimObjective(**fields)


def test_every_method_resolves_to_options_the_loss_takes():
    hidden, weight = torch.randn(3, 4), torch.randn(VOCAB_SIZE, 4)
    target = torch.tensor([1, 2, 3])
    teacher = sk.topk_logits(torch.randn(3, VOCAB_SIZE), top_k=5, target=target)
    for method in METHODS:
        options = sk.SlimObjective(method).loss_options
        rows = teacher if options["kd_weight"] else None
        result = sk.linear_slim_loss(hidden, weight, target, rows, **options)
        assert (result.kd.sum() > 0) == (method != "sft")
    assert sk.SlimObjective("kd", divergence="reverse_kl").loss_options["rest"] == "ghost"
    assert sk.SlimObjective("jsd", rest="renorm_both").loss_options["rest"] == "renorm_both"


def test_adapters_of_the_student_are_trained_and_learned_prompts_refused(tmp_path, store):
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    trainer = make_trainer(tmp_path, store, model=peft.get_peft_model(make_model(), config), max_steps=4)
    trainer.train()
    up = {name: p for name, p in trainer.model.named_parameters() if "lora_B" in name}
    assert any("lm_head" in name for name in up)
    assert all(parameter.abs().max() > 1e-3 for parameter in up.values())
    student, losses = trainer.model.eval(), []
    with torch.no_grad():
        for document in store:
            logits = student(document.input_ids[None]).logits[0, document.positions - 1]
            target = document.input_ids[document.positions]
            losses.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    assert trainer.evaluate(store)["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)

    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="would not train PEFT's prompts: use SlimLossMixin"):
        make_trainer(tmp_path, store, model=peft.get_peft_model(make_model(), prompts))


def test_experts_whose_auxiliary_loss_would_be_dropped_are_refused(tmp_path, store):
    config = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    with pytest.raises(ValueError, match="would not train the auxiliary loss of the experts of MixtralForCausalLM"):
        make_trainer(tmp_path, store, model=make_student(MixtralConfig(**sizes, **config)))
    for changed in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}):
        make_trainer(tmp_path, store, model=make_student(MixtralConfig(**sizes, **config | changed)))


def test_gkd_warns_where_student_and_teacher_end_with_other_tokens(tmp_path, store, caplog):
    student, teacher = make_model(), make_teacher()
    teacher.generation_config.eos_token_id = [3, 4]
    args = SlimConfig(output_dir=str(tmp_path), **RECIPE | {"method": "gkd"})
    for ends, is_other in (([5, 6], True), (4, False), (None, False)):
        student.generation_config.eos_token_id = ends
        caplog.clear()
        with caplog.at_level(logging.WARNING, "slimkernels"):
            SlimTrainer(model=student, args=args, train_dataset=store, teacher_model=teacher)
        assert ("ends its text with the tokens [5, 6] and the teacher with [3, 4]" in caplog.text) == is_other


def test_a_teacher_and_a_store_can_be_given_by_their_folders(tmp_path, store):
    make_teacher().save_pretrained(tmp_path / "teacher")
    args = SlimConfig(output_dir=str(tmp_path), **RECIPE | {"max_steps": 1})
    trainer = SlimTrainer(
        model=make_model(),
        args=args,
        train_dataset=store.path,
        eval_dataset={"held-out": str(store.path)},
        teacher_model=str(tmp_path / "teacher"),
    )
    trainer.train()
    expected = online(tmp_path, store, max_steps=1)
    expected.train()
    assert training_logs(trainer)[0]["loss"] == training_logs(expected)[0]["loss"]
    assert trainer.evaluate()["eval_held-out_perplexity"] > 1


@pytest.mark.parametrize("base", ["by name", "unnamed", "moved"])
def test_a_student_of_adapters_is_loaded_to_be_measured_and_trained_further(tmp_path, store, base, capsys):
    """Saves LoRA adapters with SlimTrainer, and runs `eval` and `train` on their folder."""
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    make_model().save_pretrained(tmp_path / "base")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if base == "unnamed":
        student.name_or_path = student.config.name_or_path = ""
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    trainer = make_trainer(tmp_path / "run", store, model=peft.get_peft_model(student, config), max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapters"))
    expected = trainer.evaluate(store)["eval_loss"]
    command = ["train", "--store", str(store.path), "--student", str(tmp_path / "adapters"), "--method", "kd"]
    command += ["--out", str(tmp_path / "further"), "--max-steps", "3", "--learning-rate", "0.01"]
    command += ["--option", "use_cpu=true"]
    if base != "by name":
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        assert main(["eval", "--store", str(store.path), "--model", str(tmp_path / "adapters")]) == 2
        message = capsys.readouterr().err
        assert f"the model of the adapter in {tmp_path / 'adapters'} is not found" in message
        assert "set base_model_name_or_path in its adapter_config.json" in message
        return
    capsys.readouterr()
    assert main(["eval", "--store", str(store.path), "--model", str(tmp_path / "adapters"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[str(tmp_path / "adapters")]
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    assert main(command) == 0
    further = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "further"
    )
    assert evaluate_store(further, store)["loss"] < expected
    teacher = load_model(tmp_path / "adapters")
    assert make_student(str(tmp_path / "adapters")).training
    assert sum(parameter.requires_grad for parameter in teacher.parameters()) == 6


def test_a_teacher_of_adapters_is_one_model(tmp_path, store):
    peft = pytest.importorskip("peft", reason="needs the extra slimkernels[trl]")
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "adapters")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    adapted.save_pretrained(tmp_path / "adapters")
    teacher, _ = load_teacher(tmp_path / "adapters")
    ids = store[0].input_ids[None]
    torch.testing.assert_close(teacher(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert teacher.name_or_path == "adapters"
    capture(teacher, make_tokenizer(), [[2, 3, 4]], tmp_path / "captured", top_k=3)


def test_a_student_continues_the_prompt_that_the_store_knows(tmp_path) -> None:
    """Every token but the first of a generated document is a label, so that its labels do not say where it began."""
    teacher, tokens = make_model(seed=5).eval(), torch.arange(2, 14)
    settings = {"vocab_size": VOCAB_SIZE, "tokenizer_fingerprint": "", "teacher": {}, "selection": {}}
    with torch.no_grad():
        rows = sk.topk_logits(teacher(tokens[None]).logits[0, :-1], top_k=5, target=tokens[1:])
    with StoreWriter(tmp_path, **settings) as writer:
        writer.add(tokens, torch.arange(1, 12), rows, prompt_length=7)
    batch = SlimCollator()([StoreDataset(tmp_path)[0]])
    written = continue_prompts(teacher, batch, max_new_tokens=3, temperature=1.0, pad_token_id=0)
    assert written["input_ids"][0, :7].tolist() == tokens[:7].tolist()
    assert int(written["rows"][0]) == 6
