"""``slimkernels train --teacher-server``, from what vLLM answered and from the same numbers in the form of SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import served, served_training, teachers
from support.served_captures import QUICK
from support.served_sglang import SglangServer

from slimkernels.cli import main
from slimkernels.store import Store
from slimkernels.teacher import capture_server

pytest.importorskip("httpx2", reason="the extra `server` is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.smollm2()[1]


@pytest.fixture(scope="module")
def documents(tokenizer, tmp_path_factory) -> Path:
    return served_training.make_documents(tmp_path_factory.mktemp("documents") / "store")


@pytest.fixture(scope="module")
def expected(tokenizer, tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights after a training on rows that were captured from vLLM before it."""
    folder = tmp_path_factory.mktemp("captured")
    texts = [tokenizer(text)["input_ids"] for text in served.TEXTS]
    with served.ReplayServer(served.TRAININGS["vllm"]) as server:
        capture_server(
            server.url, served.MODEL, tokenizer, folder / "store", documents=texts, **served.OPTIONS, **QUICK
        )
    out = folder / "out"
    assert main(["train", "--store", str(folder / "store"), "--out", str(out), *served_training.recipe()]) == 0
    return load_file(out / "model.safetensors")


def servers() -> dict:
    replayed = {"vllm": lambda: served.ReplayServer(served.TRAININGS["vllm"])}
    return replayed | {f"sglang-{form}": lambda form=form: SglangServer(form) for form in ("triples", "base64")}


@pytest.mark.parametrize("name", servers())
def test_the_student_is_that_of_a_capture_before_the_training(
    name, documents, expected, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "k3y")
    rows = ["--teacher-rows", str(tmp_path / "rows"), "--key-env", "TEACHER_KEY"]
    with servers()[name]() as server:
        assert main(served_training.command(server.url, documents, tmp_path / "one", *rows)) == 0
        assert {seen["headers"].get("Authorization") for seen in server.seen} == {"Bearer k3y"}
        num_asked = len(server.seen)
        # A second training asks for nothing but what it checks first: the kind of the server and one sentence.
        assert main(served_training.command(server.url, documents, tmp_path / "two", *rows)) == 0
        assert num_asked - len(served.TEXTS) >= len(server.seen) - num_asked
    assert "student saved in" in capsys.readouterr().out
    assert len(Store(tmp_path / "rows" / "rank-00000")) == len(served.TEXTS)
    for out in ("one", "two"):
        weights = load_file(tmp_path / out / "model.safetensors")
        assert weights.keys() == expected.keys()
        for parameter, value in weights.items():
            torch.testing.assert_close(value, expected[parameter], msg=lambda text, out=out: f"{out}: {text}")


def test_rows_are_in_the_output_folder_by_default(documents, tmp_path) -> None:
    with served.ReplayServer(served.TRAININGS["vllm"]) as server:
        assert main(served_training.command(server.url, documents, tmp_path / "out")) == 0
    assert len(Store(tmp_path / "out" / "teacher-rows" / "rank-00000")) == len(served.TEXTS)


def test_a_budget_is_named_by_its_option(documents, tmp_path, capsys) -> None:
    with served.ReplayServer(served.TRAININGS["vllm"]) as server:
        command = served_training.command(server.url, documents, tmp_path / "out", "--token-budget", "20")
        assert main(command) == 2
    assert "slimkernels: --token-budget 20 is spent: 13 tokens were asked for" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_found_is_asked_for_by_its_option(documents, tmp_path, capsys) -> None:
    with served.ReplayServer(served.TRAININGS["vllm"]) as server:
        command = served_training.command(server.url, documents, tmp_path / "out")
        place = command.index("--tokenizer")
        assert main(command[:place] + command[place + 2 :]) == 2
    assert "--teacher-server needs the tokenizer of its model, got none: give --tokenizer\n" in capsys.readouterr().err


def test_texts_of_another_tokenizer_are_refused(documents, tmp_path, capsys) -> None:
    """SGLang is asked for the texts of one sentence, and there alone."""
    with SglangServer() as server:
        server.texts = {token: f"{text}s" for token, text in server.texts.items()}
        assert main(served_training.command(server.url, documents, tmp_path / "out")) == 2
        asked = [seen["body"]["return_text_in_logprobs"] for seen in server.seen if seen["path"] == "/generate"]
    assert asked == [True]
    assert "reads token 260 as ' thes', and the student's tokenizer as ' the': give" in capsys.readouterr().err


def test_an_error_names_the_server(documents, tmp_path, capsys) -> None:
    with served.ReplayServer(served.RECORDINGS["llama.cpp"]) as server:
        assert main(served_training.command(server.url, documents, tmp_path / "out")) == 2
    assert "must be a vLLM or SGLang server" in capsys.readouterr().err
