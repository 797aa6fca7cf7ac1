"""The distribution of the teacher's entropy in a store, and trainings that begin with the easy documents."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from support.tiny import make_model, make_store
from test_trainer import make_trainer, training_logs
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainerCallback

import slimkernels as sk
from slimkernels.cli import main
from slimkernels.store import DocumentOrder, Store, StoreDataset, StoreWriter, document_entropies, stats
from slimkernels.trainer.document_order import easy_first


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(make_store(tmp_path_factory.mktemp("store") / "train", num_documents=40))


def expected_entropies(store: Store) -> list[torch.Tensor]:
    """Computes them from the full logits of the teacher that ``make_store`` captured."""
    teacher, found = make_model(seed=1234).eval(), []
    for document in store:
        with torch.no_grad():
            q = teacher(document.input_ids[None]).logits[0, document.positions - 1].double().softmax(-1)
        kept = q.gather(-1, document.teacher.ids.long())
        outcomes = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
        found.append(-(outcomes * outcomes.log()).sum(-1))
    return found


def test_stats_are_the_entropies_of_the_kept_ids_and_one_outcome_more(store):
    by_document = expected_entropies(store)
    rows, means = torch.cat(by_document).numpy(), np.array([of_one.mean() for of_one in by_document])
    assert document_entropies(store) == pytest.approx(means, rel=1e-5)
    found = stats(store.path, num_bins=7)
    assert (found["documents"], found["rows"]) == (40, len(rows))
    for name, values in (("token_entropy", rows), ("document_entropy", means)):
        assert found[name]["mean"] == pytest.approx(values.mean(), rel=1e-5)
        shares = {"min": 0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1}
        assert found[name]["quantiles"] == {
            n: pytest.approx(np.quantile(values, q), rel=1e-5) for n, q in shares.items()
        }
        edges, counts = found[name]["histogram"].values()
        assert edges == pytest.approx(np.linspace(0, values.max(), 8), rel=1e-5)
        assert sum(counts) == len(values)
        # The bin of a value on an edge depends on rounding.
        assert np.abs(np.array(counts) - np.histogram(values, np.linspace(0, values.max(), 8))[0]).sum() <= 2


def test_a_document_without_a_row_has_no_entropy(tmp_path):
    settings = {"tokenizer_fingerprint": "", "teacher": {}, "selection": {}, "codec": "float32"}
    with StoreWriter(tmp_path / "one", vocab_size=4, **settings) as writer:
        certain = sk.topk_logits(torch.tensor([[0.0, -float("inf"), -float("inf"), -float("inf")]]), top_k=1)
        writer.add([1, 0], [1], certain)
        writer.add([2], [], certain[:0])
    assert document_entropies(Store(tmp_path / "one")).tolist() == pytest.approx([0.0, np.nan], nan_ok=True)
    found = stats(tmp_path / "one")["document_entropy"]
    assert (found["mean"], found["histogram"]["counts"]) == (0.0, [1] + [0] * 9)
    StoreWriter(tmp_path / "none", vocab_size=4, **settings).close()
    assert stats(tmp_path / "none") == {"documents": 0, "rows": 0, "token_entropy": None, "document_entropy": None}
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        stats(tmp_path / "one", num_bins=0)


def test_the_command_shows_quantiles_and_histograms(store, tmp_path, capsys):
    assert main(["store", "stats", str(store.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stats(store.path)
    assert main(["store", "stats", str(store.path)]) == 0
    shown = capsys.readouterr().out
    content = stats(store.path)
    assert f"40 documents, {content['rows']} rows" in shown
    assert re.search(rf"median +{content['token_entropy']['quantiles']['median']:.4g}", shown)
    bars = re.findall(r"^ +[\d.]+ to +[\d.]+ +(\d+)(?: (#+))?$", shown, re.M)
    assert [int(count) for count, _ in bars[:10]] == content["token_entropy"]["histogram"]["counts"]
    assert max(len(bar) for _, bar in bars) == 40
    StoreWriter(tmp_path, vocab_size=4, tokenizer_fingerprint="", teacher={}, selection={}).close()
    assert main(["store", "stats", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("0 documents, 0 rows")


def test_an_order_reads_bucket_by_bucket_and_shuffles_within():
    difficulty = np.random.default_rng(0).normal(size=43)
    difficulty[7] = np.nan
    options = {"difficulty": difficulty, "num_buckets": 5}
    order = DocumentOrder(43, seed=1, **options)
    epochs = [order.permutation(epoch).tolist() for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    sizes = [9, 9, 8, 9, 8]
    ends = np.cumsum([0, *sizes])
    for found in epochs[:2]:
        buckets = [difficulty[found[a:b]] for a, b in itertools.pairwise(ends)]
        assert sorted(found) == list(range(43))
        assert all(np.nanmax(one) <= np.nanmin(next_one) for one, next_one in itertools.pairwise(buckets))
        assert np.isnan(buckets[-1]).sum() == 1
        assert all((np.diff(one) < 0).any() for one in buckets)
    halves = [list(DocumentOrder(43, seed=1, rank=rank, world_size=2, **options)) for rank in range(2)]
    assert [halves[place % 2][place // 2] for place in range(43)] == epochs[0]
    state = order.state_dict(documents_read=11)
    other = DocumentOrder(43, seed=1, **options)
    other.load_state_dict(state)
    assert list(other) == epochs[0][11:]
    assert DocumentOrder(3, shuffle=False, difficulty=[3, 1, 2], num_buckets=3).permutation(0).tolist() == [1, 2, 0]
    for changed in (DocumentOrder(43, seed=1), DocumentOrder(43, seed=1, difficulty=-difficulty)):
        with pytest.raises(ValueError, match=r"of the same documents, but: buckets='\w{16}' there"):
            changed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"difficulty must have a number for each document, shape \(3,\), got \(2,\)"):
        DocumentOrder(3, difficulty=[1.0, 2.0])


class Read(TrainerCallback):
    """The documents that a training reads, in order, by their first tokens."""

    def __init__(self, trainer) -> None:
        self.documents: list[list[int]] = []
        collate = trainer.data_collator

        def seen(documents):
            self.documents += [document.input_ids.tolist() for document in documents]
            return collate(documents)

        trainer.data_collator = seen


ORDERED = {"document_order": "easy-first", "train_sampling_strategy": "random", "method": "kd", "max_steps": 15}


def test_a_training_reads_the_easy_documents_first_and_continues_exactly(store, tmp_path, monkeypatch):
    """Fifteen steps of four documents are an epoch and a half; the run is killed within the second epoch."""
    options = ORDERED | {"save_strategy": "steps", "save_steps": 13}
    whole = make_trainer(tmp_path / "whole", store, **options)
    read = Read(whole)
    whole.train()
    entropy = {tuple(document.input_ids.tolist()): value for document, value in
               zip(store, document_entropies(store), strict=True)}  # fmt: skip
    for epoch in (read.documents[:40], read.documents[40:60]):
        found = np.array([entropy[tuple(ids)] for ids in epoch]).reshape(-1, 4)
        assert (found.max(-1)[:-1] <= found.min(-1)[1:]).all()
        assert (np.diff(found) < 0).any()
    assert read.documents[:20] != read.documents[40:60]

    shutil.copytree(tmp_path / "whole" / "checkpoint-13", tmp_path / "run" / "checkpoint-13")
    # As with several processes, whose loader of a resumed epoch hides the order too deeply for accelerate.
    monkeypatch.setattr("accelerate.data_loader.DataLoaderShard.set_epoch", lambda *args: None)
    resumed = make_trainer(tmp_path / "run", store, **options)
    seen = Read(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert seen.documents[:8] == read.documents[52:60]
    assert [entry["loss"] for entry in training_logs(resumed)] == [entry["loss"] for entry in training_logs(whole)]
    assert all(map(torch.equal, resumed.model.parameters(), whole.model.parameters()))
    with pytest.raises(ValueError, match="document_order='easy-first' there, 'random' here"):
        make_trainer(tmp_path / "run", store, **options | {"document_order": "random"}).train(True)


def test_an_order_of_several_stores_or_a_part_of_one(store, tmp_path):
    other = Store(make_store(tmp_path / "other", num_documents=20, seed=9))
    parts = ConcatDataset([Subset(StoreDataset(store), [3, 1, 30]), StoreDataset(other)])
    expected = np.concatenate([document_entropies(store)[[3, 1, 30]], document_entropies(other)])
    order = easy_first(parts, seed=4)
    assert order.permutation(0).tolist() == DocumentOrder(23, seed=4, difficulty=expected).permutation(0).tolist()
    with pytest.raises(ValueError, match=r"'easy-first' needs documents of stores, .* got list"):
        easy_first([1, 2], seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_order": "hard-first"}, "document_order must be one of 'random', 'easy-first', got 'hard-first'"),
        (
            {"train_sampling_strategy": "sequential"},
            "document_order and train_sampling_strategy must not both be given",
        ),
    ],
)
def test_a_wrong_order_is_one_sentence(store, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, store, **ORDERED | options)
