"""DistillKit's compressed rows, from an encoder of its own that was written from their description."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import distillkit_writer as writer
from support import teachers
from support.exchange_cases import assert_is, make_cases

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.exchange import import_distillkit
from slimkernels.exchange.distillkit_codec import Compression
from slimkernels.store import Store, verify

pyarrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
yaml = pytest.importorskip("yaml")

# The first two are what README.md recommends, the third is that of its published data set of Qwen3-235B.
CONFIGS = {
    "recommended": {
        "d": 300,
        "k": 128,
        "exact_k": 16,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
        "error_diffusion": False,
    },
    "budget": {
        "d": 300,
        "k": 50,
        "exact_k": 1,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1, "sqrt"],
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": False,
    },
    "published": {
        "d": 300,
        "k": 128,
        "exact_k": 32,
        "exact_dtype": "float32",
        "polynomial_terms": [0, 1, 2],
        "term_dtype": "float32",
        "residual_bins": [],
        "delta_encoding": True,
        "error_diffusion": False,
    },
    "bins": {
        "d": 300,
        "k": 40,
        "exact_k": 3,
        "exact_dtype": "float16",
        "polynomial_terms": [0, 1, "exp"],
        "normalize_t": True,
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 8, "num_elements": 11},
            {"scale_dtype": "bfloat16", "element_bits": 5, "num_elements": 7},
            {"scale_dtype": "float32", "element_bits": 1, "num_elements": 9},
            {"scale_dtype": "float64", "element_bits": 13, "num_elements": 2},
        ],
        "delta_encoding": False,
    },
    "bins alone": {
        "d": 300,
        "k": 17,
        "exact_k": 0,
        "exact_dtype": "float32",
        "residual_bins": [{"scale_dtype": "float32", "element_bits": 12, "num_elements": 17}],
    },
    "exact": {"d": 300, "k": 12, "exact_k": 12, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False},
}
EXACT = CONFIGS["exact"]


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


def write(path: Path, records: list[dict]) -> Path:
    lists = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
    schema = pyarrow.schema(
        [
            ("input_ids", pyarrow.list_(pyarrow.uint64())),
            ("compressed_logprobs", lists),
            ("bytepacked_indices", lists),
        ]
    )
    pq.write_table(pyarrow.Table.from_pylist(records, schema=schema), path)
    return path


def record_of(case, config: dict, rows: int | None = None) -> dict:
    rows = len(case.input_ids) - 1 if rows is None else rows
    kept = [case.largest(row, config["k"]) for row in range(rows)]
    encoded = [writer.encode(case.logprobs[row, ids].tolist(), config)[0] for row, ids in enumerate(kept)]
    return {
        "input_ids": case.input_ids,
        "compressed_logprobs": [list(data) for data in encoded],
        "bytepacked_indices": [list(writer.index_bytes(ids, config["d"])) for ids in kept],
    }


def test_a_row_by_hand() -> None:
    # V = 5: ids of 3 bits. 4, 0, 3 = 100 000 011 = 1000 0001 1(000 0000). One exact value, -0.5 = 0xBF00 in bfloat16;
    # the polynomial -1 - 2 t = -1, -3; a bin of 4 bits with scale 0.25 and the numbers 9, 6: +1 and -2 steps.
    config = {
        "d": 5,
        "k": 3,
        "exact_k": 1,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1],
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 2}],
        "delta_encoding": False,
    }
    compression = Compression.of(config, "here")
    assert (compression.index_bytes, compression.value_bytes) == (2, 2 + 8 + 2 + 1)
    assert compression.ids(np.array([[0b10000001, 0b10000000]], np.uint8)).tolist() == [[4, 0, 3]]
    row = bytes.fromhex("00bf000080bf000000c0003496")
    assert compression.values(np.frombuffer(row, np.uint8)[None]).tolist() == [[-0.5, -0.75, -3.5]]
    delta = Compression.of(config | {"delta_encoding": True}, "here")
    assert delta.values(np.frombuffer(row, np.uint8)[None]).tolist() == [[-0.5, -1.25, -4.75]]


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_every_kind_are_decoded(name) -> None:
    config = CONFIGS[name]
    compression = Compression.of(config, "here")
    case = make_cases(1)[0]
    for row in range(len(case.input_ids)):
        ids = case.largest(row, config["k"])
        truth = case.logprobs[row, ids]
        data, expected = writer.encode(truth.tolist(), config)
        values = compression.values(np.frombuffer(data, np.uint8)[None])[0]
        np.testing.assert_allclose(values, expected, atol=2e-5 * abs(truth).max())
        packed = np.frombuffer(writer.index_bytes(ids, 300), np.uint8)
        assert compression.ids(packed[None])[0].tolist() == ids
        # The compression itself: the largest as precise as their dtype, the others near.
        precision = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-23}[config["exact_dtype"]]
        exact = config["exact_k"]
        assert (abs(values - truth)[:exact] <= (precision + 1e-6) * abs(truth[:exact])).all()
        assert np.sqrt(np.mean((values - truth) ** 2)) < 0.06 * (truth.max() - truth.min())


@pytest.mark.parametrize("name", ["exact", "published", "bins"])
@pytest.mark.parametrize("extra_row", [False, True])
def test_import_of_a_folder(name, extra_row, tokenizer, tmp_path) -> None:
    config, cases = CONFIGS[name], make_cases(11)
    folder = tmp_path / "logits"
    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    for number, case in enumerate(cases):
        # Packed data sets have a row for the last token too.
        rows = len(case.input_ids) - (not extra_row)
        write(folder / f"data_{number}.parquet", [record_of(case, config, rows)])
    report = import_distillkit(folder, tmp_path / "store", tokenizer, codec="float32", teacher="big")
    verify(tmp_path / "store")
    store = Store(tmp_path / "store")
    assert report[:3] == (11, sum(len(case.input_ids) - 1 for case in cases), 0)
    assert store.manifest["selection"] == {
        "kind": "imported",
        "format": "distillkit",
        "normalised_over": "vocabulary",
        "temperature": 1.0,
    }
    for document, case in zip(store, cases, strict=True):
        if name == "exact":
            assert_is(document, case, positions=list(range(1, len(case.input_ids))))
        for row, teacher in enumerate(document.teacher[i] for i in range(len(document.teacher))):
            ids = case.largest(row, config["k"])
            expected = np.array(writer.encode(case.logprobs[row, ids].tolist(), config)[1])[np.argsort(ids)]
            assert teacher.ids.tolist() == sorted(ids)
            np.testing.assert_allclose(teacher.logits.numpy(), expected, atol=1e-3)
            assert teacher.lse.item() == pytest.approx(max(0.0, np.logaddexp.reduce(expected)), abs=1e-5)
            assert float(sk.sparse_softmax(teacher, rest="ghost").tail_logprob) <= 0


def test_import_leaves_out_rows_about_padding(tokenizer, tmp_path) -> None:
    case = make_cases(1)[0]
    padded = case._replace(input_ids=[*case.input_ids[:-1], 299])
    write(tmp_path / "a.parquet", [record_of(padded, EXACT)])
    options = {"compression_config": EXACT, "codec": "float32"}
    import_distillkit(tmp_path / "a.parquet", tmp_path / "all", tokenizer, **options)
    import_distillkit(tmp_path / "a.parquet", tmp_path / "store", tokenizer, pad_token_id=299, **options)
    length = len(case.input_ids)
    assert Store(tmp_path / "all")[0].positions.tolist() == list(range(1, length))
    assert_is(Store(tmp_path / "store")[0], padded, positions=list(range(1, length - 1)))


def test_import_of_rows_that_are_not_full_or_sum_to_more_than_one(tokenizer, tmp_path) -> None:
    config = EXACT | {"k": 3, "exact_k": 3, "exact_dtype": "bfloat16"}
    values = [[-0.001, -math.inf, -math.inf], [math.log(0.5), math.log(0.499), math.log(0.011)]]
    record = {
        "input_ids": [5, 7, 9],
        "compressed_logprobs": [list(writer.encode(row, config)[0]) for row in values],
        "bytepacked_indices": [list(writer.index_bytes(ids, 300)) for ids in ([7, 0, 0], [9, 299, 256])],
    }
    write(tmp_path / "a.parquet", [record])
    import_distillkit(tmp_path / "a.parquet", tmp_path / "store", tokenizer, compression_config=config, codec="float32")
    teacher = Store(tmp_path / "store")[0].teacher
    assert teacher.ids.tolist() == [[7, -1, -1], [9, 256, 299]]
    assert teacher.lse[0].item() == 0
    assert teacher.lse[1].item() == pytest.approx(teacher.logits[1].logsumexp(-1).item(), abs=1e-6)
    assert teacher.lse[1].item() > 0.005
    # The rest of 1 is known to the last digit of the source; more than 1 leaves no rest that is known.
    assert teacher.rest_lse[0].item() == pytest.approx(math.log(-math.expm1(teacher.logits[0, 0].item())), abs=1e-4)
    assert teacher.rest_lse[1].isnan()
    teacher.validate(300)


@pytest.mark.parametrize("form", ["json", "training"])
def test_the_configuration_is_found_in_other_files(form, tokenizer, tmp_path) -> None:
    write(tmp_path / "a.parquet", [record_of(make_cases(1)[0], EXACT)])
    if form == "json":
        path = tmp_path / "config.json"
        path.write_text(json.dumps(EXACT))
    else:
        path = tmp_path / "train.yml"
        path.write_text(yaml.safe_dump({"model": "x", "teacher": {"kind": "dataset", "logprob_compressor": EXACT}}))
    report = import_distillkit(tmp_path / "a.parquet", tmp_path / "store", tokenizer, compression_config=path)
    assert report.documents == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": None}, r"k must be a whole number in \[1, 1048576\], got None"),
        ({"d": 0}, "d must be a whole number"),
        ({"exact_k": 13}, r"exact_k must be a whole number in \[0, 12\], got 13"),
        ({"exact_k": 5}, "polynomial_terms or residual_bins must define entries after exact_k=5"),
        ({"exact_dtype": "int8"}, "exact_dtype must be one of float16, bfloat16, float32, float64, got 'int8'"),
        ({"polynomial_terms": ["log"]}, "polynomial_terms must be whole numbers, 'sqrt' or 'exp', got 'log'"),
        ({"polynomial_terms": [-1]}, "polynomial_terms must be"),
        (
            {"residual_bins": [{"scale_dtype": "float32", "element_bits": 2, "num_elements": 1}]},
            "residual_bins must hold at most k - exact_k = 0 elements",
        ),
        ({"polynomial_degree": 8, "vocab_size": 5}, "legacy compression, which is not supported"),
        ({"colour": 1}, "holds unknown fields colour"),
        ({"k": 11, "exact_k": 11}, "compressed_logprobs must have 44 bytes a row, as .* says, got 48"),
        ({"d": 5000}, "bytepacked_indices must have 20 bytes a row, as .* says, got 14"),
    ],
)
def test_import_refuses_a_configuration(change, message, tokenizer, tmp_path) -> None:
    write(tmp_path / "a.parquet", [record_of(make_cases(1)[0], EXACT)])
    config = {name: value for name, value in (EXACT | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        import_distillkit(tmp_path / "a.parquet", tmp_path / "store", tokenizer, compression_config=config)
    assert not (tmp_path / "store").exists()


def test_import_distillkit_refuses(tokenizer, tmp_path) -> None:
    record = record_of(make_cases(1)[0], EXACT)
    source, store = write(tmp_path / "a.parquet", [record]), tmp_path / "store"
    with pytest.raises(FileNotFoundError, match=r"no file .*compression_config.yaml; give the one of the capture"):
        import_distillkit(source, store, tokenizer)
    (tmp_path / "compression_config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"compression_config.yaml: must be a mapping of settings, got list"):
        import_distillkit(source, store, tokenizer)
    (tmp_path / "compression_config.yaml").write_text("{")
    with pytest.raises(ValueError, match=r"compression_config.yaml cannot be read as YAML"):
        import_distillkit(source, store, tokenizer)
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(EXACT))
    for change, message in (
        ({"compressed_logprobs": record["compressed_logprobs"][2:]}, "a row for each of 20 tokens but the first"),
        ({"bytepacked_indices": None}, "bytepacked_indices must be a list of lists, got null"),
        ({"input_ids": None}, "input_ids must be a list, got null"),
        ({"bytepacked_indices": [[255] * 14] * 19}, "record 1: teacher row 0 holds an id twice"),
        ({"compressed_logprobs": [[255] * 48] * 19}, "record 1: teacher row 0 holds a value that is NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            import_distillkit(write(tmp_path / "bad.parquet", [record | change]), store, tokenizer)
    shifted = [record | {"input_ids": [*record["input_ids"][1:], 5]} for record in map(record_of_exact, make_cases(8))]
    with pytest.raises(ValueError, match="rows are about other tokens"):
        import_distillkit(write(tmp_path / "bad.parquet", shifted), store, tokenizer)
    assert not store.exists()
    with pytest.raises(ValueError, match=r"record 1: .*\[0, 60\)"):
        import_distillkit(source, tmp_path / "small", tokenizer, vocab_size=60)


def record_of_exact(case) -> dict:
    return record_of(case, EXACT)


def test_import_distillkit_command(tmp_path, capsys) -> None:
    teacher = str(teachers.save_teacher(tmp_path / "tiny"))
    source = write(tmp_path / "a.parquet", [record_of(make_cases(1)[0], EXACT)])
    (tmp_path / "compression_config.yaml").write_text(yaml.safe_dump(EXACT))
    command = ["store", "import", "--format", "distillkit", str(source), str(tmp_path / "store")]
    assert main([*command, "--tokenizer", teacher, "--pad-token-id", "0"]) == 0
    assert "added 1 documents" in capsys.readouterr().out
    assert torch.isfinite(Store(tmp_path / "store")[0].teacher.logits).all()
