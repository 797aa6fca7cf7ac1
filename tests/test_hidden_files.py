"""Hidden states in the files of vLLM's connector: the layer is found, and the rows are those of the model itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import families, served, teachers
from support.hidden_states import layers_of, write_files
from torch import nn
from transformers import PreTrainedModel

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.models.final_layers import final_norm, load_final_layers
from slimkernels.serving.errors import ServerUnavailableError
from slimkernels.store import Store, verify
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.teacher import capture_hidden

K = 9
FAMILIES = ["llama", "llama-tied", "qwen2", "gemma2", "gpt2", "gpt-neox", "phi", "cohere", "granite", "bloom"]


def make_documents(vocab_size: int, count: int = 4) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(vocab_size, (5 + 3 * n,), generator=generator).tolist() for n in range(count)]


def assert_rows_of(store: Store, model: PreTrainedModel, documents, *, atol: float, vocab_size: int | None = None):
    assert len(store) == len(documents)
    for ids in documents:
        document = store[store.find(ids)]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1, :vocab_size].float()
        expected = sk.topk_logits(logits, top_k=K, target=torch.tensor(ids[1:]), temperatures=store.temperatures)
        rows = document.teacher
        assert document.positions.tolist() == list(range(1, len(ids)))
        close = {"atol": atol, "rtol": 0}
        torch.testing.assert_close(rows.logits, logits.gather(-1, rows.ids.long()), **close)
        torch.testing.assert_close(rows.logits.sort().values, expected.logits.sort().values, **close)
        for name in ("lse", "target_logit"):
            torch.testing.assert_close(getattr(rows, name), getattr(expected, name), **close)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("normed", [False, True])
def test_rows_are_those_of_the_models_own_logits(tmp_path, family, normed):
    model = families.make_family(family).eval()
    with torch.no_grad():
        # A norm that changes what it has normalised, as that of a trained model does.
        final_norm(model).weight.copy_(torch.linspace(0.5, 2.0, 16))
    documents = make_documents(families.VOCAB_SIZE)
    folder = write_files(tmp_path / "hidden", model, documents, normed=normed, dtype=torch.float32)
    options = {"top_k": K, "temperatures": (1.0, 2.0), "codec": "float32"}
    report = capture_hidden(folder, model, None, tmp_path / "store", **options)
    assert report == (4, sum(map(len, documents)), 0, 2, not normed)
    verify(tmp_path / "store")
    assert_rows_of(Store(tmp_path / "store"), model, documents, atol=2e-4)


@pytest.mark.parametrize("codec", ["hidden16", "hidden8"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_input_of_the_head_is_kept_on_request(tmp_path, family, codec):
    model = families.make_family(family).eval()
    documents = make_documents(families.VOCAB_SIZE)
    write_files(tmp_path / "hidden", model, documents)
    capture_hidden(tmp_path / "hidden", model, None, tmp_path / "store", top_k=K, codec=codec)
    verify(tmp_path / "store")
    store = Store(tmp_path / "store")
    # A logit is a sum of 16 products, each with the rounding of vLLM's bfloat16 and that of the codec.
    head = model.get_output_embeddings().weight.detach().abs().sum(-1).max()
    largest = max(layers_of(model, ids)[1].abs().max() for ids in documents)
    rounding = 2 * 2.0**-8 + (2.0**-8 if codec == "hidden16" else 1 / 254)
    assert_rows_of(store, model, documents, atol=float(head * largest * rounding))
    assert store.head.read().softcap == (3.0 if family == "gemma2" else None)


def test_the_rows_that_pad_a_head_are_left_out(tmp_path):
    tokenizer = teachers.make_tokenizer()
    model = teachers.make_teacher(vocab_size=len(tokenizer) + 20)
    documents = make_documents(len(tokenizer))
    write_files(tmp_path / "hidden", model, documents, dtype=torch.float32)
    capture_hidden(tmp_path / "hidden", model, tokenizer, tmp_path / "store", top_k=K, codec="float32")
    store = Store(tmp_path / "store")
    assert store.vocab_size == len(tokenizer)
    assert_rows_of(store, model, documents, atol=2e-4, vocab_size=len(tokenizer))


def test_a_capture_is_continued_and_skips_what_is_stored(tmp_path):
    model = teachers.make_teacher()
    documents = make_documents(300)
    write_files(tmp_path / "hidden", model, [*documents, [7], documents[0]])
    last = tmp_path / "hidden/cmpl-03-0.safetensors"
    content = last.read_bytes()
    last.write_bytes(content[:-5])
    with pytest.raises(
        ValueError, match=r"cmpl-03-0\.safetensors cannot be read .*: wait until the server has written"
    ):
        capture_hidden(tmp_path / "hidden", model, None, tmp_path / "store", top_k=K)
    assert len(Store(tmp_path / "store")) == 3
    last.write_bytes(content)
    report = capture_hidden(tmp_path / "hidden", model, None, tmp_path / "store", top_k=K)
    assert report[:3] == (1, len(documents[3]), 5)
    report = capture_hidden(tmp_path / "hidden", model, None, tmp_path / "store", top_k=K)
    assert report == (0, 0, 6, None, False)
    with pytest.raises(SettingsMismatchError):
        capture_hidden(tmp_path / "hidden", teachers.make_teacher(seed=3), None, tmp_path / "store", top_k=K)


def test_a_killed_capture_is_continued(tmp_path):
    model = teachers.make_teacher()
    teachers.save_teacher(tmp_path / "model")
    documents = make_documents(300, 30)
    write_files(tmp_path / "hidden", model, documents)
    command = ["capture", "--hidden", str(tmp_path / "hidden"), "--head", str(tmp_path / "model")]
    command += ["--out", str(tmp_path / "store"), "--shard-rows", "20", "--top-k", "9"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-m", "slimkernels", *command], **quiet) as process:
        while process.poll() is None and len(list((tmp_path / "store").glob("shard-*.safetensors"))) < 3:
            pass
        process.kill()
    verify(tmp_path / "store")
    assert len(Store(tmp_path / "store")) > 0
    assert main(command) == 0
    assert sorted(document.input_ids.tolist() for document in Store(tmp_path / "store")) == sorted(documents)


@pytest.mark.parametrize("layers", [slice(2, 3), [0, 0, 1, 2]], ids=["fewer", "more"])
def test_a_file_with_another_number_of_layers_is_refused(tmp_path, layers):
    model = teachers.make_teacher()
    folder = write_files(tmp_path / "hidden", model, make_documents(300))
    file = folder / "cmpl-02-0.safetensors"
    content = safetensors.torch.load_file(file)
    content["hidden_states"] = content["hidden_states"][:, layers].contiguous()
    safetensors.torch.save_file(content, file)
    with pytest.raises(ValueError, match=r"cmpl-02-0.safetensors must have 3 layers, .*, got [14]: capture the files"):
        capture_hidden(folder, model, None, tmp_path / "store", top_k=K)


def write(folder: Path, content) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(content, folder / "a.safetensors")
    return folder


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"hidden": torch.zeros(3, 1, 32)}, "must hold the tensors 'hidden_states' and 'token_ids'"),
        ({"hidden_states": torch.zeros(3, 1, 32), "token_ids": torch.zeros(3)}, "must be integers of shape"),
        ({"hidden_states": torch.zeros(3, 1, 32), "token_ids": torch.zeros(1, 3).long()}, "must be integers of shape"),
        ({"hidden_states": torch.zeros(2, 1, 32), "token_ids": torch.zeros(3).long()}, "a row per token"),
        ({"hidden_states": torch.zeros(3, 0, 32), "token_ids": torch.zeros(3).long()}, "must have shape"),
        ({"hidden_states": torch.zeros(3, 1, 32).long(), "token_ids": torch.zeros(3).long()}, "must have shape"),
        ({"hidden_states": torch.zeros(3, 1, 31), "token_ids": torch.zeros(3).long()}, "the head reads 32"),
        ({"hidden_states": torch.zeros(3, 1, 32), "token_ids": torch.tensor([1, 2, 300])}, "token ids must lie in"),
        ({"hidden_states": torch.zeros(3, 1, 32), "token_ids": torch.tensor([1, -2, 3])}, "token ids must lie in"),
        ({"hidden_states": torch.ones(3, 2, 32), "token_ids": torch.zeros(3).long()}, "no layer of the hidden states"),
        ({"hidden_states": torch.full((3, 1, 32), torch.nan), "token_ids": torch.zeros(3).long()}, "no layer"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    write(tmp_path / "hidden", content)
    with pytest.raises(ValueError, match=message):
        capture_hidden(tmp_path / "hidden", teachers.make_teacher(), None, tmp_path / "store", top_k=K)


@pytest.mark.parametrize("codec", ["affine8", "hidden8"])
def test_hidden_states_that_are_not_finite_are_refused(tmp_path, codec):
    model = teachers.make_teacher()
    write_files(tmp_path / "hidden", model, make_documents(300, 2))
    file = tmp_path / "hidden/cmpl-01-0.safetensors"
    content = safetensors.torch.load_file(file)
    content["hidden_states"][2, -1, 3] = torch.inf
    safetensors.torch.save_file(content, file)
    with pytest.raises(FloatingPointError, match=r"hidden states in .*cmpl-01-0\.safetensors are not finite"):
        capture_hidden(tmp_path / "hidden", model, None, tmp_path / "store", top_k=K, codec=codec)
    assert len(Store(tmp_path / "store")) == 1


def test_a_folder_without_files_is_named(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="hidden states not found"):
            capture_hidden(folder, teachers.make_teacher(), None, tmp_path / "store")


@pytest.mark.parametrize("wrong", ["layer", "model", "tokens"])
def test_files_of_another_layer_model_or_tokenizer_are_refused(tmp_path, wrong):
    model = teachers.make_teacher()
    with torch.no_grad():
        # In a model that is not trained, the last layer adds little to the embeddings.
        model.get_decoder().layers[-1].mlp.down_proj.weight.mul_(500)
    folder = write_files(tmp_path / "hidden", model, make_documents(300), last=wrong != "layer")
    if wrong == "model":
        model = teachers.make_teacher(seed=7)
    if wrong == "tokens":
        file = folder / "cmpl-00-0.safetensors"
        content = safetensors.torch.load_file(file)
        content["token_ids"] = 299 - content["token_ids"]
        safetensors.torch.save_file(content, file)
    with pytest.raises(ValueError, match=r"the nearest, layer \d of \d .* nats away\. Write the output of the last"):
        capture_hidden(folder, model, None, tmp_path / "store")
    assert len(Store(tmp_path / "store")) == 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt-neox"])
def test_final_layers_are_loaded_alone(tmp_path, family):
    model = families.make_family(family).eval()
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    loaded = load_final_layers(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    norm, expected = final_norm(loaded), final_norm(model)
    assert type(norm) is type(expected)
    assert torch.equal(norm.weight, expected.weight)
    assert any(parameter.is_meta for parameter in loaded.parameters())


def test_final_layers_under_other_names_are_not_taken_for_tied_ones(tmp_path):
    """GPT-NeoX's files call the head embed_out."""
    families.make_family("gpt-neox").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold lm_head\.weight under this name, but do not: load the whole"):
        load_final_layers(tmp_path)


def test_a_decoder_that_ends_in_a_linear_layer_has_no_final_norm():
    model = families.make_family("llama")
    model.get_decoder().norm = nn.Linear(16, 16, bias=False)
    assert final_norm(model) is None


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.norm.weight"])
def test_missing_final_layers_are_named(tmp_path, missing):
    teachers.save_teacher(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state[missing]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"must hold {missing}"):
        load_final_layers(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read"):
        load_final_layers(tmp_path)


def test_the_head_alone_needs_a_server(tmp_path):
    teachers.save_teacher(tmp_path / "model")
    model = load_final_layers(tmp_path / "model")
    write_files(tmp_path / "hidden", teachers.make_teacher(), make_documents(300))
    with pytest.raises(ValueError, match="give a server that scores one document, or all weights"):
        capture_hidden(tmp_path / "hidden", model, None, tmp_path / "store")
    with pytest.raises(ValueError, match="server needs the tokenizer"):
        capture_hidden(tmp_path / "hidden", model, None, tmp_path / "store", server="http://localhost:1/v1")


def test_the_layer_is_found_by_one_served_document(tmp_path, capsys):
    """The folder of --head has the weights of its final layers alone."""
    pytest.importorskip("httpx2", reason="needs the extra server")
    from support.served_scores import ScoringServer

    model, documents = teachers.make_teacher(seed=3), make_documents(300)
    teachers.save_teacher(tmp_path / "model", seed=3)
    state = safetensors.torch.load_file(tmp_path / "model/model.safetensors")
    final = {name: state[name] for name in ("lm_head.weight", "model.norm.weight")}
    safetensors.torch.save_file(final, tmp_path / "model/model.safetensors", {"format": "pt"})
    write_files(tmp_path / "hidden", model, documents, dtype=torch.float32)
    command = ["capture", "--hidden", str(tmp_path / "hidden"), "--head", str(tmp_path / "model"), "--top-k", "9"]
    command += ["--out", str(tmp_path / "store"), "--codec", "float32", "--model", served.MODEL, "--check-server"]
    with ScoringServer() as server:
        assert main([*command, server.url]) == 0
        assert server.documents == [tuple(documents[0])]
        # Where nothing is missing, nothing is asked.
        assert main([*command, server.url]) == 0
        assert len(server.documents) == 1
    assert "read layer 2 of the files, the final norm applied here" in capsys.readouterr().out
    assert_rows_of(Store(tmp_path / "store"), model, documents, atol=2e-4)


def test_the_rows_of_another_server_are_refused(tmp_path):
    pytest.importorskip("httpx2", reason="needs the extra server")
    from support.served_scores import ScoringServer

    tokenizer, model = teachers.make_tokenizer(), teachers.make_teacher()
    write_files(tmp_path / "hidden", model, make_documents(300))
    options = {"tokenizer": tokenizer, "store_path": tmp_path / "store", "server_model": served.MODEL}
    with ScoringServer() as server, pytest.raises(ValueError, match="no layer of the hidden states"):
        capture_hidden(tmp_path / "hidden", model, **options, server=server.url)
    with pytest.raises(ServerUnavailableError):
        capture_hidden(tmp_path / "hidden", model, **options, server=server.url)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden", "hidden"], "--hidden needs --head"),
        (["--hidden", "hidden", "--head", "model", "--text", "a.jsonl"], "--text has no meaning with --hidden"),
        (["--hidden", "hidden", "--head", "model", "--seed", "3"], "--seed has no meaning with --hidden"),
        (["--hidden", "hidden", "--head", "model", "--model", "x"], "without --check-server"),
        (["--teacher", "model", "--head", "model", "--text", "a.jsonl"], "--head has no meaning without --hidden"),
        (["--teacher", "model"], "one of the arguments --text --prompts is required"),
        (["--hidden", "none", "--head", "model"], "there is no .safetensors file in none"),
        (
            ["--server", "http://localhost:1/v1", "--model", "x", "--prompts", "--codec", "hidden8"],
            "--codec hidden8 needs a teacher's hidden states",
        ),
    ],
)
def test_a_wrong_command_gets_one_sentence(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    teachers.save_teacher(tmp_path / "model")
    write_files(tmp_path / "hidden", teachers.make_teacher(), make_documents(300))
    try:
        code = main(["capture", *words, "--out", "store"])
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("codec", ["affine8", "hidden16"])
def test_the_command_captures_and_trains(tmp_path, monkeypatch, capsys, codec):
    monkeypatch.chdir(tmp_path)
    teachers.save_teacher(tmp_path / "model")
    write_files(tmp_path / "hidden", teachers.make_teacher(), make_documents(300, 8))
    words = ["capture", "--hidden", "hidden", "--head", "model", "--out", "store", "--codec", codec, "--top-k", "9"]
    assert main(words) == 0
    output = capsys.readouterr().out
    assert "added 8 documents" in output
    assert "read layer 2 of the files, the final norm applied here" in output
    assert main(["store", "info", "store"]) == 0
    assert "smallest_codec" in capsys.readouterr().out
    teachers.save_teacher(tmp_path / "student", seed=1)
    train = ["train", "--store", "store", "--student", "student", "--method", "slim", "--out", "out"]
    train += ["--eval-store", "store", "--max-steps", "2", "--batch-size", "2", "--option", "use_cpu=true"]
    assert main(train) == 0
    assert "eval_kl_ghost" in capsys.readouterr().out
