"""The sample-efficiency experiment from end to end with a tiny teacher, and its tables and figure by hand."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from support.teachers import make_tokenizer, save_teacher

from bench import records
from bench.reproduce import sample_efficiency as reproduce_sample_efficiency
from bench.reproduce.sample_efficiency import all_runs, reproduce
from bench.reproduce.sample_efficiency_corpus import Corpus, Settings
from bench.reproduce.sample_efficiency_results import ABLATIONS, METHODS, Estimate, Experiment, sample_efficiency_block

# These trainings cover every kind of teacher, and an option.
ONLY = "sft$|kd teacher_top_fraction=0.2|slim rest=ghost|sampled"
ENGLISH = """
 = A heading that is long enough to be a paragraph of running text, were it not for the signs of equality around it,
 and which goes on for so long that nobody would read it to its end = = = = = = = = = = = = = = = = = = = = = = = =

 The well @-@ known old <unk> stood by the river for many years , and the people of the town were very fond of it , \
until one day the river rose and carried it away with all that was in it , which was never seen again by anyone .
 The well @-@ known old house stood by the river for many years , and the people of the town were very fond of it , \
until one day the river rose and carried it away with all that was in it , which was never seen again by anyone .
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    teacher = save_teacher(tmp_path_factory.mktemp("teacher") / "tiny")
    return Settings(
        teacher=str(teacher),
        teacher_dtype="float32",
        prompts=12,
        heldout_every=4,
        documents=24,
        max_new_tokens=12,
        heldout_tokens=60,
        sizes=(100, 200),
        ablation_size=100,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        epochs=2,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, settings):
    """Runs seed 0 at the smaller size in two calls, the first of which was stopped and then killed in a write."""
    folder = tmp_path_factory.mktemp("experiment")
    out, english = folder / "out.jsonl", folder / "english.txt"
    english.write_text(ENGLISH)
    asked = {"seeds": [0], "english": english, "only": f"100 tokens, ({ONLY})"}
    assert reproduce(out, folder / "work", settings, most=1, **asked) == 1
    with out.open("a") as file:
        file.write('{"op": "sample_eff')
    assert reproduce(out, folder / "work", settings, **asked) == 3
    return folder, records.read(out), asked


def test_sample_efficiency_appends_what_is_missing(finished):
    _, rows, _ = finished
    runs = [(row["run"]["method"], row["run"]["teacher"], row["run"]["options"]) for row in rows]
    assert runs == [
        ("sft", "none", {}),
        ("sampled", "draws", {}),
        ("slim", "top_k", {"rest": "ghost"}),
        ("kd", "online", {"teacher_top_fraction": 0.2}),
    ]
    for row in rows:
        assert 100 <= row["tokens"] < 150
        assert len(row["curve"]) == 2
        # The student learns: its perplexity falls, from not much more than the vocabulary's size of 300.
        assert row["curve"][1]["teacher_perplexity"] < row["curve"][0]["teacher_perplexity"] < 400
        assert {"teacher", "english"} == set(row["teacher_perplexity"])
        assert {"commit", "device", "threads", "torch", "date"} <= set(row)
    assert len({row["curve"][1]["teacher_kl"] for row in rows}) == len(rows)


def test_sample_efficiency_resumes_with_the_same_numbers(finished, settings, monkeypatch):
    folder, rows, asked = finished
    out = folder / "again.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    assert reproduce(out, folder / "work", settings, **asked) == 1
    assert records.read(out)[-1]["curve"] == rows[-1]["curve"]
    # No training is missing, so no corpus is loaded.
    monkeypatch.setattr(reproduce_sample_efficiency, "Corpus", None)
    assert reproduce(out, folder / "work", settings, **asked) == 0


def test_sample_efficiency_subsets_are_nested(finished, settings):
    folder, _, asked = finished
    corpus = Corpus(folder / "work", settings, asked["english"])

    def documents(seed: int, size: int, kind: str = "top_k") -> list[list[int]]:
        return [document.input_ids.tolist() for document in corpus.subset(seed, size, kind)]

    small, large = documents(0, 100), documents(0, 200)
    assert large[: len(small)] == small
    assert len(large) > len(small)
    assert documents(0, 100, "draws") == small
    assert documents(1, 100) != small
    assert not {tuple(ids) for ids in corpus.training} & {
        tuple(document.input_ids.tolist()) for document in corpus.heldout["teacher"]
    }
    (english,) = corpus.heldout["english"]
    assert make_tokenizer().decode(english.input_ids).startswith("The well-kn")
    with pytest.raises(ValueError, match=r"tokens must be at most .*, got 100000"):
        corpus.subset(0, 100_000, "top_k")


def test_sample_efficiency_remembered_teacher_is_the_teacher(finished, settings):
    folder, _, asked = finished
    corpus = Corpus(folder / "work", settings, asked["english"])
    batch = [torch.tensor(ids) for ids in corpus.training[:3]]
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
    with torch.no_grad():
        logits = corpus.remembered(ids, mask)
        for row, document in zip(logits, batch, strict=True):
            expected = corpus.teacher(document[None]).logits[0]
            torch.testing.assert_close(row[: len(document)], expected, atol=1e-3, rtol=1e-4)


def test_sample_efficiency_refuses_english_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path / "out"), "--english", str(tmp_path / "none.txt")])
    with pytest.raises(SystemExit):
        reproduce_sample_efficiency.main()
    assert "none.txt, which is not a file" in capsys.readouterr().err


def test_sample_efficiency_finishes_a_seed_before_the_next():
    runs = list(all_runs(Settings(), [3, 4]))
    seeds = [run.seed for run in runs]
    assert seeds == [3] * (len(runs) // 2) + [4] * (len(runs) // 2)
    assert len(set(map(str, runs))) == len(runs)
    arms = {arm for ablation in ABLATIONS.values() for arm in ablation.arms.values()}
    assert len(runs) // 2 == 4 * len(Settings().sizes) + len(arms - set(METHODS.values()))


def rows_of(perplexities: dict[str, tuple[float, ...]], size: int = 1000) -> list[dict]:
    """Makes rows of methods, or of values of ``rest``, with one perplexity per seed."""
    settings = {"teacher": "t", "num_layers": 2, "hidden_size": 64, "epochs": 4, "batch_size": 4, "top_fraction": 0.05}
    settings |= {"learning_rate": 0.006, "heldout_tokens": 3000, "rounds": 50}
    rows = []
    for name, values in perplexities.items():
        arm = METHODS[name] if name in METHODS else ABLATIONS["`rest`, SLIM"].arms[f"`{name}`"]
        for seed, value in enumerate(values):
            run = {
                "method": arm.method,
                "size": size,
                "seed": seed,
                "teacher": arm.teacher,
                "options": dict(arm.options),
            }
            row = {"run": run, "settings": settings, "teacher_perplexity": {"teacher": 5.0}, "parameters": 10}
            row["curve"] = [{"teacher_perplexity": 1.0}, {"teacher_perplexity": value, "teacher_kl": 1.0}]
            row |= {"device": "d", "threads": 1, "commit": "abc", "date": "2026-01-02T03", "op": "sample_efficiency"}
            rows.append(row)
    return rows


ROWS = rows_of(
    {
        "SFT": (200.0, 202.0, 198.0),
        "dense KD": (100.0, 101.0, 99.0),
        "SLIM": (99.0, 103.0, 96.0),
        "ghost": (90.0, 93.0, 87.0),
        "zero": (120.0, 125.0, 115.0),
    }
)


def test_sample_efficiency_interval_by_hand():
    mean, low, high = Estimate.of([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2.0 - 4.303 / math.sqrt(3), 2.0 + 4.303 / math.sqrt(3)))
    assert math.isnan(Estimate.of([1.0]).low)


def test_sample_efficiency_changes_are_paired_and_over_sizes():
    rows = rows_of({"SFT": (200.0, 400.0), "dense KD": (100.0, 200.0)}) + rows_of(
        {"SFT": (90.0,), "dense KD": (45.0,)}, 2000
    )
    experiment = Experiment(rows)
    sft, kd = METHODS["SFT"], METHODS["dense KD"]
    assert tuple(experiment.change(kd, sft, 1000)) == pytest.approx((-50.0, -50.0, -50.0))
    both = experiment.change(kd, sft, 1000, 2000)
    assert both.mean == pytest.approx(-50.0)
    assert math.isnan(both.low)
    assert experiment.change(METHODS["SLIM"], sft, 1000) is None


def test_sample_efficiency_block_by_hand():
    lines = sample_efficiency_block(ROWS).splitlines()
    assert "|  | dense KD | 100 ± 2 |" in lines
    assert "|  | SLIM | 99.33 ± 8.72 |" in lines
    assert "|  | sampled KD | - |" in lines
    (order,) = [line for line in lines if line.startswith("- 1k tokens")]
    assert order.startswith("- 1k tokens: SLIM ~ KD < SFT; SLIM to SFT -50.4 % [-53.4, -47.1], ")
    assert "SLIM to dense KD -0.7 % [-6.8, +5.7], dense KD to SFT" in order
    assert order.endswith("dense KD to SFT -50.0 % [-50.0, -50.0]")
    (ghost,) = [line for line in lines if line.startswith("|  | `ghost`")]
    assert ghost.startswith("|  | `ghost` | 90.00 ± 7.45 | -9.4 % [")
    (said,) = [line for line in lines if 'other values of `rest` than "renorm"' in line]
    rest = said.partition("Perplexity with other values of `token_weight`")[0]
    assert 'Perplexity with other values of `rest` than "renorm": `ghost`' in rest
    assert ") lowers it; `zero`" in rest
    assert ") raises it." in rest


def test_sample_efficiency_uses_the_newest_settings_and_the_last_row_of_a_training():
    old = [row | {"settings": row["settings"] | {"epochs": 1}} for row in rows_of({"SFT": (5.0, 5.0, 5.0)})]
    experiment = Experiment(old + rows_of({"SFT": (300.0,)}) + ROWS)
    assert experiment.estimate(METHODS["SFT"], 1000, "teacher_perplexity").mean == pytest.approx(200.0)


def test_sample_efficiency_plot_shows_means_and_intervals():
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from bench.reproduce.sample_efficiency_plot import sample_efficiency

    figure = sample_efficiency(ROWS)
    curves, changes = figure.axes
    shown = {container.get_label(): container for container in curves.containers}
    assert set(shown) == {"SFT", "dense KD", "SLIM"}
    assert shown["SFT"].lines[0].get_ydata() == pytest.approx([200.0])
    (bar,) = shown["SFT"].lines[2][0].get_segments()
    assert (bar[1][1] - bar[0][1]) / 2 == pytest.approx(4.303 * 2 / math.sqrt(3), rel=1e-3)
    assert [label.get_text() for label in changes.get_yticklabels()] == ["rest, SLIM: zero", "rest, SLIM: ghost"]
    plt.close(figure)
