"""Patched models, and models that the mixin trains, that threads share and that are copied, sent and unwrapped."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from support.families import make_family
from test_patch_model import assert_same, generate, loss_and_gradients, make_batch
from transformers import Trainer, TrainingArguments

import slimkernels as sk
from slimkernels.models.head_loss import HeadLoss

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.fixture
def frequent_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(*functions, calls: int = 40) -> None:
    """Runs every function ``calls`` times, each in a thread of its own, and raises what one of them raised."""
    errors = []
    start = threading.Barrier(len(functions))

    def repeat(function) -> None:
        start.wait()
        try:
            for _ in range(calls):
                function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("frequent_switches")
def test_threads_that_train_and_generate_with_one_patched_model_do_not_meet():
    model = make_family("llama")
    batches = [make_batch(seed) for seed in range(3)]
    expected = [model(**batch).loss for batch in batches]
    ids = batches[0]["input_ids"]
    logits = model(input_ids=ids).logits
    tokens = generate(model.eval())
    model.train()
    sk.patch_model(model)

    def trains(number: int):
        return lambda: torch.testing.assert_close(model(**batches[number]).loss, expected[number])

    def reads():
        torch.testing.assert_close(model(input_ids=ids).logits, logits)

    in_threads(trains(0), reads, trains(1), reads, trains(2))
    assert model(**batches[0]).logits is None
    assert torch.equal(generate(model.eval()), tokens)
    sk.unpatch_model(model.train())
    assert model(**batches[0]).logits.shape == logits.shape
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.usefixtures("frequent_switches")
def test_a_loss_in_place_of_the_head_is_seen_by_its_own_thread_only():
    """Calls the model in one thread while another computes a loss in place of its head, as the mixin does."""
    model, batch = make_family("llama"), make_batch()
    expected = model(**batch)

    def distills():
        head = HeadLoss()
        with head.inside(model):
            torch.testing.assert_close(model(**batch).loss, expected.loss)
        assert head.result is not None

    def reads():
        output = model(**batch)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)

    in_threads(distills, reads, distills, reads)
    assert type(model.lm_head) is torch.nn.Linear
    assert "forward" not in vars(model.lm_head)
    assert "_loss_function" not in vars(model)


def test_nothing_of_a_call_is_on_the_model_while_it_runs():
    """A copy that is made in the middle of a call is a whole model of its own."""
    model, batch = make_family("llama"), make_batch()
    logits = model(**batch).logits
    with HeadLoss().inside(model):
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301 -- written here
        other = copy.deepcopy(model)
    for one in (twin, other):
        torch.testing.assert_close(one(**batch).logits, logits)
        assert type(one) is type(model)
        assert type(one.lm_head) is torch.nn.Linear


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301 -- written here
    "old-pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),  # noqa: S301 -- written here
    "torch-save": through_torch_save,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_patched_model_is_patched_and_can_be_unpatched(make_copy):
    model, batch = make_family("llama"), make_batch()
    expected = loss_and_gradients(model, **batch)
    twin = make_copy(sk.patch_model(model))
    assert twin(**batch).logits is None
    assert_same(loss_and_gradients(twin, **batch), expected)
    with pytest.raises(ValueError, match="already patched"):
        sk.patch_model(twin)
    sk.unpatch_model(twin)
    assert twin(**batch).logits is not None
    assert model(**batch).logits is None
    sk.patch_model(twin)
    assert twin(**batch).logits is None


def worker(rank: int, model, batch, losses) -> None:
    output = model(**batch)
    assert output.logits is None
    losses[rank] = float(output.loss.detach())


def test_a_patched_model_that_is_sent_to_processes_is_patched_there():
    model, batch = make_family("llama").share_memory(), make_batch()
    expected = float(model(**batch).loss.detach())
    losses = torch.zeros(1).share_memory_()
    torch.multiprocessing.spawn(worker, (sk.patch_model(model), batch, losses), nprocs=1)
    assert losses.item() == pytest.approx(expected, rel=1e-5)


def test_replicas_of_data_parallel_run_themselves():
    """Gives the replica another head: a loss of the first model's head would be another."""
    model, batch = sk.patch_model(make_family("llama")), make_batch()
    replica = model._replicate_for_data_parallel()
    replica._modules["lm_head"] = copy.deepcopy(model.lm_head)
    replica._modules["lm_head"].weight.data.mul_(2)
    output = replica(**batch)
    assert output.logits is None
    sk.unpatch_model(model)
    eager = copy.deepcopy(model)
    eager.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    torch.testing.assert_close(output.loss, eager(**batch).loss)


@pytest.mark.parametrize("order", ["patch, prepare", "prepare, patch"])
def test_a_model_that_accelerate_prepared_stays_patched_when_it_is_unwrapped(order, request):
    accelerate = pytest.importorskip("accelerate")
    # The state is the process's: a trainer of another test may have set another precision.
    accelerate.state.AcceleratorState._reset_state()
    request.addfinalizer(accelerate.state.AcceleratorState._reset_state)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, batch = make_family("llama"), make_batch()
    expected = model(**batch).loss
    if order == "patch, prepare":
        prepared = accelerator.prepare_model(sk.patch_model(model))
    else:
        # The check compares logits that autocast rounds with those of a float32 head.
        prepared = sk.patch_model(accelerator.prepare_model(model), check=False)
    output = prepared(**batch)
    assert output.logits is None
    assert output.loss != expected
    torch.testing.assert_close(output.loss, expected, rtol=5e-3, atol=0)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    output = unwrapped(**batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)
    sk.unpatch_model(unwrapped)
    assert unwrapped(**batch).logits is not None


def test_a_patched_model_has_the_names_of_its_class(tmp_path):
    model = make_family("llama")
    own, hook = type(model), str(type(model))
    sk.patch_model(model)
    assert isinstance(model, own)
    assert (type(model).__name__, str(type(model))) == (own.__name__, hook)
    model.save_pretrained(tmp_path)
    assert own.from_pretrained(tmp_path).config.architectures == [own.__name__]
    assert type(sk.unpatch_model(model)) is own


def test_a_model_that_was_trained_can_be_sent_without_this_package(tmp_path):
    """Leaves nothing of the mixin in the pickle of the student that it trained."""

    class Distiller(sk.SlimLossMixin, Trainer):
        pass

    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    row = {name: value[0] for name, value in make_batch().items()}
    model = make_family("llama")
    Distiller(model=model, args=args, train_dataset=[row, row], objective=sk.SlimObjective("sft")).train()
    assert b"slimkernels" not in pickle.dumps(model)
