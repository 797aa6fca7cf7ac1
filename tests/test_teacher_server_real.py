"""Real servers on localhost, llama.cpp and vLLM with SmolLM2: `make test-servers`. No other test needs them."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from support import served, teachers
from support.evaluation import make_data
from support.served_captures import assert_close_to_local

from bench.reproduce.instructions_judge import PairJudge, serve
from slimkernels.cli import main
from slimkernels.evaluate.runner import load_run
from slimkernels.models.gguf import converted_folder, default_cache_dir
from slimkernels.models.heldout import evaluate_store
from slimkernels.models.load import load_model
from slimkernels.models.make_student import make_student
from slimkernels.search import PathFinder, PathFinderConfig, ServerEngine
from slimkernels.store import Store, verify
from slimkernels.teacher import capture, capture_server, shipped_prompts

pytestmark = pytest.mark.server
pytest.importorskip("httpx2", reason="the extra `server` is not installed")


@pytest.fixture(scope="module")
def smollm2():
    return teachers.smollm2()


@pytest.fixture(scope="module", params=["llama.cpp", "vllm"])
def server(request, smollm2, tmp_path_factory):
    """Its kind and its address."""
    variable = {"llama.cpp": "LLAMACPP_PYTHON", "vllm": "VLLM_PYTHON"}[request.param]
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} does not name a Python with this server: run make test-servers")
    gguf = teachers.smollm2_gguf()
    folder = converted_folder(gguf, default_cache_dir())
    log = tmp_path_factory.mktemp("server") / "log"
    with served.real_server(request.param, python, folder, gguf, log) as address:
        yield request.param, f"{address}/v1"


@pytest.mark.parametrize("api", ["auto", "completions", "chat"])
def test_generated_documents_are_those_of_the_local_model(server, api, smollm2, tmp_path) -> None:
    _, url = server
    model, tokenizer = smollm2
    prompts = shipped_prompts()[:12]
    options = {"prompts": prompts, "api": api, "top_logprobs": 20, "max_tokens": 24, "codec": "float32"}
    report = capture_server(url, served.MODEL, tokenizer, tmp_path, concurrency=4, **options)
    assert (report.documents + report.dropped, report.unmapped_fraction) == (12, pytest.approx(0, abs=0.01))
    assert report.documents >= 11
    verify(tmp_path)
    masses = []
    for document in Store(tmp_path):
        assert_close_to_local(document, model)
        masses.append(document.teacher.logits.exp().sum(-1))
    # What 20 entries hold of this model's distribution on its own text.
    assert 0.6 < float(torch.cat(masses).mean()) < 0.95
    again = capture_server(url, served.MODEL, tokenizer, tmp_path, **options)
    assert again.skipped == report.documents


def test_scored_documents_agree_with_a_local_capture(server, smollm2, tmp_path) -> None:
    """The same documents through ``capture`` with the same model: the same rows, up to the server's arithmetic."""
    kind, url = server
    if kind == "llama.cpp":
        pytest.skip("llama.cpp does not score given text; test_teacher_server.py shows how that is said")
    model, tokenizer = smollm2
    documents = [tokenizer(text)["input_ids"] for text in served.TEXTS]
    options = {"top_logprobs": 20, "codec": "float32"}
    report = capture_server(url, served.MODEL, tokenizer, tmp_path / "server", documents=documents, **options)
    assert (report.documents, report.unmapped_fraction) == (2, 0.0)
    capture(model, tokenizer, documents, tmp_path / "local", top_k=20, codec="float32")
    local = Store(tmp_path / "local")
    for document in Store(tmp_path / "server"):
        other = local[local.find(document.input_ids)]
        assert torch.equal(document.positions, other.positions)
        shared = (document.teacher.ids[:, :, None] == other.teacher.ids[:, None, :]).any(-1)
        # bfloat16 changes the order of entries of almost equal probability.
        assert shared.float().mean() > 0.9
        exact = other.teacher.target_logit - other.teacher.lse[:, 0]
        assert (document.teacher.target_logit - exact).abs().mean() < 0.1
        assert_close_to_local(document, model)


def test_search(server, smollm2) -> None:
    """A tree that grows on the server, and the same one again: texts and tokens are the tokenizer's."""
    _, url = server
    engine = ServerEngine(url, served.MODEL, concurrency=8)
    config = PathFinderConfig(**served.SEARCH)
    results = PathFinder(engine, config).solve(served.SEARCHED)
    assert engine._branches == {}
    for result in results:
        assert result.candidates
        for node in range(1, len(result.tree)):
            ids = result.tree.token_ids(node)
            assert result.tree.text(node) == smollm2[1].decode(ids, skip_special_tokens=True)
            assert -12 * len(ids) < result.tree.sum_logprob[node] < 0
    engine.close()


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_side_by_side(server, style, smollm2, tmp_path) -> None:
    """The server's model beside the same one here, which finds its greedy answers likeliest; nothing is asked twice."""
    _, url = server
    model, tokenizer = smollm2
    command = f"""compare --models here=smollm2-135m-instruct there={url}#{served.MODEL} --tasks gsm8k strategyqa
        --data {make_data(tmp_path / "data")} --out {tmp_path / "out"} --samples 2 --max-depth 2 --max-step-tokens 16
        --decoders greedy self-consistency pathfinder --chains 2 --branching-factor 2 --beam 2""".split()
    command += ["--tokenizer", "smollm2-135m-instruct"] if style == "chat" else ["--prompt-style", "plain"]
    assert main(command) == 0
    records = load_run(tmp_path / "out")[1]
    assert len(records) == 2 * 3 * 2 * 2
    assert all(record.output.strip() and record.tokens for record in records)
    here = {(r.decoder, r.task, r.sample): r for r in records if r.model == "here"}
    regrets = []
    for record in (record for record in records if record.model == "there"):
        assert record.prompt == here[record.decoder, record.task, record.sample].prompt
        if record.decoder == "greedy":
            texts = [record.prompt, record.output]
            prompt, own = tokenizer(texts, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
            regrets.append(logits.amax(-1) - logits.gather(-1, torch.tensor(own)[:, None])[:, 0])
    # The server's arithmetic is another: a close call between two tokens may go the other way.
    regret = torch.cat(regrets)
    assert regret.max() < 1.0
    assert regret.mean() < 0.05
    page = (tmp_path / "out" / "report.html").read_text()
    assert url in page
    assert "A server shows neither the weights of a model nor their precision." in page
    assert main(command) == 0
    assert load_run(tmp_path / "out")[1] == records


def test_command_line(server, smollm2, tmp_path, capsys) -> None:
    _, url = server
    command = f"""capture --server {url} --model {served.MODEL} --tokenizer smollm2-135m-instruct --prompts
        --documents 3 --max-new-tokens 8 --out {tmp_path}/store""".split()
    assert main(command) == 0
    assert "added 3 documents" in capsys.readouterr().out
    assert main(["store", "verify", str(Path(tmp_path) / "store")]) == 0


def test_pairs_are_judged_behind_llama_cpp() -> None:
    python = os.environ.get("LLAMACPP_PYTHON")
    if not python:
        pytest.skip("LLAMACPP_PYTHON does not name a Python with this server: run make test-servers")
    with serve(teachers.smollm2_gguf(), python) as url, PairJudge(url, "smollm2", "digest") as judge:
        first, second = judge.compare("Name three fruits.", "Apples, pears and plums.", "The the of the.")
        swapped = judge.compare("Name three fruits.", "The the of the.", "Apples, pears and plums.")
    # An answer that names neither letter would count one half exactly.
    assert all(0 < one < 1 and one != 0.5 for one in (first, second))
    assert swapped == pytest.approx((1 - second, 1 - first), abs=0.02)


def test_vllm_scores_without_the_text_of_the_candidates(smollm2, tmp_path) -> None:
    """A server that was started with --enable-scale-out is asked through /inference/v1/generate."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON does not name a Python with this server: run make test-servers")
    model, tokenizer = smollm2
    gguf = teachers.smollm2_gguf()
    folder = converted_folder(gguf, default_cache_dir())
    documents = [tokenizer(text)["input_ids"] for text in served.TEXTS]
    with (
        served.real_server("vllm-tokens", python, folder, gguf, tmp_path / "log") as address,
        served.RecordingServer(address) as server,
    ):
        options = {"top_logprobs": 20, "codec": "float32"}
        capture_server(server.url, served.MODEL, tokenizer, tmp_path / "store", documents=documents, **options)
        paths = [exchange["path"] for exchange in server.exchanges]
        answers = [exchange["answer"] for exchange in server.exchanges[1:]]
    assert paths == ["/v1/models", *["/inference/v1/generate"] * 2]
    assert all('"decoded_token":null' in answer and '"decoded_token":"' not in answer for answer in answers)
    for document in Store(tmp_path / "store"):
        assert_close_to_local(document, model)


def test_training_ends_where_it_does_with_the_teacher_in_process(smollm2, tmp_path, capsys) -> None:
    """The same weights, dtype, number of entries and seed: the held-out KL of both students is the same within 2 %."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON does not name a Python with this server: run make test-servers")
    gguf = teachers.smollm2_gguf()
    folder = converted_folder(gguf, default_cache_dir())
    for name, tokens, seed in (("train", 3000, 0), ("heldout", 1000, 1)):
        command = f"""capture --teacher smollm2-135m-instruct --prompts --tokens {tokens} --max-new-tokens 32
            --seed {seed} --out {tmp_path / name}"""
        assert main(command.split()) == 0
    heldout = Store(tmp_path / "heldout")

    def kl_after(out: str, *teacher: str) -> float:
        command = f"""train --store {tmp_path / "train"} --tokenizer smollm2-135m-instruct --method reverse_kl
            --epochs 2 --batch-size 4 --learning-rate 6e-3 --seed 7 --option use_cpu=true --out {tmp_path / out}"""
        assert main([*command.split(), *teacher]) == 0
        return evaluate_store(load_model(tmp_path / out), heldout)["kl_ghost"]

    served_by = functools.partial(served.real_server, "vllm", python, folder, gguf, tmp_path / "log")
    with served_by(dtype="float32") as address:
        options = ["--teacher-server", f"{address}/v1", "--teacher-name", served.MODEL, "--top-logprobs", "20"]
        of_server = kl_after("served", *options)
    in_process = kl_after("local", "--teacher", str(folder), "--option", "teacher_top_k=20")
    untrained = evaluate_store(make_student(vocab_size=heldout.vocab_size), heldout)["kl_ghost"]
    with capsys.disabled():
        kls = {"from the server": of_server, "in process": in_process, "untrained": untrained}
        sys.stdout.write(f"\nheld-out KL: {kls}\n")
    assert of_server == pytest.approx(in_process, rel=0.02)
    assert in_process < 0.8 * untrained
