"""Models behind servers side by side: same answers as the local model, resumed runs, identities, and refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.evaluation import make_data, make_folder
from support.served import MODEL, ModelServer
from support.tiny import make_store
from transformers import AutoModelForCausalLM

from slimkernels.cli import main
from slimkernels.evaluate.choices import ChoiceTask
from slimkernels.evaluate.decoders import DecoderSettings
from slimkernels.evaluate.heldout import load_heldout
from slimkernels.evaluate.models import find_models
from slimkernels.evaluate.records import read_records
from slimkernels.evaluate.runner import Plan, load_run, run
from slimkernels.evaluate.tasks import Sample, load_task
from slimkernels.serving import base_client
from slimkernels.serving.errors import ServerUnavailableError

pytest.importorskip("httpx2", reason="the extra `server` is not installed")
pytestmark = pytest.mark.cpu_kernels

SETTINGS = DecoderSettings(max_steps=4, max_step_tokens=12, num_chains=3, branching_factor=2, beam=2)
QUICK = {"backoff_s": 0.01, "max_retries": 1}
TEMPLATE = "{% for message in messages %}ask: {{ message['content'] }}\nanswer:{% endfor %}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_folder(tmp_path_factory.mktemp("model") / "local", seed=4)
    model = AutoModelForCausalLM.from_pretrained(path)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # larger ones, for answers with lines and with ends
            parameter.data *= 20
    model.save_pretrained(path)
    config = path / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture
def server(folder):
    with ModelServer(folder) as server:
        yield server


def make_plan(names, data, samples=4, decoders=("greedy",), batch_questions=2, **options):
    tasks = [load_task(name, data, samples) for name in ("gsm8k", "strategyqa")]
    models = find_models(names, **QUICK | options)
    return Plan(models, decoders, tasks, SETTINGS, shots=0, batch_questions=batch_questions)


def answered(records, model):
    """Returns a model's records without its name, the times, and the sums that rounding changes."""
    found = []
    for record in (record for record in records if record.model == model):
        candidates = tuple({name: entry[name] for name in ("text", "tokens", "spent")} for entry in record.candidates)
        found.append(dataclasses.replace(record, key="", model="", seconds=None, candidates=candidates))
    return found


def sums(records, model):
    return [entry["sum_logprob"] for record in records if record.model == model for entry in record.candidates]


@pytest.mark.parametrize(("kind", "style"), [("vllm", "plain"), ("vllm", "chat"), ("openai", "plain")])
def test_a_served_model_answers_as_the_same_model_here(kind, style, folder, data, tmp_path):
    with ModelServer(folder, kind=kind) as server:
        tokenizers = [str(folder)] if style == "chat" else []
        plan = make_plan([str(folder), f"b={server.url}#{MODEL}"], data, prompt_style=style, tokenizers=tokenizers)
        records = run(plan, tmp_path)
        assert all(isinstance(body["prompt"], str) == (kind == "openai") for body in server.completions)
    local, served = answered(records, "local"), answered(records, "b")
    assert len(served) == 8
    assert served == local
    assert sums(records, "b") == pytest.approx(sums(records, "local"), rel=1e-4)
    assert len({record.output for record in served}) >= 6
    if style == "plain":
        assert any("\n" in record.output for record in served)
        assert any(record.output_tokens < 12 for record in served)
    assert all(record.prompt.startswith("ask: Q:") == (style == "chat") for record in served)


def test_decoders_that_draw_repeat_themselves_on_a_server(server, data, tmp_path):
    decoders = ("self-consistency", "pathfinder")
    first, again = (
        answered(run(make_plan([server.url], data, decoders=decoders), tmp_path / name), MODEL) for name in ("a", "b")
    )
    assert first == again
    assert {record.decoder for record in first} == set(decoders)
    chains = [record for record in first if record.decoder == "self-consistency"]
    assert {len(record.candidates) for record in chains} <= {1, 2, 3}
    assert len({candidate["text"] for record in chains for candidate in record.candidates}) > len(chains)
    assert {body["temperature"] for body in server.completions} > {0.8}


def test_a_server_that_dies_loses_nothing_that_was_answered(server, folder, data, tmp_path):
    names, plain = [f"b={server.url}", str(folder)], {"prompt_style": "plain"}
    server.dies_after = 14
    with pytest.raises(ServerUnavailableError, match=r"b: POST .* failed 2 times.*; its answers so far are kept in"):
        run(make_plan(names, data, **plain), tmp_path)
    written = [record for file in tmp_path.glob("records/b-*.jsonl") for record in read_records(file)]
    assert 0 < len(written) < 8
    server.dies_after, asked = None, len(server.completions)
    records = run(make_plan(names, data, **plain), tmp_path)
    assert answered(records, "b") == answered(records, "local")
    times = {record.key: record.seconds for record in records}
    assert all(times[record.key] == record.seconds for record in written)
    prompts = {record.prompt for record in written}
    again = [server.tokenizer.decode(body["prompt"]) for body in server.completions[asked:]]
    assert again
    assert not any(text.startswith(tuple(prompts)) for text in again)
    # All records exist, so the server is not asked again.
    asked = len(server.completions)
    assert run(make_plan(names, data, **plain), tmp_path) == records
    assert len(server.completions) == asked


def test_identity_depends_on_the_server_and_its_statements(server, folder):
    def identity(name=server.url, **options):
        return find_models([name], **QUICK | options)[0].identity

    assert identity() == identity() == identity(f"{server.url}#{MODEL}")
    assert identity() == identity(dtype="bfloat16", prompt_style="plain")
    others = [identity(tokenizers=[str(folder)])]
    server.names = (MODEL, "other")
    others.append(identity(f"{server.url}#other"))
    server.kind = "llamacpp-like"
    others.append(identity(f"{server.url}#{MODEL}"))
    with ModelServer(folder) as elsewhere:
        others.append(identity(elsewhere.url))
    server.names, server.kind = (MODEL,), "vllm"
    assert len({identity(), *others}) == 5


def test_served_models_have_names_of_their_own(server, folder):
    def labels(*names):
        return [model.label for model in find_models(names, **QUICK)]

    server.names = (MODEL, "org/other")
    host = server.url.removeprefix("http://").removesuffix("/v1")
    secret = server.url.replace("://", "://me:secret-7@")
    assert labels(f"{secret}#{MODEL}", f"{server.url}#org/other", str(folder)) == [MODEL, "org/other", "local"]
    with ModelServer(folder) as other:
        two = labels(f"{server.url}#{MODEL}", other.url)
        assert two == [f"{host}/{MODEL}", f"{other.url.removeprefix('http://').removesuffix('/v1')}/{MODEL}"]
    assert labels(f"a={server.url}#{MODEL}", f"b={server.url}#{MODEL}") == ["a", "b"]
    with pytest.raises(ValueError, match="models must be different and have different names") as error:
        labels(f"{secret}#{MODEL}", f"{secret}#{MODEL}")
    assert "secret-7" not in str(error.value)


def test_a_server_without_a_list_is_asked_by_name(server, monkeypatch):
    reply = server.reply

    def without_a_list(path, body):
        return (404, {}, "{}") if path == "/v1/models" else reply(path, body)

    monkeypatch.setattr(server, "reply", without_a_list)
    server.kind = "openai"
    (model,) = find_models([f"{server.url}#{MODEL}"], **QUICK)
    assert (model.label, model.served["said"]) == (MODEL, {})
    with pytest.raises(ValueError, match=r"a server must list one model, or be given as http.*#NAME; it lists none"):
        find_models([server.url], **QUICK)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("{url}#absent", {}, "must have the model 'absent', but lists smollm2, other"),
        ("{url}", {}, r"must list one model, or be given as http://127.*#NAME; it lists smollm2, other"),
        ("{url}?a=1#smollm2", {}, r"without \? and #"),
        ("{url}#other", {"prompt_style": "chat"}, "--prompt-style chat needs --tokenizer MODEL for other"),
        ("{url}#other", {"tokenizers": ["b={folder}"]}, r"for a server's model \(here: other\).* got b"),
        ("{folder}", {"tokenizers": ["{folder}"]}, r"for a server's model \(here: none\)"),
        ("{url}#other", {"tokenizers": ["{plain}"]}, "must have a chat template to ask other in"),
        ("{url}#other", {"tokenizers": ["{folder}"], "prompt_style": "plain"}, "--tokenizer has no effect with"),
        ("{url}#other", {"key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY must hold the server's key"),
    ],
)
def test_bad_served_models(names, options, message, server, folder, tmp_path):
    server.names = (MODEL, "other")
    values = {"url": server.url, "folder": folder, "plain": make_folder(tmp_path / "plain")}
    options = {
        name: [text.format(**values) for text in value] if isinstance(value, list) else value
        for name, value in options.items()
    }
    with pytest.raises(ValueError, match=message):
        find_models([names.format(**values)], **QUICK | options)
    assert not server.completions


def test_a_chat_is_refused_at_once_by_a_server_that_takes_no_token_ids(folder):
    with ModelServer(folder, kind="openai") as server:
        message = "smollm2 cannot be asked in the chat template of local: prompts must be texts for this server"
        with pytest.raises(ValueError, match=message):
            find_models([server.url], tokenizers=[str(folder)], **QUICK)


def test_tasks_that_need_probabilities_of_given_texts_are_refused(server, data, tmp_path):
    plan = make_plan([server.url], data)
    heldout = load_heldout(make_store(tmp_path / "store", num_documents=2))
    choices = [ChoiceTask("arc_easy", "a file", "hash", (Sample("0", "Which?", ""),), 1)]
    for name, tasks in (("heldout", {"heldout": heldout}), ("arc_easy", {"choices": choices})):
        with pytest.raises(ValueError, match=rf"servers' models \(smollm2\), got {name}, which need probabilities"):
            dataclasses.replace(plan, **tasks)
    assert not server.completions


def command(out, data, *models):
    words = [
        "compare",
        "--models",
        *models,
        "--tasks",
        "gsm8k",
        "--data",
        str(data),
        "--out",
        str(out),
        "--samples",
        "3",
    ]
    return [*words, "--shots", "0", "--max-depth", "2", "--max-step-tokens", "6", "--batch-questions", "1"]


def test_command_line_reports_the_facts_of_a_server(server, folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SERVED_KEY", "secret-7")
    out = tmp_path / "out"
    words = [*command(out, data, str(folder), f"far={server.url}#{MODEL}"), "--tokenizer", f"far={folder}"]
    assert main([*words, "--key-env", "SERVED_KEY"]) == 0
    assert {seen["headers"].get("Authorization") for seen in server.seen} == {"Bearer secret-7"}
    records = load_run(out)[1]
    assert answered(records, "far") == answered(records, "local")
    (far,) = [entry for entry in json.loads((out / "run.json").read_text())["models"] if "served" in entry]
    for page in ((out / "report.html").read_text(), (out / "report.md").read_text().replace("\\", "")):
        for said in (
            f"{MODEL}", server.url, "the chat template of local", "owned_by vllm, max_model_len 512", far["identity"],
            "shows neither the weights of a model nor their precision", "repetition was judged by character trigrams",
        ):  # fmt: skip
            assert said in page, said
    for path in out.rglob("*"):
        assert path.is_dir() or b"secret-7" not in path.read_bytes()
    # A login in the URL is used but never shown.
    login = command(tmp_path / "login", data, server.url.replace("://", "://me:secret-8@"))
    assert main(login) == 0
    assert server.seen[-1]["headers"]["Authorization"].startswith("Basic ")
    for path in (tmp_path / "login").rglob("*"):
        assert path.is_dir() or b"secret-8" not in path.read_bytes()


def test_command_line_fails_before_and_between_answers(server, folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base_client, "_MAX_BACKOFF_S", 0.01)

    def last_line():
        return capsys.readouterr().err.strip().splitlines()[-1]

    # The command fails before the local model is asked and before anything is written.
    out = tmp_path / "out"
    assert main(command(out, data, str(folder), "far=http://127.0.0.1:9/v1#m")) == 1
    assert last_line().startswith("slimkernels: GET http://127.0.0.1:9/v1/models failed 2 times")
    assert not out.exists()
    assert main(command(out, data, f"{server.url}#absent")) == 2
    assert "must have the model 'absent', but lists smollm2" in last_line()
    server.dies_after = 3
    assert main(command(out, data, server.url)) == 1
    assert f"slimkernels: {MODEL}: POST {server.url}/completions failed 7 times" in last_line()
    (file,) = out.glob("records/*.jsonl")
    before = read_records(file)
    assert 0 < len(before) < 3
    assert not (out / "report.html").exists()
    server.dies_after = None
    assert main(command(out, data, server.url)) == 0
    assert read_records(file)[: len(before)] == before
    assert len(read_records(file)) == 3
