"""``translate_store``: places by bytes, ids by exact token, masses against dense rows, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import teachers, tiny
from support import tokenizers_of_kinds as kinds

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.exchange import translate_store
from slimkernels.exchange.alignment import Aligner, UntranslatableError
from slimkernels.exchange.token_bytes import read_pieces
from slimkernels.exchange.translated_rows import translate_rows
from slimkernels.store import Store, StoreWriter, info, verify
from slimkernels.teacher import capture
from slimkernels.trainer.stored_rows import check_stored_rows

TEXTS = (
    "When the rain stopped, Anna drank a naïve café au lait — don't ask — and 日本語 was 😀 spoken 12345 times.",
    "She thought about the old wall.\n\nA black cat was sleeping on it; running, it ran.",
)


aligner_of = functools.cache(lambda teacher, student: Aligner(teacher(), student()))


def tokens_of(tokenizer, text):
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("make", [kinds.smollm2, kinds.sentencepiece, teachers.make_tokenizer])
def test_token_bytes_join_to_the_text(make):
    tokenizer = make()
    pieces = read_pieces(tokenizer, "teacher")
    for text in TEXTS:
        joined = pieces.joined(tokens_of(tokenizer, text))
        assert joined.decode().removeprefix(" ") == text
        assert len(joined) == pieces.lengths[tokens_of(tokenizer, text)].sum()
    assert not any(pieces.texts[number] for number in tokenizer.all_special_ids)


def test_ids_are_those_of_the_same_bytes():
    """SentencePiece's spaces and bytes, and the end of text by its role."""
    teacher, student = kinds.smollm2(), kinds.sentencepiece()
    tokens = aligner_of(kinds.smollm2, kinds.sentencepiece).map
    vocab = teacher.get_vocab()
    expected = {
        "Ġthe": f"{kinds.SPACE}the",
        "op": "op",
        "Ċ": "<0x0A>",
        "Ã": "<0xC3>",
        "a": "a",
        "<|im_end|>": "</s>",
        "<|im_start|>": None,
        "<repo_name>": None,
        "Ġthoughtful": None,
    }
    for name, counterpart in expected.items():
        number = -1 if counterpart is None else student.convert_tokens_to_ids(counterpart)
        assert tokens.ids[:, vocab[name]].tolist() == [number, number], name
    assert tokens.is_injective
    assert (tokens.ids[:, -1] == -1).all()


def test_ids_of_wordpiece_follow_from_the_place():
    teacher, student = kinds.smollm2(), kinds.minilm()
    tokens = aligner_of(kinds.smollm2, kinds.minilm).map
    vocab = teacher.get_vocab()
    for name, within, beginning in (
        ("ing", "##ing", "ing"),
        ("Ġrunning", "running", "running"),
        ("ĠThe", "the", "the"),
        (".", ".", "."),
        ("Ġ", None, None),
        ("##", None, None),
        ("<|im_end|>", "[SEP]", "[SEP]"),
    ):
        ids = [-1 if name is None else student.convert_tokens_to_ids(name) for name in (within, beginning)]
        assert tokens.ids[:, vocab[name]].tolist() == ids, name
    assert not tokens.is_injective


def brute_force_places(teacher, teacher_ids, student, student_ids):
    """The student's tokens before which the decoded texts of some number of tokens of both are equal, byte for byte."""
    texts = [read_pieces(tokenizer, "teacher") for tokenizer in (teacher, student)]
    begins = {len(texts[0].joined(teacher_ids[:place])): place for place in range(len(teacher_ids))}
    return [begins.get(len(texts[1].joined(student_ids[:place]))) for place in range(len(student_ids))]


def test_places_are_aligned_by_bytes():
    """Within a character that both tokenizers cut in two, too."""
    teacher, student = kinds.smollm2(), teachers.make_tokenizer()
    aligner = aligner_of(kinds.smollm2, teachers.make_tokenizer)
    for text in TEXTS:
        ids = tokens_of(teacher, text)
        found = aligner(ids)
        assert found.input_ids.tolist() == tokens_of(student, text).tolist()
        expected = brute_force_places(teacher, ids, student, found.input_ids)
        assert np.where(found.is_aligned, found.place, None).tolist() == expected
    assert 0.2 < found.is_aligned.mean() < 0.9


def test_places_of_a_tokenizer_that_changes_the_text():
    """Dropped spaces belong to the token after them."""
    teacher, student = kinds.smollm2(), kinds.minilm()
    ids = tokens_of(teacher, "Naïve  cafés—unhappiness, 日本")
    found = aligner_of(kinds.smollm2, kinds.minilm)(ids)
    names = student.convert_ids_to_tokens(found.input_ids.tolist())
    assert names == ["naive", "cafes", "—", "un", "##ha", "##pp", "##iness", ",", "日", "本"]
    begins = teacher.convert_ids_to_tokens(ids[found.place].tolist())
    rows = list(zip(begins, found.is_aligned.tolist(), found.begins_word.tolist(), strict=True))
    of = dict(zip(names, rows, strict=True))
    # Two spaces before it: the first is a token of the teacher.
    assert of["cafes"] == ("Ġ", True, False)
    assert of["—"][1:] == (True, False)
    assert of["un"][1:] == (True, True)
    assert of[","] == (",", True, False)
    assert of["本"][1:] == (True, True)


def test_spaces_before_a_text_are_no_part_of_it():
    """SentencePiece begins a text with a space, and its tokens do not say that the text has none."""
    byte_level, pieces = kinds.smollm2(), kinds.sentencepiece()
    text = "the rain, the rain"
    ids = np.array(pieces(text)["input_ids"])
    found = aligner_of(kinds.sentencepiece, kinds.smollm2)(ids)
    assert byte_level.decode(found.input_ids) == text
    assert found.is_aligned.tolist() == [False, True, True, True, True]
    found = aligner_of(kinds.smollm2, kinds.sentencepiece)(tokens_of(byte_level, text))
    assert found.input_ids.tolist() == ids.tolist()
    assert found.is_aligned.tolist() == [False, False, True, False, True, True, True, False]


def test_special_tokens_and_prompts():
    teacher, student = kinds.smollm2(), kinds.sentencepiece()
    aligner = aligner_of(kinds.smollm2, kinds.sentencepiece)
    end = teacher.convert_tokens_to_ids("<|im_end|>")
    ids = np.array([*tokens_of(teacher, "the <s> rain"), end])
    found = aligner(ids, prompt_length=1)
    # What reads like a special token is text, and the end of text is not.
    assert student.decode(found.input_ids) == "<s> the <s> rain</s>"
    assert found.input_ids.tolist().count(1) == 1
    assert found.is_aligned[-1]
    assert found.prompt_length == 2
    with pytest.raises(UntranslatableError, match=r"no <repo_name>: add it"):
        aligner(np.array([end, teacher.convert_tokens_to_ids("<repo_name>")]))


def test_a_character_that_was_cut_in_two_is_left_out():
    teacher, student = kinds.smollm2(), teachers.make_tokenizer()
    aligner = aligner_of(kinds.smollm2, teachers.make_tokenizer)
    ids = tokens_of(teacher, "😀 rain 😀")[1:-1]
    # The bytes of a face are cut in two.
    assert teacher.decode(ids).startswith("�")
    assert teacher.decode(ids).endswith("�")
    found = aligner(ids)
    assert student.decode(found.input_ids) == " rain "
    assert found.place[0] > 0
    assert found.is_aligned[0]
    with pytest.raises(UntranslatableError, match="no UTF-8"):
        aligner(np.concatenate([tokens_of(teacher, "a"), ids]))


def dense_case(temperatures, *, num_rows=40, vocab_size=60, new_size=30, top_k=15, seed=0):
    """Rows of a dense teacher in float64, and a map of its ids of which some have none and some share one."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, vocab_size, generator=generator, dtype=torch.float64)
    label = torch.randint(vocab_size, (num_rows,), generator=generator)
    teacher = sk.topk_logits(logits, top_k=top_k, target=label, temperatures=temperatures)
    ids = torch.randint(new_size, (vocab_size + 1,), generator=generator)
    # Every third, and what padding reaches.
    ids[::3] = -1
    return logits, label, teacher, ids


def test_rows_are_those_of_the_dense_teacher():
    logits, label, teacher, ids = dense_case((1.0, 2.0))
    new_label = torch.where(torch.arange(40) % 3 > 0, ids[label], -1)
    found = translate_rows(teacher, ids.numpy()[teacher.ids.numpy()], label.numpy(), new_label.numpy())
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, teacher.ids.long(), True)
    probs = logits.softmax(-1)
    is_mapped = kept & (ids[:-1] >= 0)
    dense = torch.zeros(40, 30, dtype=torch.float64)
    dense.index_add_(-1, ids[:-1].clamp(min=0), probs.where(is_mapped, 0))
    ours = torch.zeros(40, 31, dtype=torch.float64)
    kept_probs = torch.from_numpy(np.exp(found.logits - found.lse[:, :1]))
    ours.scatter_(-1, torch.from_numpy(found.ids).long() % 31, kept_probs)
    torch.testing.assert_close(ours[:, :30], dense, rtol=1e-9, atol=1e-15)
    rest = torch.from_numpy(np.exp(found.rest_lse - found.lse))
    torch.testing.assert_close(rest[:, 0], 1 - dense.sum(-1), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(found.mass_kept, dense.sum(-1), rtol=1e-9)
    np.testing.assert_allclose(found.mass_before, (probs * kept).sum(-1), rtol=1e-9)
    # The label's probability is that of all kept ids which become it, and its own.
    at = torch.arange(40)
    expected = dense[at, new_label.clamp(min=0)] + probs[at, label] * ~kept[at, label]
    known = new_label >= 0
    ours = torch.from_numpy(np.exp(found.target_logit - found.lse[:, 0]))
    torch.testing.assert_close(ours[known], expected[known], rtol=1e-9, atol=0)
    assert ours[~known].isnan().all()
    # At another temperature the rows are those of the added probabilities, and still sum to one.
    entries = np.where(found.ids >= 0, found.logits, -np.inf) / 2 - found.lse[:, 1:]
    np.testing.assert_allclose(np.exp(entries).sum(-1) + rest[:, 1].numpy(), 1, rtol=1e-9)
    assert (found.ids >= 0).sum() < int(is_mapped.sum())
    # Ids ascend, and padding is at the end.
    sk.SparseLogits(*map(torch.from_numpy, (found.ids, found.logits, found.lse[:, :1]))).validate(30)


def test_rows_whose_rest_is_not_known():
    """A rest is then 1 minus what is kept, where that can be told."""
    _, label, teacher, ids = dense_case((1.0,))
    mapped = ids.numpy()[teacher.ids.numpy()]
    known = translate_rows(teacher, mapped, label.numpy(), label.numpy())
    for rest in (None, torch.full_like(teacher.lse, math.nan)):
        found = translate_rows(dataclasses.replace(teacher, rest_lse=rest), mapped, label.numpy(), label.numpy())
        np.testing.assert_allclose(np.exp(found.rest_lse), np.exp(known.rest_lse), rtol=1e-3)


def test_a_row_without_counterparts_keeps_nothing():
    _, label, teacher, _ = dense_case((1.0, 2.0))
    found = translate_rows(teacher, np.full(teacher.ids.shape, -1), label.numpy(), label.numpy())
    assert found.ids.shape == (40, 1)
    assert (found.ids == -1).all()
    assert (found.rest_lse == found.lse).all()
    assert not found.mass_kept.any()


class Captured(NamedTuple):
    """A tiny random teacher with a tokenizer, and the store of its largest logits for two documents."""

    model: Any
    make_tokenizer: Any
    path: Path
    top_k: int


def captured(folder, make_tokenizer, model, top_k, texts):
    tokenizer = make_tokenizer()
    documents = [[*tokens_of(tokenizer, text).tolist(), tokenizer.eos_token_id] for text in texts]
    capture(model, tokenizer, documents, folder, top_k=top_k, codec="float32", temperatures=(1.0, 2.0))
    return Captured(model, make_tokenizer, folder, top_k)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Documents in SmolLM2's tokens."""
    model = tiny.make_model(vocab_size=len(kinds.smollm2()), hidden_size=8, num_layers=1).eval()
    texts = (TEXTS[0][:60], TEXTS[1][:60])
    return captured(tmp_path_factory.mktemp("real"), kinds.smollm2, model, 2000, texts)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Documents in tokens of SentencePiece."""
    model = teachers.make_teacher(vocab_size=400, max_position_embeddings=256)
    return captured(tmp_path_factory.mktemp("small"), kinds.sentencepiece, model, 30, TEXTS)


@pytest.mark.parametrize(("name", "make_student"), [("real", kinds.minilm), ("small", teachers.make_tokenizer)])
def test_translated_store_equals_a_dense_computation(name, make_student, tmp_path, request):
    """The report's masses, and the rows as they are read."""
    model, make_teacher, path, top_k = request.getfixturevalue(name)
    teacher, student = make_teacher(), make_student()
    report = translate_store(path, tmp_path / "out", teacher, student)
    verify(tmp_path / "out")
    aligner = aligner_of(make_teacher, make_student)
    model = copy.deepcopy(model).double()
    masses, before, labels, same = [], [], 0, 0
    translated = Store(tmp_path / "out", vocab_size=len(student))
    for source, document in zip(Store(path), translated, strict=True):
        with torch.no_grad():
            probs = model(source.input_ids[None]).logits[0].softmax(-1)
        found = aligner(source.input_ids.numpy())
        assert document.input_ids.tolist() == found.input_ids.tolist()
        positions = [p for p in range(1, len(found.input_ids)) if found.place[p] > 0]
        assert document.positions.tolist() == positions
        labels += len(positions)
        for row, position in enumerate(positions):
            ours = document.teacher[row]
            kept = ours.ids >= 0
            ghost = torch.cat([ours.logits[kept] - ours.lse[0], (ours.rest_lse - ours.lse)[:1]]).double().exp()
            assert ghost.sum() == pytest.approx(1, abs=1e-5)
            if not found.is_aligned[position]:
                assert not kept.any()
                assert ours.target_logit.isnan()
                continue
            place = int(found.place[position])
            kept_ids = probs[place - 1].topk(top_k).indices
            tokens = torch.from_numpy(aligner.map.ids[int(found.begins_word[position])])
            # The last takes what has no counterpart.
            dense = torch.zeros(len(student) + 1, dtype=torch.float64)
            dense.index_add_(0, tokens[kept_ids].long() % len(dense), probs[place - 1, kept_ids])
            masses.append(float(dense[:-1].sum()))
            before.append(float(probs[place - 1, kept_ids].sum()))
            torch.testing.assert_close(ghost[:-1], dense[ours.ids[kept].long()], rtol=1e-4, atol=1e-9)
            assert set(ours.ids[kept].tolist()) == set(dense[:-1].nonzero()[:, 0].tolist())
            is_same = tokens[source.input_ids[place]] == document.input_ids[position]
            assert ours.target_logit.isnan() == ~is_same
            same += int(is_same)
    assert (report.labels, report.aligned, report.same_token) == (labels, len(masses), same)
    assert 0 < report.same_token < report.aligned < report.labels
    assert report.mass_kept["mean"] == pytest.approx(np.mean(masses), rel=1e-6)
    for quantile, share in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        assert report.mass_kept[quantile] == pytest.approx(np.quantile(masses, share), rel=1e-5)
    assert report.mass_before == pytest.approx(np.mean(before), rel=1e-6)
    assert (report.documents, report.added, report.skipped) == (2, 2, {})
    assert report.mapped_ids == (aligner.map.ids >= 0).any(0).sum()


def test_labels_that_are_not_aligned_learn_from_the_text_alone(small, tmp_path):
    student = teachers.make_tokenizer()
    translate_store(small.path, tmp_path / "out", kinds.sentencepiece(), student)
    packed = Store(tmp_path / "out").packed(0)
    rows = sk.decode_logits(packed.teacher)
    empty = (rows.ids < 0).all(-1)
    assert empty.any()
    assert torch.equal(rows.ids, Store(tmp_path / "out")[0].teacher.ids)
    logits = torch.randn(len(rows), len(student), requires_grad=True)
    target = packed.input_ids[packed.positions]
    for method in ("none", "teacher_over_student"):
        out = sk.slim_loss(logits, target, rows, rest="ghost", token_weight=method, reduction="none")
        (grad,) = torch.autograd.grad(out.loss.sum(), logits)
        (plain,) = torch.autograd.grad(sk.slim_loss(logits, target, None, reduction="sum").loss, logits)
        assert (out.kd[empty] == 0).all()
        torch.testing.assert_close(grad[empty], plain[empty])
        assert (grad[~empty] - plain[~empty]).abs().amax(-1).gt(1e-4).any()


def test_translation_is_continued(small, tmp_path):
    """A second run adds what the first has not written, and reports all."""
    source = Store(small.path)
    teacher, student = kinds.sentencepiece(), teachers.make_tokenizer()
    settings = {name: getattr(source.settings, name) for name in ("teacher", "selection", "temperatures", "codec")}
    first = StoreWriter(
        tmp_path / "one",
        vocab_size=source.vocab_size,
        tokenizer_fingerprint=source.tokenizer_fingerprint,
        **settings,
    )
    with first:
        first.add(source[0].input_ids, source[0].positions, source[0].teacher)
    assert translate_store(tmp_path / "one", tmp_path / "out", teacher, student).added == 1
    report = translate_store(small.path, tmp_path / "out", teacher, student)
    assert (report.added, report.documents) == (1, 2)
    assert report == translate_store(small.path, tmp_path / "fresh", teacher, student)._replace(added=1)
    assert len(Store(tmp_path / "out")) == 2
    assert info(tmp_path / "out")["rows"] == info(tmp_path / "fresh")["rows"]


def test_documents_that_cannot_be_translated_are_counted(tmp_path):
    teacher, student = teachers.make_tokenizer(), kinds.sentencepiece()
    documents = [teacher(text)["input_ids"] for text in ("the rain", "a cat")]
    start = teacher.bos_token_id
    documents += [[*documents[0], start, *documents[0]], [start, *documents[0]]]
    capture(teachers.make_teacher(), teacher, documents, tmp_path / "in", top_k=7)
    report = translate_store(tmp_path / "in", tmp_path / "out", teacher, student)
    assert report.documents == 2
    assert report.skipped == {
        "the student's tokenizer has no <|start|>: add it as a special token": 1,
        "another document has the same tokens": 1,
    }
    only = [documents[2]]
    capture(teachers.make_teacher(), teacher, only, tmp_path / "none", top_k=7)
    with pytest.raises(ValueError, match=r"no document that can be translated, of 1: 1 because .* no <\|start\|>"):
        translate_store(tmp_path / "none", tmp_path / "nothing", teacher, student)
    assert not (tmp_path / "nothing").exists()


def test_translation_refuses_other_tokenizers(small, tmp_path):
    with pytest.raises(ValueError, match="teacher_tokenizer must be that of"):
        translate_store(small.path, tmp_path / "out", teachers.make_tokenizer(), kinds.sentencepiece())
    with pytest.raises(ValueError, match="the student's tokenizer must be byte-level BPE, SentencePiece or WordPiece"):
        translate_store(small.path, tmp_path / "out", kinds.sentencepiece(), tiny.make_tokenizer())
    with pytest.raises(ValueError, match=r"the teacher's tokenizer must be .* got WordPiece"):
        Aligner(kinds.minilm(), kinds.sentencepiece())


def test_training_on_a_translated_store_needs_the_ghost(small, tmp_path, caplog):
    translate_store(small.path, tmp_path / "out", kinds.sentencepiece(), teachers.make_tokenizer())
    store = Store(tmp_path / "out")
    for rest in (None, "zero_logit"):
        with pytest.raises(ValueError, match="rest must be 'ghost' with a translated store"):
            check_stored_rows(store, sk.SlimObjective("kd", rest=rest), vocab_size=300)
    for method, rest in (("kd", "ghost"), ("slim", "ghost"), ("reverse_kl", None), ("sft", None)):
        check_stored_rows(store, sk.SlimObjective(method, rest=rest), vocab_size=300)
    assert not caplog.records
    check_stored_rows(store, sk.SlimObjective("kd", rest="renorm"), vocab_size=300)
    assert "rest='renorm' ignores a part of the teacher" in caplog.text


def test_translate_command(small, tmp_path, capsys):
    teachers.make_tokenizer().save_pretrained(tmp_path / "student")
    kinds.sentencepiece().save_pretrained(tmp_path / "teacher")
    command = ["store", "translate", str(small.path), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "student")]
    assert main(command) == 2
    assert "--teacher-tokenizer must be given" in capsys.readouterr().err
    command += ["--teacher-tokenizer", str(tmp_path / "teacher")]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["documents"] == 2
    assert 0 < report["mass_kept"]["mean"] < report["mass_before"] < 1
    assert main(command) == 0
    assert "labels" in capsys.readouterr().out
