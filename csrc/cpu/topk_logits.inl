// Finds the K largest logits of a row, ordered by id, and the row's log-sum-exp, in one read of the row.
//
// 1. A strided sample gives a threshold that a few more than K elements pass, and a level for the exponentials.
// 2. One pass collects the candidates with their ids and sums the exponentials relative to the level.
// 3. A bisection finds the exact K-th largest among the candidates.
//
// If the sample's threshold is too low, as in a row that is mostly -inf, it is raised during the pass. If it is too high,
// a second pass over the row is necessary, which is slower but still exact.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "select.h"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

template <class A>
struct TopkScratch {
  using Key = typename Lanes<A>::Key;
  A* values;     // (V + width) candidates in id order
  int32_t* ids;  // (V + width)
  Key* keys;     // (V + width)
  double* sums;  // (M) sums of exp((z - level) / T)
};

// Estimates from a sample of a row.
template <class A>
struct RowGuess {
  A threshold;  // a few more than K elements are not below it; -inf if sampling cannot help
  A level;      // the largest element of the sample
};

// Samples every stride-th vector of the row. The rank of the threshold allows for four standard deviations of the
// sampling error.
template <class X, class A>
RowGuess<A> guess_row(const X* row, const TopkLogitsArgs& args, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const int64_t whole_vectors = args.vocab_size / kWidth;
  if (whole_vectors == 0) return {-infinity<A>(), max_lanes(load_part(row, args.vocab_size, -infinity<A>()))};
  int64_t vectors = args.vocab_size / 256;
  vectors = vectors < 32 ? 32 : vectors > 512 ? 512 : vectors;
  if (vectors > whole_vectors) vectors = whole_vectors;
  const int64_t stride = whole_vectors / vectors * kWidth;
  typename Lanes<A>::Vec best = {};
  best -= infinity<A>();
  for (int64_t i = 0; i < vectors; ++i) {
    const auto v = load(row + i * stride);
    best = max(best, v);
    const auto keys = order_keys(v);
    memcpy(scratch.keys + i * kWidth, &keys, sizeof(keys));
  }
  RowGuess<A> guess = {-infinity<A>(), max_lanes(best)};
  if (guess.level == -infinity<A>()) guess.level = sampled_max(row, args.vocab_size);
  const int64_t samples = vectors * kWidth;
  if (args.vocab_size < 4 * samples || 4 * args.top_k > args.vocab_size) return guess;
  const double fraction = double(args.top_k) / args.vocab_size;
  const double expected = fraction * samples;
  const int64_t rank = int64_t(expected + 4 * __builtin_sqrt(expected * (1 - fraction)) + 2);
  if (rank < samples) guess.threshold = value_of_key<A>(select_key(scratch.keys, samples, rank));
  return guess;
}

template <class A>
typename Lanes<A>::Key keep_largest(int64_t found, int64_t top_k, const TopkScratch<A>& scratch);

// Collects the elements not below the guessed threshold, in id order, and sums the exponentials relative to the level.
// Drops elements that cannot be among the top_k when many more were found.
template <class X, class A>
int64_t collect(const X* row, const TopkLogitsArgs& args, RowGuess<A> guess, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const int64_t vocab_size = args.vocab_size;
  for (int64_t m = 0; m < args.num_temperatures; ++m) scratch.sums[m] = 0;
  const int64_t most = 4 * (args.top_k + kBlock);
  int64_t found = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const int64_t length = vocab_size - begin < kBlock ? vocab_size - begin : kBlock;
    if (found > most) {
      // Later elements that tie with the K-th largest so far have higher ids, so only those above it count.
      const A above_kth = value_of_key<A>(keep_largest(found, args.top_k, scratch) + 1);
      guess.threshold = above_kth < infinity<A>() ? above_kth : infinity<A>();
      found = args.top_k;
    }
    typename Lanes<A>::Vec sum = {};
    int64_t i = 0;
    const auto visit = [&](typename Lanes<A>::Vec v) {
      const auto mask = not_below(v, guess.threshold);
      append(mask, v, scratch.values + found);
      append(mask, ids_from(begin + i), scratch.ids + found);
      found += count(mask);
      sum += exp(v - guess.level);
    };
    for (; i + kWidth <= length; i += kWidth) {
      prefetch_ahead(row + begin + i);
      visit(load(row + begin + i));
    }
    if (i < length) visit(load_part(row + begin + i, length - i, -infinity<A>()));
    scratch.sums[0] += sum_lanes(sum);
    for (int64_t m = 1; m < args.num_temperatures; ++m) {
      scratch.sums[m] += sum_exp(row + begin, length, guess.level, A(1 / args.temperatures[m]));
    }
  }
  // Padding lanes of the last vector pass a threshold of -inf. Their ids lie past the end of the row.
  while (found > 0 && scratch.ids[found - 1] >= vocab_size) --found;
  return found;
}

// Compacts the candidates in place to the top_k largest, in id order; ties go to the lowest id. Returns the key of the
// K-th largest.
template <class A>
typename Lanes<A>::Key keep_largest(int64_t found, int64_t top_k, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const auto keys_at = [&](int64_t i) { return order_keys(load(scratch.values + i)); };
  for (int64_t i = 0; i < found; i += kWidth) {
    const auto keys = keys_at(i);
    memcpy(scratch.keys + i, &keys, sizeof(keys));
  }
  const auto kth = select_key(scratch.keys, found, top_k);
  for (int64_t i = found; i < padded<A>(found); ++i) scratch.values[i] = -infinity<A>();
  int64_t ties = top_k;
  for (int64_t i = 0; i < found; i += kWidth) ties -= count(above(keys_at(i), kth));
  int64_t kept = 0;
  for (int64_t i = 0; i < found && kept < top_k; i += kWidth) {
    const auto keys = keys_at(i);
    auto tied = equal(keys, kth);
    if (count(tied) > ties) tied = first_lanes(tied, ties);
    ties -= count(tied);
    const auto taken = above(keys, kth) | tied;
    const auto v = load(scratch.values + i);
    const VecI ids = load_raw<VecI>(scratch.ids + i);
    append(taken, v, scratch.values + kept);
    append(taken, ids, scratch.ids + kept);
    kept += count(taken);
  }
  return kth;
}

template <class X>
void topk_row(const TopkLogitsArgs& args, int64_t n, const TopkScratch<typename Acc<X>::type>& scratch) {
  using A = typename Acc<X>::type;
  const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
  const int64_t top_k = args.top_k;

  RowGuess<A> guess = guess_row<X, A>(row, args, scratch);
  int64_t found = collect(row, args, guess, scratch);
  A* lse = static_cast<A*>(args.lse) + n * args.num_temperatures;
  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    lse[m] = A(log_sum_exp_of_row(row, args.vocab_size, 1 / args.temperatures[m], guess.level, scratch.sums[m]));
  }
  if (found < top_k) {
    guess.threshold = -infinity<A>();
    found = collect(row, args, guess, scratch);
  }

  keep_largest(found, top_k, scratch);
  memcpy(args.ids + n * top_k, scratch.ids, top_k * sizeof(int32_t));
  X* values = static_cast<X*>(args.values) + n * top_k;
  int64_t i = 0;
  for (; i + Lanes<A>::kWidth <= top_k; i += Lanes<A>::kWidth) store_exact(values + i, load(scratch.values + i));
  for (; i < top_k; ++i) store_one(values + i, scratch.values[i]);
}

template <class X>
int64_t topk_rows(const TopkLogitsArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t capacity = padded<A>(args.vocab_size) + kMaxWidth;
  const int64_t bytes = capacity * (2 * sizeof(A) + sizeof(int32_t)) + args.num_temperatures * sizeof(double);
  char* memory = static_cast<char*>(malloc(bytes));
  if (memory == nullptr) return kNoMemory;
  TopkScratch<A> scratch;
  scratch.sums = reinterpret_cast<double*>(memory);
  scratch.values = reinterpret_cast<A*>(scratch.sums + args.num_temperatures);
  scratch.keys = reinterpret_cast<typename Lanes<A>::Key*>(scratch.values + capacity);
  scratch.ids = reinterpret_cast<int32_t*>(scratch.keys + capacity);

  int64_t fault = kOk;
  for (int64_t n = begin; n < end; ++n) {
    if (args.target != nullptr) {
      const int64_t target = args.target[n];
      A* target_logit = static_cast<A*>(args.target_logit) + n;
      if (target >= args.vocab_size) {
        fault = n * kFaults + kBadTarget;
        break;
      }
      const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
      *target_logit = target < 0 ? A(__builtin_nan("")) : load_one(row + target);
    }
    topk_row<X>(args, n, scratch);
  }
  free(memory);
  return fault;
}

int64_t topk_logits(const TopkLogitsArgs& args, int64_t begin, int64_t end) {
  return with_element_type(args.dtype, [&](auto element) { return topk_rows<decltype(element)>(args, begin, end); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
