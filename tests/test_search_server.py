"""The search with a server, by what llama.cpp and vLLM answered: tokens, texts, faults, and interrupts."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time

import numpy as np
import pytest
import torch
from support import served, teachers

from slimkernels.cli import main
from slimkernels.cli.decode import SEARCH_FIELDS
from slimkernels.search import PathFinder, PathFinderConfig, Question, ServerEngine
from slimkernels.search.engines import server_steps
from slimkernels.search.engines.server import trigram_counts
from slimkernels.search.engines.server_steps import StepPart
from slimkernels.serving.errors import ServerRequestError, ServerUnavailableError, UnusableAnswerError

pytest.importorskip("httpx2", reason="the extra `server` is not installed")

CONFIG = PathFinderConfig(**served.SEARCH)
KINDS = ("llama.cpp", "vllm")
QUICK = {"backoff_s": 0.01, "timeout_s": 5.0}


@pytest.fixture(scope="module")
def smollm2():
    return teachers.smollm2()


@pytest.fixture
def server():
    with served.ReplayServer(served.SEARCHES["vllm"]) as replay:
        yield replay


def solve(server, **options):
    engine = ServerEngine(server.url, served.MODEL, **QUICK | options)
    results = PathFinder(engine, CONFIG).solve(served.SEARCHED)
    assert engine._branches == {}
    engine.close()
    return results


def nodes_of(results):
    return [
        (tree.path(node), tree.step_token_ids(node), tree.steps[node], float(tree.sum_logprob[node]))
        for tree in (result.tree for result in results)
        for node in range(1, len(tree))
    ]


def generations(server):
    return [seen["body"] for seen in server.seen if seen["path"].endswith(("/completion", "/completions"))]


@pytest.mark.parametrize("kind", KINDS)
def test_server_nodes_have_the_tokens_texts_and_log_probabilities_of_the_model(kind, smollm2):
    model, tokenizer = smollm2
    with served.ReplayServer(served.SEARCHES[kind]) as server:
        results = solve(server)
    ends = set()
    for prompt, result in zip(served.SEARCHED, results, strict=True):
        prompt_ids, tree = tokenizer(prompt)["input_ids"], result.tree
        for leaf in sorted({*range(1, len(tree))} - {*tree.parent.tolist()}):
            own = tree.token_ids(leaf)
            with torch.inference_mode():
                logits = model(torch.tensor([prompt_ids + own])).logits[0, len(prompt_ids) - 1 : -1]
            exact = logits.log_softmax(-1).gather(-1, torch.tensor(own)[:, None])[:, 0]
            # llama.cpp says nothing of a token that it stops at.
            stops = [kind == "llama.cpp" and "\n" in tokenizer.decode(token) for token in own]
            sums = exact.masked_fill(torch.tensor(stops), 0.0).cumsum(0)
            for node in tree.branch(leaf):
                count = int(tree.num_tokens[node])
                assert tree.text(node) == tokenizer.decode(own[:count], skip_special_tokens=True)
                assert float(tree.sum_logprob[node]) == pytest.approx(sums[count - 1].item(), abs=0.1 * count)
                ends.add(tree.reasons[node] or ("step" if CONFIG.is_step(tree.steps[node]) else "length"))
    assert {"finished", "pruned"} < ends
    assert any(CONFIG.is_step(step) for _, _, step, _ in nodes_of(results))


@pytest.mark.parametrize("kind", KINDS)
def test_server_is_asked_for_whole_depths_with_the_childs_seeds_and_token_ids(kind):
    with served.ReplayServer(served.SEARCHES[kind]) as server:
        results = solve(server)
        asked = generations(server)
    assert all(isinstance(token, int) for body in asked for token in body["prompt"])
    assert all(body["stop"] == ["\n"] for body in asked)
    assert len({(body["seed"], len(body["prompt"])) for body in asked}) == len(asked)
    assert all(0 <= body["seed"] < 2**31 for body in asked)
    # A step that begins with the delimiter takes another request.
    assert len(asked) > sum(result.tree.attempts.sum() for result in results)
    with served.ReplayServer(served.SEARCHES[kind]) as server:
        assert nodes_of(solve(server, concurrency=2)) == nodes_of(results)


@pytest.mark.parametrize("kind", KINDS)
def test_server_of_another_kind_continues_texts_and_is_cut(kind):
    with served.ReplayServer(served.SEARCHES[kind], names_itself=False) as server:
        results = solve(server)
        asked = generations(server)
    prompts = {body["prompt"] for body in asked}
    assert set(served.SEARCHED) < prompts
    for question, result in zip(served.SEARCHED, results, strict=True):
        tree = result.tree
        for node in range(1, len(tree)):
            step = tree.steps[node]
            assert not CONFIG.is_step(step[:-2])
            assert len(tree.step_token_ids(node)) <= CONFIG.max_step_tokens
            if (tree.parent == node).any():
                assert question + tree.text(node) in prompts
    assert any(CONFIG.is_step(step) for _, _, step, _ in nodes_of(results))


def test_server_search_goes_on_from_its_trace(server, tmp_path):
    def traced(name):
        engine = ServerEngine(server.url, served.MODEL, **QUICK)
        before = len(generations(server))
        results = PathFinder(engine, CONFIG).solve(served.SEARCHED, trace=tmp_path / name)
        engine.close()
        return nodes_of(results), len(generations(server)) - before

    expected, requests = traced("whole")
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[: 1 + len(lines) // 2]))
    nodes, again = traced("cut")
    assert nodes == expected
    assert 0 < again < requests


def test_server_identity_tells_how_the_server_is_spoken_to(server):
    identities = []
    for names_itself in (True, False):
        server.names_itself = names_itself
        identities.append(ServerEngine(server.url, served.MODEL, **QUICK).identity())
    assert identities == [{"engine": "server", "model": served.MODEL, "dialect": kind} for kind in ("vllm", "openai")]


def test_decode_asks_a_server(server, tmp_path, capsys):
    expected = solve(server)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": prompt}) + "\n" for prompt in served.SEARCHED))
    flags = [word for name, value in served.SEARCH.items() for word in (SEARCH_FIELDS[name][0], str(value))]
    command = ["decode", "--model", f"{server.url}#{served.MODEL}", "--template", "{question}"]
    command += ["--questions", str(questions), "--answer-pattern", "(?!)", *flags]
    assert main([*command, "--out", str(tmp_path / "out.jsonl")]) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # The old form continues the same file: nothing is left to answer.
    old = ["decode", "--model", served.MODEL, "--server", server.url, *command[3:]]
    old += ["--out", str(tmp_path / "out.jsonl")]
    with pytest.warns(DeprecationWarning, match="--server URL --model NAME is now --model URL#NAME"):
        assert main(old) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(records)
    assert [record["text"] for record in records] == [result.text for result in expected]
    for refused in (["--device", "cuda"], ["--selector", "verifier"]):
        assert main([*command, *refused]) == 2
        assert "a server" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["disconnect", "cut", (500, {}, "{}"), (429, {"Retry-After": "0"}, "{}")])
def test_server_faults_change_nothing(fault, server):
    expected = nodes_of(solve(server))
    server.faults = [None, None, None, fault, fault]
    assert nodes_of(solve(server)) == expected


MALFORMED = (
    "{}",
    '{"choices": []}',
    '{"choices": [{"text": 5, "token_ids": null, "finish_reason": "stop"}]}',
    '{"choices": [{"text": "a", "token_ids": ["a"], "finish_reason": "stop"}]}',
    '{"content": "a", "tokens": null, "stop_type": "word"}',
    '{"tokens": ["a"]}',
    '{"error": {"message": "overloaded"}}',
    "<html>",
)


class _FirstMalformed(served.ReplayServer):
    """Answers every request with an answer that cannot be read, once, and then as the real server."""

    def __init__(self, recording, malformed, **options):
        super().__init__(recording, **options)
        self.malformed, self.known = malformed, set()

    def reply(self, path, body):
        request = json.dumps([path, body])
        if body is not None and request not in self.known:
            self.known.add(request)
            return 200, {}, self.malformed
        return super().reply(path, body)


@pytest.mark.parametrize("malformed", MALFORMED)
@pytest.mark.parametrize("kind", [*KINDS, "openai"])
def test_server_is_asked_again_for_an_answer_that_cannot_be_read(kind, malformed):
    options = {"recording": served.SEARCHES.get(kind, served.SEARCHES["vllm"]), "names_itself": kind != "openai"}
    with served.ReplayServer(**options) as server:
        expected = nodes_of(solve(server))
    with _FirstMalformed(malformed=malformed, **options) as server:
        assert nodes_of(solve(server)) == expected
        assert server.known


@pytest.mark.parametrize("malformed", MALFORMED)
def test_server_whose_answers_all_cannot_be_read_is_an_error_and_leaves_nothing(malformed, server):
    engine = ServerEngine(server.url, served.MODEL, max_retries=1, **QUICK)
    finder = PathFinder(engine, CONFIG)
    finder.plan(served.SEARCHED)
    server.faults = [(200, {}, malformed)] * 40
    with pytest.raises(UnusableAnswerError, match=r"completions was answered 2 times, but no answer can be used"):
        finder.solve(served.SEARCHED)
    assert engine._branches == {}


def test_server_is_asked_again_for_log_probabilities_that_are_missing_once(server):
    expected = nodes_of(solve(server))
    silent = '{"choices": [{"text": "a", "token_ids": [1], "logprobs": null, "finish_reason": "length"}]}'
    server.faults = [None, None, None, (200, {}, silent), (200, {}, silent)]
    assert nodes_of(solve(server)) == expected


def test_server_that_is_down_is_an_error_and_leaves_nothing(server):
    engine = ServerEngine(server.url, served.MODEL, max_retries=1, **QUICK)
    finder = PathFinder(engine, CONFIG)
    finder.plan(served.SEARCHED)
    server.faults = [(503, {}, "{}")] * 40
    with pytest.raises(ServerUnavailableError, match=r"completions failed 2 times, at last with status 503"):
        finder.solve(served.SEARCHED)
    assert engine._branches == {}
    server.faults = []
    assert len(finder.solve(served.SEARCHED)) == 2
    with pytest.raises(ServerUnavailableError, match="ConnectError"):
        ServerEngine("http://127.0.0.1:9", served.MODEL, **QUICK)


def test_server_silence_is_given_up(server):
    engine = ServerEngine(server.url, served.MODEL, max_retries=0, backoff_s=0.01, timeout_s=0.3)
    engine.start(served.SEARCHED)
    server.faults = ["hang"] * 4
    with pytest.raises(ServerUnavailableError, match="ReadTimeout"):
        PathFinder(engine, CONFIG).solve(served.SEARCHED)


def test_server_requests_end_with_an_interrupt(server):
    engine = ServerEngine(server.url, served.MODEL, **QUICK | {"timeout_s": 3600.0})
    finder = PathFinder(engine, CONFIG)
    finder.plan(served.SEARCHED)
    server.faults = ["hang"] * 4
    before = len(server.seen)

    def interrupt():
        while len(server.seen) < before + 4:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        finder.solve(served.SEARCHED)
    assert time.monotonic() - start < 600
    assert engine._branches == {}
    while asyncio.all_tasks(engine._loop):
        assert time.monotonic() - start < 600
        time.sleep(0.01)
    # Nothing is left of them: the same search goes through afterwards.
    assert len(finder.solve(served.SEARCHED)) == 2


class _Silent(served.ReplayServer):
    """Answers as the real server would without log-probabilities."""

    def reply(self, path, body):
        status, headers, data = super().reply(path, body)
        answer = json.loads(data)
        for choice in answer.get("choices", ()):
            choice["logprobs"] = None
        return status, headers, json.dumps(answer)


def test_server_without_log_probabilities_is_refused_or_prunes_at_random():
    with _Silent(served.SEARCHES["vllm"]) as server:
        with pytest.raises(ServerRequestError, match="require_logprobs=False"):
            solve(server)
        # The first depth is what was recorded; what comes after depends on what was kept.
        engine = ServerEngine(server.url, served.MODEL, require_logprobs=False, **QUICK)
        config = PathFinderConfig(**served.SEARCH | {"max_depth": 1})
        results = PathFinder(engine, config).solve(served.SEARCHED)
    assert any("pruning was at random" in note for note in results[0].notes)
    scores = [score for _, _, _, score in nodes_of(results)]
    assert len(set(scores)) == 4
    assert all(score < 0 for score in scores)


def test_server_results_say_how_they_were_judged(server):
    [result, _] = solve(server)
    assert result.checks == ("repetition",)
    assert any("character trigrams" in note for note in result.notes)
    same = trigram_counts("So 3 + 4 = 7\n"), trigram_counts(" so 3 + 4 = 7")
    np.testing.assert_array_equal(*same)
    assert (trigram_counts("Then 7 - 2 = 5") != same[0]).any()


def test_server_prompts_are_checked(server):
    engine = ServerEngine(server.url, served.MODEL, context_length=5, **QUICK)
    with pytest.raises(ValueError, match=r"questions\[0\]: .*fewer than the context of 5"):
        PathFinder(engine).solve(served.SEARCHED)
    server.names_itself = False
    engine = ServerEngine(server.url, served.MODEL, **QUICK)
    with pytest.raises(ValueError, match="must be texts for this server"):
        PathFinder(engine).solve([Question([1, 2, 3])])


def test_server_answers_are_cut_at_tokens_or_characters():
    def whole(text):
        return "\n" in text

    tokens = StepPart("a.\n\nb", [1, 2, 3], [-1.0, -2.0, -3.0], "length", ["a", ".\n\n", "b"])
    assert tokens.cut(whole) == StepPart("a.\n\n", [1, 2], [-1.0, -2.0], "step", ["a", ".\n\n"])
    assert StepPart("a\nbc", [-1, -1], [], "length").cut(whole) == StepPart("a\n", [-1], [], "step")
    assert StepPart("a\nbc", [], [], "length").cut(whole) == StepPart("a\n", [], [], "step")
    ids_alone = StepPart("é\nb", [7, 8, 9], [-1.0], "length")
    assert ids_alone.cut(whole) == ids_alone._replace(end="step")


def vllm_answer(text, pieces, logprobs, reason="\n", token_ids=None):
    """Makes an answer of vLLM, of tokens 1, 2, ... with these texts."""
    choice = {
        "text": text,
        "token_ids": list(range(1, len(pieces) + 1)) if token_ids is None else token_ids,
        "logprobs": {"tokens": pieces, "token_logprobs": logprobs},
        "finish_reason": "stop" if reason else "length",
        "stop_reason": reason,
    }
    return {"choices": [choice]}


def test_server_tokens_past_the_text_are_cut():
    # A server that speculates may name tokens that it drew behind the stop string.
    past = vllm_answer("a.\n", ["a", ".\n", "So", " b"], [-1.0, -2.0, -4.0, -8.0])
    assert server_steps._vllm(past) == StepPart("a.\n", [1, 2], [-1.0, -2.0], "stop", ["a", ".\n"])
    inside = vllm_answer("a.\n", ["a", ".\n\n", "b"], [-1.0, -2.0, -4.0])
    assert server_steps._vllm(inside) == StepPart("a.\n\n", [1, 2], [-1.0, -2.0], "stop", ["a", ".\n\n"])
    longer = vllm_answer("a.", ["a", ".", "b"], [-1.0, -2.0, -4.0], reason=None)
    assert server_steps._vllm(longer) == StepPart("a.", [1, 2], [-1.0, -2.0], "length", ["a", "."])
    unnamed = vllm_answer("a.\n", ["a", ".\n"], [-1.0, -2.0], token_ids=[1, 2, 3, 4])
    assert server_steps._vllm(unnamed) == StepPart("a.\n", [1, 2], [-1.0, -2.0], "stop", ["a", ".\n"])
    entries = [{"token": piece, "logprob": -1.0} for piece in ("a", ".\n", "So")]
    content = {"content": "a.", "tokens": [1, 2, 3], "completion_probabilities": entries}
    content |= {"stop_type": "word", "stopping_word": "\n"}
    assert server_steps._llama_cpp(content, "So") == StepPart("a.\n", [1, 2], [-1.0, -1.0], "stop", ["a", ".\n"])


@pytest.mark.parametrize("reason", ["\n", None])
def test_server_answer_with_more_log_probabilities_than_tokens_is_refused(reason):
    content = vllm_answer("\ufffd\n", ["\ufffd", "\ufffd", "\n"], [-1.0, -2.0, -4.0], reason, token_ids=[1, 2])
    with pytest.raises(ValueError, match="3 log-probabilities of 2 tokens"):
        server_steps._vllm(content)


def test_server_steps_come_from_sglang_as_texts():
    """SGLang is told apart for its scores; a search asks it through OpenAI's interface."""

    class Client:
        async def get(self, path):
            return {"data": [{"id": "model", "owned_by": "sglang", "max_model_len": 77}]}

    dialect = asyncio.run(server_steps.dialect_of(Client(), "model"))
    assert (dialect.kind, dialect.takes_token_ids, dialect.context_length) == ("openai", False, 77)
