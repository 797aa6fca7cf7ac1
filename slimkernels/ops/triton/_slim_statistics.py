"""The statistics of a row of slim_loss that are computed only where they are asked for."""

from __future__ import annotations

import triton
import triton.language as tl

from slimkernels.ops.triton._math import order_keys
from slimkernels.ops.triton._select import largest_key, load_entries, select_key
from slimkernels.ops.triton._slim_passes import teacher_logits
from slimkernels.ops.triton._slim_terms import unit_logits
from slimkernels.ops.triton._teacher import log_q_tail_of, teacher_q_norm


@triton.jit
def store_statistics(
    stats_ptr, num_rows, row, teacher, target, student_sums, teacher_sums, temperature, MODE: tl.constexpr
):
    """Computes the statistics of a row after ``lse``, and stores each into its row of ``stats``."""
    lse_one = student_sums.lse_one
    lowest = order_keys(tl.full((), float("-inf"), row.ptr.dtype.element_ty))
    highest = largest_key(row.ptr, row.vocab_size, row.vocab_size, lowest, MODE.block_v)
    argmax = first_with_key(row, highest, MODE)
    zero = tl.full((), 0.0, tl.float64)
    # All are NaN where the log-sum-exp is.
    nan = tl.where(lse_one == lse_one, 0.0, lse_one)
    teacher_entropy = zero
    argmax_kept = zero
    surer = zero
    shared = zero
    if MODE.has_teacher:
        teacher_entropy = entropy_of_teacher(teacher, teacher_sums, temperature, row.vocab_size, MODE)
        argmax_kept += is_kept(teacher, argmax, MODE)
        surer = tl.where(teacher_sums.log_t_y > student_sums.log_s_y, 1.0, zero)
        if MODE.statistics == "all":
            shared = overlap(row, teacher, lowest, highest, MODE)
    step = tl.full((), num_rows, tl.int64)
    tl.store(stats_ptr + 7 * step, entropy_of_student(row, argmax, lse_one, MODE) + nan)
    tl.store(stats_ptr + 8 * step, teacher_entropy + nan)
    tl.store(stats_ptr + 9 * step, argmax_kept + nan)
    tl.store(stats_ptr + 10 * step, tl.where(argmax == target, 1.0, zero) + nan)
    tl.store(stats_ptr + 11 * step, surer + nan)
    if MODE.statistics == "all":
        tl.store(stats_ptr + 12 * step, shared + nan)


@triton.jit
def fill_statistics(stats_ptr, num_rows, value, MODE: tl.constexpr):
    """Fills the statistics after ``lse`` of a row that is ignored or faulty."""
    END: tl.constexpr = 13 if MODE.statistics == "all" else 12
    step = tl.full((), num_rows, tl.int64)
    for i in tl.static_range(7, END):
        tl.store(stats_ptr + i * step, value)


@triton.jit
def first_with_key(row, key, MODE: tl.constexpr):
    """Returns the first index of a row's logit with an order key."""
    first = tl.full((MODE.block_v,), row.vocab_size, tl.int32)
    for begin in tl.range(0, row.vocab_size, MODE.block_v):
        v = begin + tl.arange(0, MODE.block_v)
        found = order_keys(load_entries(row.ptr, v, row.vocab_size, row.vocab_size)) == key
        first = tl.minimum(first, tl.where(found & (v < row.vocab_size), v, row.vocab_size))
    return tl.min(first)


@triton.jit
def is_kept(teacher, index, MODE: tl.constexpr):
    """Returns 1 where an index is among the teacher's ids, else 0."""
    found = 0
    for begin in range(0, teacher.kept, MODE.block_k):
        k = begin + tl.arange(0, MODE.block_k)
        found += tl.sum((tl.load(teacher.ids_ptr + k, mask=k < teacher.kept, other=-1) == index).to(tl.int32))
    return found


@triton.jit
def entropy_of_student(row, argmax, lse_one, MODE: tl.constexpr):
    """Computes the entropy at temperature 1 as the sum of s * -log s, of which no term is negative."""
    level = unit_logits(row, argmax, argmax >= 0, MODE, "")
    # log s = (y - level) * unit - offset, where the first term is exact near the largest logit.
    offset = (lse_one - level * row.unit).to(MODE.acc)
    terms = tl.full((MODE.block_v,), 0.0, MODE.acc)
    for begin in tl.range(0, row.vocab_size, MODE.block_v, num_stages=4):
        v = begin + tl.arange(0, MODE.block_v)
        y = unit_logits(row, v, v < row.vocab_size, MODE, "evict_last")
        minus_log_s = offset - (y - level) * row.unit.to(MODE.acc)
        s = tl.exp(-minus_log_s)
        terms += tl.where(s == 0, 0.0, s * minus_log_s)
    entropy = tl.sum(terms.to(tl.float64))
    return tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def entropy_of_teacher(teacher, teacher_sums, temperature, vocab_size, MODE: tl.constexpr):
    """Computes the entropy of the outcomes of "ghost", whatever ``rest`` is."""
    GHOST: tl.constexpr = "ghost"
    lse_on = teacher_sums.lse_on
    q_norm = teacher_q_norm(lse_on, teacher_sums.lse, teacher_sums.rest_lse, teacher.kept, vocab_size, GHOST)
    offset = (q_norm - teacher_sums.level / temperature).to(MODE.acc)
    entropy = tl.full((), 0.0, tl.float64)
    for begin in range(0, teacher.kept, MODE.block_k):
        logits = teacher_logits(teacher, begin + tl.arange(0, MODE.block_k), MODE)
        minus_log_q = offset - (logits - teacher_sums.level) * teacher.inv_temperature
        q = tl.exp(-minus_log_q)
        entropy += tl.sum(tl.where(q == 0, 0.0, q * minus_log_q).to(tl.float64))
    log_q_tail = log_q_tail_of(lse_on, teacher_sums.lse, teacher_sums.rest_lse, q_norm, teacher.kept, vocab_size)
    q_tail = tl.exp(log_q_tail)
    entropy -= tl.where(q_tail == 0, 0.0, q_tail * log_q_tail)
    return tl.where(entropy < 0, 0.0, entropy)


@triton.jit
def overlap(row, teacher, lowest, highest, MODE: tl.constexpr):
    """Computes the share of the K kept ids that are among the row's K largest logits, equal ones by ascending index."""
    size = row.vocab_size
    kept = teacher.kept
    kth, reaching, above = select_key(row.ptr, size, size, lowest, highest, kept, kept, MODE.acc, MODE.block_v)
    # If the bisection stopped at exactly K entries, all that equal the key count.
    last = tl.full((), size, tl.int32)
    if reaching != kept:
        last = index_of_tie(row, kth, kept - above, MODE)
    shared = 0
    for begin in range(0, kept, MODE.block_k):
        k = begin + tl.arange(0, MODE.block_k)
        ids = tl.load(teacher.ids_ptr + k, mask=k < kept, other=0)
        keys = order_keys(load_entries(row.ptr, ids, size, size))
        counts = (keys > kth) | ((keys == kth) & (ids <= last))
        shared += tl.sum((counts & (k < kept)).to(tl.int32))
    return shared.to(tl.float64) / tl.maximum(kept, 1)


@triton.jit
def index_of_tie(row, key, rank, MODE: tl.constexpr):
    """Returns the index of the rank-th logit with an order key, of which there are as many (rank 1 is the first)."""
    last = tl.full((), -1, tl.int32)
    seen = tl.full((), 0, tl.int32)
    for begin in range(0, row.vocab_size, MODE.block_v):
        v = begin + tl.arange(0, MODE.block_v)
        tied = (order_keys(load_entries(row.ptr, v, row.vocab_size, row.vocab_size)) == key) & (v < row.vocab_size)
        up_to = seen + tl.cumsum(tied.to(tl.int32))
        last = tl.maximum(last, tl.max(tl.where(tied & (up_to <= rank), v, -1)))
        seen += tl.sum(tied.to(tl.int32))
    return last
