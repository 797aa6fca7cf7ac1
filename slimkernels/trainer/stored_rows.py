"""Checks of a store's rows before they are trained on, whichever data set or trainer they come through."""

from __future__ import annotations

import logging
import math
import os
from typing import Any, cast

from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from slimkernels.models.fingerprints import check_tokenizer
from slimkernels.store import MixedStores, Store, StoreDataset, StoreIterableDataset
from slimkernels.store.dataset import packed_kind
from slimkernels.trainer.objective import SlimObjective
from slimkernels.trainer.unscored_documents import UnscoredDocuments

# Heads are padded to multiples of at most this many rows. A larger difference means another vocabulary.
LARGEST_PADDING = 1024
_DRAWS = ("sample", "mixed")

logger = logging.getLogger(__name__)


def opened_store(dataset: Any) -> Any:
    """Returns a data set as it is, and a ``StoreDataset`` for the path of a store."""
    return StoreDataset(dataset) if isinstance(dataset, str | os.PathLike) else dataset


def sources_of(dataset: Any) -> list[Store | StoreDataset]:
    """Returns the stores under a data set, such as a ``Subset`` or a ``ConcatDataset``; none for other data sets."""
    if isinstance(dataset, Store | StoreDataset):
        return [dataset]
    if isinstance(dataset, StoreIterableDataset):
        return [dataset.documents]
    inner = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    return [source for one in inner if one is not None for source in sources_of(one)]


def stores_of(dataset: Any) -> list[Store]:
    """Returns the stores under a data set, as ``sources_of`` finds them."""
    return [source.store if isinstance(source, StoreDataset) else source for source in sources_of(dataset)]


def longest_document(dataset: Any) -> int:
    """Returns the number of tokens of the longest document of a data set, 0 where that is not known before it is read.

    It is known of stores, and of a ``datasets.Dataset`` with a column ``input_ids`` and without ``position_ids``, whose
    rows are documents unless ``seq_lengths``, as TRL's packing writes it, says how long the documents of a row are.
    """
    if isinstance(dataset, UnscoredDocuments):
        return dataset.longest
    longest = max([store.longest_document() for store in stores_of(dataset)], default=0)
    columns = dataset.column_names if isinstance(dataset, Dataset) else []
    name = next((name for name in ("seq_lengths", "input_ids") if name in columns), None)
    if name is None or "position_ids" in columns:
        return longest
    # Tables of Arrow count tokens without making a Python number of each.
    for table in cast(Any, dataset).select_columns(name).with_format("arrow").iter(batch_size=1000):
        for chunk in table[name].chunks:
            lengths = chunk.flatten() if name == "seq_lengths" else chunk.value_lengths()
            longest = max(longest, *lengths.drop_null().to_pylist(), 0)
    return longest


def mixture_of(dataset: Any) -> MixedStores | None:
    """Returns the mixture of stores that a data set is, or the first one inside of it, or None.

    Raises:
        ValueError: A mixture with shares lies inside of another data set, whose order would not follow them.
    """
    if isinstance(dataset, MixedStores):
        return dataset
    inner = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    found = [mixture for one in inner if one is not None and (mixture := mixture_of(one)) is not None]
    if any(mixture.shares is not None for mixture in found):
        raise ValueError(
            "shares of the stores must be those of the whole data set, got MixedStores with shares inside of a "
            f"{type(dataset).__name__}: pass the MixedStores itself"
        )
    return found[0] if found else None


def check_stored_rows(
    dataset: Any,
    objective: SlimObjective | None,
    *,
    vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> None:
    """Checks that a student can learn from the stores under a data set, in the way that an objective asks for.

    Args:
        dataset: A ``Store`` or ``StoreDataset``, a torch data set of them, or ``UnscoredDocuments``. Other data sets
            pass.
        objective: The objective that reads the teacher's rows; None where they are only measured against, or not read.
        vocab_size: Number of rows V of the student's head.
        tokenizer: The student's tokenizer, or None where it is not known.
        max_length: Number of tokens that the student can read; None for no check.

    Raises:
        ValueError: The stores have another vocabulary or tokenizer, hold longer documents, cannot be in one batch, or
            lack what the objective reads; or the data set is a stream of them.
    """
    if isinstance(dataset, UnscoredDocuments):
        _check_unscored(dataset, objective, max_length)
    sources = sources_of(dataset)
    if sources and isinstance(dataset, IterableDataset):
        raise ValueError(
            "the documents of a trainer must have an order that it can shuffle, split and resume, got a stream, "
            f"{type(dataset).__name__}, which does that itself: pass a StoreDataset"
        )
    if objective is not None and objective.needs_teacher:
        _check_mixture(mixture_of(dataset), objective)
    for store in stores_of(dataset):
        _check_vocabulary(store, vocab_size)
        check_tokenizer(store, tokenizer)
        if max_length is not None and (longest := store.longest_document()) > max_length:
            raise ValueError(
                f"documents must have at most max_length={max_length} tokens for this student, got one of {longest} "
                f"in {store.path}; capture shorter documents or give the student more positions"
            )
        if objective is not None and objective.needs_teacher:
            check_selection(store, objective)
    _check_one_batch(sources)


def _check_mixture(mixture: MixedStores | None, objective: SlimObjective) -> None:
    rest = objective.loss_options["rest"]
    is_mixed = mixture is not None and mixture.weights is not None
    if is_mixed and rest in ("zero", "ghost") and objective.temperature != 1:
        raise ValueError(
            f"temperature must be 1 with rest={rest!r} and weights of the stores, whose mixture has no other, got "
            f"{objective.temperature}: omit the weights, or use rest='renorm'"
        )


def _check_vocabulary(store: Store, rows: int) -> None:
    if not store.vocab_size <= rows <= store.vocab_size + LARGEST_PADDING:
        raise ValueError(
            f"the student's head must have as many rows as the teacher's vocabulary in the store, {store.vocab_size}, "
            f"got {rows}; make the student with vocab_size={store.vocab_size} or call "
            f"model.resize_token_embeddings({store.vocab_size})"
        )
    if rows != store.vocab_size:
        logger.warning(
            "the student's head has %d rows and the store's vocabulary %d: the last %d rows are taken to be padding",
            rows,
            store.vocab_size,
            rows - store.vocab_size,
        )


def _check_unscored(dataset: UnscoredDocuments, objective: SlimObjective | None, max_length: int | None) -> None:
    if objective is not None and objective.needs_teacher:
        raise ValueError(
            f"method {objective.method!r} needs a teacher, and the documents of train_dataset have no rows of one: "
            "pass a teacher_model or teacher_server that scores them, a store, or method 'sft'"
        )
    if max_length is not None and dataset.longest > max_length:
        raise ValueError(
            f"documents must have at most max_length={max_length} tokens for this student, got one of "
            f"{dataset.longest}: split them, as read_documents does, or give the student more positions"
        )


def check_is_scored(objective: SlimObjective, is_scored: bool) -> None:
    """Checks that there is a teacher to score what the student writes.

    Raises:
        ValueError: The student writes, and no model or server scores its batches.
    """
    if objective.method == "gkd" and objective.on_policy_fraction > 0 and not is_scored:
        raise ValueError(
            "method 'gkd' needs a teacher_model or teacher_server to score what the student writes: pass one, or "
            "set on_policy_fraction=0 to learn from the store alone"
        )


def check_selection(store: Store, objective: SlimObjective) -> None:
    """Checks that an objective can learn from the kind of rows that a store holds.

    Raises:
        ValueError: It cannot.
    """
    selection = store.settings.selection
    kind = selection.get("kind")
    options = objective.loss_options
    if "temperature" in objective.parsed_schedules and (kind in _DRAWS or options["rest"] in ("zero", "ghost")):
        raise ValueError(
            f"temperature must not have a schedule with rest={options['rest']!r} and a store of select={kind!r}, whose "
            "rows are for a few temperatures: use rest='renorm' with the largest logits, or a teacher_model"
        )
    if objective.method == "sampled" and kind not in _DRAWS:
        raise ValueError(
            f"method 'sampled' needs a store of draws, captured with select='sample' or 'mixed', got one of "
            f"{kind!r}: use method 'kd', or pass a teacher_model"
        )
    drawn = selection.get("source", {}).get("kind") if kind == "translated" else kind
    if drawn in _DRAWS and objective.temperature != 1:
        raise ValueError(
            f"temperature must be 1 with a store of select={drawn!r}, whose rows are shares of draws at temperature "
            f"1, got {objective.temperature}; capture the largest logits to train at another temperature"
        )
    if kind == "top_logprobs" and objective.rest is None and options["rest"] == "renorm":
        raise ValueError(
            "rest must be chosen with a store of a server's answers, whose few kept ids would be all that the teacher "
            "allows under the default 'renorm', got None: set rest='ghost', or 'renorm' if that is meant"
        )
    if kind == "translated":
        _check_rest_of_translated(store, objective)
    wanted = f"temperatures=(1.0, {objective.temperature}), or use rest='renorm'"
    if kind == "top_logprobs":
        advice = "a server tells its rows at temperature 1 alone, so set temperature=1, or rest='renorm_both'"
    elif store.settings.hidden is None:
        advice = f"capture the teacher with {wanted}"
    else:
        # Rows of hidden states are made for any temperature.
        advice = f"open it as a Store with {wanted}"
    if options["rest"] in ("zero", "ghost") and not any(
        math.isclose(temperature, objective.temperature, rel_tol=1e-6) for temperature in store.temperatures
    ):
        raise ValueError(
            f"temperature={objective.temperature} is not among the teacher's temperatures={store.temperatures} of "
            f"{store.path}, which rest={options['rest']!r} reads; {advice}"
        )


def _check_rest_of_translated(store: Store, objective: SlimObjective) -> None:
    """Refuses a rest that a translated store gives no meaning to, and warns of one that is seldom meant."""
    rest = objective.loss_options["rest"]
    if rest == "ghost":
        return
    lost = f"the teacher's mass on tokens that the student does not have is in the rest of every row of {store.path}"
    if objective.rest is None or rest == "zero_logit":
        got = "None" if objective.rest is None else f"{rest!r}"
        raise ValueError(f"rest must be 'ghost' with a translated store, got {got}: {lost}")
    logger.warning("rest=%r ignores a part of the teacher, rest='ghost' does not: %s", rest, lost)


def _check_one_batch(sources: list[Store | StoreDataset]) -> None:
    """Checks that documents of all sources can be in one batch."""
    kinds = set()
    for source in sources:
        store = source.store if isinstance(source, StoreDataset) else source
        is_packed = isinstance(source, StoreDataset) and source.packed
        kinds.add((source.temperatures, is_packed, *(packed_kind(store) if is_packed else ("none", 0, None))))
    for name, values in zip(
        ("temperatures", "packed", "codec", "vocab_size", "head"), map(set, zip(*kinds, strict=True)), strict=False
    ):
        if len(values) > 1:
            advice = (
                "capture them alike" if name == "temperatures" else "open them with StoreDataset(path, packed=False)"
            )
            raise ValueError(
                f"stores that are trained on together must share {name}, as a batch holds documents of all, got "
                f"{sorted(values)}: {advice}"
            )
