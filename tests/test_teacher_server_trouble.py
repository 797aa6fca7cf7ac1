"""A served teacher in trouble: retries, limits, unusable and empty answers, kills and resumption."""

from __future__ import annotations

import datetime
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support import served, teachers
from support.served_captures import QUICK, assert_same_documents, posts, run
from transformers.utils import chat_template_utils

from slimkernels import SparseLogits
from slimkernels.serving.errors import BudgetSpentError
from slimkernels.store import Store, StoreWriter
from slimkernels.teacher import ServerCost, ServerRequestError, ServerUnavailableError, capture_server

pytest.importorskip("httpx2", reason="the extra `server` is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.smollm2()[1]


@pytest.fixture
def vllm():
    with served.ReplayServer(served.RECORDINGS["vllm"]) as server:
        yield server


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
        assert_same_documents(tmp_path / "calm", tmp_path / "rough")
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
        assert_same_documents(tmp_path / "calm", tmp_path / "rough")
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
        assert_same_documents(tmp_path / "calm", tmp_path / "counted")

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
                together.wait(900)
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

    def test_a_budget_ends_the_capture_and_keeps_the_answers(self, tokenizer, tmp_path, vllm) -> None:
        costs = [len(tokenizer(prompt)["input_ids"]) + served.OPTIONS["max_tokens"] for prompt in served.PROMPTS]
        # A refused request costs nothing, one that was cut off may have cost all of it.
        vllm.faults = [None, (503, {}, "{}"), "cut"]
        options = {"concurrency": 1, "token_budget": 2 * costs[0] + costs[1] + costs[2] - 1}
        spent = rf"token_budget={options['token_budget']} is spent: {2 * costs[0] + costs[1]} tokens were asked for"
        with pytest.raises(BudgetSpentError, match=spent):
            run(vllm, tokenizer, tmp_path, **options)
        assert len(Store(tmp_path)) == 2
        assert run(vllm, tokenizer, tmp_path, token_budget=costs[2]).documents == 1
        assert len(Store(tmp_path)) == 3

    @pytest.mark.parametrize("budget", [0, -1, 2.5, True])
    def test_a_budget_that_is_no_number_of_tokens_is_refused(self, budget, tokenizer, tmp_path, vllm) -> None:
        with pytest.raises(ValueError, match="token_budget must be an int of at least 1"):
            run(vllm, tokenizer, tmp_path, token_budget=budget)
        assert not vllm.seen

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
        deadline = time.monotonic() + 900
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
        assert_same_documents(tmp_path, tmp_path.with_name("whole"))

    def test_a_prompt_used_twice_is_asked_twice(self, tokenizer, tmp_path, vllm) -> None:
        report = run(vllm, tokenizer, tmp_path, prompts=served.PROMPTS[:1], max_retries=0)
        assert report.documents == 1
        # The second of it has another seed, which was not recorded.
        with pytest.raises(ServerRequestError, match=r"never recorded.*'seed': 1"):
            run(vllm, tokenizer, tmp_path, prompts=served.PROMPTS[:1] * 2, max_retries=0)
