"""Held-out documents side by side: numbers equal those of ``evaluate_store``, and lower is better in all texts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from support.evaluation import make_data, make_folder, make_record
from support.tiny import make_model, make_store, make_tokenizer

from slimkernels.cli import main
from slimkernels.evaluate import evaluate_store, heldout
from slimkernels.evaluate import models as evaluated_models
from slimkernels.evaluate.models import find_models
from slimkernels.evaluate.records import read_records
from slimkernels.evaluate.report import write_report
from slimkernels.evaluate.report.charts import Axis
from slimkernels.evaluate.score_units import metric
from slimkernels.evaluate.summary import Arm, Records, compare, overall, slices
from slimkernels.store import Store

pytestmark = pytest.mark.cpu_kernels
SEEDS = {"a": 0, "b": 1, "teacher": 1234}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(make_store(tmp_path_factory.mktemp("store") / "heldout", num_documents=9))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, seed in SEEDS.items():
        make_model(seed=seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return [str(root / name) for name in SEEDS]


@pytest.fixture(scope="module")
def report(store, folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out")
    words = ["compare", "--models", *folders, "--tasks", "heldout", "--store", str(store.path), "--batch-size", "2"]
    assert main([*words, "--out", str(out)]) == 0
    return out


def test_each_document_and_their_mean_are_those_of_evaluate_store(store, report):
    records = read_records(report / "records.jsonl")
    assert len(records) == 3 * 9
    for record in records:
        document = store[int(record.sample)]
        model = make_model(seed=SEEDS[record.model])
        expected = evaluate_store(model, [document])
        assert record.scores == pytest.approx({"loss": expected["loss"], "kl": expected["kl_ghost"]}, abs=1e-5)
        assert record.labels == expected["tokens"] == len(document.positions)
        assert record.published["teacher_loss"] == pytest.approx(math.log(expected["teacher_perplexity"]), abs=1e-5)
        assert record.question == make_tokenizer().decode(document.input_ids)
    grouped = Records(records)
    for name, seed in SEEDS.items():
        expected = evaluate_store(make_model(seed=seed), store)
        found = overall(grouped, Arm(name, ""), "heldout")
        assert found.scores["loss"].value == pytest.approx(expected["loss"], abs=1e-5)
        assert found.scores["kl"].value == pytest.approx(expected["kl_ghost"], abs=1e-5)
        assert found.labels == expected["tokens"]
        assert found.empty is None
    assert sum(sum(part.counts) for part in slices(grouped, "heldout", "document length (labels)")) == 27


def test_the_page_knows_that_lower_is_better(store, report):
    page, text = (report / "report.html").read_text(), (report / "report.md").read_text().replace("\\", "")
    metrics = {name: evaluate_store(make_model(seed=seed), store) for name, seed in SEEDS.items()}
    for name, places in (("loss", ".3f"), ("perplexity", ",.4g"), ("kl_ghost", ".3f")):
        best, second, worst = sorted(found[name] for found in metrics.values())
        assert f'<td class="best number">{abs(best):{places}} [' in page
        assert re.search(rf"\| \*{second:{places}} \[[^|*]*\]\* \|", text)
        assert f"| {worst:{places}} [" in text
    assert metrics["teacher"]["kl_ghost"] < 1e-3 < metrics["a"]["kl_ghost"]
    (verdict,) = re.findall("teacher is lower (.*)", text.partition("## Slices")[0])
    assert re.fullmatch(r"than [ab] by \d\.\d{3} nats \[.*\], than [ab] by \d\.\d{3} nats \[.*\]\..*", verdict)
    assert "teacher is higher" not in text
    assert f"perplexity on these labels was {metrics['a']['teacher_perplexity']:,.4g} at capture" in text
    assert "9 of 9" in text
    # Texts about questions and answers do not occur.
    for foreign in ("no sampling", "empty", "no output", "Reference:", "Worked examples", "reasoning steps"):
        assert foreign not in text
        assert foreign not in page.partition("<script>")[0]


def test_a_document_is_measured_once(store, folders, report, tmp_path, monkeypatch):
    words = ["compare", "--models", *folders[:1], "--tasks", "heldout", "--store", str(store.path), "--out"]
    assert main([*words, str(tmp_path), "--samples", "4"]) == 0
    before = read_records(next(tmp_path.glob("records/*.jsonl")))
    assert main([*words, str(tmp_path), "--samples", "6"]) == 0
    after = read_records(next(tmp_path.glob("records/*.jsonl")))
    # A larger number of documents extends the smaller one, whose records keep their times.
    assert (after[:4], len(after)) == (before, 6)
    monkeypatch.setattr(evaluated_models, "_loader", lambda *_: pytest.fail)
    assert main([*words, str(tmp_path)[:], "--samples", "6"]) == 0
    assert main(["compare", "--rescore", "--out", str(tmp_path)]) == 0
    assert read_records(tmp_path / "records.jsonl") == after


def test_questions_and_documents_share_a_report(tmp_path):
    data = make_data(tmp_path / "data")
    model = make_folder(tmp_path / "chars")
    tokenizer = evaluated_models.find_models([str(model)])[0].load().tokenizer
    path = make_store(tmp_path / "store", num_documents=2)
    words = ["compare", "--models", f"small={model}", "--data", str(data), "--samples", "1", "--shots", "0"]
    words += ["--max-depth", "1", "--max-step-tokens", "3", "--store", path, "--out", str(tmp_path / "out")]
    # The store has another tokenizer.
    assert main([*words, "--tasks", "gsm8k", "heldout"]) == 2
    assert len(tokenizer) != len(make_tokenizer())
    make_model(vocab_size=len(make_tokenizer())).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    assert main([*words, "--tasks", "gsm8k", "heldout"]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| task, score | small | samples |" in text  # loss, perplexity and KL of one model
    assert "| model · decoder | gsm8k, flexible % |" in text


def test_means_are_over_labels_by_hand():
    def record(model, sample, loss, labels):
        fields = {"scores": {"loss": loss}, "labels": labels, "decoder": "", "task": "heldout"}
        return make_record(sample, "", "", model=model, **fields)

    records = Records([record("a", 0, 2.0, 1), record("a", 1, 4.0, 3), record("b", 0, 1.0, 1), record("b", 1, 4.4, 3)])
    assert overall(records, Arm("a", ""), "heldout").scores["loss"].value == 3.5
    (found,) = compare(records)
    # (1 * -1.0 + 3 * 0.4) / 4, where the mean over documents is -0.3.
    assert found.difference.value == pytest.approx(0.05)
    assert (found.difference.low, found.difference.high) == pytest.approx((-1.0, 0.4))
    assert found.difference.p_value == 1.0


def test_axis_of_nats_is_round_and_holds_every_value():
    axis = Axis.of([2.31, 2.97, 2.5], metric("loss"))
    assert axis.marks == pytest.approx([2.2, 2.4, 2.6, 2.8, 3.0])
    assert [axis.share(value) for value in (2.2, 3.0)] == pytest.approx([0, 1])
    for values in ([5.0], [0.0, 0.0], [1e-4, 900.0]):
        assert all(0 <= Axis.of(values, metric("loss")).share(value) <= 1 for value in values)
    assert Axis.of([0.3], metric("strict")).texts == ["0", "25", "50", "75", "100"]


def test_models_are_labelled_by_the_parts_of_their_paths_that_differ(tmp_path):
    for run in ("one", "two"):
        make_folder(tmp_path / run / "slim")
    make_folder(tmp_path / "kd=1")
    paths = [str(tmp_path / name) for name in ("one/slim", "two/slim", "kd=1")]
    labels = [model.label for model in find_models([*paths, f"mine={paths[0]}"])]
    assert labels == ["one/slim", "two/slim", "kd=1", "mine"]
    with pytest.raises(ValueError, match="models must be different and have different names"):
        find_models([f"x={paths[0]}", f"x={paths[1]}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--models {model} --tasks heldout --out {tmp}",
            "--tasks heldout and --store DIR, a held-out store, go together",
        ),
        ("--models {model} --tasks gsm8k --data {tmp} --store {store} --out {tmp}", "go together"),
        ("--models {model} --tasks heldout gsm8k --store {store} --out {tmp}", "--models needs --data"),
        ("--models {model} --tasks heldout --store {tmp}/no --out {tmp}", "{tmp}/no"),
        ("--models {chars} --tasks heldout --store {store} --out {tmp}", "was captured with tokenizer_fingerprint"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(arguments, message, store, folders, tmp_path, capsys):
    names = {"tmp": tmp_path, "store": store.path, "model": folders[0], "chars": tmp_path / "chars"}
    if "{chars}" in arguments:
        make_folder(names["chars"])
    assert main(["compare", *arguments.format(**names).split()]) == 2
    assert message.format(**names) in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_whose_loss_is_no_number_is_an_error(store, folders, tmp_path, capsys):
    model = make_model()
    model.get_output_embeddings().weight.data.fill_(math.inf)
    model.save_pretrained(tmp_path / "bad")
    make_tokenizer().save_pretrained(tmp_path / "bad")
    words = ["compare", "--models", str(tmp_path / "bad"), "--tasks", "heldout", "--store", str(store.path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "bad must have a finite loss on document" in capsys.readouterr().err


def test_a_store_without_labels_is_an_error(tmp_path):
    from support.store_cases import SETTINGS

    from slimkernels.store import StoreWriter

    with StoreWriter(tmp_path, **SETTINGS) as writer:
        del writer
    with pytest.raises(ValueError, match="at least one label to evaluate on, got none"):
        heldout.load_heldout(tmp_path)


def test_documents_escape_like_everything_else(tmp_path):
    fields = {"scores": {"loss": 1.0}, "labels": 2, "decoder": "", "task": "heldout", "question": "<script>x"}
    page = write_report([make_record(0, "", "", **fields)], tmp_path).read_text()
    assert "&lt;script&gt;x" in page
    assert "<script>x" not in page
