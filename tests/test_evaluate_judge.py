"""The judge over real HTTP: the prompt that it gets, one request per output, and outputs that it does not rate."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.evaluation import make_data, make_folder, make_record
from support.served import _Server

from slimkernels.cli import main
from slimkernels.evaluate.judge import Judge, RatedResponse, Rating, rated_response, read_rating
from slimkernels.evaluate.records import read_records
from slimkernels.evaluate.scoring import score
from slimkernels.serving.errors import ServerRequestError, ServerUnavailableError

pytest.importorskip("httpx2", reason="a judge needs the package httpx2")


class JudgeServer(_Server):
    """A server that rates a response by its length, gives "mute" no rating, and refuses "big"."""

    refuses = False

    def reply(self, path, body):
        if path == "/v1/models":
            return 200, {}, json.dumps({"data": []})
        content = body["messages"][0]["content"]
        response = content.rpartition("[Response]\n")[2].strip()
        if self.refuses or "big" in response:
            return 400, {}, json.dumps({"error": {"message": "the context is too long"}})
        said = "I cannot say." if "mute" in response else f"[[99]] is no rating. Its length. [[{len(response) % 10}.5]]"
        return 200, {}, json.dumps({"choices": [{"message": {"content": said}}]})

    @property
    def asked(self):
        return [seen["body"]["messages"][0]["content"] for seen in self.seen if seen["body"]]


@pytest.fixture
def server():
    with JudgeServer() as server:
        yield server


def test_ratings_in_order_and_what_the_judge_is_shown(server):
    with Judge(server.url, "j", concurrency=2) as judge:
        answers = [RatedResponse("Say it.", "it", text) for text in ("x", "mute", "{a}", "big", "xxxx")]
        ratings = list(judge.rate_all(answers))
    assert [rating.value for rating in ratings] == [1.5, None, 3.5, None, 4.5]
    assert "has no rating from 1 to 10" in ratings[1].error
    assert "the context is too long" in ratings[3].error
    assert any("[Instruction]\nSay it.\n\n[Reference]\nit\n\n[Response]\n{a}\n" in asked for asked in server.asked)
    bodies = [seen["body"] for seen in server.seen if seen["body"]]
    assert {(body["model"], body["temperature"]) for body in bodies} == {("j", 0)}
    assert (
        rated_response(make_record(0, "B", "B", task="commonsenseqa", choices=("bank", "mall"))).reference == "(B) mall"
    )


def test_a_judge_that_refuses_everything_is_an_error(server):
    server.refuses = True
    with Judge(server.url, "j", concurrency=1) as judge, pytest.raises(ServerRequestError, match="first 5 outputs"):
        list(judge.rate_all([RatedResponse("a", "b", str(number)) for number in range(50)]))
    assert len(server.asked) < 50


@pytest.mark.parametrize(
    "malformed",
    [
        "{}",
        '{"choices": []}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": [1]}}]}',
        "<p>",
    ],
)
def test_a_judge_is_asked_again_for_a_reply_that_cannot_be_read(malformed, server):
    answers = [RatedResponse("Say it.", "it", text) for text in ("x", "xxx")]
    with Judge(server.url, "j", concurrency=1, backoff_s=0.01, max_retries=2) as judge:
        server.faults = [(200, {}, malformed)] * 2
        assert [rating.value for rating in judge.rate_all(answers)] == [1.5, 3.5]
        # One that stays unreadable does not end the run.
        server.faults = [(200, {}, malformed)] * 3
        unread, read = judge.rate_all(answers)
    assert "no answer can be used" in unread.error
    assert (unread.value, read.value) == (None, 3.5)


def test_a_judge_without_a_text_is_not_asked_again(server):
    with Judge(server.url, "j", backoff_s=0.01) as judge:
        server.faults = [(200, {}, '{"choices": [{"message": {"content": null}}]}')]
        [rating] = judge.rate_all([RatedResponse("Say it.", "it", "x")])
    assert "has no rating" in rating.error
    assert len(server.asked) == 1


def test_a_judge_at_a_wrong_address_is_an_error(server):
    with Judge("http://127.0.0.1:1/v1", "j", backoff_s=0.01) as judge, pytest.raises(ServerUnavailableError):
        judge.check()


def test_a_rating_belongs_to_one_output():
    with Judge("http://127.0.0.1:1/v1", "j") as judge:
        record = make_record(0, "The answer is 1.")
        rated = score(judge.judged(record, Rating(7.0, "[[7]]", None)))
        assert rated.scores == {"flexible": 1.0, "strict": 1.0, "judge j": 7.0}
        assert judge.has_rated(rated)
        changed = score(dataclasses.replace(rated, output="The answer is 2."))
        assert not judge.has_rated(changed)
        assert "judge j" not in changed.scores


@pytest.mark.cpu_kernels
def test_command_line_asks_once_and_marks_what_was_not_rated(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "secret-7")
    out = tmp_path / "out"
    words = ["compare", "--models", str(make_folder(tmp_path / "m")), "--tasks", "gsm8k"]
    words += ["--data", str(make_data(tmp_path / "data"))]
    words += ["--samples", "3", "--shots", "0", "--max-depth", "1", "--max-step-tokens", "3", "--out", str(out)]
    assert main(words) == 0
    (file,) = out.glob("records/*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, output in zip(rows, ("big", "mute", "xxxxx"), strict=True):
        row["output"] = output
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = ["--judge", server.url, "--judge-model", "j", "--judge-key-env", "JUDGE_KEY"]
    assert main([*words, *judge]) == 0
    assert len(server.asked) == 3
    assert {seen["headers"].get("Authorization") for seen in server.seen} == {"Bearer secret-7"}
    # Refused outputs are asked again; outputs with a reply, rated or not, are not.
    assert main(["compare", "--rescore", "--out", str(out), *judge]) == 0
    assert len(server.asked) == 4
    records = read_records(out / "records.jsonl")
    assert [record.scores.get("judge j") for record in records] == [None, None, 5.5]
    page = (out / "report.html").read_text()
    assert f"Judge: j at {server.url}" in page
    assert "Not rated by j: 2 of 3 outputs of m · greedy. The first error: the server refused" in page
    assert "j: not rated, the reply has no rating" in page
    assert "j: 5.5 of 10. [[99]] is no rating." in page
    assert "judge j of 10" in page
    assert '<td class="number">33.3</td>' in page
    # A run without a judge keeps the ratings and the name of their judge.
    assert main(words) == 0
    assert (out / "report.html").read_text() == page
    for path in out.rglob("*"):
        assert path.is_dir() or b"secret-7" not in path.read_bytes()
    for arguments, message in (
        (["--rescore", "--judge", server.url], "--judge URL and --judge-model NAME go together"),
        (["--outputs", "x", *judge], "not those of --outputs"),
        (["--rescore", *judge[:4], "--judge-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY must hold the server's key"),
        (["--rescore", "--judge", "localhost", *judge[2:]], "url must be the base URL"),
    ):
        assert main(["compare", "--out", str(out), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "rating"),
    [
        ("Good. [[8]]", 8),
        ("Good. [[8/10]]", 8),
        ("Good. [[ 8 / 10 ]]", 8),
        ("Good. [[Rating: 8]]", 8),
        ("[[rating 8.5]]", 8.5),
        ("It says `[[10]]`. Rating: **[[8]]**", 8),
        ('The rating is "[[8]]".', 8),
        ('Rating: [[8]]. The response says "[[10]]" of itself.', 8),
        ('The response says "[[10]]" of itself, so [[8]]', 8),
        ("First [[5]], but then [[8]]", 8),
        ("[[99]] is no rating. [[8]]", 8),
        ("[[8/5]]", None),
        ("[[0]]", None),
        ("eight", None),
    ],
)
def test_rating_is_read_from_what_the_judge_says(said, rating):
    assert read_rating(said) == rating
