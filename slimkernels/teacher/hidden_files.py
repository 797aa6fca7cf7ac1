"""``capture_hidden``: hidden states that a server has written to files, and the teacher's head, into a store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimkernels.models.evaluation import evaluation_mode
from slimkernels.models.final_layers import final_norm
from slimkernels.models.fingerprints import weights_fingerprint
from slimkernels.models.head import LanguageModelHead, output_embeddings
from slimkernels.ops.topk_logits import topk_logits
from slimkernels.sparse_logits import SparseLogits
from slimkernels.store import Store, StoreWriter
from slimkernels.store.hidden import HIDDEN_BITS
from slimkernels.teacher.added_documents import AddedDocuments
from slimkernels.teacher.corpus import TokenizedDocument
from slimkernels.teacher.selection import Selection, check_keeps_hidden, resolve_selection
from slimkernels.teacher.server import capture_server
from slimkernels.teacher.vocabulary import CapturedVocabulary, captured_vocabulary

# Names of the tensors that vLLM's ExampleHiddenStatesConnector writes.
_HIDDEN, _TOKENS = "hidden_states", "token_ids"
_CHECKED_TOKENS, _CHECKED_IDS = 16, 20
# Mean divergence in nats up to which a layer is the head's input. Engines that compute in bfloat16 differ by less than
# 0.01, and another layer or model by much more.
_LARGEST_DIVERGENCE = 0.05
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HiddenReport(NamedTuple):
    """The result of one call of ``capture_hidden``.

    Attributes:
        documents: Documents added to the store.
        tokens: Tokens in them.
        skipped: Documents that were in the store already, or have no label.
        layer: Index of the layer in the files that the head's input was made of; None where no document was missing.
        norm_applied: Whether the layer was written before the final norm, which was applied here.
    """

    documents: int
    tokens: int
    skipped: int
    layer: int | None
    norm_applied: bool


class _HeadInput(NamedTuple):
    """The way from the layers of a file to the input of the head."""

    layer: int
    num_layers: int
    norm: nn.Module | None

    @torch.inference_mode()
    def __call__(self, layers: Tensor, weight: Tensor) -> Tensor:
        """Returns (T, D) of (T, L, D), in the dtype and on the device of the head's weight."""
        hidden = layers[:, self.layer].to(weight.device, weight.dtype)
        return hidden if self.norm is None else self.norm(hidden)


def capture_hidden(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    store_path: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    top_fraction: float | None = None,
    temperatures: Sequence[float] = (1.0,),
    codec: str = "affine8",
    server: str | None = None,
    server_model: str | None = None,
    shard_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HiddenReport:
    """Adds the documents of files of hidden states to a store, with the kept logits of every token but the first.

    Equivalent to, for a file with the ``token_ids`` (T,) and the layer ``hidden_states[:, layer]`` (T, D)::

        hidden = norm(hidden_states[:-1, layer])  # without norm where the layer was written after it
        rows = linear_topk_logits(hidden, head.weight, top_k, top_fraction, target=token_ids[1:], ...)
        writer.add(token_ids, torch.arange(1, T), rows)

    The files are those of vLLM's ``ExampleHiddenStatesConnector``: one ``.safetensors`` file per request, with the
    tensors ``hidden_states`` (T, L, D), of L layers, and ``token_ids`` (T,). vLLM writes the output of the last layer,
    before the final norm, where ``eagle_aux_hidden_state_layer_ids`` holds the number of the model's layers.

    The files say neither which layers they hold nor whether the final norm was applied. Both are found by comparing the
    logits that each possibility gives for the first 16 tokens of a document with those of the model itself, or with the
    log-probabilities of a server. That also shows another model, tokenizer or revision. Files are read in the order of
    their names; documents that are in the store are skipped, so the same call continues after a kill.

    Args:
        folder: Folder of the files.
        model: The teacher. With ``server`` it needs weights for its final norm and head alone, as from
            ``load_final_layers``. Rows of the head beyond the tokenizer's ids are left out.
        tokenizer: The teacher's tokenizer; its fingerprint goes into the store. With None the store has no fingerprint,
            and every row of the head counts.
        store_path: New directory, or a store made with the same settings.
        top_k: K, the number of entries to keep of every row.
        top_fraction: K as a share of the vocabulary; 0.05 if neither this nor ``top_k`` is given.
        temperatures: Temperatures at which the log-sum-exp of the whole row is kept; 1.0 is always the first.
        codec: Codec of the store; "hidden16" and "hidden8" keep the input of the head and the head.
        server: Base URL of a server that scores one document, such as the one that wrote the files; it needs a
            tokenizer.
        server_model: The server's name for the model; by default that of ``model``.
        shard_rows: Rows at which a shard is full, the same as in ``StoreWriter``.
        progress: Called as progress(documents, tokens) after each document, with the totals so far, skipped documents
            included.

    Returns:
        HiddenReport.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no ``.safetensors`` file.
        ValueError: A file is not one of hidden states, a token id is outside the vocabulary, no layer gives the logits
            of the model or server, an argument is out of range, or the model's weights are not there and no server is
            given.
        FloatingPointError: Hidden states or logits are not finite.
        SettingsMismatchError: The store was made with another teacher, tokenizer, selection or codec.
        ServerRequestError, ServerUnavailableError: The server did not score the document.
    """
    if server is not None and tokenizer is None:
        raise ValueError("server needs the tokenizer of the teacher, got tokenizer=None")
    files = _files(folder)
    head = LanguageModelHead.of(model)
    vocabulary = captured_vocabulary(tokenizer, head.vocab_size, store_path)
    head = head.first_rows(vocabulary.size)
    selection = resolve_selection(
        "top_k", vocabulary.size, temperatures=temperatures, top_k=top_k, top_fraction=top_fraction
    )
    kept: dict[str, Any] = {}
    if codec in HIDDEN_BITS:
        check_keeps_hidden(selection, codec)
        kept = {"head": head.weights(), "top_k": selection.top_k}
    norm = final_norm(model)
    with StoreWriter(
        store_path,
        vocab_size=vocabulary.size,
        tokenizer_fingerprint=vocabulary.fingerprint,
        teacher=_describe(model, norm, head),
        selection=selection.description,
        temperatures=selection.temperatures,
        codec=codec,
        shard_rows=shard_rows,
        **kept,
    ) as writer:
        added, short, head_input = AddedDocuments(writer, progress), 0, None
        for number, file in enumerate(files):
            with _open(file) as opened:
                ids = _token_ids(opened, file)
                if len(ids) < 2:
                    short += 1
                    continue
                vocabulary.check(ids, number)
                rows = None
                if ids not in writer:
                    layers = _layers(opened, file, len(ids), head.weight.shape[1])
                    if head_input is None:
                        expected = _expected(ids, model, vocabulary, tokenizer, server, server_model)
                        head_input = _find_head_input(layers, head, norm, expected, file)
                    if layers.shape[1] != head_input.num_layers:
                        raise ValueError(
                            f"{_HIDDEN} in {file} must have {head_input.num_layers} layers, as in the file in which "
                            f"the input of the head was found, got {layers.shape[1]}: capture the files of another "
                            "configuration of the server from a folder of their own"
                        )
                    hidden = head_input(layers, head.weight)[:-1]
                    if not torch.isfinite(hidden).all():
                        raise FloatingPointError(f"the hidden states in {file} are not finite")
                    rows = hidden if kept else _rows(selection, head, hidden, ids)
                added.add(ids, rows)
                added.show_progress()
    layer = None if head_input is None else head_input.layer
    return HiddenReport(
        *added.report(without_label=short), layer, head_input is not None and head_input.norm is not None
    )


def _describe(model: PreTrainedModel, norm: nn.Module | None, head: LanguageModelHead) -> dict[str, Any]:
    final = nn.ModuleList([output_embeddings(model), *([] if norm is None else [norm])])
    return {
        "name": str(model.name_or_path),
        "model_type": model.config.model_type,
        "dtype": str(head.weight.dtype).removeprefix("torch."),
        # Those of the final layers, as the others computed the hidden states elsewhere.
        "weights": weights_fingerprint(final),
        "hidden_size": head.weight.shape[1],
    }


def _rows(selection: Selection, head: LanguageModelHead, hidden: Tensor, ids: TokenizedDocument) -> SparseLogits:
    labels = torch.tensor(ids.labels)
    return selection(head, hidden, torch.tensor(ids)[labels].to(hidden.device), [(ids, labels)])


def _files(folder: str | os.PathLike[str]) -> list[Path]:
    path = Path(folder).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise FileNotFoundError(f"hidden states not found: there is no .safetensors file in {path}")
    return files


def _open(file: Path) -> Any:
    try:
        opened = safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}): wait until the server has written it") from error
    names = set(opened.keys())
    if not {_HIDDEN, _TOKENS} <= names:
        raise ValueError(
            f"{file} must hold the tensors {_HIDDEN!r} and {_TOKENS!r}, as vLLM writes them, got {sorted(names)[:5]}"
        )
    return opened


def _token_ids(opened: Any, file: Path) -> TokenizedDocument:
    ids = opened.get_tensor(_TOKENS)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{_TOKENS} in {file} must be integers of shape (T,), got {tuple(ids.shape)} {ids.dtype}")
    return TokenizedDocument(ids.tolist())


def _layers(opened: Any, file: Path, num_tokens: int, hidden_size: int) -> Tensor:
    """Returns the hidden states of a document as (T, L, D)."""
    layers = opened.get_tensor(_HIDDEN)
    if layers.ndim == 2:
        layers = layers[:, None]
    if layers.ndim != 3 or layers.dtype not in _FLOATS or len(layers) != num_tokens or layers.shape[1] == 0:
        raise ValueError(
            f"{_HIDDEN} in {file} must have shape ({num_tokens}, L, D), a row per token, and dtype float32, bfloat16 "
            f"or float16, got {tuple(layers.shape)} {layers.dtype}"
        )
    if layers.shape[-1] != hidden_size:
        raise ValueError(
            f"{_HIDDEN} in {file} have size {layers.shape[-1]}, but the head reads {hidden_size}: give the head of the "
            "model that was served"
        )
    return layers


def _expected(
    ids: list[int],
    model: PreTrainedModel,
    vocabulary: CapturedVocabulary,
    tokenizer: PreTrainedTokenizerBase | None,
    server: str | None,
    server_model: str | None,
) -> SparseLogits:
    """Returns the largest logits (T - 1, K) after each of the first tokens of a document, from server or model."""
    ids = ids[:_CHECKED_TOKENS]
    if server is not None and tokenizer is not None:
        with tempfile.TemporaryDirectory() as scored:
            capture_server(
                server,
                server_model or str(model.name_or_path),
                tokenizer,
                f"{scored}/store",
                documents=[ids],
                top_logprobs=_CHECKED_IDS,
                vocab_size=vocabulary.size,
                codec="float32",
            )
            return Store(f"{scored}/store")[0].teacher
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the layer of the hidden states cannot be found with the head's weights alone: give a server that scores "
            "one document, or all weights of the model"
        )
    with torch.inference_mode(), evaluation_mode(model):
        read = torch.tensor([ids], device=model.device)
        logits = model(input_ids=read, use_cache=False).logits[0, :-1, : vocabulary.size]
    return topk_logits(logits.float(), min(_CHECKED_IDS, vocabulary.size)).to("cpu")


def _find_head_input(
    layers: Tensor, head: LanguageModelHead, norm: nn.Module | None, expected: SparseLogits, file: Path
) -> _HeadInput:
    """Returns the layer, and whether the norm is to be applied, whose logits are the expected ones.

    Raises:
        ValueError: There is none.
    """
    layers = layers[: len(expected)]
    # The last layer is the likeliest, as it is written; of equally good ways the first is taken.
    ways = [
        _HeadInput(layer, layers.shape[1], used)
        for layer in reversed(range(layers.shape[1]))
        for used in dict.fromkeys((norm, None))
    ]
    with torch.inference_mode():
        found = [_divergence(expected, head.logits(way(layers, head.weight)).float().cpu()) for way in ways]
    best = min(range(len(ways)), key=lambda number: found[number])
    if not found[best] <= _LARGEST_DIVERGENCE:
        raise ValueError(
            f"no layer of the hidden states in {file} gives the teacher's logits: the nearest, layer "
            f"{ways[best].layer} of {layers.shape[1]} {'with' if ways[best].norm is not None else 'without'} the final "
            f"norm, is {found[best]:.2g} nats away. Write the output of the last layer "
            "(eagle_aux_hidden_state_layer_ids with the number of layers), and give the head and the tokenizer of the "
            "model that was served"
        )
    return ways[best]


def _divergence(expected: SparseLogits, logits: Tensor) -> float:
    """Returns the mean KL of logits (N, V) from expected rows, over the kept ids and one bucket for all others."""
    is_kept = expected.ids >= 0
    log_p = (expected.logits.double() - expected.lse[:, :1].double()).masked_fill(~is_kept, -torch.inf)
    log_q = logits.double().log_softmax(-1).gather(-1, expected.ids.long().clamp(min=0))
    log_q = log_q.masked_fill(~is_kept, -torch.inf)
    terms = torch.where(is_kept & (log_p > -torch.inf), log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp(min=1e-9) for log in (log_p, log_q))
    divergence = float((terms + rest_p * (rest_p / rest_q).log()).mean())
    # NaN would be smaller than nothing.
    return divergence if divergence == divergence else torch.inf
