"""Rows from the answers of servers: the same as code that reads them entry by entry makes, for hostile answers too."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import math
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import served, teachers
from support.served_sglang import FORMS, SglangServer

from slimkernels.served_rows import arrays, llamacpp, openai, sglang, vllm
from slimkernels.served_rows.answers import Options, Position, Request
from slimkernels.served_rows.rows import AnswerReader, DroppedAnswer
from slimkernels.served_rows.tokens import NumberedTokens, ServerToken, TokenMap
from slimkernels.serving.errors import ServerRequestError

URL = "http://localhost/v1"
Entries = list[tuple[int, float | None]]


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.smollm2()[1]


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return TokenMap(tokenizer, len(tokenizer))


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer(served.TEXTS[0])["input_ids"]


def options(kind: str = "sglang", top_logprobs: int = 5) -> Options:
    return Options(model=served.MODEL, kind=kind, top_logprobs=top_logprobs, max_tokens=12, temperature=1.0)


def reader(tokens: TokenMap, top_logprobs: int = 5) -> AnswerReader:
    server = SimpleNamespace(client=SimpleNamespace(url=URL), model=served.MODEL, top_logprobs=top_logprobs)
    return AnswerReader(server, tokens, 1.0)


def expected_row(chosen: int, entries: Entries, top_logprobs: int, vocab_size: int) -> dict[int, float]:
    """Makes a row entry by entry, as its definition says."""
    known = [(token, -math.inf if value is None or math.isnan(value) else value) for token, value in entries]
    most = sorted(known, key=lambda entry: (-entry[1], entry[0] == chosen))[:top_logprobs]
    row: dict[int, float] = {}
    for token, value in most:
        if value > -1000 and 0 <= token < vocab_size:
            row[token] = max(value, row.get(token, -math.inf))
    return row


def row_of(tokens: TokenMap, position: Position, top_logprobs: int) -> dict[int, float]:
    ids, logprobs = reader(tokens, top_logprobs)._row(position)
    assert ids.tolist() == sorted(ids.tolist())
    return dict(zip(ids.tolist(), logprobs.tolist(), strict=True))


def numbered(entries: Entries) -> NumberedTokens:
    return NumberedTokens(arrays.integers(entry[0] for entry in entries), arrays.floats(entry[1] for entry in entries))


class TestRows:
    @pytest.mark.parametrize(
        ("chosen", "entries", "row"),
        [
            # The token of the text comes first and is one more than was asked for.
            (9, [(9, -8.0), (1, -1.0), (2, -2.0), (3, -3.0)], {1, 2, 3}),
            (9, [(9, -1.5), (1, -1.0), (2, -2.0), (3, -3.0)], {9, 1, 2}),
            (2, [(2, -2.0), (1, -1.0), (3, -3.0)], {1, 2, 3}),
            # It is as probable as the last of the most probable, and the server's choice among them counts.
            (9, [(9, -3.0), (1, -1.0), (2, -2.0), (3, -3.0)], {1, 2, 3}),
            (9, [(1, -1.0), (2, -2.0), (3, -3.0), (9, -3.0)], {1, 2, 3}),
            # One of the most probable has no id; the token of the text does not take its place.
            (9, [(9, -8.0), (1, -1.0), (60000, -2.0), (3, -3.0)], {1, 3}),
            (9, [(9, -8.0), (1, -1.0), (-1, -2.0), (3, -3.0)], {1, 3}),
            (9, [(9, None), (1, -1.0), (2, None), (3, -math.inf)], {1}),
            (9, [(9, math.nan), (1, -9999.0), (2, -3.4e38)], set()),
            (9, [(1, -2.0), (1, -1.5), (2, -3.0)], {1, 2}),
            (9, [], set()),
        ],
    )
    def test_by_hand(self, chosen, entries, row, tokens) -> None:
        position = Position(ServerToken(f"token_id:{chosen}", -8.0, None, chosen), numbered(entries))
        found = row_of(tokens, position, 3)
        assert set(found) == row
        assert found == expected_row(chosen, entries, 3, tokens.vocab_size)

    def test_random_rows_are_those_of_their_definition(self, tokens) -> None:
        draw = random.Random(0)
        for _ in range(300):
            count, top_logprobs = draw.randrange(12), draw.randrange(1, 8)
            values = [draw.choice([-2.5, -3.0, -4.0, None, -math.inf, draw.uniform(-12, -2.5)]) for _ in range(count)]
            entries = [(draw.choice([draw.randrange(9), 49151, 49152, -5]), value) for value in values]
            chosen = draw.choice([7, *[token for token, _ in entries]])
            position = Position(ServerToken(f"token_id:{chosen}", -3.0, None, chosen), numbered(entries))
            expected = expected_row(chosen, entries, top_logprobs, tokens.vocab_size)
            assert row_of(tokens, position, top_logprobs) == expected
            named = [ServerToken.named(f"token_id:{token}", value) for token, value in entries if token >= 0]
            if len(named) == count:
                assert row_of(tokens, position._replace(top=named), top_logprobs) == expected

    def test_text_and_ids_make_the_same_row(self, tokenizer, tokens) -> None:
        words = [" Paris", " the", " London", " a", " Lyon", "."]
        found = [tokenizer.convert_tokens_to_ids(word.replace(" ", "Ġ")) for word in words]
        values = [-1.0, -2.0, -3.0, -3.0, -4.0, -9.0]
        text = Position(ServerToken(".", -9.0), [ServerToken(w, v) for w, v in zip(words, values, strict=True)])
        by_id = Position(
            ServerToken(f"token_id:{found[-1]}", -9.0, None, found[-1]), numbered(list(zip(found, values, strict=True)))
        )
        assert row_of(tokens, text, 5) == row_of(tokens, by_id, 5) == dict(zip(found[:5], values, strict=False))

    @pytest.mark.parametrize("values", [[-0.1, -0.2], [0.5, -9.0], [5.0, 3.0], [math.inf, -1.0], [800.0, -1.0]])
    def test_what_are_no_log_probabilities(self, values, tokens) -> None:
        position = Position(ServerToken("", -1.0), numbered(list(enumerate(values))))
        with pytest.raises(ServerRequestError, match="at most 1 is possible"):
            row_of(tokens, position, 5)

    def test_the_token_of_the_text_must_have_a_log_probability_too(self, tokens) -> None:
        with pytest.raises(ServerRequestError, match=r"a probability of 2\.718 together"):
            row_of(tokens, Position(ServerToken("", 0.99999), numbered([(1, -1.0)])), 5)

    def test_a_tokenizer_of_other_bytes_is_counted(self, tokens, tokenizer) -> None:
        the, end = (tokenizer.convert_tokens_to_ids(name) for name in ("Ġthe", "<|im_end|>"))
        top = NumberedTokens(np.array([the, the + 1, end, 70000]), np.full(4, -3.0), [b" the", b"other", b"", b"?"])
        seen, unmapped = tokens.seen, tokens.unmapped
        assert tokens.have_ids(top).tolist() == [True, False, True, False]
        assert (tokens.seen - seen, tokens.unmapped - unmapped) == (4, 2)


class TestArrays:
    @pytest.mark.parametrize("values", [["1"], [True], [[1.0]], [{}], [10**400], [1.0, "x"]])
    def test_what_is_no_number(self, values) -> None:
        with pytest.raises(ValueError, match="log-probability"):
            arrays.floats(values)

    @pytest.mark.parametrize("values", [["1"], [True], [1.0], [None], [2**63], [1, []]])
    def test_what_is_no_id(self, values) -> None:
        with pytest.raises(ValueError, match="token id"):
            arrays.integers(values)

    def test_encoded_arrays(self) -> None:
        text = base64.b64encode(b"\x00\x00\xa0\x7f" + np.array([-0.1, -np.inf, -2.5], "<f4").tobytes()).decode()
        found = arrays.decoded(text, "float32", (2, 2))
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, [[np.nan, np.float32(-0.1)], [-np.inf, -2.5]])
        assert arrays.decoded("BQAAAP////8=", "int32", (1, 2)).tolist() == [[5, -1]]

    @pytest.mark.parametrize(
        ("names", "ids"),
        [
            (["token_id:5", "token_id:49151"], [5, 49151]),
            ([], []),
            (["token_id:5", "the"], None),
            (["token_id:"], None),
            (["token_id:-5"], None),
            (["5token_id:"], None),
            (["token_id:5\ntoken_id:6"], None),
            (["token_id:5token_id:6", "7"], None),
            (["token_id:5\n"], None),
            (["token_id:٣"], None),
            (["token_id: 5"], None),
            (["token_id:1_0"], None),
            (["token_id:" + "9" * 30], None),
            (["token_id:" + "9" * 9999], None),
        ],
    )
    def test_ids_in_names(self, names, ids) -> None:
        found = arrays.named_ids(names)
        assert (None if found is None else found.tolist()) == ids
        if names != ["5token_id:"]:
            digits = [name.replace("token_id:", "", 1) for name in names]
            same = arrays.named_ids(digits, prefix="")
            assert ids is None or (same is not None and same.tolist() == ids)


def forms_of_scores(ids: list[int]) -> dict[str, tuple[dict[str, Any], Any]]:
    """Returns an answer of every kind of server that scores text, and the function that reads it."""
    found = {}
    for form in FORMS:
        server = SglangServer(form)
        found[form] = server.score(ids, 0), sglang.scores(options(), Request(ids), URL).read
        server.server_close()
    for kind, call in (("vllm", vllm.scores), ("vllm-tokens", vllm.scores_without_text)):
        for line in served.RECORDINGS[kind].read_text(encoding="utf-8").splitlines():
            exchange = json.loads(line)
            request = exchange["request"] or {}
            if ids in (request.get("prompt"), request.get("token_ids")) and "echo" not in request:
                found[kind] = json.loads(exchange["answer"]), call(options("vllm"), Request(ids), URL).read
    return found


def slowly_read(kind: str, content: Any) -> list[tuple[int, float | None, Entries]]:
    """Reads the id and log-probability of the token of the text and of the others at every position but the first."""
    if kind.startswith("vllm"):
        positions = (content if kind == "vllm-tokens" else content["choices"][0])["prompt_logprobs"]
        found = []
        for position in positions[1:]:
            entries = [(int(token), entry["logprob"]) for token, entry in (position or {}).items()]
            found.append((*(entries[0] if entries else (-1, None)), entries))
        return found
    meta = content["meta_info"]
    rows: list[Entries]
    if kind == "triples":
        rows = [[(token, value) for value, token, _ in row or ()] for row in meta["input_top_logprobs"]]
    else:
        if kind == "flat":
            values, numbers = meta["input_top_logprobs_val_flat"], meta["input_top_logprobs_idx_flat"]
        else:
            kinds = [np.dtype(meta[f"input_top_logprobs_{name}_flat_b64_dtype"]) for name in ("val", "idx")]
            texts = [meta[f"input_top_logprobs_{name}_flat_b64"] for name in ("val", "idx")]
            values, numbers = (
                np.frombuffer(base64.b64decode(t), k).tolist() for t, k in zip(texts, kinds, strict=True)
            )
        width = meta["input_top_logprobs_shape"][1]
        pairs = list(zip(numbers, values, strict=True))
        rows = [[]] * meta["input_top_logprobs_null_prefix"]
        rows += [pairs[at : at + width] for at in range(0, len(pairs), width)] if width else []
    tokens = meta["input_token_logprobs"]
    return [(token, value, row) for (value, token, _), row in zip(tokens[1:], rows[1:], strict=True)]


KINDS = [*FORMS, "vllm", "vllm-tokens"]


class TestScoredAnswers:
    def test_all_kinds_of_servers_give_the_same_document(self, ids, tokens) -> None:
        found = {}
        for kind, (content, read) in forms_of_scores(ids).items():
            document = reader(tokens).scored(Request(ids), read(content))
            assert not isinstance(document, DroppedAnswer)
            found[kind] = document
        first = found.pop("vllm")
        assert set(found) == {*FORMS, "vllm-tokens"}
        for document in found.values():
            assert (document.input_ids, document.positions) == (first.input_ids, first.positions)
            for name in ("ids", "logits", "lse", "target_logit"):
                assert torch.equal(getattr(document.teacher, name), getattr(first.teacher, name))

    @pytest.mark.parametrize("kind", KINDS)
    def test_an_answer_that_was_changed_makes_the_rows_that_it_says_or_an_error(self, kind, ids, tokens) -> None:
        content, read = forms_of_scores(ids)[kind]
        draw = random.Random(kind)
        errors = rows = 0
        for _ in range(1500):
            changed = mutated(content, draw)
            try:
                document = reader(tokens).scored(Request(ids), read(changed))
            except ServerRequestError:
                errors += 1
                continue
            if isinstance(document, DroppedAnswer):
                continue
            rows += 1
            said = slowly_read(kind, changed)
            for number, place in enumerate(document.positions):
                token, value, entries = said[place - 1]
                assert token in (ids[place], 0)
                teacher = document.teacher
                kept = teacher.ids[number] >= 0
                found = dict(zip(teacher.ids[number][kept].tolist(), teacher.logits[number][kept], strict=True))
                expected = expected_row(ids[place], entries, 5, tokens.vocab_size)
                assert found.keys() == expected.keys()
                assert all(float(found[token]) == np.float32(expected[token]) for token in found)
                target = float(teacher.target_logit[number])
                assert target == np.float32(value) if value is not None and value > -1000 else math.isnan(target)
        # Both happen often enough for the loop to mean something.
        assert min(errors, rows) > 100

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_text_that_was_cut_or_garbled_is_an_error_or_is_read_as_it_stands(self, kind, ids, tokens) -> None:
        content, read = forms_of_scores(ids)[kind]
        text, draw = json.dumps(content), random.Random(kind)
        for _ in range(1500):
            at = draw.randrange(len(text))
            garbled = text[:at] + draw.choice(["", *'0123456789-.eE,:[]{}"n\\ \x00']) + text[at + draw.randrange(3) :]
            try:
                changed = json.loads(garbled)
            except ValueError:
                continue
            if isinstance(changed, dict):
                with contextlib.suppress(ServerRequestError):
                    reader(tokens).scored(Request(ids), read(changed))


class TestGeneratedAnswers:
    @pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
    def test_an_answer_that_was_changed_is_an_error_or_a_document(self, kind, tokens) -> None:
        calls = {
            "/v1/completions": openai.completion,
            "/v1/chat/completions": openai.chat,
            "/completion": llamacpp.completion,
        }
        exchanges = [json.loads(line) for line in served.RECORDINGS[kind].read_text(encoding="utf-8").splitlines()]
        draw = random.Random(kind)
        documents = errors = 0
        for exchange in exchanges:
            if exchange["path"] not in calls:
                continue
            request = Request(exchange["request"].get("prompt") or [1, 9690])
            read = calls[exchange["path"]](options(kind.replace(".", "")), request).read
            content = json.loads(exchange["answer"])
            for _ in range(150):
                try:
                    document = reader(tokens).generated(request, read(mutated(content, draw)))
                except ServerRequestError:
                    errors += 1
                    continue
                if not isinstance(document, DroppedAnswer):
                    documents += 1
                    assert all(0 <= token < tokens.vocab_size for token in document.input_ids)
                    assert max(document.positions) < len(document.input_ids)
        assert min(documents, errors) > 100


def mutated(content: Any, draw: random.Random) -> Any:
    """Returns a copy with one to three values removed, repeated, swapped or replaced."""
    changed = copy.deepcopy(content)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        spots = [spot for spot in _spots(changed) if len(spot[0])]
        holder, key = draw.choice(spots)
        value = holder[key]
        kind = draw.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(value))
        elif kind == 2 and isinstance(holder, list):
            other = draw.randrange(len(holder))
            holder[key], holder[other] = holder[other], holder[key]
        elif kind <= 4 and type(value) in (int, float):
            near = [value + 1, value - 1, -value, value * 0.5, 0, 49151, 49152, 2**31, -9999.0, -3.5]
            holder[key] = draw.choice(near)
        elif kind == 5 and isinstance(value, str) and value:
            at = draw.randrange(len(value))
            holder[key] = value[:at] + draw.choice("AZaz09+/= :") + value[at + 1 :]
        else:
            odd = [None, True, "x", "", 1.5, -1, 10**30, [], {}, [[]], math.nan, math.inf, -math.inf, "token_id:5"]
            holder[key] = copy.deepcopy(draw.choice(odd))
    return changed


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Returns every (list or object, index or key) in a value."""
    if not isinstance(value, list | dict):
        return []
    keys = list(range(len(value))) if isinstance(value, list) else list(value)
    return [(value, key) for key in keys] + [spot for key in keys for spot in _spots(value[key])]
