"""Corpora and prompts as they are found: byte order marks, encodings, odd lines, odd columns, conversations."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import torch
from support import teachers

from slimkernels.exchange.records import read_records
from slimkernels.store import Store
from slimkernels.teacher import TokenizedDocument, capture, generate_documents, read_documents, read_prompts
from slimkernels.teacher.chat import assistant_tokens
from slimkernels.text_files import read_lines

ODD = "one\u2028two\u2029three\x85four\x0cfive\x1csix\u00a0seven"
PLAIN_CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}\n"
    "{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "Where did Anna go?"},
    {"role": "assistant", "content": "To the wall."},
    {"role": "user", "content": "And the cat?"},
    {"role": "assistant", "content": "It was sleeping."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


def starting_tokenizer():
    """A tokenizer that begins every text with its start of text, as Llama's does."""
    from tokenizers import processors

    tokenizer = teachers.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    return tokenizer


def texts_of(path: Path, tokenizer, **options) -> list[str]:
    return [tokenizer.decode(ids) for ids in read_documents(path, tokenizer, **options)]


class TestLines:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_end_only_at_line_ends(self, tmp_path, encoding, end) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(f"{ODD}{end}{end}last".encode(encoding))
        assert list(read_lines(path)) == [ODD, "", "last"]

    def test_in_another_encoding_name_the_file_and_what_to_do(self, tmp_path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes("fine\ncafé".encode("latin-1"))
        with pytest.raises(ValueError, match=r"a.txt must be text in UTF-8, but .* byte 0xe9 after line .*iconv"):
            list(read_lines(path))


class TestPrompts:
    def test_keep_the_characters_within_a_line_and_lose_the_mark(self, tmp_path) -> None:
        path = tmp_path / "p.txt"
        path.write_text(f"{ODD}\nplain\n", encoding="utf-8-sig")
        assert read_prompts(path) == [ODD, "plain"]

    @pytest.mark.parametrize("field", ["prompt", "text"])
    @pytest.mark.parametrize("kind", ["jsonl", "json", "array", "parquet"])
    def test_of_records_are_their_fields(self, tmp_path, kind, field) -> None:
        records = [{field: f"Once\n{ODD} ", "n": 1}, {field: " "}, {field: "Say hi", "n": "x"}]
        path = tmp_path / f"p.{'json' if kind == 'array' else kind}"
        if kind == "parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{field: r[field]} for r in records]), path)
        elif kind == "array":
            path.write_text(json.dumps(records, ensure_ascii=False, indent=1))
        else:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            path.write_text(lines, encoding="utf-8-sig")
        assert read_prompts(path) == [f"Once\n{ODD} ", "Say hi"]
        assert read_prompts(path, text_field=field) == [f"Once\n{ODD} ", "Say hi"]
        with pytest.raises(ValueError, match=r"prompt file .* has no field 'question' in record 1, only"):
            read_prompts(path, text_field="question")

    def test_in_another_encoding_name_the_file(self, tmp_path) -> None:
        (tmp_path / "p.txt").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=r"p.txt must be text in UTF-8"):
            read_prompts(tmp_path / "p.txt")


class TestCorpora:
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
    @pytest.mark.parametrize("kind", ["jsonl", "txt"])
    def test_lose_their_byte_order_mark(self, tmp_path, tokenizer, kind, encoding) -> None:
        path = tmp_path / f"a.{kind}"
        content = "Anna\n\na cat" if kind == "txt" else '{"text": "Anna"}\n{"text": "a cat"}\n'
        path.write_text(content, encoding=encoding)
        assert texts_of(path, tokenizer) == ["Anna", "a cat"]

    @pytest.mark.parametrize("kind", ["jsonl", "txt"])
    def test_in_another_encoding_name_the_file(self, tmp_path, tokenizer, kind) -> None:
        path = tmp_path / f"a.{kind}"
        for content in (b'{"text": "caf\xe9"}\n', '{"text": "Anna"}\n'.encode("utf-32")):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"a.{kind} must be text in UTF-8"):
                list(read_documents(path, tokenizer))

    @pytest.mark.parametrize("text", ["cut \ud83d", [{"role": "user", "content": "\ude00"}]])
    def test_with_half_of_a_surrogate_pair_name_the_record(self, tmp_path, tokenizer, text) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"text": "whole \U0001f600", "note": "\ud83d"}) + "\n" + json.dumps({"text": text}))
        with pytest.raises(ValueError, match=r"'text' in record 2 of .*a.jsonl holds half of a surrogate pair"):
            list(read_documents(path, tokenizer))
        with pytest.raises(ValueError, match=r"'text' in record 2 of .*a.jsonl holds half of a surrogate pair"):
            read_prompts(path)

    def test_of_text_end_at_lines_of_white_space(self, tmp_path, tokenizer) -> None:
        path = tmp_path / "a.txt"
        path.write_text(f"one\ntwo\n \nthree\n\t\n\n\nfour\r\n\r\n{ODD}")
        assert texts_of(path, tokenizer) == ["one\ntwo", "three", "four", ODD]

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_whose_texts_look_like_dates_are_texts(self, tmp_path, tokenizer, kind) -> None:
        records = [{"text": "2024-07-26"}, {"text": "2024-07-27T10:00:00Z"}, {"text": "12"}, {"text": "Anna"}]
        path = tmp_path / f"a.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        assert texts_of(path, tokenizer) == [record["text"] for record in records]

    def test_may_hold_anything_in_the_columns_that_are_not_read(self, tmp_path, tokenizer) -> None:
        path = tmp_path / "a.jsonl"
        others = [1, "x" * (12 << 20), None, {"a": [1, "b"]}, [1, [2]], 2**70, True]
        path.write_text("".join(json.dumps({"text": "Anna", "other": other}) + "\n" for other in others))
        assert texts_of(path, tokenizer) == ["Anna"] * len(others)

    def test_stop_at_a_number_of_documents_or_tokens(self, tmp_path, tokenizer) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": f"Anna put on {n} boots."}) + "\n" for n in range(9)))
        whole = list(read_documents(path, tokenizer))
        assert list(read_documents(path, tokenizer, num_documents=3)) == whole[:3]
        assert list(read_documents(path, tokenizer, num_documents=99)) == whole
        length = len(whole[0])
        cut = list(read_documents(path, tokenizer, num_tokens=2 * length + 3))
        assert cut == [*whole[:2], whole[2][:3]]
        # One token more has no label.
        assert list(read_documents(path, tokenizer, num_tokens=2 * length + 1)) == whole[:2]
        assert sum(map(len, read_documents(path, tokenizer, num_tokens=10**6))) == sum(map(len, whole))
        with pytest.raises(ValueError, match="num_tokens must be at least 2, got 1"):
            read_documents(path, tokenizer, num_tokens=1)

    def test_of_token_ids_need_no_tokenizer(self, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"input_ids": [1, 2, 3], "prompt": "Anna"}\n')
        (document,) = read_documents(path, None, text_field="input_ids")
        assert (document, document.prompt_length) == ([1, 2, 3], 0)

    def test_of_other_projects_lose_their_byte_order_mark(self, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps({"text": ODD}, ensure_ascii=False) + "\n", encoding="utf-8-sig")
        assert [record for _, record in read_records(path)] == [{"text": ODD}]


class TestPieces:
    def test_begin_as_the_document_does(self, tmp_path) -> None:
        """Models with a start of text have never read a text without it."""
        tokenizer = starting_tokenizer()
        path = tmp_path / "a.jsonl"
        text = "When the rain stopped, Anna put on her boots and went out to look at the old wall."
        path.write_text(json.dumps({"text": text}) + "\n")
        (whole,) = read_documents(path, tokenizer, max_length=None)
        pieces = list(read_documents(path, tokenizer, max_length=8))
        assert len(pieces) > 3
        assert all(piece[0] == tokenizer.bos_token_id and 2 <= len(piece) <= 8 for piece in pieces)
        assert [whole[0], *(token for piece in pieces for token in piece[1:])] == whole
        assert all(piece.labels == list(range(1, len(piece))) for piece in pieces)

    def test_of_token_ids_too(self, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"ids": [0, 5, 6, 7, 8]}\n{"ids": [9, 5, 6, 7, 8]}\n')
        pieces = list(read_documents(path, starting_tokenizer(), text_field="ids", max_length=3))
        assert pieces == [[0, 5, 6], [0, 7, 8], [9, 5, 6], [7, 8]]


class TestConversations:
    def of(self, template: str):
        tokenizer = teachers.make_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    @pytest.mark.parametrize("template", [PLAIN_CHAT, MARKED_CHAT])
    def test_have_the_assistants_tokens_as_labels(self, template, tmp_path) -> None:
        tokenizer = self.of(template)
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps({"messages": MESSAGES, "id": "a"}) + "\n")
        (document,) = read_documents(path, tokenizer, text_field="messages")
        assert document == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
        spoken = tokenizer.decode([document[p] for p in document.labels])
        assert spoken == "To the wall.<|end|>It was sleeping.<|end|>"

    def test_are_the_labels_that_trl_trains_on(self) -> None:
        tokenizer = self.of(MARKED_CHAT)
        encoded = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
        ids, positions = assistant_tokens(tokenizer, MESSAGES)
        assert ids == encoded["input_ids"]
        assert positions == [p for p, own in enumerate(encoded["assistant_masks"]) if own]

    @pytest.mark.parametrize("select", ["top_k", "sample"])
    def test_are_captured_with_rows_for_the_labels_alone(self, select, tmp_path) -> None:
        tokenizer, model = self.of(PLAIN_CHAT), teachers.make_teacher()
        path = tmp_path / "chat.jsonl"
        short = [*MESSAGES[:2], {"role": "user", "content": "Thanks"}]
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (MESSAGES, short)))
        documents = list(read_documents(path, tokenizer, text_field="messages"))
        report = capture(model, tokenizer, documents, tmp_path / "chat", select=select, codec="float32")
        capture(model, tokenizer, [list(ids) for ids in documents], tmp_path / "all", select=select, codec="float32")
        assert report.documents == 2
        store, every = Store(tmp_path / "chat"), Store(tmp_path / "all")
        for document in documents:
            chat, whole = (one[one.find(document)] for one in (store, every))
            assert chat.positions.tolist() == document.labels
            rows = whole.teacher[chat.positions - 1]
            for kept, row in zip(chat.teacher, rows, strict=True):
                count = int((row.ids >= 0).sum())
                assert kept.ids[:count].tolist() == row.ids[:count].tolist()
                torch.testing.assert_close(kept.logits[:count], row.logits[:count])

    def test_without_an_answer_have_no_document(self, tmp_path) -> None:
        path = tmp_path / "chat.jsonl"
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (MESSAGES[:1], MESSAGES)))
        assert len(list(read_documents(path, self.of(PLAIN_CHAT), text_field="messages"))) == 1

    def test_are_split_with_their_labels(self, tmp_path) -> None:
        tokenizer = self.of(PLAIN_CHAT)
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
        (whole,) = read_documents(path, tokenizer, text_field="messages")
        pieces = list(read_documents(path, tokenizer, text_field="messages", max_length=11))
        spoken = [piece[p] for piece in pieces for p in piece.labels]
        lost = [whole[p] for p in whole.labels if p % 11 == 0]
        assert sorted([*spoken, *lost]) == sorted(whole[p] for p in whole.labels)

    def test_read_the_same_date_on_every_day(self, monkeypatch) -> None:
        """Llama's template shows today's date; a capture continued tomorrow must find its documents."""
        from transformers.utils import chat_template_utils

        class Tomorrow(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2031, 12, 24)

        tokenizer = self.of("Today is {{ strftime_now('%d %b %Y') }}.\n" + PLAIN_CHAT)
        before = assistant_tokens(tokenizer, MESSAGES)
        assert "Today is 26 Jul 2024." in tokenizer.decode(before[0])
        monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
        assert assistant_tokens(tokenizer, MESSAGES) == before

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (None, "needs a tokenizer with a chat template"),
            ("{{ raise_exception('no system role') }}", "does not accept the conversation: no system role"),
            ("{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}", "message 1 of the conversation does not"),
        ],
    )
    def test_that_cannot_be_encoded_name_the_corpus(self, template, message, tmp_path) -> None:
        tokenizer = teachers.make_tokenizer()
        tokenizer.chat_template = template
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps({"messages": MESSAGES}) + "\n")
        with pytest.raises(ValueError, match=f"chat.jsonl: .*{message}"):
            list(read_documents(path, tokenizer, text_field="messages"))


class TestPromptLengths:
    def test_of_generated_documents_are_in_the_store(self, tokenizer, tmp_path) -> None:
        model = teachers.make_teacher()
        path = tmp_path / "a.jsonl"
        generate_documents(model, tokenizer, teachers.PROMPTS, path, num_documents=8, max_new_tokens=5)
        documents = list(read_documents(path, tokenizer, text_field="input_ids", max_length=None))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lengths = [len(tokenizer(line["prompt"])["input_ids"]) for line in lines]
        assert [document.prompt_length for document in documents] == lengths
        capture(model, tokenizer, documents, tmp_path / "store", top_k=5)
        store = Store(tmp_path / "store")
        for document, length in zip(documents, lengths, strict=True):
            stored = store[store.find(document)]
            assert stored.prompt_length == length
            # The tokens of the prompt have rows as well.
            assert stored.positions.tolist() == list(range(1, len(document)))

    def test_are_those_of_the_first_piece(self) -> None:
        document = TokenizedDocument(range(10), prompt_length=4)
        assert [document.part(0, 3).prompt_length, document.part(0, 6).prompt_length] == [3, 4]
        assert document.part(6, 9).prompt_length == 0
