"""A served teacher, by what llama.cpp and vLLM said: tokens, mass, retries, limits, resumption and keys."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support import served, teachers
from transformers.utils import chat_template_utils

from slimkernels import SparseLogits, slim_loss, sparse_softmax
from slimkernels.cli import main
from slimkernels.serving.client import ServerClient
from slimkernels.store import Store, StoreWriter
from slimkernels.store.errors import SettingsMismatchError
from slimkernels.teacher import (
    ServerCost,
    ServerReport,
    ServerRequestError,
    ServerUnavailableError,
    UnmappedTokensError,
    capture_server,
)

pytest.importorskip("httpx2", reason="the extra `server` is not installed")

KEY = "sk-the-key-of-the-tests"
# What the options of served.OPTIONS leave to a test.
QUICK = {"backoff_s": 0.01, "timeout_s": 5.0}


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


def run(server, tokenizer, path, name=None, kind="vllm", **options) -> ServerReport:
    recorded = {entry[0]: entry[2] for entry in served.captures(kind, tokenizer)}[name or "generated"]
    return capture_server(server.url, served.MODEL, tokenizer, path, **served.OPTIONS | recorded | QUICK | options)


def posts(server) -> list[dict]:
    return [seen for seen in server.seen if seen["body"] is not None]


def same_documents(left: Path, right: Path) -> bool:
    stores = Store(left), Store(right)
    return len(stores[0]) == len(stores[1]) and all(
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.positions, b.positions)
        and torch.equal(a.teacher.logits, b.teacher.logits)
        for a, b in zip(*stores, strict=True)
    )


# Answers with a good status that cannot be used.
UNUSABLE = [
    (200, {"Content-Type": "text/html"}, "<html>Bad gateway</html>"),
    (200, {}, ""),
    (200, {}, '{"error": {"message": "upstream timed out", "code": 502}}'),
    (200, {}, '{"error": "overloaded"}'),
    (200, {}, '{"choices": []}'),
    (200, {}, '{"choices": [{"text": "a", "logprobs": null}]}'),
    (200, {}, '{"choices": null}'),
    (200, {}, "[]"),
    (200, {}, '{"choices": [{"text": "a b", "logprobs": {"content": [{"token": "a", "logprob": -1.0}]}}]}'),
    (
        200,
        {},
        '{"choices": [{"text": "a b", "logprobs": {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": []}}]}',
    ),
]


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
        assert torch.allclose(tail + teacher.logits.exp().masked_fill(~kept, 0.0).sum(-1), torch.ones(9))

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


def assert_close_to_local(document, model) -> None:
    """The server computes in 4 bits (llama.cpp) or bfloat16 (vLLM): means are off by up to 0.11 nats."""
    with torch.inference_mode():
        local = model(document.input_ids[None]).logits[0].log_softmax(-1)[document.positions - 1]
    teacher, labels = document.teacher, document.input_ids[document.positions]
    kept = teacher.ids >= 0
    expected = local.gather(-1, teacher.ids.clamp(min=0).long())
    assert (expected - teacher.logits)[kept].abs().mean() < 0.2
    assert (expected.exp() - teacher.logits.exp())[kept].abs().max() < 0.15
    assert (local.gather(-1, labels[:, None])[:, 0] - teacher.target_logit).abs().mean() < 0.3
    # The kept entries are the most probable ones, and what is missing to 1 is the mass of all others.
    mass = teacher.logits.exp().masked_fill(~kept, 0.0).sum(-1)
    most = torch.stack(
        [row.topk(int(count)).values.exp().sum() for row, count in zip(local, kept.sum(-1), strict=True)]
    )
    assert (mass - most)[kept.all(-1)].abs().max() < 0.15


def test_a_row_in_the_wrong_place_is_noticed(smollm2, tmp_path, llamacpp) -> None:
    run(llamacpp, smollm2[1], tmp_path, kind="llama.cpp")
    for document in Store(tmp_path):
        with pytest.raises(AssertionError):
            assert_close_to_local(dataclasses.replace(document, positions=document.positions - 1), smollm2[0])


class TestTroubledServers:
    BUSY = (429, {"Retry-After": "0.3"}, '{"error": {"message": "slow down"}}')
    BROKEN = (500, {}, "<html>oops</html>")

    def test_every_temporary_trouble_ends_in_the_same_store(self, tokenizer, tmp_path, vllm) -> None:
        run(vllm, tokenizer, tmp_path / "calm")
        vllm.seen.clear()
        # The first answer is that to GET /models.
        vllm.faults = [None, self.BUSY, self.BROKEN, "disconnect", "cut", "hang", (503, {}, "")]
        report = run(vllm, tokenizer, tmp_path / "rough", concurrency=1, timeout_s=1.0)
        assert report.documents == 3
        assert same_documents(tmp_path / "calm", tmp_path / "rough")
        attempts = [seen["body"]["seed"] for seen in posts(vllm)]
        assert attempts == [0] * 7 + [1, 2]
        times = [seen["at"] for seen in posts(vllm)]
        assert times[1] - times[0] >= 0.3

    def test_retry_after_holds_back_everyone(self, tokenizer, tmp_path, vllm) -> None:
        vllm.faults = [None, self.BUSY]
        run(vllm, tokenizer, tmp_path, concurrency=1, num_documents=2)
        first, *later = [seen["at"] for seen in posts(vllm)]
        assert len(later) == 2
        assert min(later) - first >= 0.3

    def test_retry_after_may_be_a_date_and_backoff_grows(self, tokenizer, tmp_path, vllm) -> None:
        now, begin = time.time(), time.monotonic()
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(now + 3))
        vllm.faults = [None, (429, {"Retry-After": date}, "{}"), *[self.BROKEN] * 3]
        run(vllm, tokenizer, tmp_path, num_documents=1, backoff_s=0.2)
        times = [seen["at"] for seen in posts(vllm)]
        # The date has whole seconds. A slow machine asks later, never earlier.
        assert times[1] - begin >= int(now + 3) - now - 0.05
        waits = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
        for attempt, wait in enumerate(waits, 1):
            assert wait >= 0.5 * 0.2 * 2**attempt

    def test_giving_up_keeps_what_was_answered(self, tokenizer, tmp_path, vllm) -> None:
        vllm.faults = [None, None, *[self.BROKEN] * 3]
        with pytest.raises(ServerUnavailableError, match=r"failed 3 times, at last with status 500: <html>oops"):
            run(vllm, tokenizer, tmp_path, concurrency=1, max_retries=2)
        assert len(Store(tmp_path)) == 1
        vllm.faults.clear()
        vllm.seen.clear()
        costs: list[ServerCost] = []
        report = run(vllm, tokenizer, tmp_path, announce=costs.append)
        assert (report.documents, report.skipped) == (2, 1)
        assert costs == [ServerCost(2, 4 + 3, 24)]
        assert sorted(seen["body"]["seed"] for seen in posts(vllm)) == [1, 2]

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ((400, {}, '{"error": {"message": "logprobs above 5"}}'), "with status 400: logprobs above 5"),
            ((401, {}, '{"error": "bad key"}'), "bad key; keys are read from the environment: OPENAI_API_KEY, or"),
            ((429, {}, '{"error": {"code": "insufficient_quota", "message": "pay"}}'), "status 429: pay"),
            ((200, {}, '{"error": {"code": 400, "message": "too long"}}'), "with status 400: too long"),
            ((200, {}, '{"error": {"code": "insufficient_quota", "message": "pay"}}'), "status 402: pay"),
            ((307, {"Location": "http://elsewhere"}, ""), "status 307"),
        ],
    )
    def test_what_waiting_does_not_help_is_said_at_once(self, fault, message, tokenizer, tmp_path, vllm) -> None:
        vllm.faults = [None, fault]
        with pytest.raises(ServerRequestError, match=f"document 0, 5 tokens of prompt: .*{message}"):
            run(vllm, tokenizer, tmp_path, concurrency=1)
        assert len(posts(vllm)) == 1

    def test_an_answer_that_cannot_be_used_is_asked_for_again(self, tokenizer, tmp_path, vllm) -> None:
        run(vllm, tokenizer, tmp_path / "calm")
        vllm.seen.clear()
        vllm.faults = [None, *UNUSABLE[:6]]
        report = run(vllm, tokenizer, tmp_path / "rough", concurrency=1)
        assert (report.documents, report.dropped, report.drop_reasons) == (3, 0, ())
        assert same_documents(tmp_path / "calm", tmp_path / "rough")
        assert [seen["body"]["seed"] for seen in posts(vllm)] == [0] * 7 + [1, 2]

    @pytest.mark.parametrize("fault", UNUSABLE)
    def test_one_answer_that_stays_unusable_does_not_end_the_run(self, fault, tokenizer, tmp_path, vllm) -> None:
        vllm.faults = [None, None, *[fault] * 3]
        report = run(vllm, tokenizer, tmp_path, concurrency=1, max_retries=2)
        assert (report.documents, report.dropped) == (2, 1)
        (reason,) = report.drop_reasons
        assert "document 1, 4 tokens of prompt: POST" in reason
        assert "was answered 3 times, but no answer can be used" in reason
        vllm.seen.clear()
        assert run(vllm, tokenizer, tmp_path)[:4] == (1, 16, 2, 0)
        assert [seen["body"]["seed"] for seen in posts(vllm)] == [1]

    def test_a_server_whose_answers_are_never_usable_ends_the_run(self, tokenizer, tmp_path, vllm) -> None:
        vllm.faults = [None, *[(200, {}, '{"choices": [{"text": "a", "logprobs": null}]}')] * 3]
        with pytest.raises(ServerRequestError, match=r"a text without logprobs.*does this server give logprobs"):
            run(vllm, tokenizer, tmp_path / "a", concurrency=1, max_retries=0)
        vllm.faults = [None, None, *[(200, {"Content-Type": "text/html"}, "<p>hello")] * 8]
        with pytest.raises(ServerRequestError, match="must answer with a JSON object, got text/html '<p>hello'"):
            run(vllm, tokenizer, tmp_path / "b", concurrency=1, max_retries=0, num_documents=12)
        assert len(Store(tmp_path / "b")) == 1

    @pytest.mark.parametrize(
        "choice",
        [
            {"message": {"content": ""}, "logprobs": {"content": None}, "finish_reason": "stop"},
            {"message": {"content": ""}, "logprobs": {"content": []}, "finish_reason": "content_filter"},
            {"message": {"content": None, "tool_calls": []}, "logprobs": None, "finish_reason": "tool_calls"},
            {"text": "", "logprobs": {"tokens": [], "token_logprobs": [], "top_logprobs": []}, "finish_reason": "stop"},
            {"text": "", "logprobs": None, "finish_reason": "stop"},
        ],
    )
    @pytest.mark.parametrize("usage", [{"completion_tokens": 0}, {"completion_tokens": 1}, None])
    def test_an_empty_answer_is_counted_and_asked_for_again_by_the_next_call(
        self, usage, choice, tokenizer, tmp_path, vllm
    ) -> None:
        answer = json.dumps({"choices": [choice]} | ({"usage": usage} if usage else {}))
        vllm.faults = [None, (200, {}, answer)]
        report = run(vllm, tokenizer, tmp_path, concurrency=1)
        assert (report.documents, report.skipped, report.dropped) == (2, 0, 1)
        assert report.drop_reasons == (f"an answer is empty (finish reason {choice['finish_reason']!r})",)
        assert all(len(document.positions) for document in Store(tmp_path))
        vllm.seen.clear()
        assert run(vllm, tokenizer, tmp_path)[:4] == (1, 17, 2, 0)
        assert [seen["body"]["seed"] for seen in posts(vllm)] == [0]

    def test_an_empty_answer_that_an_earlier_release_stored_is_asked_for_again(self, tokenizer, tmp_path, vllm) -> None:
        run(vllm, tokenizer, tmp_path, num_documents=1)
        settings = {name: Store(tmp_path).manifest[name] for name in ("teacher", "selection", "codec", "vocab_size")}
        with StoreWriter(tmp_path, tokenizer_fingerprint=Store(tmp_path).tokenizer_fingerprint, **settings) as writer:
            empty = SparseLogits(torch.zeros((0, 5), dtype=torch.int32), torch.zeros(0, 5), torch.zeros(0, 1))
            writer.add(tokenizer(served.PROMPTS[1])["input_ids"], [], empty)
        assert run(vllm, tokenizer, tmp_path).documents == 2

    @pytest.mark.parametrize("finish", ["stop", None])
    def test_an_end_of_text_that_is_counted_but_not_listed(self, finish, tokenizer, tmp_path) -> None:
        with served.ReplayServer(served.RECORDINGS["llama.cpp"], names_itself=False) as server:
            run(server, tokenizer, tmp_path / "calm", "generated_as_openai", "llama.cpp")
            reply = server.reply

            def counted(path, body):
                status, headers, answer = reply(path, body)
                if body is not None:
                    content = json.loads(answer)
                    content["usage"]["completion_tokens"] += 1
                    content["choices"][0]["finish_reason"] = finish
                    answer = json.dumps(content)
                return status, headers, answer

            server.reply = counted
            report = run(server, tokenizer, tmp_path / "counted", "generated_as_openai", "llama.cpp")
        assert (report.documents, report.dropped, report.unmapped_fraction) == (3, 0, 0.0)
        assert same_documents(tmp_path / "calm", tmp_path / "counted")

    def test_a_chat_whose_template_shows_the_date_is_not_asked_for_again_tomorrow(self, tmp_path, monkeypatch) -> None:
        tokenizer = teachers.make_tokenizer()
        tokenizer.chat_template = (
            "Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}\n> {% endif %}"
        )
        entry = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}
        choice = {"message": {"content": "a"}, "logprobs": {"content": [entry]}, "finish_reason": "length"}
        prompts = ["Who?", "Why?"]
        for day, expected in (((2026, 5, 1), (2, 0)), ((2026, 12, 24), (0, 2))):

            class Day(datetime.datetime):
                on = day

                @classmethod
                def now(cls, tz=None):
                    return cls(*cls.on)

            monkeypatch.setattr(chat_template_utils, "datetime", Day)
            with served.ReplayServer(served.RECORDINGS["vllm"]) as server:
                server.reply = lambda path, body: (200, {}, json.dumps({"choices": [choice]}))
                options = {"prompts": prompts, "api": "chat", "max_tokens": 1, "top_logprobs": 1} | QUICK
                report = capture_server(server.url, "any", tokenizer, tmp_path, **options)
            assert (report.documents, report.skipped) == expected
        assert "01 May 2026" in tokenizer.decode(Store(tmp_path)[0].input_ids)

    def test_the_length_of_the_prompt_is_stored(self, tokenizer, tmp_path, vllm) -> None:
        run(vllm, tokenizer, tmp_path)
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in served.PROMPTS]
        assert [document.prompt_length for document in Store(tmp_path)] == lengths

    def test_a_wait_of_hours_is_said(self, tokenizer, tmp_path, vllm) -> None:
        vllm.faults = [None, (429, {"Retry-After": "86400"}, "{}")]
        with pytest.raises(ServerUnavailableError, match="it asks to wait 86400 s"):
            run(vllm, tokenizer, tmp_path, num_documents=1)

    def test_nobody_there(self, tokenizer, tmp_path) -> None:
        with served.ReplayServer(served.RECORDINGS["vllm"]) as server:
            pass
        with pytest.raises(ServerUnavailableError, match=r"GET .*/models failed 2 times, at last with ConnectError"):
            run(server, tokenizer, tmp_path)
        assert not tmp_path.joinpath("manifest.json").exists()

    def test_requests_are_side_by_side_up_to_the_limit(self, tokenizer, tmp_path, vllm, monkeypatch) -> None:
        together = threading.Barrier(3)
        reply, running, most = vllm.reply, [], []

        def slow(path, body):
            if body is not None:
                running.append(1)
                most.append(len(running))
                # Broken, and an error, unless three are under way at the same time.
                together.wait(10)
                running.pop()
            return reply(path, body)

        monkeypatch.setattr(vllm, "reply", slow)
        run(vllm, tokenizer, tmp_path, concurrency=3)
        assert max(most) == 3

    def test_one_at_a_time(self, tokenizer, tmp_path, vllm, monkeypatch) -> None:
        running, most = [], []
        reply = vllm.reply

        def counted(path, body):
            running.append(1)
            most.append(len(running))
            time.sleep(0.05)
            running.pop()
            return reply(path, body)

        monkeypatch.setattr(vllm, "reply", counted)
        run(vllm, tokenizer, tmp_path, concurrency=1)
        assert max(most) == 1

    def test_requests_per_minute(self, tokenizer, tmp_path, vllm) -> None:
        begin = time.monotonic()
        run(vllm, tokenizer, tmp_path, requests_per_minute=300, concurrency=3)
        times = sorted(seen["at"] for seen in vllm.seen)
        assert len(times) == 4
        # A slow machine makes requests arrive later, never earlier.
        assert all(at - begin >= 0.2 * number for number, at in enumerate(times))

    def test_a_killed_capture_asks_only_for_the_rest(self, tokenizer, tmp_path, vllm) -> None:
        """SIGKILL while the second answer is awaited: the first is in the store, and never asked for again."""
        code = f"""if True:
            import sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            from support import served, teachers
            from slimkernels.teacher import capture_server, load_tokenizer
            capture_server(
                {vllm.url!r}, served.MODEL, load_tokenizer("smollm2-135m-instruct"), {str(tmp_path)!r},
                prompts=served.PROMPTS, concurrency=1, flush_s=0.0, **served.OPTIONS,
            )
        """
        vllm.faults = [None, None, "hang"]
        process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
        deadline = time.monotonic() + 60
        # The second question may be on its way before the first answer is written.
        while len(posts(vllm)) < 2 or not len(Store(tmp_path)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(Store(tmp_path)) == 1
        vllm.seen.clear()
        report = run(vllm, tokenizer, tmp_path)
        assert (report.documents, report.skipped) == (2, 1)
        assert sorted(seen["body"]["seed"] for seen in posts(vllm)) == [1, 2]
        run(vllm, tokenizer, tmp_path.with_name("whole"))
        assert same_documents(tmp_path, tmp_path.with_name("whole"))

    def test_a_prompt_used_twice_is_asked_twice(self, tokenizer, tmp_path, vllm) -> None:
        report = run(vllm, tokenizer, tmp_path, prompts=served.PROMPTS[:1], max_retries=0)
        assert report.documents == 1
        # The second of it has another seed, which was not recorded.
        with pytest.raises(ServerRequestError, match=r"never recorded.*'seed': 1"):
            run(vllm, tokenizer, tmp_path, prompts=served.PROMPTS[:1] * 2, max_retries=0)


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
            ({"temperature": math.nan}, r"temperature must be in \[0, inf\]"),
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
