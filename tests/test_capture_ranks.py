"""Ranks that capture together store what one process stores, whichever of them die on the way."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import capture_dying_rank, capture_killed_ranks
from support import teachers
from test_capture import OPTIONS, assert_is_what_the_teacher_says, contents, make_documents

from slimkernels.cli import main
from slimkernels.store import RankWriter, Store, errors, verify, verify_complete
from slimkernels.store.codec import document_hash
from slimkernels.store.format import part_name
from slimkernels.teacher import Ranks, capture, generate_documents, load_teacher, read_documents

TOP_K = 17
# For scripts, whose first place to import from is their own folder.
SAME_PACKAGE = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
SIXTH_OF_EIGHT = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture(scope="module")
def tokenizer():
    return teachers.make_tokenizer()


@pytest.fixture(scope="module")
def model():
    return teachers.make_teacher()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(teachers.save_teacher(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in make_documents(60, seed=2)))
    return str(path)


def assert_same_documents(one: Store, other: Store, **close) -> None:
    """The same documents, in any order; their rows bit for bit unless ``close`` says how close."""
    assert len(one) == len(other)
    for document in one:
        twin = other[other.find(document.input_ids)]
        assert torch.equal(document.positions, twin.positions)
        assert torch.equal(document.teacher.ids, twin.teacher.ids)
        for field in ("logits", "lse", "target_logit"):
            options = close or {"atol": 0, "rtol": 0}
            torch.testing.assert_close(getattr(document.teacher, field), getattr(twin.teacher, field), **options)


def parts_contents(path: Path, num_parts: int) -> list[dict[str, bytes]]:
    return [contents(path / part_name(part)) for part in range(num_parts)]


def test_ranks_store_what_one_process_stores(model, tokenizer, tmp_path) -> None:
    documents = make_documents(40)
    # Twice, and without a label.
    given = [*documents, documents[3], [7], documents[11], []]
    reports = [
        capture(model, tokenizer, given, tmp_path / "ranks", rank=rank, num_ranks=3, **OPTIONS) for rank in range(3)
    ]
    whole = capture(model, tokenizer, given, tmp_path / "whole", num_parts=3, **OPTIONS)
    assert whole == (40, sum(map(len, documents)), 4)
    assert [sum(column) for column in zip(*reports, strict=True)] == list(whole)
    assert all(report.documents for report in reports)
    # Every file, byte for byte: the order of the documents and the shards do not depend on who captured them.
    assert parts_contents(tmp_path / "ranks", 3) == parts_contents(tmp_path / "whole", 3)
    assert (tmp_path / "ranks" / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()
    verify(tmp_path / "ranks")
    assert verify_complete(tmp_path / "ranks", given) == 42
    # An ordinary store has other batches, so its rows are rounded differently.
    capture(model, tokenizer, given, tmp_path / "plain", **OPTIONS | {"codec": "float32"})
    capture(model, tokenizer, given, tmp_path / "parts", num_parts=3, **OPTIONS | {"codec": "float32"})
    assert_same_documents(Store(tmp_path / "parts"), Store(tmp_path / "plain"), atol=1e-5, rtol=1e-5)
    for document in Store(tmp_path / "parts"):
        assert_is_what_the_teacher_says(document, model)


def test_a_capture_continues_with_another_number_of_ranks(model, tokenizer, tmp_path) -> None:
    documents = make_documents(30)
    for rank in range(2):
        capture(model, tokenizer, documents[:20], tmp_path / "store", rank=rank, num_ranks=2, num_parts=4, **OPTIONS)
    reports = [
        capture(model, tokenizer, documents, tmp_path / "store", rank=rank, num_ranks=5, **OPTIONS) for rank in range(5)
    ]
    assert sum(report.documents for report in reports) == 10
    assert sum(report.skipped for report in reports) == 20
    assert reports[4] == (0, 0, 0)
    verify(tmp_path / "store")
    assert verify_complete(tmp_path / "store", documents) == 30


def test_a_rank_is_refused_a_store_of_another_teacher(model, tokenizer, tmp_path) -> None:
    capture(model, tokenizer, make_documents(4), tmp_path, rank=0, num_ranks=2, top_k=TOP_K)
    with pytest.raises(errors.SettingsMismatchError, match=r"part-00001 was made with selection="):
        capture(model, tokenizer, make_documents(4), tmp_path, rank=1, num_ranks=2, top_k=TOP_K + 1)
    with pytest.raises(ValueError, match="at least one document of 2 tokens, got none"):
        capture(model, tokenizer, [[3]], tmp_path, rank=1, num_ranks=2, top_k=TOP_K)


def test_ranks_share_what_one_of_them_generates(model, tokenizer, tmp_path) -> None:
    """The others wait for the file, and then find every document in it."""
    path, script = tmp_path / "text.jsonl", "import fcntl, sys, time; f = open(sys.argv[1], 'ab')\n"
    script += "fcntl.flock(f, fcntl.LOCK_EX); print('locked', flush=True); time.sleep(0.5)"
    options = {"num_documents": 6, "max_new_tokens": 8, "wait": True}
    with subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BlockingIOError):
            generate_documents(model, tokenizer, teachers.PROMPTS, path, **options | {"wait": False})
        first = generate_documents(model, tokenizer, teachers.PROMPTS, path, **options)
    written = path.read_bytes()
    assert generate_documents(model, tokenizer, teachers.PROMPTS, path, **options) == first
    assert path.read_bytes() == written
    assert len(list(read_documents(path, None, text_field="input_ids", max_length=None))) == 6


@pytest.mark.parametrize(
    ("environment", "tensor_parallel", "expected"),
    [
        ({}, 1, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 1, (5, 8, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, 4, (1, 2, 1)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            3,
            "multiple of tensor_parallel=3",
        ),
        ({}, 2, r"got 1: start with torchrun --nproc-per-node 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, "must set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, 1, "to numbers, got"),
    ],
)
def test_ranks_from_the_environment(environment, tensor_parallel, expected) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            Ranks.from_environment(tensor_parallel, environment)
    else:
        ranks = Ranks.from_environment(tensor_parallel, environment)
        assert (ranks.rank, ranks.num_ranks, ranks.local_process) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "capture --teacher {teacher} --text {corpus} --out {tmp}/s --tensor-parallel 2",
            "multiple of --tensor-parallel 2",
        ),
        ("capture --teacher {teacher} --text {tmp}/no.txt --out {tmp}/s --parts 2", "there is no file"),
        ("store verify {store} --complete {tmp}/no.jsonl", "there is no file"),
        ("store verify {store} --complete {corpus}", "no field 'text' in record 1"),
        ("store verify {store} --complete {text}", "the corpus holds text: give the tokenizer it was captured with"),
        ("store verify {store} --complete {text} --tokenizer {other}", "captured with tokenizer_fingerprint="),
    ],
)
def test_bad_input_exits_2_with_one_sentence(
    arguments, message, model, tokenizer, teacher, corpus, tmp_path, capsys
) -> None:
    capture(model, tokenizer, make_documents(4), tmp_path / "store", num_parts=2, top_k=TOP_K)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "When the rain stopped"}) + "\n")
    other = teachers.make_tokenizer()
    other.eos_token = other.bos_token
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(Path(teacher, "config.json").read_text())
    places = {"store": tmp_path / "store", "text": text, "other": tmp_path / "other", "tmp": tmp_path}
    assert main(arguments.format(teacher=teacher, corpus=corpus, **places).split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("slimkernels: ")
    assert message in error


def torchrun(*command: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*launcher, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": "."},
    )


def capture_command(teacher: str, corpus: str, out: Path, *options: object) -> list[object]:
    command = ["capture", "--teacher", teacher, "--text", corpus, "--text-field", "ids", "--out", out, "--top-k", TOP_K]
    return [*command, "--batch-tokens", 200, "--shard-rows", 60, "--threads", 1, *options]


def test_a_killed_rank_ends_the_command_and_another_number_of_ranks_completes_it(
    teacher, corpus, tmp_path, capsys
) -> None:
    """torchrun ends the survivor, what either has written is kept, and one process captures the rest."""
    out = tmp_path / "killed"
    verify_command = ["store", "verify", str(out), "--complete", corpus, "--text-field", "ids"]
    process = torchrun(capture_dying_rank.__file__, *capture_command(teacher, corpus, out))
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in process.stderr
    verify(out)
    before = Store(out)
    with RankWriter(out, rank=1, num_ranks=2, **writer_settings(before)) as writer:
        assert 0 < len(writer) < sum(writer.part_of(ids) is not None for ids in make_documents(60, seed=2))
    assert main(verify_command) == 1
    assert f"{60 - len(before)} of 60 documents are not in" in capsys.readouterr().err
    assert main([*map(str, capture_command(teacher, corpus, out))]) == 0
    assert f"added {60 - len(before)} documents" in capsys.readouterr().out
    assert main(verify_command) == 0
    assert "holds all 60 documents of" in capsys.readouterr().out
    assert main([*map(str, capture_command(teacher, corpus, tmp_path / "alone", "--parts", 2))]) == 0
    assert_same_documents(Store(out), Store(tmp_path / "alone"))


def test_a_killed_rank_is_started_again_by_torchrun(teacher, corpus, tmp_path) -> None:
    out = tmp_path / "killed"
    process = torchrun("--max-restarts", 1, capture_dying_rank.__file__, *capture_command(teacher, corpus, out))
    assert process.returncode == 0, process.stderr
    # The second life of rank 1 finds what the first has written.
    added, skipped = re.search(r"rank 1 of 2: added (\d+) documents.*skipped (\d+)", process.stdout).groups()
    assert int(added) > 0
    assert int(skipped) > 0
    verify(out)
    assert verify_complete(out, make_documents(60, seed=2)) == len(Store(out)) == 60
    assert main([*map(str, capture_command(teacher, corpus, tmp_path / "alone", "--parts", 2))]) == 0
    assert_same_documents(Store(out), Store(tmp_path / "alone"))


def writer_settings(store: Store) -> dict[str, object]:
    names = ("vocab_size", "tokenizer_fingerprint", "teacher", "selection", "temperatures", "codec")
    return {name: getattr(store.settings, name) for name in names}


def test_a_teacher_that_is_split_over_two_processes(teacher, corpus, tmp_path) -> None:
    """Tensor parallelism over gloo: two processes are one rank, and the store is that of the undivided teacher."""
    out = tmp_path / "split"
    process = torchrun("-m", "slimkernels", *capture_command(teacher, corpus, out, "--tensor-parallel", 2))
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("rank 0 of 1: added 60 documents") == 1
    verify(out)
    assert main([*map(str, capture_command(teacher, corpus, tmp_path / "alone"))]) == 0
    # The same fingerprint of the weights, too: either continues the other's store.
    assert Store(out).settings == Store(tmp_path / "alone").settings
    # Within a step of the 8 bits: sums over two processes are rounded differently.
    assert_same_documents(Store(out), Store(tmp_path / "alone"), atol=0.1, rtol=0)
    for one, other in zip(Store(out), Store(tmp_path / "alone"), strict=True):
        torch.testing.assert_close(one.teacher.lse, other.teacher.lse, atol=1e-5, rtol=1e-5)


def test_a_teacher_is_not_split_into_parts_of_heads(teacher) -> None:
    with pytest.raises(ValueError, match=r"must divide the teacher's num_key_value_heads=2, .* got 4"):
        load_teacher(teacher, tensor_parallel=4)


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_captures_that_are_killed_lose_nothing(tmp_path, kills) -> None:
    """SIGKILL of one rank or both at random moments: nothing reported written is lost, nothing is captured twice."""
    command = [sys.executable, capture_killed_ranks.__file__, str(tmp_path), "7", str(kills)]
    expected, seen = capture_killed_ranks.documents(), []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=SAME_PACKAGE
    ) as process:
        reported: dict[str, set[str]] = {}
        for line in iter(process.stdout.readline, "{}\n"):
            assert line, "the ranks' parent died"
            state = json.loads(line)
            path = tmp_path / state["store"]
            so_far = reported.setdefault(state["store"], set())
            assert so_far.isdisjoint(state["reported"])
            so_far.update(state["reported"])
            seen.append(len(so_far))
            if so_far:
                verify(path)
                assert so_far <= {digest.hex() for digest in hashes(Store(path))}
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert any(0 < count < len(expected) for count in seen), seen
    whole = parts_contents(tmp_path / "whole", 2)
    for name in reported:
        verify(tmp_path / name)
        assert verify_complete(tmp_path / name, expected) == len(expected)
        # A killed rank leaves whole shards, and the next one goes on where it stopped: the same files.
        assert parts_contents(tmp_path / name, 2) == whole


def hashes(store: Store) -> list[bytes]:
    return [document_hash(document.input_ids.numpy().astype("int32")) for document in store]
