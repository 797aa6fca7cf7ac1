"""What capture stores is what the teacher says, whatever stops it on the way."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import teachers
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM, PhiConfig

from slimkernels import SparseLogits
from slimkernels.cli import main
from slimkernels.store import Document, Store, StoreDataset, verify
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.store.identity import is_same_tokenizer
from slimkernels.store.manifest import seal_manifest, unseal_manifest
from slimkernels.teacher import (
    TokenizedDocument,
    capture,
    generate_documents,
    read_documents,
    shipped_prompts,
    tokenizer_fingerprint,
)
from slimkernels.teacher.capture import _batches
from slimkernels.teacher.selection import cut_top_p
from slimkernels.trainer import SlimConfig, SlimTrainer

TOP_K = 17


def make_documents(count: int = 12, seed: int = 0, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [torch.randint(300, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return teachers.make_teacher()


def assert_is_what_the_teacher_says(document: Document, model, *, atol: float = 1e-4) -> None:
    """Every kept logit, label logit and normaliser of a document, beside the model's own dense logits."""
    ids, teacher = document.input_ids, document.teacher
    assert document.positions.tolist() == list(range(1, len(ids)))
    with torch.inference_mode():
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
    kept = teacher.ids.long()
    close = {"atol": atol, "rtol": 1e-4}
    torch.testing.assert_close(teacher.logits, logits.gather(1, kept), **close)
    torch.testing.assert_close(teacher.target_logit, logits.gather(1, ids[1:, None])[:, 0], **close)
    for temperature in teacher.temperatures:
        torch.testing.assert_close(teacher.lse_at(temperature), (logits / temperature).logsumexp(-1), **close)
    # As sets the ids may differ where logits tie within rounding; as values they are the largest.
    largest = logits.topk(teacher.top_k).values.sort().values
    torch.testing.assert_close(teacher.logits.sort().values, largest, **close)
    captured = (teacher.logits - teacher.lse_at(1.0)[:, None]).exp()
    torch.testing.assert_close(captured, logits.softmax(-1).gather(1, kept), atol=1e-5, rtol=1e-3)


def test_capture_stores_what_the_teacher_says(model, tokenizer, tmp_path) -> None:
    documents = make_documents()
    report = capture(
        model, tokenizer, documents, tmp_path, top_k=TOP_K, temperatures=(1.0, 2.5), codec="float32", batch_tokens=90
    )
    verify(tmp_path)
    store = Store(tmp_path)
    assert report == (12, sum(map(len, documents)), 0)
    assert sorted(document.input_ids.tolist() for document in store) == sorted(documents)
    assert (store.vocab_size, store.tokenizer_fingerprint) == (300, tokenizer_fingerprint(tokenizer))
    assert store.temperatures == (1.0, 2.5)
    assert store.manifest["selection"] == {"kind": "top_k", "value": 17, "top_k": 17}
    for document in store:
        assert_is_what_the_teacher_says(document, model)


def test_capture_keeps_a_twentieth_by_default(model, tokenizer, tmp_path) -> None:
    capture(model, tokenizer, make_documents(2), tmp_path)
    store = Store(tmp_path)
    assert store.manifest["selection"] == {"kind": "top_fraction", "value": 0.05, "top_k": 15}
    assert store[0].teacher.top_k == 15


@pytest.mark.parametrize(
    ("top_p", "rows"),
    [
        # Probabilities 1/2 at id 7, 1/4 at 2, 1/8 at 3, 1/8 at 9 of a whole row; 1/8 at 4, 1/8 at 5, the rest not kept.
        (0.4, [[7], [4, 5]]),
        (0.5, [[7], [4, 5]]),
        (0.6, [[2, 7], [4, 5]]),
        (0.8, [[2, 3, 7], [4, 5]]),
        (0.9, [[2, 3, 7, 9], [4, 5]]),
        (1.0, [[2, 3, 7, 9], [4, 5]]),
        (1 / 8, [[7], [4]]),
    ],
)
def test_cut_top_p_by_hand(top_p, rows) -> None:
    """The lse is that of the whole row, so that the second row's share does not count for more than it is."""
    ids = torch.tensor([[2, 3, 7, 9], [4, 5, -1, -1]], dtype=torch.int32)
    # exp(logit - lse), exact in float64 as powers of two are.
    logits = torch.tensor([[1 / 4, 1 / 8, 1 / 2, 1 / 8], [1 / 8, 1 / 8, 7.0, 7.0]]).double().log()
    cut = cut_top_p(SparseLogits(ids, logits, torch.zeros(2, 1).double(), target_logit=torch.zeros(2)), top_p)
    assert [[i for i in row if i >= 0] for row in cut.ids.tolist()] == rows
    assert cut.top_k == max(map(len, rows))
    for r, row in enumerate(rows):
        places = [ids[r].tolist().index(i) for i in row]
        assert cut.logits[r, : len(row)].tolist() == logits[r, places].tolist()
    cut.validate(10)


def test_cut_top_p_adds_what_it_cuts_to_the_rest() -> None:
    temperatures = (1.0, 2.0)
    rows = [[3, 5, 1, -9, 2], [1, -60, 1, -61, -62], [4, 0, 3, 2, 1]]
    row = torch.tensor(rows, dtype=torch.float64)
    kept = row[:, :4]
    lse, rest_lse = (torch.stack([(x / t).logsumexp(-1) for t in temperatures], -1) for x in (row, row[:, 4:]))
    rest_lse[2] = torch.tensor([-torch.inf, torch.nan])
    ids = torch.arange(4, dtype=torch.int32).repeat(3, 1)
    sparse = SparseLogits(ids, kept, lse, temperatures, rest_lse=rest_lse)
    cut = cut_top_p(sparse, 0.86)
    assert [[i for i in ids if i >= 0] for ids in cut.ids.tolist()] == [[0, 1], [0, 2], [0, 2]]
    for column, temperature in enumerate(temperatures):
        # Of the second row nothing is left but e^-60: 1 - the kept mass would be 0.
        for r, others in ((0, [2, 3, 4]), (1, [1, 3, 4])):
            expected = (row[r, others] / temperature).logsumexp(-1)
            assert cut.rest_lse[r, column].item() == pytest.approx(expected.item(), abs=1e-12)
    assert cut.rest_lse[2, 0].item() == pytest.approx(torch.logaddexp(row[2, 1], row[2, 3]).item(), abs=1e-12)
    assert cut.rest_lse[2, 1].isnan()
    single = dataclasses.replace(sparse, logits=kept.float(), lse=lse.float(), rest_lse=rest_lse.float())
    torch.testing.assert_close(cut_top_p(single, 0.86).rest_lse, cut.rest_lse.float(), equal_nan=True)
    assert torch.equal(cut_top_p(sparse, 1.0).rest_lse[0], rest_lse[0])
    assert cut_top_p(dataclasses.replace(sparse, rest_lse=None), 0.86).rest_lse is None


@pytest.mark.parametrize("top_p", [0.1, 0.3, 1.0])
def test_capture_cuts_rows_at_a_probability(model, tokenizer, tmp_path, top_p) -> None:
    documents = make_documents()
    for name, options in (("whole", {}), ("cut", {"top_p": top_p})):
        capture(model, tokenizer, documents, tmp_path / name, top_k=TOP_K, codec="float32", **options)
    verify(tmp_path / "cut")
    cut, whole = Store(tmp_path / "cut"), Store(tmp_path / "whole")
    assert cut.manifest["selection"] == {"kind": "top_k", "value": 17, "top_k": 17, "top_p": top_p}
    sizes = set()
    for document, full in zip(cut, whole, strict=True):
        assert torch.equal(document.teacher.lse, full.teacher.lse)
        assert torch.equal(document.teacher.target_logit, full.teacher.target_logit)
        for r, ids in enumerate(document.teacher.ids):
            kept = dict(zip(full.teacher.ids[r].tolist(), full.teacher.logits[r].tolist(), strict=True))
            likely = sorted(kept, key=lambda i: -kept[i])
            mass = (torch.tensor([kept[i] for i in likely]).double() - full.teacher.lse[r, 0]).exp().cumsum(0)
            count = min(int((mass < top_p).sum()) + 1, TOP_K)
            assert [i for i in ids.tolist() if i >= 0] == sorted(likely[:count])
            assert document.teacher.logits[r, :count].tolist() == [kept[i] for i in sorted(likely[:count])]
            sizes.add(count)
    assert sizes == {TOP_K} if top_p == 1.0 else len(sizes) > 1
    with pytest.raises(SettingsMismatchError, match="top_p"):
        capture(model, tokenizer, documents, tmp_path / "cut", top_k=TOP_K, codec="float32")
    with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\], got 0"):
        capture(model, tokenizer, documents, tmp_path / "other", top_p=0)


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (Gemma2Config, {"final_logit_softcapping": 3.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
        (CohereConfig, {"logit_scale": 0.37}),
        (GraniteConfig, {"logits_scaling": 4.0}),
        (PhiConfig, {}),  # Its head has a bias.
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_capture_follows_the_architecture(config_class, options, tokenizer, tmp_path) -> None:
    model = teachers.make_teacher(config_class=config_class, **options)
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    capture(model, tokenizer, make_documents(4), tmp_path, top_k=TOP_K, codec="float32")
    for document in Store(tmp_path):
        assert_is_what_the_teacher_says(document, model)


class DoubledLogits(LlamaForCausalLM):
    """Does to its logits what no configuration tells."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


def test_capture_refuses_a_head_it_does_not_know(model, tokenizer, tmp_path) -> None:
    other = DoubledLogits(model.config).eval()
    with pytest.raises(ValueError, match=r"the logits of DoubledLogits are not softcap\(logit_scale"):
        capture(other, tokenizer, make_documents(2), tmp_path)
    assert len(Store(tmp_path)) == 0


def test_capture_of_a_bfloat16_teacher(tokenizer, tmp_path) -> None:
    model = teachers.make_teacher(dtype=torch.bfloat16)
    capture(model, tokenizer, make_documents(4), tmp_path, top_k=TOP_K, codec="bfloat16")
    store = Store(tmp_path)
    assert store.manifest["teacher"]["dtype"] == "bfloat16"
    for document in store:
        with torch.inference_mode():
            logits = model(document.input_ids[None]).logits[0, :-1].float()
        kept = logits.gather(1, document.teacher.ids.long())
        torch.testing.assert_close(document.teacher.logits, kept, atol=0.05 * float(kept.abs().max()), rtol=0)


def test_capture_skips_what_is_stored_or_has_no_label(model, tokenizer, tmp_path) -> None:
    documents = make_documents(6)
    assert capture(model, tokenizer, documents[:4], tmp_path, top_k=TOP_K).documents == 4
    report = capture(model, tokenizer, [*documents, documents[5], [7], []], tmp_path, top_k=TOP_K)
    assert report == (2, len(documents[4]) + len(documents[5]), 7)
    verify(tmp_path)
    assert len(Store(tmp_path)) == 6


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


CAPTURE = """
    import os, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    from support import teachers
    from test_capture import OPTIONS, make_documents
    from slimkernels.teacher import capture

    def stop(documents, tokens):
        if documents >= 8:
            os.kill(os.getpid(), {signal})

    capture(teachers.make_teacher(), teachers.make_tokenizer(), make_documents(), {path!r}, progress=stop, **OPTIONS)
"""
OPTIONS = {"top_k": TOP_K, "batch_tokens": 90, "window": 5, "shard_rows": 40}


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_capture_that_was_killed_continues_to_the_same_store(model, tokenizer, tmp_path, stop) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tests = str(Path(__file__).parent)
    script = textwrap.dedent(CAPTURE).format(tests=tests, path=str(killed), signal=int(stop))
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, timeout=900)
    assert process.returncode == -stop, process.stderr.decode()
    stored = len(Store(killed))
    assert 0 < stored < 12
    assert capture(model, tokenizer, make_documents(), killed, **OPTIONS).documents == 12 - stored
    capture(model, tokenizer, make_documents(), whole, **OPTIONS)
    verify(killed)
    if stop == signal.SIGKILL:
        assert contents(killed) == contents(whole)
    for one, other in zip(Store(killed), Store(whole), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        for field in ("ids", "logits", "lse", "target_logit"):
            assert torch.equal(getattr(one.teacher, field), getattr(other.teacher, field)), field


@given(st.lists(st.integers(2, 60), max_size=40), st.integers(1, 10), st.integers(2, 100))
def test_batches_hold_every_document_once_within_bounds(lengths, window, batch_tokens) -> None:
    documents = [TokenizedDocument([number] * length) for number, length in enumerate(lengths)]
    for number, ids in enumerate(documents):
        # What the teacher reads counts, which is longer where there is a prefix.
        ids.teacher_ids = [7] * (number % 3) + ids
    batches = list(_batches(iter(documents), window, batch_tokens))
    assert sorted(itertools.chain(*batches)) == sorted(documents)
    for batch in batches:
        longest, shortest = len(batch[0].read_ids), len(batch[-1].read_ids)
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        assert longest <= 1.25 * shortest
        numbers = [ids[0] // window for ids in batch]
        assert len(set(numbers)) == 1


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([[1, 300]], {}, r"token ids must lie in \[0, 300\).*got 1 to 300 in document 1"),
        ([[1, 2], [-1, 2]], {}, r"got -1 to 2 in document 2"),
        ([[1] * 129], {}, "document 1 has 129 tokens, but the teacher reads 128: split it"),
        ([], {}, "at least one document of 2 tokens, got none"),
        ([[3]], {}, "at least one document of 2 tokens, got none"),
        ([[1, 2]], {"top_k": 301}, "top_k must be an integer in"),
        ([[1, 2]], {"top_fraction": 1.5}, "top_fraction must be in"),
        ([[1, 2]], {"top_k": 3, "top_fraction": 0.1}, "exactly one of top_k and top_fraction"),
        ([[1, 2]], {"temperatures": (1.0, 0.0)}, "temperatures must be"),
        ([[1, 2]], {"codec": "int4"}, "codec must be"),
        ([[1, 2]], {"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ([[1, 2]], {"window": 0}, "window must be at least 1"),
    ],
)
def test_capture_refuses_bad_input(model, tokenizer, tmp_path, documents, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        capture(model, tokenizer, documents, tmp_path / "store", **options)


def test_capture_refuses_the_store_of_another_teacher(model, tokenizer, tmp_path) -> None:
    capture(model, tokenizer, make_documents(2), tmp_path, top_k=TOP_K)
    before = contents(tmp_path)
    other_tokenizer = teachers.make_tokenizer()
    other_tokenizer.eos_token = other_tokenizer.bos_token
    for name, arguments, options in (
        ("teacher", (teachers.make_teacher(seed=1), tokenizer), {"top_k": TOP_K}),
        ("tokenizer_fingerprint", (model, other_tokenizer), {"top_k": TOP_K}),
        ("selection", (model, tokenizer), {"top_k": TOP_K + 1}),
        ("codec", (model, tokenizer), {"top_k": TOP_K, "codec": "float32"}),
    ):
        # Nothing is computed first: the documents are not even asked for.
        with pytest.raises(SettingsMismatchError, match=f"was made with {name}="):
            capture(*arguments, iter(lambda: pytest.fail("read a document"), None), tmp_path, **options)
    assert contents(tmp_path) == before


def test_capture_refuses_a_tokenizer_larger_than_the_model(model, tmp_path) -> None:
    longer = teachers.make_tokenizer()
    longer.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="the tokenizer has 301 tokens, but the teacher has 300"):
        capture(model, longer, make_documents(2), tmp_path)


def test_capture_stops_at_logits_that_are_not_finite(tokenizer, tmp_path) -> None:
    model = teachers.make_teacher()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.inf
    with pytest.raises(FloatingPointError, match=r"not finite in torch.float32"):
        capture(model, tokenizer, make_documents(2), tmp_path)
    assert len(Store(tmp_path)) == 0


def test_capture_of_the_real_teacher(tmp_path) -> None:
    model, tokenizer = teachers.smollm2()
    path = tmp_path / "a.jsonl"
    generate_documents(model, tokenizer, shipped_prompts(), path, num_documents=4, max_new_tokens=24)
    capture(
        model, tokenizer, read_documents(path, tokenizer, text_field="input_ids"), tmp_path / "store", codec="float32"
    )
    store = Store(tmp_path / "store")
    assert store.manifest["selection"]["top_k"] == 2458
    assert len(store) == 4
    for document in store:
        # Logits are around 20; batches round differently from single documents.
        assert_is_what_the_teacher_says(document, model, atol=2e-3)
        mass = (document.teacher.logits - document.teacher.lse_at(1.0)[:, None]).exp().sum(-1)
        assert 0.9 < float(mass.mean()) <= 1.0 + 1e-5


class TestPaddedHeads:
    """Heads have more rows than the tokenizer has ids: Qwen2.5's has 152,064 for 151,665. The others are no tokens."""

    @pytest.fixture
    def padded(self):
        model = teachers.make_teacher(vocab_size=328)
        with torch.no_grad():
            # Untrained rows can be likely ones.
            model.lm_head.weight[300:] *= 2
        return model

    @pytest.mark.parametrize("select", ["top_k", "sample", "mixed"])
    def test_are_captured_without_their_padding(self, select, padded, tokenizer, tmp_path) -> None:
        whole = teachers.make_teacher(vocab_size=328)
        whole.load_state_dict(padded.state_dict())
        whole.resize_token_embeddings(300)
        documents = make_documents(4)
        options = {"select": select, "codec": "float32", "temperatures": (1.0, 2.0) if select == "top_k" else (1.0,)}
        for name, model in (("padded", padded), ("whole", whole)):
            capture(model, tokenizer, documents, tmp_path / name, **options)
        stores = Store(tmp_path / "padded"), Store(tmp_path / "whole")
        assert stores[0].vocab_size == 300
        assert stores[0].manifest["selection"] == stores[1].manifest["selection"]
        for left, right in zip(*stores, strict=True):
            assert torch.equal(left.teacher.ids, right.teacher.ids)
            torch.testing.assert_close(left.teacher.logits, right.teacher.logits)
            torch.testing.assert_close(left.teacher.lse, right.teacher.lse)
            torch.testing.assert_close(left.teacher.rest_lse, right.teacher.rest_lse, equal_nan=True)

    def test_a_student_with_the_tokens_that_both_have_trains(self, padded, tokenizer, tmp_path) -> None:
        capture(padded, tokenizer, make_documents(4), tmp_path / "store")
        options = {"max_steps": 2, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        trainer = SlimTrainer(
            model=teachers.make_teacher(seed=3),
            args=SlimConfig(output_dir=str(tmp_path / "run"), method="kd", **options),
            train_dataset=StoreDataset(tmp_path / "store"),
            processing_class=tokenizer,
        )
        assert trainer.train().training_loss > 0

    def test_write_no_token_that_the_tokenizer_lacks(self, padded, tokenizer, tmp_path) -> None:
        with torch.no_grad():
            padded.lm_head.weight[300:] *= 20
        generate_documents(
            padded, tokenizer, teachers.PROMPTS, tmp_path / "a.jsonl", num_documents=20, max_new_tokens=40
        )
        documents = list(read_documents(tmp_path / "a.jsonl", tokenizer, text_field="input_ids", max_length=None))
        assert max(max(ids) for ids in documents) < 300
        capture(padded, tokenizer, documents, tmp_path / "store")

    def test_of_a_store_that_an_earlier_release_began_are_continued_as_they_were(
        self, padded, tokenizer, tmp_path
    ) -> None:
        first, rest = make_documents(4)[:2], make_documents(4)[2:]
        wide = teachers.make_tokenizer()
        wide.add_tokens([f"<{i}>" for i in range(28)])
        capture(padded, wide, first, tmp_path)
        manifest = (tmp_path / "manifest.json").read_bytes()
        content = unseal_manifest(manifest) | {"tokenizer_fingerprint": tokenizer_fingerprint(tokenizer)}
        (tmp_path / "manifest.json").write_bytes(seal_manifest(content))
        assert capture(padded, tokenizer, rest, tmp_path).documents == 2
        assert Store(tmp_path).vocab_size == 328


@pytest.mark.parametrize("num_rows", [300, 328])
def test_a_padding_token_that_was_added_to_the_tokenizer_changes_nothing(num_rows, tokenizer, tmp_path) -> None:
    model, documents = teachers.make_teacher(vocab_size=num_rows), make_documents(4)
    padded = teachers.make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    assert padded.pad_token_id == 300
    capture(model, tokenizer, documents[:2], tmp_path / "old")
    assert capture(model, padded, documents, tmp_path / "old") == (2, sum(map(len, documents[2:])), 2)
    store = Store(tmp_path / "old")
    assert (store.vocab_size, store.tokenizer_fingerprint) == (300, tokenizer_fingerprint(tokenizer))
    if num_rows == 300:
        capture(model, padded, documents, tmp_path / "new")
        assert Store(tmp_path / "new").vocab_size == 300


def padded_tokenizer():
    """The shared tokenizer after a padding token was added to it, as training scripts do."""
    padded = teachers.make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    return padded


@pytest.mark.parametrize("num_rows", [300, 328])
def test_a_store_begun_with_an_added_padding_token_goes_on_without_it(num_rows, tokenizer, tmp_path) -> None:
    model, documents = teachers.make_teacher(vocab_size=num_rows), make_documents(4)
    capture(model, padded_tokenizer(), documents[:2], tmp_path)
    expected = Store(tmp_path).settings
    assert expected.vocab_size == min(num_rows, 301)
    assert capture(model, tokenizer, documents, tmp_path).documents == 2
    assert Store(tmp_path).settings == expected
    other_padding = teachers.make_tokenizer()
    other_padding.add_special_tokens({"pad_token": "<other>"})
    assert capture(model, other_padding, [*documents, [7, 8, 9]], tmp_path).documents == 1


def test_two_tokenizers_are_the_same_by_one_rule(tokenizer, tmp_path) -> None:
    padded, longer, other_end = padded_tokenizer(), teachers.make_tokenizer(), padded_tokenizer()
    longer.add_tokens("<pad>")
    other_end.eos_token = other_end.bos_token
    own, of_padded, of_longer, of_other = map(tokenizer_fingerprint, (tokenizer, padded, longer, other_end))
    assert [len(own), len(of_padded), len(of_longer)] == [64, 129, 64]
    # A store of an earlier release holds the first hash alone.
    for one, other, is_same in (
        (own, own, True),
        (own, of_padded, True),
        (of_padded.split()[0], of_padded, True),
        # Which token pads does not count.
        (of_padded, of_longer, True),
        (own, of_longer, False),
        (of_padded, of_other, False),
        ("", own, False),
        ("", "", True),
    ):
        assert is_same_tokenizer(one, other) == is_same_tokenizer(other, one) == is_same


def test_verify_and_generation_know_a_tokenizer_with_an_added_padding_token(tmp_path, capsys) -> None:
    model, tokenizer = teachers.make_teacher(vocab_size=328), teachers.make_tokenizer()
    options = {"max_new_tokens": 6, "batch_size": 2, "top_k": None}
    generate_documents(model, tokenizer, teachers.PROMPTS, tmp_path / "whole", num_documents=4, **options)
    generate_documents(model, tokenizer, teachers.PROMPTS, tmp_path / "text", num_documents=2, **options)
    generate_documents(model, padded_tokenizer(), teachers.PROMPTS, tmp_path / "text", num_documents=4, **options)
    assert (tmp_path / "text").read_bytes() == (tmp_path / "whole").read_bytes()

    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "When the rain stopped"}) + "\n")
    capture(model, tokenizer, read_documents(text, tokenizer), tmp_path / "store")
    for name, other in (("padded", padded_tokenizer()), ("other", teachers.make_tokenizer())):
        if name == "other":
            other.eos_token = other.bos_token
        teachers.save_teacher(tmp_path / name)
        other.save_pretrained(tmp_path / name)
        verify_with = ["--complete", str(text), "--tokenizer", str(tmp_path / name)]
        assert main(["store", "verify", str(tmp_path / "store"), *verify_with]) == (0 if name == "padded" else 2)
    assert "was captured with tokenizer_fingerprint=" in capsys.readouterr().err
