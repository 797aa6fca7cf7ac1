"""A served teacher, by what llama.cpp and vLLM said: rows, tokens, mass, keys and arguments."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from support import served, teachers
from support.served_captures import assert_close_to_local, posts, run

from slimkernels import slim_loss, sparse_softmax
from slimkernels.cli import main
from slimkernels.served_rows.answers import Position
from slimkernels.served_rows.rows import AnswerReader
from slimkernels.served_rows.tokens import ServerToken, TokenMap
from slimkernels.serving.client import ServerClient
from slimkernels.store import Store
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.teacher import ServerReport, ServerRequestError, UnmappedTokensError

pytest.importorskip("httpx2", reason="the extra `server` is not installed")

KEY = "sk-the-key-of-the-tests"


@pytest.fixture(scope="module")
def smollm2():
    return teachers.smollm2()


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return smollm2[1]


@pytest.fixture
def llamacpp():
    with served.ReplayServer(served.RECORDINGS["llama.cpp"]) as server:
        yield server


@pytest.fixture
def vllm():
    with served.ReplayServer(served.RECORDINGS["vllm"]) as server:
        yield server


class TestRecordedServers:
    @pytest.mark.parametrize(
        ("kind", "name", "named", "rows"),
        [
            ("llama.cpp", "generated", True, [12, 12, 12]),
            ("llama.cpp", "chat", True, [12, 12]),
            # Twelve tokens, but one row for the last of each three that make up a character.
            ("llama.cpp", "chat_as_openai", False, [4, 12]),
            ("llama.cpp", "generated_as_openai", False, [12, 12, 12]),
            ("llama.cpp", "generated_emoji", True, [3]),
            ("vllm", "generated", True, [12, 12, 12]),
            ("vllm", "chat", True, [12, 12]),
            ("vllm", "chat_greedy", True, [32, 25]),
            ("vllm", "generated_as_openai", False, [12, 12, 12]),
            ("vllm", "scored", True, [10, 11]),
            # Positions about which this server names no token that has a string of its own have no row.
            ("vllm", "scored_as_openai", False, [10, 9]),
        ],
    )
    def test_documents_and_rows_are_those_of_the_local_model(self, kind, name, named, rows, smollm2, tmp_path) -> None:
        model, tokenizer = smollm2
        with served.ReplayServer(served.RECORDINGS[kind], names_itself=named) as server:
            report = run(server, tokenizer, tmp_path, name, kind, max_unmapped_fraction=0.1)
        store = Store(tmp_path)
        assert [len(document.positions) for document in store] == rows
        assert (report.documents, report.dropped) == (len(rows), 0)
        assert report.tokens == sum(len(document.input_ids) for document in store)
        for document in store:
            assert_close_to_local(document, model)

    def test_the_tokens_are_those_that_the_server_drew(self, tokenizer, tmp_path, llamacpp) -> None:
        run(llamacpp, tokenizer, tmp_path, kind="llama.cpp")
        answers = [
            json.loads(exchange["answer"]) for exchange in llamacpp.exchanges if exchange["path"] == "/completion"
        ]
        drawn = [answer["tokens"] for answer in answers]
        for document, prompt in zip(Store(tmp_path), served.PROMPTS, strict=True):
            ids = document.input_ids.tolist()
            prompt_ids = tokenizer(prompt)["input_ids"]
            assert ids[: len(prompt_ids)] == prompt_ids
            assert ids[len(prompt_ids) :] in drawn
            assert document.positions.tolist() == list(range(len(prompt_ids), len(ids)))

    def test_characters_of_several_tokens(self, tokenizer, tmp_path, llamacpp) -> None:
        """llama.cpp reports one entry per character, and none for one that the end cut off."""
        run(llamacpp, tokenizer, tmp_path, "generated_emoji", "llama.cpp")
        (document,) = Store(tmp_path)
        answers = [
            json.loads(exchange["answer"]) for exchange in llamacpp.exchanges if exchange["path"] == "/completion"
        ]
        (answer,) = [answer for answer in answers if len(answer["completion_probabilities"]) < len(answer["tokens"])]
        assert answer["content"] == "🌟🌟🌟\ufffd"
        prompt_length = len(document.input_ids) - 9
        assert document.input_ids[prompt_length:].tolist() == answer["tokens"][:9]
        assert document.positions.tolist() == [prompt_length + 2, prompt_length + 5, prompt_length + 8]

    @pytest.mark.parametrize(("codec", "tolerance"), [("float32", 1e-6), ("affine8", 1e-3)])
    def test_the_rest_has_exactly_the_mass_that_is_missing(self, codec, tolerance, tokenizer, tmp_path, vllm) -> None:
        run(vllm, tokenizer, tmp_path, codec=codec)
        for seed, document in enumerate(Store(tmp_path)):
            (choice,) = [
                json.loads(exchange["answer"])["choices"][0]
                for exchange in vllm.exchanges
                if exchange["path"] == "/v1/completions"
                and exchange["request"].get("seed") == seed
                and "return_token_ids" in exchange["request"]
            ]
            tops = choice["logprobs"]["top_logprobs"]
            # The server adds the token that it drew: it is the label, and no entry unless it is among the top.
            assert {len(top) for top in tops} == {5, 6}
            masses = [math.fsum(sorted(map(math.exp, top.values()))[-5:]) for top in tops]
            tail = sparse_softmax(document.teacher, rest="ghost").tail_logprob.exp()
            assert torch.allclose(tail, 1 - torch.tensor(masses), atol=tolerance)
            assert tail.min() > 1e-4
            assert document.teacher.lse.abs().max() == 0
            # In float64 from the printed numbers, whatever the codec of the kept ones.
            rests = torch.tensor([math.log1p(-mass) for mass in masses])
            torch.testing.assert_close(document.teacher.rest_lse[:, 0], rests, rtol=0, atol=1e-6)
            drawn = torch.tensor(choice["logprobs"]["token_logprobs"])
            assert torch.equal(document.teacher.target_logit, drawn)

    def test_what_cannot_be_mapped_belongs_to_the_rest(self, tokenizer, tmp_path) -> None:
        with served.ReplayServer(served.RECORDINGS["vllm"], names_itself=False) as server:
            report = run(server, tokenizer, tmp_path, "scored_as_openai", max_unmapped_fraction=0.2)
        teacher = Store(tmp_path)[1].teacher
        kept = teacher.ids >= 0
        assert kept.sum(-1).tolist() == [5, 5, 5, 3, 5, 5, 5, 5, 4]
        assert 0.05 < report.unmapped_fraction < 0.1
        tail = sparse_softmax(teacher, rest="ghost").tail_logprob.exp()
        mass = teacher.logits.exp().masked_fill(~kept, 0.0).sum(-1)
        assert torch.allclose(tail + mass, torch.ones(9))
        assert torch.allclose(teacher.rest_lse[:, 0].exp() + mass, torch.ones(9))

    def test_a_document_with_unknown_tokens_is_dropped_or_refused(self, tokenizer, tmp_path) -> None:
        with served.ReplayServer(served.RECORDINGS["vllm"], names_itself=False) as server:
            report = run(server, tokenizer, tmp_path / "a", "chat_as_openai", "vllm", max_unmapped_fraction=1.0)
            assert (report.documents, report.dropped) == (1, 1)
            assert report.unmapped_fraction > 0.2
            assert "have no known ids in the tokenizer" in report.drop_reasons[0]
            with pytest.raises(UnmappedTokensError, match=r"have no id in the tokenizer, more than max_unmapped_.*'"):
                run(server, tokenizer, tmp_path / "b", "chat_as_openai", "vllm")

    def test_a_document_that_lacks_tokens_is_dropped_for_that_reason(self, tokenizer, tmp_path, llamacpp) -> None:
        """llama.cpp lists nothing for a character that the end cut off. No token was unknown."""
        report = run(llamacpp, tokenizer, tmp_path, "chat_greedy", "llama.cpp")
        assert (report.documents, report.dropped, report.unmapped_fraction) == (1, 1, 0.0)
        assert report.drop_reasons == ("the server counts 32 generated tokens, but lists 30",)

    def test_llama_cpp_cannot_score(self, tokenizer, tmp_path, llamacpp) -> None:
        with pytest.raises(ServerRequestError, match=r"logprobs for 1 of the 11 tokens.*llama.cpp does not.*prompts"):
            run(llamacpp, tokenizer, tmp_path, "scored", "llama.cpp")

    def test_the_store_says_where_it_comes_from_and_follows_a_server_that_moved(
        self, tokenizer, tmp_path, vllm
    ) -> None:
        run(vllm, tokenizer, tmp_path)
        manifest = Store(tmp_path).manifest
        assert manifest["teacher"] == {"name": "smollm2", "server": vllm.url, "kind": "vllm"}
        assert manifest["selection"]["top_k"] == 5
        with served.ReplayServer(served.RECORDINGS["vllm"]) as moved:
            assert run(moved, tokenizer, tmp_path) == ServerReport(0, 0, 3, 0, 0.0, 0)
            assert not posts(moved)
            with pytest.raises(SettingsMismatchError, match="seed"):
                run(moved, tokenizer, tmp_path, seed=1)

    def test_what_a_student_learns_from_it(self, tokenizer, tmp_path, vllm) -> None:
        """The ghost loss and its gradient are those of the kept tokens and one outcome for all others, in float64."""
        run(vllm, tokenizer, tmp_path, "scored")
        document = Store(tmp_path)[0]
        teacher, labels = document.teacher, document.input_ids[document.positions]
        logits = torch.randn(len(labels), len(tokenizer), requires_grad=True)
        loss = slim_loss(logits, labels, teacher, rest="ghost", token_weight="none", ce_weight=0.0).loss
        loss.backward()
        exact = logits.detach().double().requires_grad_()
        kept = exact.softmax(-1).gather(-1, teacher.ids.long())
        p = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
        q = teacher.logits.double().exp()
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
        expected = (q * (q.log() - p.log())).sum(-1).mean()
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert (logits.grad - exact.grad).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        # log-probabilities of the three entries of a row, and its rest
        ([math.log(0.5), math.log(0.25), math.log(0.125)], math.log(0.125)),
        # 1 - 0.99998 - 1e-6 - 1e-6: float32 would have an error of 1 %.
        ([math.log(0.99998), math.log(1e-6), math.log(1e-6)], math.log(1.8e-5)),
        # Below 1e-5, 0, and less than 0: the rounding of what was printed.
        ([math.log(0.999991), math.log(1e-6), -9999.0], math.nan),
        ([0.0, -30.0, -9999.0], math.nan),
        ([0.0, math.log(5e-4), -3.4e38], math.nan),
    ],
)
def test_rest_of_a_served_row_is_that_of_the_printed_numbers(printed, expected) -> None:
    tokens = TokenMap(teachers.make_tokenizer(), 300)
    server = SimpleNamespace(client=SimpleNamespace(url="http://host"), model="model", top_logprobs=3)
    top = [ServerToken("", logprob, id=5 + i) for i, logprob in enumerate(printed)]
    # A fourth entry, which a server adds for the token that it drew, is not kept and so belongs to the rest.
    top.append(ServerToken("", min(printed) - 1.0 if expected == math.log(0.125) else -9999.0, id=60))
    places, teacher = AnswerReader(server, tokens, 1.0)._rows([4], [Position(top[0], top)])
    assert places == [4]
    assert teacher.lse.tolist() == [[0.0]]
    assert teacher.rest_lse.dtype == torch.float32
    assert teacher.rest_lse.item() == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_row_in_the_wrong_place_is_noticed(smollm2, tmp_path, llamacpp) -> None:
    run(llamacpp, smollm2[1], tmp_path, kind="llama.cpp")
    for document in Store(tmp_path):
        with pytest.raises(AssertionError):
            assert_close_to_local(dataclasses.replace(document, positions=document.positions - 1), smollm2[0])


class TestKeys:
    def test_a_key_is_sent_and_nowhere_else(self, tokenizer, tmp_path, vllm, monkeypatch) -> None:
        monkeypatch.setenv("TEST_KEY", KEY)
        run(vllm, tokenizer, tmp_path / "store", key_env="TEST_KEY")
        assert {seen["headers"]["Authorization"] for seen in vllm.seen} == {f"Bearer {KEY}"}
        assert not any(KEY.encode() in file.read_bytes() for file in (tmp_path / "store").iterdir())
        # Servers repeat the key they do not like.
        vllm.faults = [None, (401, {}, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}))]
        with pytest.raises(ServerRequestError, match=r"provided: \*\*\*") as caught:
            run(vllm, tokenizer, tmp_path / "other", key_env="TEST_KEY", num_documents=1)
        assert KEY not in str(caught.value)

    def test_the_usual_variable(self, tokenizer, tmp_path, vllm, monkeypatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        run(vllm, tokenizer, tmp_path, num_documents=1)
        assert vllm.seen[-1]["headers"]["Authorization"] == f"Bearer {KEY}"

    def test_a_login_in_the_url_is_used_and_not_stored(self, tokenizer, tmp_path, vllm, monkeypatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        vllm.url = vllm.url.replace("http://", "http://anna:p%40ss@")
        run(vllm, tokenizer, tmp_path, num_documents=1)
        assert vllm.seen[-1]["headers"]["Authorization"] == "Basic YW5uYTpwQHNz"
        text = (tmp_path / "manifest.json").read_text()
        assert "127.0.0.1" in text
        assert "anna" not in text
        assert "p%40ss" not in text

    def test_a_named_variable_must_be_set(self, monkeypatch) -> None:
        monkeypatch.delenv("TEST_KEY", raising=False)
        with pytest.raises(ValueError, match="environment variable TEST_KEY must hold the server's key"):
            ServerClient("http://localhost/v1", key_env="TEST_KEY")

    @pytest.mark.parametrize(
        "url", ["localhost:8000", "ftp://a/v1", "http://", "http://a/v1?key=secret", "http://a:b/"]
    )
    def test_urls(self, url) -> None:
        with pytest.raises(ValueError, match="url must be the base URL of a server") as caught:
            ServerClient(url)
        assert "secret" not in str(caught.value)


class TestTokens:
    def test_another_tokenizer_is_refused(self, tmp_path, vllm, tokenizer) -> None:
        with pytest.raises(ServerRequestError, match="never recorded"):
            run(vllm, teachers.make_tokenizer(), tmp_path / "a")
        answer = json.loads(next(e["answer"] for e in vllm.exchanges if e["path"] == "/v1/completions"))
        answer["choices"][0]["prompt_token_ids"] = [0, 504]
        vllm.faults = [None, (200, {}, json.dumps(answer))]
        with pytest.raises(
            ServerRequestError, match=r"read the tokens \[0, 504\] where the tokenizer makes \[504, 3575"
        ):
            run(vllm, tokenizer, tmp_path / "b", concurrency=1)

    @pytest.mark.parametrize("named", [True, False])
    def test_a_server_that_scores_other_tokens_is_refused(self, named, tokenizer, tmp_path) -> None:
        with served.ReplayServer(served.RECORDINGS["vllm"], names_itself=named) as server:
            path = "prompt_logprobs" if named else "echo"
            answers = [e["answer"] for e in server.exchanges if path in (e["request"] or {})]
            answer = json.loads(answers[0])
            choice = answer["choices"][0]
            # A token in front, which a server that counts only what it was sent would not tell.
            if named:
                choice["prompt_logprobs"].insert(1, choice["prompt_logprobs"][1])
            else:
                for values in (choice["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs")):
                    values.insert(1, values[1])
            server.faults = [None, (200, {}, json.dumps(answer))]
            with pytest.raises(ServerRequestError, match=r"scored '.*' where the document has token 5249 at 2"):
                run(server, tokenizer, tmp_path, "scored" if named else "scored_as_openai", concurrency=1)

    def test_what_is_no_logprob_is_refused(self, tokenizer, tmp_path, vllm) -> None:
        answer = json.loads(next(e["answer"] for e in vllm.exchanges if e["path"] == "/v1/completions"))
        for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
            top.update({name: value + 20.0 for name, value in top.items()})
        vllm.faults = [None, (200, {}, json.dumps(answer))]
        with pytest.raises(ServerRequestError, match="with a probability of inf together, at most 1 is possible"):
            run(vllm, tokenizer, tmp_path, concurrency=1)

    def test_what_a_server_does_not_know_is_no_entry(self, tokenizer, tmp_path, vllm) -> None:
        """OpenAI writes -9999 for a token that is not among the most probable, llama.cpp the lowest float."""
        answer = json.loads(next(e["answer"] for e in vllm.exchanges if e["path"] == "/v1/completions"))
        logprobs = answer["choices"][0]["logprobs"]
        logprobs["token_logprobs"][0] = -9999.0
        name = min(logprobs["top_logprobs"][1], key=logprobs["top_logprobs"][1].get)
        logprobs["top_logprobs"][1] = {**logprobs["top_logprobs"][1], name: -3.4028235e38}
        vllm.faults = [None, (200, {}, json.dumps(answer))]
        run(vllm, tokenizer, tmp_path, num_documents=1)
        (document,) = Store(tmp_path)
        assert math.isnan(document.teacher.target_logit[0])
        assert torch.isfinite(document.teacher.target_logit[1:]).all()
        assert name not in {f"token_id:{token}" for token in document.teacher.ids[1].tolist()}


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompts": None}, "give either documents to score or prompts to continue"),
            ({"documents": [[1, 2]]}, "give either documents to score or prompts to continue"),
            ({"prompts": []}, "prompts must hold at least one prompt"),
            ({"prompts": [""]}, "every prompt must have at least one token"),
            ({"prompts": [[1, 2]], "api": "chat"}, "a prompt of api='chat' must be text"),
            ({"prompts": None, "documents": []}, "documents must hold at least one document"),
            ({"api": "assistants"}, "api must be one of auto, completions, chat, llama.cpp, sglang, got 'assistants'"),
            ({"top_logprobs": 0}, "top_logprobs must be an int of at least 1, got 0"),
            ({"temperature": math.nan}, "temperature must be finite and at least 0"),
            ({"temperature": 1e-40}, r"temperature must be in \["),
            ({"seed": -1}, "seed must be in"),
            ({"max_unmapped_fraction": 2.0}, "max_unmapped_fraction must be in"),
            ({"concurrency": 0}, "concurrency must be an int of at least 1"),
            ({"max_retries": -1}, "max_retries must be an int of at least 0"),
            ({"requests_per_minute": 0}, "requests_per_minute must be positive and finite"),
            ({"timeout_s": math.inf}, "timeout_s must be positive and finite"),
        ],
    )
    def test_bad_ones(self, options, message, tokenizer, tmp_path, vllm) -> None:
        with pytest.raises(ValueError, match=message):
            run(vllm, tokenizer, tmp_path, **options)
        assert not posts(vllm)

    def test_command_line(self, tokenizer, tmp_path, vllm, capsys, monkeypatch) -> None:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        (tmp_path / "prompts.txt").write_text("\n".join(served.PROMPTS))
        command = f"""capture --server {vllm.url} --model smollm2 --tokenizer smollm2-135m-instruct --top-k 5
            --prompts {tmp_path}/prompts.txt --max-new-tokens 12 --codec float32 --out {tmp_path}/store""".split()
        assert main(command) == 0
        out, err = capsys.readouterr()
        assert "3 requests: 12 prompt tokens, at most 36 generated tokens" in " ".join(err.split())
        assert "added 3 documents, 48 tokens (36 generated); skipped 0, dropped 0" in " ".join(out.split())
        assert len(Store(tmp_path / "store")) == 3
        assert main(command) == 0
        assert "0 requests: 0 prompt tokens" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--prompts", "--server needs --model"),
            ("--prompts --model a", "--server needs --tokenizer"),
            ("--prompts --model a --tokenizer b --tokens 5", "--tokens has no meaning with --server"),
            ("--prompts --model a --tokenizer b --top-fraction 0.1", "--top-fraction has no meaning with --server"),
            ("--prompts --model a --tokenizer b --temperatures 1 2", "--temperatures has no meaning with --server"),
            ("--text a.txt --model a --tokenizer b --generated x", "--generated has no meaning with --server"),
            ("--prompts --model a --tokenizer /no/where", "there is no folder or .gguf file /no/where"),
        ],
    )
    def test_bad_commands(self, options, message, tmp_path, capsys) -> None:
        assert main(["capture", "--server", "http://localhost:9", "--out", str(tmp_path / "s"), *options.split()]) == 2
        assert message in " ".join(capsys.readouterr().err.split())

    def test_without_the_extra(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "httpx2", None)
        with pytest.raises(ImportError, match=r"pip install 'slimkernels\[server\]'"):
            ServerClient("http://localhost/v1")
