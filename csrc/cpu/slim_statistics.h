// The statistics of a row of slim_loss that are computed only where they are asked for: entropies, the student's first
// choice, and its overlap with the kept ids.
#pragma once

#include "dispatch.h"
#include "exponentials.h"
#include "select.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// Returns the entropy of the distribution e / total.sum, where e = exp(x - total.level) or 0. `e` is padded to whole
// vectors.
template <class X, class A>
double entropy_of(const X* x, const A* e, int64_t count, ExpSum total) {
  using Vec = typename Lanes<A>::Vec;
  constexpr int kWidth = Lanes<A>::kWidth;
  if (total.sum == 0) return 0;
  // Terms of e * (log(sum) - (x - level)), of which none is negative.
  const A level = A(total.level), log_sum = A(__builtin_log(total.sum));
  const auto term = [&](Vec logit, Vec power) {
    return select(power == Vec{}, Vec{}, power * (log_sum - (logit - level)));
  };
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = count - begin < kBlock ? count : begin + kBlock;
    Vec sums[4] = {};  // independent, so that additions overlap
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      for (int j = 0; j < 4; ++j) sums[j] += term(load(x + i + j * kWidth), load(e + i + j * kWidth));
    }
    for (; i + kWidth <= end; i += kWidth) sums[0] += term(load(x + i), load(e + i));
    if (i < end) sums[0] += term(load_part(x + i, end - i, -infinity<A>()), load(e + i));
    sum += sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return sum / total.sum;
}

template <class X, class A = typename Acc<X>::type>
SK_INLINE auto row_keys(const X* row, int64_t i, int64_t count) {
  return order_keys(i + Lanes<A>::kWidth <= count ? load(row + i) : load_part(row + i, count - i, -infinity<A>()));
}

// Returns the index of the rank-th of the elements with a key, of which there are as many (rank 1 is the first).
template <class X, class Key>
int64_t index_of_key(const X* row, int64_t count, Key key, int64_t rank) {
  constexpr int kWidth = Lanes<typename Acc<X>::type>::kWidth;
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t found = SK_ISA::count(equal(row_keys(row, i, count), key));
    if (found < rank) {
      rank -= found;
      continue;
    }
    for (; rank > 0; ++i) rank -= order_key(load_one(row + i)) == key;
    return i - 1;
  }
  return 0;
}

// Returns the index of the first of the largest elements, any where one is NaN.
template <class X>
int64_t argmax(const X* row, int64_t count) {
  using A = typename Acc<X>::type;
  using Vec = typename Lanes<A>::Vec;
  constexpr int kWidth = Lanes<A>::kWidth;
  A best = -infinity<A>();
  int64_t best_block = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = count - begin < kBlock ? count : begin + kBlock;
    const Vec lowest = Vec{} - infinity<A>();
    Vec most[4] = {lowest, lowest, lowest, lowest};
    int64_t i = begin;
    for (; i + 4 * kWidth <= end; i += 4 * kWidth) {
      for (int j = 0; j < 4; ++j) most[j] = max(load(row + i + j * kWidth), most[j]);
    }
    for (; i + kWidth <= end; i += kWidth) most[0] = max(load(row + i), most[0]);
    if (i < end) most[0] = max(load_part(row + i, end - i, -infinity<A>()), most[0]);
    const A found = max_lanes(max(max(most[0], most[1]), max(most[2], most[3])));
    if (found > best) {
      best = found;
      best_block = begin;
    }
  }
  for (int64_t i = best_block; i < count; ++i) {
    if (load_one(row + i) == best) return i;
  }
  return 0;
}

// Returns the share of the ids that are among the `kept` largest of the row, equal elements by ascending index. `keys`
// is overwritten.
template <class X>
SK_NOINLINE double overlap(const X* row, int64_t vocab_size, const int32_t* ids, int64_t kept,
                           typename Lanes<typename Acc<X>::type>::Key* keys) {
  using A = typename Acc<X>::type;
  constexpr int kWidth = Lanes<A>::kWidth;
  if (kept == 0) return 0;
  for (int64_t i = 0; i < vocab_size; i += kWidth) {
    store_raw(keys + i, row_keys(row, i, vocab_size));
  }
  const auto kth = select_key(keys, vocab_size, kept);
  int64_t ties = kept;
  for (int64_t i = 0; i < vocab_size; i += kWidth) ties -= count(above(row_keys(row, i, vocab_size), kth));
  const int64_t last = index_of_key(row, vocab_size, kth, ties);
  int64_t shared = 0;
  for (int64_t k = 0; k < kept; ++k) {
    const auto key = order_key(load_one(row + ids[k]));
    shared += key > kth || (key == kth && ids[k] <= last);
  }
  return double(shared) / kept;
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
