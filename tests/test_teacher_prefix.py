"""Rows that the teacher gives behind a prefix, which the student does not see: captured here, from a server, learnt."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support import served, teachers
from support.served_scores import ScoringServer

from slimkernels.cli import main
from slimkernels.models.heldout import evaluate_store
from slimkernels.store import Store, errors, info, verify
from slimkernels.teacher import TokenizedDocument, capture, capture_logits, capture_server, read_documents
from slimkernels.trainer import SlimConfig, SlimTrainer

TEXTS = ["The apple trees were still wet.", "A black cat.", "She thought about the long summer that was coming."]
HINTS = ["It had rained. ", "", "In May: "]
SYSTEM = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }} {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return teachers.make_teacher(seed=3)


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    records = [{"text": text, "hint": hint} for text, hint in zip(TEXTS, HINTS, strict=True)]
    return write(tmp_path / "corpus.jsonl", records)


def read(path: Path, tokenizer, **options) -> list[TokenizedDocument]:
    return list(read_documents(path, tokenizer, teacher_prefix_field="hint", **options))


def dense_rows(model, prefix: list[int], ids: list[int], positions: list[int]) -> torch.Tensor:
    """Returns the model's own logits before the tokens at ``positions`` of a document behind a prefix."""
    with torch.no_grad():
        return model(torch.tensor([prefix + ids])).logits[0].float()[torch.tensor(positions) + len(prefix) - 1]


def assert_rows(store: Store, model, prefix_of: dict[tuple[int, ...], list[int]], *, served: bool = False) -> None:
    assert len(store) == len(prefix_of)
    for document in store:
        ids = document.input_ids.tolist()
        logits = dense_rows(model, prefix_of[tuple(ids)], ids, document.positions.tolist())
        expected = logits.log_softmax(-1) if served else logits
        teacher, close = document.teacher, {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(teacher.logits, expected.gather(-1, teacher.ids.long()), **close)
        torch.testing.assert_close(
            teacher.logits.sort().values, expected.topk(teacher.top_k).values.sort().values, **close
        )
        labels = document.input_ids[document.positions]
        torch.testing.assert_close(teacher.target_logit, expected.gather(-1, labels[:, None])[:, 0], **close)
        torch.testing.assert_close(teacher.lse_at(1.0), expected.logsumexp(-1), **close)


def test_rows_are_the_models_own_behind_the_prefix(corpus, tokenizer, model, tmp_path):
    prefixes = {tuple(tokenizer(t)["input_ids"]): tokenizer(h)["input_ids"] for t, h in zip(TEXTS, HINTS, strict=True)}
    documents = read(corpus, tokenizer)
    # A batch holds documents of other lengths, and one that has some labels only.
    labelled = TokenizedDocument([5, 9, 7, 8, 6], positions=[2, 4], teacher_ids=[40, 41, 42, 5, 9, 7, 8, 6])
    capture(model, tokenizer, [*documents, labelled], tmp_path / "store", top_k=9, codec="float32")
    verify(tmp_path / "store")
    store = Store(tmp_path / "store")
    assert_rows(store, model, prefixes | {(5, 9, 7, 8, 6): [40, 41, 42]})
    assert store[store.find(labelled)].positions.tolist() == [2, 4]
    content = info(tmp_path / "store")
    assert content["documents_in_context"] == 3
    assert content["bytes"] == sum(p.stat().st_size for p in (tmp_path / "store").iterdir() if p.name != "writer.lock")


def test_rows_of_a_server_are_the_models_own_behind_the_prefix(corpus, tokenizer, tmp_path, capsys):
    pytest.importorskip("httpx2", reason="the extra `server` is not installed")
    prefixes = {tuple(tokenizer(t)["input_ids"]): tokenizer(h)["input_ids"] for t, h in zip(TEXTS, HINTS, strict=True)}
    labelled = TokenizedDocument([5, 9, 7, 8, 6], positions=[2, 4], teacher_ids=[40, 41, 42, 5, 9, 7, 8, 6])
    path, options = tmp_path / "store", {"top_logprobs": 9, "codec": "float32", "max_retries": 0}
    with ScoringServer() as server:
        documents = [*read(corpus, tokenizer), labelled]
        report = capture_server(server.url, served.MODEL, tokenizer, path, documents=documents, **options)
        assert (report.documents, report.tokens) == (4, sum(map(len, documents)))
        store = Store(path)
        assert_rows(store, server.model, prefixes | {(5, 9, 7, 8, 6): [40, 41, 42]}, served=True)
        assert store[store.find(labelled)].positions.tolist() == [2, 4]
        asked = len(server.documents)
        again = capture_server(server.url, served.MODEL, tokenizer, path, documents=documents, **options)
        assert (again.documents, again.skipped, len(server.documents)) == (0, 4, asked)
        with pytest.raises(errors.TeacherContextError, match="gave behind another prefix"):
            capture_server(server.url, served.MODEL, tokenizer, path, documents=[list(documents[0])], **options)


def test_a_capture_is_continued_with_the_same_prefixes_only(corpus, tokenizer, model, tmp_path):
    documents = read(corpus, tokenizer)
    path, options = tmp_path / "store", {"top_k": 9, "num_parts": 2}
    capture(model, tokenizer, documents[:1], path, **options)
    assert capture(model, tokenizer, documents, path, **options).documents == 2
    assert capture(model, tokenizer, documents, path, **options).skipped == 3
    verify(path)
    first, *_ = documents
    other = TokenizedDocument(first, teacher_ids=[7, 7, *first])
    pattern = r"rows of a document of \d+ tokens, .* behind another prefix \(hash \w{32} there, \w{32} here\)"
    with pytest.raises(errors.TeacherContextError, match=pattern):
        capture(model, tokenizer, [other], path, **options)
    with pytest.raises(
        errors.TeacherContextError,
        match=r"\(hash \w{32} there, none here\): use the prefixes of that capture .* document once",
    ):
        capture(model, tokenizer, [list(first)], path, **options)
    with pytest.raises(errors.TeacherContextError, match=r"\(hash none there, \w{32} here\)"):
        capture(model, tokenizer, [TokenizedDocument(documents[1], teacher_ids=[7, *documents[1]])], path, **options)
    with pytest.raises(errors.TeacherContextError):
        # The same document twice, behind two prefixes.
        capture(model, tokenizer, [first, other], tmp_path / "twice", top_k=9)
    logits = torch.randn(len(first), 300)
    capture_logits([logits], tokenizer, [first], tmp_path / "logits", name="mine", top_k=9)
    with pytest.raises(errors.TeacherContextError):
        capture_logits([logits], tokenizer, [other], tmp_path / "logits", name="mine", top_k=9)


def test_hashes_of_contexts_that_are_damaged_are_refused(corpus, tokenizer, model, tmp_path):
    capture(model, tokenizer, read(corpus, tokenizer), tmp_path / "store", top_k=9)
    path = tmp_path / "store" / "contexts-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(errors.TeacherContextError, match=r"contexts-000000.safetensors: its bytes are not those"):
        verify(tmp_path / "store")
    (tmp_path / "store" / "contexts-000001.safetensors").write_bytes(b"left by a killed writer")
    path.unlink()
    verify(tmp_path / "store")


def test_the_context_of_the_teacher_holds_the_prefix_too(tokenizer, tmp_path):
    model = teachers.make_teacher(max_position_embeddings=16)
    document = list(range(20, 32))
    pattern = "12 tokens and 5 more in the teacher's prefix, but the teacher reads 16: .* with max_length=11"
    with pytest.raises(ValueError, match=pattern):
        capture(model, tokenizer, [TokenizedDocument(document, teacher_ids=[9] * 5 + document)], tmp_path, top_k=9)
    with pytest.raises(ValueError, match=r"20 more in the teacher's prefix, .* reads 16: shorten the prefix$"):
        capture(model, tokenizer, [TokenizedDocument(document, teacher_ids=[9] * 20 + document)], tmp_path, top_k=9)
    with pytest.raises(ValueError, match="got 20 to 300 in the teacher's prefix of document 1: give the ids"):
        capture(model, tokenizer, [TokenizedDocument(document, teacher_ids=[300, *document])], tmp_path, top_k=9)
    capture(model, tokenizer, [TokenizedDocument(document, teacher_ids=[9] * 4 + document)], tmp_path, top_k=9)
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 300\), .* got 20 to 300"):
        capture(model, tokenizer, [TokenizedDocument([20, 21], teacher_ids=[300, 20, 21])], tmp_path, top_k=9)


def test_a_long_document_is_behind_the_prefix_in_every_piece(tokenizer, tmp_path):
    ids = list(range(10, 31))
    path = write(tmp_path / "ids.jsonl", [{"input_ids": [0, *ids], "hint": [0, 5, 6]}, {"input_ids": ids, "hint": []}])
    pieces = read(path, tokenizer, text_field="input_ids", max_length=9)
    # One start of text (id 0) each, which is the prefix's where the teacher reads one.
    assert pieces[:3] == [[0, *ids[:8]], [0, *ids[8:16]], [0, *ids[16:]]]
    assert [p.teacher_ids for p in pieces[:3]] == [[0, 5, 6, *ids[:8]], [0, 5, 6, *ids[8:16]], [0, 5, 6, *ids[16:]]]
    assert [p.teacher_ids for p in pieces[3:]] == [None] * 3
    capped = read(path, tokenizer, text_field="input_ids", num_tokens=5)
    assert [(list(d), d.teacher_ids) for d in capped] == [([0, *ids[:4]], [0, 5, 6, *ids[:4]])]


def test_the_prefix_of_a_conversation_is_in_its_system_message(tokenizer, tmp_path, model):
    chat = teachers.make_tokenizer()
    chat.chat_template = SYSTEM
    asked, said = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}
    system = {"role": "system", "content": "Be brief."}
    records = [{"messages": [asked, said], "hint": "It is Anna."}, {"messages": [system, asked, said], "hint": "Anna!"}]
    path = write(tmp_path / "chats.jsonl", [*records, {"messages": [asked, said], "hint": ""}])
    first, second, plain = read(path, chat, text_field="messages")
    assert chat.decode(first) == chat.decode(plain) == "user: Who? A: Anna."
    assert chat.decode(first.teacher_ids) == "system: It is Anna. user: Who? A: Anna."
    assert chat.decode(second.teacher_ids) == "system: Anna!\n\nBe brief. user: Who? A: Anna."
    assert plain.teacher_ids is None
    assert [chat.decode([ids[p] for p in ids.positions]) for ids in (first, second)] == [" Anna."] * 2
    capture(model, chat, [first], tmp_path / "store", top_k=9, codec="float32")
    (document,) = Store(tmp_path / "store")
    before = first.teacher_ids[: first.shift]
    assert_rows(Store(tmp_path / "store"), model, {tuple(document.input_ids.tolist()): before})
    with pytest.raises(ValueError, match=r"a conversation with a teacher's prefix must have at most max_length=6"):
        read(path, chat, text_field="messages", max_length=6)
    write(path, [{"messages": [{"role": "system", "content": [{"type": "text"}]}, said], "hint": "x"}])
    with pytest.raises(ValueError, match="the system message must be text to have a teacher's prefix, got list"):
        read(path, chat, text_field="messages")
    write(path, [{"messages": [asked, said], "hint": [1, 2]}])
    with pytest.raises(ValueError, match="prefix of a conversation must be text, got a list in record 1"):
        read(path, chat, text_field="messages")


@pytest.mark.parametrize("hint", [{}, {"hint": None}, {"hint": 3}, {"hint": ["a"]}])
def test_a_record_without_a_prefix_is_an_error(tokenizer, tmp_path, hint):
    path = write(tmp_path / "corpus.jsonl", [{"text": "A cat.", "hint": "x"}, {"text": "A dog."} | hint])
    with pytest.raises(ValueError, match=r"prefix must be text or a list of token ids in every record, empty for none"):
        read(path, tokenizer)
    (tmp_path / "corpus.txt").write_text("A cat.")
    with pytest.raises(ValueError, match=r"teacher_prefix_field must be None for a .txt file"):
        read(tmp_path / "corpus.txt", tokenizer)


def test_teacher_ids_end_in_the_document():
    assert TokenizedDocument([1, 2, 3], teacher_ids=[1, 2, 3]).teacher_ids is None
    assert TokenizedDocument([1, 2, 3], positions=[2], teacher_ids=[7, 9, 8, 3]).shift == 1
    for wrong in ([7, 1, 2], [2, 3], [7, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match="teacher_ids must end in the document's 2 tokens from its first label on"):
            TokenizedDocument([1, 2, 3], teacher_ids=wrong)


def test_a_student_comes_closer_to_the_teacher_that_knows_more(tokenizer, model, tmp_path):
    """The student is the teacher, without the prefix: self-distillation with privileged context."""
    hint = tokenizer("The rain stopped. ")["input_ids"]
    documents = [tokenizer(text)["input_ids"] for text in TEXTS]
    privileged = [TokenizedDocument(ids, teacher_ids=hint + ids) for ids in documents]
    capture(model, tokenizer, privileged, tmp_path / "store", top_k=40)
    store = Store(tmp_path / "store")
    options = {"max_steps": 30, "learning_rate": 2e-3, "per_device_train_batch_size": 3, "report_to": "none"}
    options |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "ce_weight": 0.0, "rest": "ghost"}
    student = teachers.make_teacher(seed=3)
    before = evaluate_store(student, store)["kl_ghost"]
    args = SlimConfig(output_dir=str(tmp_path / "out"), method="kd", **options)
    SlimTrainer(model=student, args=args, train_dataset=store).train()
    assert evaluate_store(student, store)["kl_ghost"] < 0.3 * before


def test_the_command_captures_behind_a_field(corpus, tmp_path, capsys):
    teacher = teachers.save_teacher(tmp_path / "teacher", seed=3)
    words = f"capture --teacher {teacher} --text {corpus} --out {tmp_path / 'store'} --top-k 9".split()
    assert main([*words, "--teacher-prefix-field", "hint"]) == 0
    assert re.search(r"documents_in_context +2\b", capsys.readouterr().out)
    assert main([*words, "--teacher-prefix-field", "text"]) == 1
    assert "behind another prefix" in capsys.readouterr().err
    assert main([*words[:3], "--prompts", "--documents", "1", *words[5:], "--teacher-prefix-field", "hint"]) == 2
    assert "--teacher-prefix-field has no meaning with --prompts" in capsys.readouterr().err
