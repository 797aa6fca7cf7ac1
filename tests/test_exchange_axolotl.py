"""axolotl's columns, written here as its README and loaders describe them, and what becomes of them in a store."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from support import teachers
from support.exchange_cases import TOP_K, Case, assert_is, make_cases

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.exchange import import_axolotl
from slimkernels.store import Store, verify
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.teacher import tokenizer_fingerprint

CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def entries(case: Case, position: int, top_k: int = TOP_K) -> list[dict]:
    """A vLLM server's answer about one token, as distilabel keeps it: the distribution over that token."""
    return [
        {"token": f"token_id:{token}", "logprob": float(case.logprobs[position - 1, token])}
        for token in case.largest(position - 1, top_k)
    ]


def prepared(case: Case, prompt: int, alignment: str) -> dict:
    """What axolotl's loader makes of a case whose first ``prompt`` tokens are not trained on: README's alignment."""
    length = len(case.input_ids)
    padding = -1e9 if alignment == "next" else -math.inf
    record = {
        "input_ids": case.input_ids,
        "labels": [-100] * prompt + case.input_ids[prompt:],
        "target_logprobs": [[padding] * TOP_K for _ in range(length)],
        "target_token_ids": [[0] * TOP_K if alignment == "next" else list(range(TOP_K)) for _ in range(length)],
        "target_mask": [[0] * TOP_K for _ in range(length)],
    }
    for position in range(1, length):
        row = position - 1 if alignment == "next" else position
        ids = case.largest(position - 1)
        kept = torch.tensor(case.logprobs[position - 1, ids])
        record["target_logprobs"][row] = kept.log_softmax(-1).tolist()
        record["target_token_ids"][row] = ids
        record["target_mask"][row] = [int(position >= prompt)] * TOP_K
    return record


def test_import_of_raw_columns_of_a_whole_sequence(tokenizer, tmp_path) -> None:
    cases = make_cases()
    records = []
    for case in cases:
        # The server says nothing about the first token, and one entry more where the label was not among the largest.
        rows = [None, *(entries(case, p, TOP_K + p % 3) for p in range(1, len(case.input_ids)))]
        records.append({"input_ids": case.input_ids, "logprobs": rows, "other": "ignored"})
    source = write(tmp_path / "a.jsonl", records)
    report = import_axolotl(source, tmp_path / "store", tokenizer, logprobs_field="logprobs", codec="float32")
    verify(tmp_path / "store")
    store = Store(tmp_path / "store")
    assert (report.documents, report.rows, report.skipped) == (4, sum(len(c.input_ids) - 1 for c in cases), 0)
    assert report.label_share > 0.4
    assert (store.vocab_size, store.tokenizer_fingerprint) == (300, tokenizer_fingerprint(tokenizer))
    assert store.manifest["selection"] == {
        "kind": "imported",
        "format": "axolotl",
        "normalised_over": "vocabulary",
        "temperature": 1.0,
    }
    for document, case in zip(store, cases, strict=True):
        assert_is(document, case, positions=list(range(1, len(case.input_ids))))
        assert (document.teacher.lse == 0).all()
    # The tail is what the server left out.
    row = store[0].teacher[3]
    expected = 1 - math.fsum(math.exp(entry["logprob"]) for entry in records[0]["logprobs"][4])
    assert sk.sparse_softmax(row, rest="ghost").tail_logprob.exp().item() == pytest.approx(expected, abs=1e-6)
    # Also where the label is not among the kept ids.
    document = store[0]
    student = torch.randn(len(document.teacher), 300, requires_grad=True)
    for rest in ("ghost", "zero", "renorm"):
        result = sk.slim_loss(student, document.input_ids[document.positions], document.teacher, rest=rest)
        (grad,) = torch.autograd.grad(result.loss, student)
        assert torch.isfinite(grad).all()
        kept = document.teacher.target_logit > -torch.inf
        assert not kept.all()
        assert torch.equal(result.weight > 0, kept)
    again = import_axolotl(source, tmp_path / "store", tokenizer, logprobs_field="logprobs", codec="float32")
    assert again[:3] == (0, 0, 4)


def test_import_of_raw_columns_of_a_conversation(tokenizer, tmp_path) -> None:
    chat = teachers.make_tokenizer()
    chat.chat_template = CHAT
    texts = ["When the rain stopped, Anna ", "put on her boots and went out to look at the garden."]
    ids = chat("".join(texts))["input_ids"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(ids), 300, generator=generator).double()
    logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])] += 8
    case = Case(ids, logits.log_softmax(-1).numpy())
    first = len(ids) - 9
    record = {
        "messages_combined": [
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)
        ],
        "values": [[float(case.logprobs[p - 1, t]) for t in case.largest(p - 1)] for p in range(first, len(ids))],
        "target_token_ids": [case.largest(p - 1) for p in range(first, len(ids))],
    }
    options = {"logprobs_field": "values", "messages_field": "messages_combined", "codec": "float32"}
    source = write(tmp_path / "a.jsonl", [record])
    report = import_axolotl(source, tmp_path / "store", chat, **options)
    assert report == (1, 9, 0, 1.0)
    assert_is(Store(tmp_path / "store")[0], case, positions=list(range(first, len(ids))))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: has neither input_ids nor a conversation in 'messages'"):
        import_axolotl(source, tmp_path / "other", chat, logprobs_field="values")


def test_import_at_another_temperature_keeps_the_distribution_of_that_temperature(tokenizer, tmp_path) -> None:
    cases = make_cases(2, temperature=2.5)
    records = [
        {"input_ids": case.input_ids, "raw": [entries(case, p) for p in range(1, len(case.input_ids))]}
        for case in cases
    ]
    source = write(tmp_path / "a.jsonl", records)
    import_axolotl(
        source, tmp_path / "store", tokenizer, logprobs_field="raw", temperature=2.5, codec="float32", teacher="big"
    )
    store = Store(tmp_path / "store")
    assert (store.temperatures, store.manifest["teacher"]) == ((1.0, 2.5), {"name": "big"})
    for document, case in zip(store, cases, strict=True):
        assert_is(document, case, positions=list(range(1, len(case.input_ids))), temperature=2.5)
        kept = document.teacher.logits.double().logsumexp(-1).float()
        torch.testing.assert_close(document.teacher.lse_at(1.0), kept)


@pytest.mark.parametrize("alignment", ["next", "same"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_import_of_prepared_columns(kind, alignment, temperature, tokenizer, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    cases = make_cases(temperature=temperature)
    records = [prepared(case, 6, alignment) for case in cases]
    source = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write(source, records)
    elif kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(source)
    else:
        datasets.Dataset.from_list(records).save_to_disk(source)
    options = {"alignment": alignment, "temperature": temperature, "codec": "float32"}
    report = import_axolotl(source, tmp_path / "store", tokenizer, **options)
    store = Store(tmp_path / "store")
    assert (report.documents, report.rows) == (4, sum(len(case.input_ids) - 6 for case in cases))
    assert store.temperatures == (1.0,)
    assert store.manifest["selection"]["normalised_over"] == "kept ids"
    for document, case in zip(store, cases, strict=True):
        positions = list(range(6, len(case.input_ids)))
        assert_is(document, case, positions=positions, whole_row=False, temperature=temperature)
        # Renormalised over the kept ids at the temperature that axolotl trained at.
        probs = sk.sparse_softmax(document.teacher, temperature=temperature, rest="renorm").logprobs
        expected = torch.tensor(case.logprobs[5, document.teacher.ids[0].tolist()]).log_softmax(-1)
        torch.testing.assert_close(probs[0].double(), expected, atol=1e-5, rtol=0)


def test_import_notices_rows_that_are_about_other_tokens(tokenizer, tmp_path) -> None:
    cases = make_cases(8)
    for written, read, side in (("same", "next", "before"), ("next", "same", "after")):
        source = write(tmp_path / f"{written}.jsonl", [prepared(case, 2, written) for case in cases])
        with pytest.raises(ValueError, match=f"the teacher's rows are about other tokens.* the one {side} it"):
            import_axolotl(source, tmp_path / "store", tokenizer, alignment=read)
        assert not (tmp_path / "store").exists()


def test_import_of_another_vocabulary_size(tokenizer, tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", [prepared(case, 2, "next") for case in make_cases(2)])
    import_axolotl(source, tmp_path / "store", tokenizer, vocab_size=320)
    assert Store(tmp_path / "store").vocab_size == 320
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: .*\[0, 200\)"):
        import_axolotl(source, tmp_path / "small", tokenizer, vocab_size=200)


def changed(**columns) -> dict:
    record = prepared(make_cases(1)[0], 2, "next")
    return {name: value for name, value in (record | columns).items() if value is not None}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"target_mask": None}, {}, r"line 1: has no column target_mask, only input_ids, labels"),
        ({"target_logprobs": [[0.0]]}, {}, "target_logprobs must have 20 rows, got 1"),
        ({"target_token_ids": [[1]] * 20}, {}, "target_logprobs has 12 entries in row 0, but 1 ids"),
        ({"target_token_ids": [[1] * TOP_K] * 20}, {}, "line 1: teacher row 0 holds an id twice"),
        (
            {"target_logprobs": [[math.nan] * TOP_K] * 20, "target_mask": [[1] * TOP_K] * 20},
            {},
            "row 0 holds a value that is NaN or infinite",
        ),
        ({"target_logprobs": [[math.inf] * TOP_K] * 20}, {}, "row 0 holds a value that is NaN or infinite"),
        ({"input_ids": ["a"] * 20}, {}, "input_ids must be a list of token ids, got"),
        ({"labels": [1]}, {}, "labels must have 20 rows, got 1"),
        ({}, {"logprobs_field": "logprobs"}, "line 1: has no column logprobs, only"),
        ({"logprobs": 3}, {"logprobs_field": "logprobs"}, "logprobs must be a list with a row for each token, got 3"),
        (
            {"logprobs": [[{"token": " the", "logprob": -1}]]},
            {"logprobs_field": "logprobs"},
            "return_tokens_as_token_ids",
        ),
        ({"logprobs": [[-1.0]]}, {"logprobs_field": "logprobs"}, "target_token_ids must have 1 rows, got 20"),
        ({}, {"alignment": "none"}, "alignment must be one of 'next', 'same', got 'none'"),
        ({}, {"temperature": 0.0}, "temperature must be positive and finite, got 0"),
        ({}, {"codec": "int4"}, "codec must be one of"),
    ],
)
def test_import_axolotl_refuses(columns, options, message, tokenizer, tmp_path) -> None:
    source = write(tmp_path / "a.jsonl", [changed(**columns)])
    with pytest.raises(ValueError, match=message):
        import_axolotl(source, tmp_path / "store", tokenizer, **options)
    assert not (tmp_path / "store").exists()


def test_import_refuses_sources_that_are_none(tokenizer, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        import_axolotl(tmp_path / "absent", tmp_path / "store", tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must hold files that end in one of .parquet, .arrow, .jsonl, got none"):
        import_axolotl(tmp_path / "empty", tmp_path / "store", tokenizer)
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"source must end in one of .parquet, .arrow, .jsonl, got"):
        import_axolotl(tmp_path / "a.csv", tmp_path / "store", tokenizer)
    for name, content, message in (
        ("a.jsonl", "", "at least one document, got none"),
        ("b.jsonl", "{", "line 1: is not JSON"),
        ("c.jsonl", "[]", "line 1: must be a JSON object, got list"),
        ("d.parquet", "PAR1 no", r"d.parquet cannot be read as parquet"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            import_axolotl(tmp_path / name, tmp_path / "store", tokenizer)
    assert not (tmp_path / "store").exists()


def test_import_axolotl_command(tmp_path, capsys) -> None:
    teacher = str(teachers.save_teacher(tmp_path / "tiny"))
    case = make_cases(1)[0]
    raw = {"input_ids": case.input_ids, "raw": [entries(case, p) for p in range(1, len(case.input_ids))]}
    source = str(write(tmp_path / "a.jsonl", [raw]))
    command = ["store", "import", "--format", "axolotl", source, str(tmp_path / "store"), "--tokenizer", teacher]
    assert main([*command, "--logprobs-field", "raw", "--teacher", "big", "--codec", "float32"]) == 0
    assert "added 1 documents, 19 rows; skipped 0; the label is among the kept ids of" in capsys.readouterr().out
    assert_is(Store(tmp_path / "store")[0], case, positions=list(range(1, 20)))
    assert main([*command, "--logprobs-field", "raw", "--teacher", "big", "--codec", "float32"]) == 0
    assert "added 0 documents, 0 rows; skipped 1" in capsys.readouterr().out
    shifted = [prepared(case, 2, "same") for case in make_cases(8)]
    source = write(tmp_path / "b.jsonl", shifted)
    command[4:6] = [str(source), str(tmp_path / "other")]
    assert main(command) == 2
    assert "keep the one before it" in capsys.readouterr().err
    assert main([*command, "--no-alignment-check"]) == 0
    assert "added 8 documents" in capsys.readouterr().out
    assert main([*command, "--samples", "x"]) == 2
    assert "--samples has no meaning with --format axolotl" in capsys.readouterr().err
    assert main([*command, "--logprobs-field", "raw"]) == 2
    assert "has no column raw" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ["affine8", "float32"])
@pytest.mark.parametrize("placeholder", [-9999.0, -3.4028234663852886e38, -math.inf])
def test_import_of_raw_columns_leaves_placeholders_out(placeholder, codec, tokenizer, tmp_path) -> None:
    """vLLM and axolotl write -9999 where there is no entry; its id is any, even one that the row holds."""
    case = make_cases(1)[0]
    ids = [case.largest(p - 1, 4) for p in range(1, len(case.input_ids))]
    values = [math.log(p) for p in (0.5, 0.25, 0.125, 0.0625)]
    record = {
        "input_ids": case.input_ids,
        "raw": [[*values, placeholder, placeholder] for _ in ids],
        "target_token_ids": [[*row, row[0], 0] for row in ids],
    }
    source = write(tmp_path / "a.jsonl", [record])
    import_axolotl(source, tmp_path / "store", tokenizer, logprobs_field="raw", codec=codec, check_alignment=False)
    teacher = Store(tmp_path / "store")[0].teacher
    assert teacher.ids.tolist() == [sorted(row) for row in ids]
    for kept, row in zip(teacher.logits.exp(), ids, strict=True):
        probabilities = dict(zip(sorted(row), kept.tolist(), strict=True))
        assert [probabilities[token] for token in row] == pytest.approx([0.5, 0.25, 0.125, 0.0625], rel=0.01)


def test_import_goes_on_with_a_padding_token_that_was_added_to_the_tokenizer(tokenizer, tmp_path) -> None:
    cases = make_cases()
    records = [
        {"input_ids": c.input_ids, "logprobs": [None, *(entries(c, p) for p in range(1, len(c.input_ids)))]}
        for c in cases
    ]
    padded, longer = teachers.make_tokenizer(), teachers.make_tokenizer()
    padded.add_special_tokens({"pad_token": "<pad>"})
    longer.add_tokens("<new>")
    options = {"logprobs_field": "logprobs", "codec": "float32"}
    for name, first, then in (("old", tokenizer, padded), ("new", padded, tokenizer)):
        import_axolotl(write(tmp_path / "half.jsonl", records[:2]), tmp_path / name, first, **options)
        settings = Store(tmp_path / name).settings
        report = import_axolotl(write(tmp_path / "all.jsonl", records), tmp_path / name, then, **options)
        assert (report.documents, report.skipped) == (2, 2)
        assert Store(tmp_path / name).settings == settings
        with pytest.raises(SettingsMismatchError, match="was made with"):
            import_axolotl(tmp_path / "all.jsonl", tmp_path / "old", longer, **options)
