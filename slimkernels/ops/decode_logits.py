"""``decode_logits``: decodes the ids and logits of packed rows on the device where they are used."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from slimkernels.ops._library import check_kernels, define
from slimkernels.ops.linear_topk_logits import linear_topk_logits
from slimkernels.packed_logits import PackedHidden, PackedLogits, clear_empty_rows
from slimkernels.sparse_logits import SparseLogits


def decode_logits(packed: PackedLogits | PackedHidden) -> SparseLogits:
    """Decodes ``ids`` from Elias-Fano words and ``logits = zero + scale * values``, exactly as the store does.

    Rows that are hidden states are ``linear_topk_logits`` of them and of the teacher's head, in the head's dtype; all
    that follows is about packed logits.

    Equivalent for every row, with bitmap and low fields as in slimkernels/store/FORMAT.md, to::

        bits = bitmap.nonzero()[:, 0]  # b_j, the position of the j-th set bit
        ids = ((bits - torch.arange(top_k)) << low_bits) | low
        logits = zero + scale * values.float()

    A row of K = 1600 ids out of 32000 takes 2.9 KB packed and 12.8 KB decoded, so it is cheaper to copy packed rows to
    a GPU and decode them there.

    Args:
        packed: N rows from ``Store.packed`` or ``PackedLogits.cat``, on the device where the result is wanted.

    Returns:
        SparseLogits with ids (N, K) int32 and logits (N, K) float32. Rows of fewer than K entries are padded with id
        -1 and logit 0; those that were stored without entries consist of padding. The other fields are those of
        ``packed``.

    Raises:
        ValueError: On cpu, a damaged row: it does not fit into its words, has a bit too many or too few, or its ids do
            not ascend inside [0, V). On cuda nothing is raised; such a row gets ids -2, which are neither ids nor
            padding, and logits NaN, so that every op that reads the row returns NaN for it. Rows of a store were
            checked when they were read. No input makes the op read or write outside its tensors.

    Supports: cpu and cuda x (uint8, bfloat16, float32) x no backward x deterministic. On cuda the host never waits for
    the device, so the op can be captured in a graph.

    Precision: exact. Scales of a store have 16 significant bits, so all devices return the same bits.

    References: Elias 1974, "Efficient storage and retrieval by content and address of static files"; Vigna 2013,
    "Quasi-succinct indices" (arXiv:1206.4300).

    >>> words = torch.tensor([[0x5E, 0x93]], dtype=torch.int32)
    >>> packed = PackedLogits(words, torch.tensor([[1.0, 4.0, 2.0, 3.0]]), lse=torch.full((1, 1), 5.0), vocab_size=20)
    >>> decode_logits(packed).ids.tolist()
    [[2, 3, 9, 17]]
    """
    if isinstance(packed, PackedHidden):
        return _rows_of_hidden(packed)
    if not isinstance(packed, PackedLogits):
        raise TypeError(
            f"packed must be a PackedLogits or PackedHidden, as Store.packed returns, got {type(packed).__name__}"
        )
    check_kernels(packed.values, "packed")
    operands = (packed.id_words, packed.values, packed.affine, packed.counts)
    ids, logits = torch.ops.slimkernels.decode_logits(
        *(None if operand is None else operand.contiguous() for operand in operands), packed.vocab_size
    )
    clear_empty_rows(ids, logits)
    return SparseLogits(ids, logits, packed.lse, packed.temperatures, packed.target_logit, packed.rest_lse)


def _rows_of_hidden(packed: PackedHidden) -> SparseLogits:
    head = packed.head.on(packed.device)
    rows = linear_topk_logits(
        packed.hidden(head.weight.dtype),
        head.weight,
        packed.top_k,
        bias=head.bias,
        target=packed.target,
        temperatures=packed.temperatures,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )
    return dataclasses.replace(rows, logits=rows.logits.float())


def _decode_logits(id_words: Tensor, values: Tensor, affine: Tensor | None, counts: Tensor | None, vocab_size: int):
    outputs = _fake(id_words, values, affine, counts, vocab_size)
    fault = torch.ops.slimkernels.decode_logits_rows(id_words, values, affine, counts, vocab_size, *outputs)
    if fault != 0:
        raise ValueError(
            f"row {fault // 4} of packed holds no valid ids of a vocabulary of {vocab_size}: its counts or id_words "
            "are damaged, or were packed for another vocabulary size or number of entries"
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
