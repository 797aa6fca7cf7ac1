"""``decode_logits``: the ids and logits of packed rows, made where they are used."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.ops._library import check_kernels, define
from slimkernels.packed_logits import PackedLogits
from slimkernels.sparse_logits import SparseLogits


def decode_logits(packed: PackedLogits) -> SparseLogits:
    """``ids`` from their Elias-Fano words and ``logits = zero + scale * values``, exactly as the store decodes them.

    With bitmap and low fields as in slimkernels/store/FORMAT.md, equivalent for every row to::

        bits = bitmap.nonzero()[:, 0]  # b_j, the place of the j-th set bit
        ids = ((bits - torch.arange(top_k)) << low_bits) | low
        logits = zero + scale * values.float()

    A row of K = 1600 ids out of 32000 takes 2.9 KB packed and 12.8 KB decoded, so packed rows are what a batch copies
    to a GPU.

    Args:
        packed: N rows, of ``Store.packed`` or ``PackedLogits.cat``, on the device that is to hold the result.

    Returns:
        SparseLogits with ids (N, K) int32 and logits (N, K) float32, rows of fewer than K entries padded with id -1 and
        logit 0, and the other fields of ``packed`` as they are.

    Raises:
        ValueError: cpu: a row whose ids no store holds: not laid out inside its words, with a bit too many or too few,
            or not ascending inside [0, V). cuda: such a row's ids are all -2, which is neither an id nor padding, and
            its logits NaN, so that every op that reads the row makes it NaN. Rows of a store were checked when they
            were read. No bytes whatever make the op read or write outside its tensors.

    Supports: cpu and cuda x (uint8, bfloat16, float32) x no backward x deterministic. On cuda nothing waits for the
    device, so that a graph can capture it.

    Precision: exact. Scales of a store have 16 significant bits, so every device returns the same bits.

    References: Elias 1974, "Efficient storage and retrieval by content and address of static files"; Vigna 2013,
    "Quasi-succinct indices" (arXiv:1206.4300).

    >>> words = torch.tensor([[0x5E, 0x93]], dtype=torch.int32)
    >>> packed = PackedLogits(words, torch.tensor([[1.0, 4.0, 2.0, 3.0]]), lse=torch.full((1, 1), 5.0), vocab_size=20)
    >>> decode_logits(packed).ids.tolist()
    [[2, 3, 9, 17]]
    """
    check_kernels(packed.values, "packed")
    operands = (packed.id_words, packed.values, packed.affine, packed.counts)
    ids, logits = torch.ops.slimkernels.decode_logits(
        *(None if operand is None else operand.contiguous() for operand in operands), packed.vocab_size
    )
    return SparseLogits(ids, logits, packed.lse, packed.temperatures, packed.target_logit)


def _decode_logits(id_words: Tensor, values: Tensor, affine: Tensor | None, counts: Tensor | None, vocab_size: int):
    outputs = _fake(id_words, values, affine, counts, vocab_size)
    fault = torch.ops.slimkernels.decode_logits_rows(id_words, values, affine, counts, vocab_size, *outputs)
    if fault != 0:
        raise ValueError(
            f"row {fault // 4} of packed holds no ids of a vocabulary of {vocab_size} as a store writes them: its "
            "counts or id_words are damaged, or were packed for another vocabulary or number of entries"
        )
    return outputs


def _fake(id_words: Tensor, values: Tensor, affine: Tensor | None, counts: Tensor | None, vocab_size: int):
    return torch.empty_like(values, dtype=torch.int32), torch.empty_like(values, dtype=torch.float32)


define(
    "decode_logits_rows(Tensor id_words, Tensor values, Tensor? affine, Tensor? counts, int vocab_size,"
    " Tensor(a!) ids, Tensor(b!) logits) -> int",
    fake=lambda *_args: 0,
    triton_module="slimkernels.ops.triton.decode_logits",
)
define(
    "decode_logits(Tensor id_words, Tensor values, Tensor? affine, Tensor? counts, int vocab_size)"
    " -> (Tensor ids, Tensor logits)",
    fake=_fake,
    implementation=_decode_logits,
)
