"""A teacher behind SGLang: the same rows as from vLLM for the same numbers, in every form that releases give.

The answers are written after the documented schema of release 0.5.23 (``support/served_sglang.py``), not recorded.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from support import served, teachers
from support.served_captures import QUICK, assert_same_documents, posts
from support.served_sglang import FORMS, INFO, SglangServer

from slimkernels.cli import main
from slimkernels.served_rows.answers import Request
from slimkernels.served_rows.api import ServerApi
from slimkernels.serving.client import ServerClient
from slimkernels.serving.errors import UnusableAnswerError
from slimkernels.serving.kinds import INFO_PATHS, identify, server_kind
from slimkernels.store import Store
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.teacher import ServerRequestError, TokenizedDocument, capture_server

pytest.importorskip("httpx2", reason="the extra `server` is not installed")

OPTIONS = served.OPTIONS | QUICK | {"concurrency": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.smollm2()[1]


@pytest.fixture(scope="module")
def documents(tokenizer):
    return [tokenizer(text)["input_ids"] for text in served.TEXTS]


@pytest.fixture(scope="module")
def of_vllm(tokenizer, documents, tmp_path_factory):
    """The store that vLLM's own answers make."""
    path = tmp_path_factory.mktemp("vllm")
    with served.ReplayServer(served.RECORDINGS["vllm"]) as server:
        capture_server(server.url, served.MODEL, tokenizer, path, documents=documents, **OPTIONS)
    return path


@pytest.fixture
def sglang():
    with SglangServer() as server:
        yield server


def api_of(client: ServerClient) -> ServerApi:
    """Makes the interface that scores documents at a server of SGLang, with five tokens a position."""
    options = {"top_logprobs": 5, "max_tokens": 1, "temperature": 1.0}
    return ServerApi(client=client, api="sglang", model=served.MODEL, kind="sglang", **options)


class TestScores:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_makes_the_same_rows(self, form, tokenizer, documents, of_vllm, tmp_path) -> None:
        with SglangServer(form) as server:
            report = capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents, **OPTIONS)
        assert (report.documents, report.tokens, report.dropped, report.unmapped_fraction) == (2, 23, 0, 0.0)
        assert_same_documents(tmp_path, of_vllm)
        assert Store(tmp_path).manifest["teacher"]["kind"] == "sglang"

    def test_vllm_without_the_text_of_candidates_makes_the_same_rows(
        self, tokenizer, documents, of_vllm, tmp_path
    ) -> None:
        with served.ReplayServer(served.RECORDINGS["vllm-tokens"]) as server:
            capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents, **OPTIONS)
            paths = [seen["path"] for seen in server.seen]
        assert paths == ["/v1/models", *["/inference/v1/generate"] * 2]
        assert_same_documents(tmp_path, of_vllm)

    @pytest.mark.parametrize(
        "refusal", [(404, {}, "{}"), (403, {}, "no"), (501, {}, ""), (503, {}, ""), (200, {}, "<html>Welcome</html>")]
    )
    def test_vllm_without_that_endpoint_is_asked_for_it_once(
        self, refusal, tokenizer, documents, of_vllm, tmp_path
    ) -> None:
        """A proxy may say in any way that it has nothing at a path."""
        with served.ReplayServer(served.RECORDINGS["vllm"]) as server:
            reply, server.lacks = server.reply, lambda path: False
            server.reply = lambda path, body: refusal if path.startswith("/inference") else reply(path, body)
            options = OPTIONS | {"max_retries": 0}
            capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents, **options)
            paths = [seen["path"] for seen in server.seen]
        assert paths == ["/v1/models", "/inference/v1/generate", "/v1/completions", "/v1/completions"]
        assert_same_documents(tmp_path, of_vllm)

    def test_vllm_with_that_endpoint_is_asked_nowhere_else(self, tokenizer, documents, tmp_path) -> None:
        with served.ReplayServer(served.RECORDINGS["vllm-tokens"]) as server:
            server.faults = [None, None, (400, {}, '{"error": {"message": "too long"}}')]
            with pytest.raises(ServerRequestError, match=r"document 1, 12 tokens of prompt: .*generate .*too long"):
                capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents, **OPTIONS)
            assert [seen["path"] for seen in server.seen] == ["/v1/models", *["/inference/v1/generate"] * 2]

    def test_the_server_is_asked_for_numbers_from_the_first_label_on(
        self, tokenizer, documents, of_vllm, sglang, tmp_path
    ) -> None:
        labels = [7, 9, 10]
        given = [TokenizedDocument(documents[0], positions=labels)]
        capture_server(sglang.url, served.MODEL, tokenizer, tmp_path, documents=given, **OPTIONS)
        (body,) = (seen["body"] for seen in posts(sglang))
        assert (body["logprob_start_len"], body["top_logprobs_num"], body["return_text_in_logprobs"]) == (6, 5, False)
        assert body["return_flat_raw_top_logprobs_b64"]
        document, whole = Store(tmp_path)[0], Store(of_vllm)[0]
        rows = torch.isin(whole.positions, torch.tensor(labels))
        assert document.positions.tolist() == labels
        assert torch.equal(document.teacher.ids, whole.teacher.ids[rows])
        assert torch.equal(document.teacher.logits, whole.teacher.logits[rows])
        assert torch.equal(document.teacher.target_logit, whole.teacher.target_logit[rows])

    def test_the_last_id_of_the_vocabulary_is_written_as_zero(self, tokenizer, documents, of_vllm, tmp_path) -> None:
        with SglangServer(vocab_size=max(documents[0]) + 1) as server:
            capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents[:1], **OPTIONS)
            shown = server.score(documents[0], 0)["meta_info"]["input_token_logprobs"]
        assert 0 in [token for _, token, _ in shown]
        assert torch.equal(Store(tmp_path)[0].teacher.target_logit, Store(of_vllm)[0].teacher.target_logit)

    @pytest.mark.parametrize("place", [0, 4, -1])
    @pytest.mark.parametrize("shown", [0, 49152, 17, -1])
    def test_other_tokens_than_were_sent_are_refused(
        self, place, shown, tokenizer, documents, sglang, tmp_path
    ) -> None:
        assert documents[0][place] not in (shown, max(documents[0]))
        answer = sglang.score(documents[0], 0)
        answer["meta_info"]["input_token_logprobs"][place][1] = shown
        sglang.faults = [None, (200, {}, json.dumps(answer))]
        if place == 0:
            # The first token has no row.
            capture_server(sglang.url, served.MODEL, tokenizer, tmp_path, documents=documents, **OPTIONS)
            return
        with pytest.raises(ServerRequestError, match=rf"scored 'token_id:{shown}' where the document has token"):
            capture_server(sglang.url, served.MODEL, tokenizer, tmp_path, documents=documents, **OPTIONS)

    def test_a_prompt_that_was_cut_is_refused(self, tokenizer, documents, sglang, tmp_path) -> None:
        answer = sglang.score(documents[0], 0)
        answer["meta_info"]["prompt_tokens"] -= 1
        sglang.faults = [None, (200, {}, json.dumps(answer))]
        with pytest.raises(ServerRequestError, match="read 10 tokens where the tokenizer makes 11 tokens"):
            capture_server(sglang.url, served.MODEL, tokenizer, tmp_path, documents=documents, **OPTIONS)

    def test_a_document_beyond_the_context_is_named(self, tokenizer, sglang, tmp_path) -> None:
        with pytest.raises(ServerRequestError, match=r"document 0, 1000 tokens of prompt: .*longer than the model's"):
            capture_server(sglang.url, served.MODEL, tokenizer, tmp_path, documents=[[260] * 1000], **OPTIONS)

    def test_log_probabilities_of_given_ids(self, documents, sglang) -> None:
        with ServerClient(sglang.url) as client:
            answer = api_of(client).score(Request(documents[0], labels=[4, 5], token_ids=[7, 49151]))
        assert answer.start == 4
        assert [position.given.ids.tolist() for position in answer.positions] == [[7, 49151]] * 7
        assert [position.given.logprobs.tolist() for position in answer.positions][:2] == [[-0.25] * 2, [-0.5] * 2]

    def test_a_position_without_entries_has_no_row(self, tokenizer, documents, tmp_path) -> None:
        with SglangServer("triples") as server:
            answer = server.score(documents[0], 0)
            answer["meta_info"]["input_top_logprobs"][4] = None
            server.faults = [None, (200, {}, json.dumps(answer))]
            capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents[:1], **OPTIONS)
        assert Store(tmp_path)[0].positions.tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10]

    def test_unknown_values_are_no_entries(self, tokenizer, documents, tmp_path) -> None:
        """SGLang writes -inf and NaN as null."""
        with SglangServer("triples") as server:
            answer = server.score(documents[0], 0)
            meta = answer["meta_info"]
            meta["input_token_logprobs"][2][0] = None
            dropped = meta["input_top_logprobs"][3][4][1]
            meta["input_top_logprobs"][3][4][0] = None
            server.faults = [None, (200, {}, json.dumps(answer))]
            capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents[:1], **OPTIONS)
        teacher = Store(tmp_path)[0].teacher
        assert math.isnan(teacher.target_logit[1])
        assert torch.isfinite(teacher.target_logit[[0, *range(2, 10)]]).all()
        assert (teacher.ids[2] >= 0).sum() == 4
        assert dropped not in teacher.ids[2].tolist()


class TestUnusableAnswers:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(
        "change",
        [
            lambda meta: meta.clear(),
            lambda meta: meta.pop("finish_reason"),
            lambda meta: meta.update(finish_reason={"type": "abort", "message": "out of memory"}),
            lambda meta: meta.update(prompt_tokens="11"),
            lambda meta: meta.update(input_token_logprobs=None),
            lambda meta: meta["input_token_logprobs"].pop(),
            lambda meta: meta["input_token_logprobs"].append([-1.0, 5, None]),
            lambda meta: meta["input_token_logprobs"][2].pop(),
            lambda meta: meta["input_token_logprobs"][2].__setitem__(0, "-1.0"),
            lambda meta: meta["input_token_logprobs"][2].__setitem__(0, True),
            lambda meta: meta["input_token_logprobs"][2].__setitem__(1, 10**30),
            lambda meta: meta["input_token_logprobs"][2].__setitem__(0, -(10**400)),
        ],
    )
    def test_each_is_asked_for_again(self, change, form, tokenizer, documents, tmp_path) -> None:
        with SglangServer(form) as server:
            answer = server.score(documents[0], 0)
            change(answer["meta_info"])
            server.faults = [None, (200, {}, json.dumps(answer))]
            report = capture_server(server.url, served.MODEL, tokenizer, tmp_path, documents=documents[:1], **OPTIONS)
            assert (report.documents, report.dropped, len(posts(server))) == (1, 0, 2)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("shape", [10]),
            ("shape", [10, 4]),
            ("shape", [9, 5]),
            ("shape", [-10, -5]),
            ("shape", [10.0, 5]),
            ("shape", [2**62, 2**62]),
            ("null_prefix", 0),
            ("null_prefix", 10**9),
            ("null_prefix", None),
            ("val_flat_b64", "AAAA"),
            ("val_flat_b64", "not base64!"),
            ("val_flat_b64", 5),
            ("val_flat_b64_dtype", "int32"),
            ("val_flat_b64_dtype", "bfloat16"),
            ("idx_flat_b64_dtype", "float32"),
            ("idx_flat_b64_dtype", ["int32"]),
            ("idx_flat_b64", None),
        ],
    )
    def test_broken_arrays(self, field, value, documents, sglang) -> None:
        answer = sglang.score(documents[0], 0)
        answer["meta_info"][f"input_top_logprobs_{field}"] = value
        sglang.faults = [(200, {}, json.dumps(answer))]
        unreadable = pytest.raises(UnusableAnswerError, match="must hold a choice with logprobs, but cannot be read")
        with ServerClient(sglang.url, max_retries=0) as client, unreadable:
            api_of(client).score(Request(documents[0]))


class TestGeneration:
    @pytest.mark.parametrize("form", FORMS)
    def test_continuations_are_those_of_vllm(self, form, tokenizer, tmp_path) -> None:
        with served.ReplayServer(served.RECORDINGS["vllm"]) as server:
            capture_server(server.url, served.MODEL, tokenizer, tmp_path / "v", prompts=served.PROMPTS, **OPTIONS)
        with SglangServer(form) as server:
            report = capture_server(
                server.url, served.MODEL, tokenizer, tmp_path / "s", prompts=served.PROMPTS, **OPTIONS
            )
        assert (report.documents, report.dropped, report.generated_tokens) == (3, 0, 36)
        assert Store(tmp_path / "s").manifest["selection"]["api"] == "sglang"
        assert_same_documents(tmp_path / "s", tmp_path / "v")

    def test_openai_interface_is_told_to_keep_the_whole_distribution(self, tokenizer, sglang, tmp_path) -> None:
        with pytest.raises(ServerRequestError):
            capture_server(sglang.url, served.MODEL, tokenizer, tmp_path, prompts=["a"], api="completions", **OPTIONS)
        body = posts(sglang)[0]["body"]
        assert (body["top_k"], body["top_p"], body["min_p"]) == (-1, 1.0, 0.0)


class TestWhichServerItIs:
    @pytest.mark.parametrize(
        ("listing", "info", "kind"),
        [
            ({"data": [{"id": "a", "owned_by": "sglang"}]}, None, "sglang"),
            ({"data": [{"id": "a", "owned_by": "vllm"}]}, INFO, "vllm"),
            (None, INFO, "sglang"),
            (None, {"model_path": "a", "internal_states": []}, "sglang"),
            (None, {"model_path": "a"}, "openai"),
            (None, {"vllm_config": "..."}, "openai"),
            ({"data": [{"id": "a", "owned_by": ["sglang"]}]}, None, "openai"),
            (None, None, "openai"),
        ],
    )
    def test_what_it_says_of_itself(self, listing, info, kind) -> None:
        assert server_kind(listing, info) == kind

    @pytest.mark.parametrize(
        ("owner", "paths"),
        [
            ("sglang", []),
            (None, ["/model_info", "/get_model_info"]),
            ("a-router", ["/model_info", "/get_model_info"]),
        ],
    )
    def test_a_router_in_front_of_it(self, owner, paths) -> None:
        with SglangServer(owner=owner) as server, ServerClient(server.url) as client:
            assert identify(client)[0] == "sglang"
            assert [seen["path"] for seen in server.seen] == ["/v1/models", *paths]

    @pytest.mark.parametrize(("owner", "asked"), [("openai-internal", 0), ("somebody", len(INFO_PATHS))])
    def test_other_servers(self, owner, asked) -> None:
        """A server may refuse what it does not know in any way."""
        with served.ReplayServer(served.RECORDINGS["vllm"]) as server, ServerClient(server.url) as client:
            listing = {"data": [{"id": "a", "owned_by": owner}]}
            server.lacks = lambda path: False
            server.reply = lambda path, _: (200, {}, json.dumps(listing)) if path == "/v1/models" else (403, {}, "no")
            assert identify(client) == ("openai", listing)
            assert len(server.seen) == 1 + asked

    def test_another_model_is_refused(self, tokenizer, documents, sglang, tmp_path) -> None:
        with pytest.raises(ServerRequestError, match=r"has no model 'other'; it serves smollm2, tuned"):
            capture_server(sglang.url, "other", tokenizer, tmp_path, documents=documents, **OPTIONS)
        assert not posts(sglang)

    def test_an_adapter_is_asked_for_by_its_name(self, tokenizer, documents, sglang, tmp_path) -> None:
        capture_server(sglang.url, "tuned", tokenizer, tmp_path, documents=documents[:1], **OPTIONS)
        assert posts(sglang)[0]["body"]["lora_path"] == "tuned"
        assert all("model" not in seen["body"] for seen in posts(sglang))


class TestCapture:
    def test_troubles_retries_and_the_key(self, tokenizer, documents, sglang, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("TEST_KEY", "sk-of-the-tests")
        sglang.faults = [None, (500, {}, "oops"), "disconnect", "cut", (200, {}, "[" * 100_000)]
        report = capture_server(
            sglang.url, served.MODEL, tokenizer, tmp_path, documents=documents, key_env="TEST_KEY", **OPTIONS
        )
        assert (report.documents, len(posts(sglang))) == (2, 6)
        assert {seen["headers"]["Authorization"] for seen in sglang.seen} == {"Bearer sk-of-the-tests"}
        again = capture_server(sglang.url, served.MODEL, tokenizer, tmp_path, documents=documents, **OPTIONS)
        assert (again.documents, again.skipped, len(posts(sglang))) == (0, 2, 6)

    @pytest.mark.parametrize("given", ["documents", "prompts"])
    def test_a_store_that_was_begun_when_it_was_not_known(self, given, tokenizer, documents, tmp_path) -> None:
        """Before SGLang was told apart, its stores had the kind "openai" and the interface "completions"."""
        arguments = {given: {"documents": documents, "prompts": served.PROMPTS}[given]}
        with served.ReplayServer(served.RECORDINGS["vllm"], names_itself=False) as server:
            options = OPTIONS | {"max_unmapped_fraction": 1.0}
            capture_server(server.url, served.MODEL, tokenizer, tmp_path, **arguments, **options)
        before = Store(tmp_path).settings
        assert before.teacher["kind"] == "openai"
        with SglangServer() as server:
            report = capture_server(server.url, served.MODEL, tokenizer, tmp_path, **arguments, **options)
            assert not posts(server)
        assert (report.documents, report.skipped) == (0, len(arguments[given]))
        assert Store(tmp_path).settings == before
        with served.ReplayServer(served.RECORDINGS["llama.cpp"]) as other, pytest.raises(SettingsMismatchError):
            capture_server(other.url, "another", tokenizer, tmp_path, **arguments, **options)

    def test_command_line(self, sglang, tmp_path, capsys, monkeypatch) -> None:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        (tmp_path / "texts.txt").write_text("\n\n".join(served.TEXTS), encoding="utf-8")
        command = f"""capture --server {sglang.url} --model smollm2 --tokenizer smollm2-135m-instruct --top-k 5
            --text {tmp_path}/texts.txt --codec float32 --out {tmp_path}/store""".split()
        assert main(command) == 0
        assert "added 2 documents, 23 tokens" in " ".join(capsys.readouterr().out.split())
