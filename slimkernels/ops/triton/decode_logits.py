"""The Triton kernel of ``decode_logits``: one program per row, which decodes a few words of the bitmap at a time.

The code is Elias-Fano as in Vigna 2013, "Quasi-succinct indices" (arXiv:1206.4300), laid out as in store/FORMAT.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slimkernels.ops.triton import launch
from slimkernels.ops.triton._math import widen
from slimkernels.ops.triton._teacher import kept_entries

# Neither an id nor padding, so that every op that reads the row recognises it as broken.
BROKEN_ID = tl.constexpr(-2)


@triton.jit
def decode_logits_kernel(
    id_words_ptr,  # (N, W) int32
    values_ptr,  # (N, K)
    affine_ptr,  # (N, 2) or None
    counts_ptr,  # (N,) or None
    ids_ptr,  # (N, K)
    logits_ptr,  # (N, K)
    num_words,
    top_k,
    vocab_size,
    BLOCK: tl.constexpr,
):
    """Scatters an id for every set bit of a row's bitmap, checks the ids and writes the logits; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    id_words_ptr += row * num_words
    values_ptr += row * top_k
    ids_ptr += row * top_k
    logits_ptr += row * top_k
    offs = tl.arange(0, BLOCK)
    count = tl.full((), top_k, tl.int32)
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)

    low_bits, low_words, high_words, high_bits = row_layout(count, vocab_size)
    sound = (count >= 1) & (count <= top_k) & (low_words + high_words <= num_words)
    # A row that does not fit into its words is treated as empty, so that nothing outside them is read.
    count = tl.where(sound, count, 0)
    high_words = tl.where(sound, high_words, 0)
    high_ptr = id_words_ptr + low_words
    sound &= rest_is_zero(id_words_ptr, low_words, count * low_bits, sound)
    sound &= rest_is_zero(high_ptr, high_words, high_bits, sound)

    ones = 0
    for begin in range(0, high_words, BLOCK // 32):
        ones += scatter_ids(id_words_ptr, high_ptr, ids_ptr, begin, high_words, ones, count, low_bits, BLOCK // 32)
    for begin in range(0, top_k, BLOCK):
        k = begin + offs
        tl.store(ids_ptr + k, -1, mask=(k >= count) & (k < top_k))
    # Threads now read ids that other threads stored.
    tl.debug_barrier()
    broken = ~sound | (ones != count) | (kept_entries(ids_ptr, top_k, vocab_size, BLOCK) != count)

    for begin in range(0, top_k, BLOCK):
        k = begin + offs
        logits = widen(tl.load(values_ptr + k, mask=k < count, other=0), tl.float32)
        if affine_ptr is not None:
            logits = tl.load(affine_ptr + 2 * row + 1) + tl.load(affine_ptr + 2 * row) * logits
        logits = tl.where(k < count, logits, 0.0)
        # Raising would need a sync, so broken rows become NaN. The check is complete only after all ids were read.
        tl.store(logits_ptr + k, tl.where(broken, float("nan"), logits), mask=k < top_k)
        tl.store(ids_ptr + k, BROKEN_ID, mask=k < tl.where(broken, top_k, 0))


@triton.jit
def row_layout(count, vocab_size):
    """Returns the number of low bits of an id, of words of the low part, and of words and bits of the bitmap."""
    last_id = tl.full((), vocab_size, tl.int32) - 1
    per_entry = (last_id + 1) // tl.maximum(count, 1)
    low_bits = tl.maximum(tl.sum(((per_entry >> tl.arange(0, 32)) > 0).to(tl.int32)) - 1, 0)
    high_bits = count.to(tl.int64) + (last_id >> low_bits) + 1
    return low_bits, (count * low_bits + 31) // 32, ((high_bits + 31) // 32).to(tl.int32), high_bits


@triton.jit
def rest_is_zero(words_ptr, num_words, used_bits, sound):
    """Returns whether the unused bits of the last word are 0."""
    tail = (used_bits % 32).to(tl.uint32)
    last = tl.load(words_ptr + num_words - 1, mask=sound & (tail > 0), other=0).to(tl.uint32, bitcast=True)
    return (last >> tail) == 0


@triton.jit
def scatter_ids(
    id_words_ptr, high_ptr, ids_ptr, begin, high_words, ones_before, count, low_bits, BLOCK_WORDS: tl.constexpr
):
    """Stores the ids of the set bits in words [begin, begin + BLOCK_WORDS) of the bitmap and returns their number.

    The j-th set bit, at position b, encodes the id ((b - j) << low_bits) | low_j.
    """
    offs_w = begin + tl.arange(0, BLOCK_WORDS)
    words = tl.load(high_ptr + offs_w, mask=offs_w < high_words, other=0).to(tl.uint32, bitcast=True)
    in_word = popcount(words)
    first = ones_before + tl.cumsum(in_word) - in_word
    bit = tl.arange(0, 32).to(tl.uint32)[None, :]
    words = words[:, None]
    j = first[:, None] + popcount(words & ((1 << bit) - 1))
    kept = (((words >> bit) & 1) != 0) & (j < count)
    # Unsigned, because in a malicious row high << low_bits can exceed 2^31 (never 2^32).
    high = offs_w.to(tl.uint32)[:, None] * 32 + bit - j.to(tl.uint32)
    ids = (high << low_bits.to(tl.uint32)) | low_field(id_words_ptr, j, low_bits, kept)
    tl.store(ids_ptr + j, ids.to(tl.int32, bitcast=True), mask=kept)
    return tl.sum(in_word)


@triton.jit
def low_field(words_ptr, j, low_bits, mask):
    """Returns the j-th field of ``low_bits`` bits, which lies in one word or two; 0 if low_bits is 0."""
    begin = j * low_bits
    offset = (begin & 31).to(tl.uint32)
    word = tl.load(words_ptr + (begin >> 5), mask=mask, other=0).to(tl.uint32, bitcast=True)
    straddles = offset + low_bits > 32
    following = tl.load(words_ptr + (begin >> 5) + 1, mask=mask & straddles, other=0).to(tl.uint32, bitcast=True)
    # Shifted in two steps, because a shift by 32 is undefined.
    field = (word >> offset) | ((following << 1) << (31 - offset))
    return field & ((tl.full((), 1, tl.uint32) << low_bits.to(tl.uint32)) - 1)


@triton.jit
def popcount(x):
    """Counts the set bits of every uint32; LLVM recognises this form and compiles it to one instruction."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


def decode_logits_rows(
    id_words: Tensor,
    values: Tensor,
    affine: Tensor | None,
    counts: Tensor | None,
    vocab_size: int,
    ids: Tensor,
    logits: Tensor,
) -> int:
    """Launches the kernel. Returns 0 (no fault) always, because reading faults back would need a sync."""
    num_rows, top_k = values.shape
    # The settings depend on the number of entries per row, which takes the place of the vocabulary size.
    settings = launch.settings_of("decode_logits", logits)
    launch.run(
        decode_logits_kernel,
        num_rows,
        settings,
        logits,
        id_words,
        values,
        affine,
        counts,
        ids,
        logits,
        id_words.shape[1],
        top_k,
        vocab_size,
        # The bitmap has 2 to 3 bits per entry; a block is at least two of its words.
        BLOCK=max(launch.block_of(settings, 2 * top_k), 64),
    )
    return 0
