// Finds the K largest logits of a row, ordered by id, in one read of the row, with the log-sum-exps of the whole row
// and of the rest, the logits that are not kept.
//
// 1. A strided sample gives a threshold that a few more than K elements pass, and a level for the exponentials.
// 2. One pass collects the candidates with their ids and sums the exponentials relative to the level, once of all
//    elements and once of those below the threshold.
// 3. A bisection finds the exact K-th largest among the candidates. The candidates that are not kept join those below
//    the threshold. So the rest is summed itself: the whole row minus the kept elements would cancel.
//
// If the sample's threshold is too low, as in a row that is mostly -inf, it is raised during the pass. If it is too
// high, or if the level is too far above the rest, a second pass over the row is necessary, which is slower but still
// exact.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "exponentials.h"
#include "select.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

template <class A>
struct TopkScratch {
  using Key = typename Lanes<A>::Key;
  A* values;      // (V + width) candidates in id order
  int32_t* ids;   // (V + width)
  Key* keys;      // (V + width)
  double* sums;   // (M) sums of exp((z - level) / T)
  double* below;  // (M) the same of the elements below the threshold

  // Values outside the K largest, which are needed after the keys.
  A* rest() const { return reinterpret_cast<A*>(keys); }
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
    store_raw(scratch.keys + i * kWidth, order_keys(v));
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

// Adds exp((x - level) / T) of a block that need not be padded: to one sum of all elements, and to one of those below
// the threshold.
template <class X, class A>
SK_INLINE void add_exponentials(const X* x, int64_t count, RowGuess<A> guess, A inv_temperature, double* all,
                                double* below) {
  constexpr int kWidth = Lanes<A>::kWidth;
  typename Lanes<A>::Vec sum = {}, sum_below = {};
  const auto visit = [&](typename Lanes<A>::Vec v) {
    const auto power = exp((v - guess.level) * inv_temperature);
    sum += power;
    sum_below += without(not_below(v, guess.threshold), power);
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) visit(load(x + i));
  if (i < count) visit(load_part(x + i, count - i, -infinity<A>()));
  *all += sum_lanes(sum);
  *below += sum_lanes(sum_below);
}

template <class A>
struct Selection {
  typename Lanes<A>::Key kth;  // the key of the K-th largest
  int64_t dropped;             // number of candidates outside the K largest, in which padding of -inf may count
};

template <class A>
Selection<A> keep_largest(int64_t found, int64_t top_k, const TopkScratch<A>& scratch);

// Adds the candidates that a selection dropped to the sums of the elements below the threshold.
template <class A>
void add_dropped(const TopkLogitsArgs& args, A level, int64_t dropped, const TopkScratch<A>& scratch) {
  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    for (int64_t i = 0; i < dropped; i += kBlock) {
      const int64_t length = dropped - i < kBlock ? dropped - i : kBlock;
      scratch.below[m] += sum_exp(scratch.rest() + i, length, level, A(1 / args.temperatures[m]));
    }
  }
}

// Collects the elements not below the guessed threshold, in id order, and sums the exponentials relative to the level.
// Drops elements that cannot be among the top_k when many more were found.
template <class X, class A>
int64_t collect(const X* row, const TopkLogitsArgs& args, RowGuess<A> guess, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const int64_t vocab_size = args.vocab_size;
  for (int64_t m = 0; m < args.num_temperatures; ++m) scratch.sums[m] = scratch.below[m] = 0;
  const int64_t most = 4 * (args.top_k + kBlock);
  int64_t found = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const int64_t length = vocab_size - begin < kBlock ? vocab_size - begin : kBlock;
    if (found > most) {
      const Selection<A> selection = keep_largest(found, args.top_k, scratch);
      add_dropped(args, guess.level, selection.dropped, scratch);
      // Later elements that tie with the K-th largest so far have higher ids, so only those above it count.
      const A above_kth = value_of_key<A>(selection.kth + 1);
      guess.threshold = above_kth < infinity<A>() ? above_kth : infinity<A>();
      found = args.top_k;
    }
    typename Lanes<A>::Vec sum = {}, sum_below = {};
    int64_t i = 0;
    const auto visit = [&](typename Lanes<A>::Vec v) {
      const auto mask = not_below(v, guess.threshold);
      append(mask, v, scratch.values + found);
      append(mask, lanes_from<VecI>(int32_t(begin + i)), scratch.ids + found);
      found += count(mask);
      const auto power = exp(v - guess.level);
      sum += power;
      sum_below += without(mask, power);
    };
    for (; i + kWidth <= length; i += kWidth) {
      prefetch_ahead(row + begin + i);
      visit(load(row + begin + i));
    }
    if (i < length) visit(load_part(row + begin + i, length - i, -infinity<A>()));
    scratch.sums[0] += sum_lanes(sum);
    scratch.below[0] += sum_lanes(sum_below);
    for (int64_t m = 1; m < args.num_temperatures; ++m) {
      add_exponentials(row + begin, length, guess, A(1 / args.temperatures[m]), scratch.sums + m, scratch.below + m);
    }
  }
  // Padding lanes of the last vector pass a threshold of -inf. Their ids lie past the end of the row.
  while (found > 0 && scratch.ids[found - 1] >= vocab_size) --found;
  return found;
}

// Compacts the candidates in place to the top_k largest, in id order; ties go to the lowest id. Moves the others to the
// rest.
template <class A>
Selection<A> keep_largest(int64_t found, int64_t top_k, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const auto keys_at = [&](int64_t i) { return order_keys(load(scratch.values + i)); };
  for (int64_t i = 0; i < found; i += kWidth) {
    store_raw(scratch.keys + i, keys_at(i));
  }
  const auto kth = select_key(scratch.keys, found, top_k);
  for (int64_t i = found; i < padded<A>(found); ++i) scratch.values[i] = -infinity<A>();
  int64_t ties = top_k;
  for (int64_t i = 0; i < found; i += kWidth) ties -= count(above(keys_at(i), kth));
  int64_t kept = 0, dropped = 0;
  for (int64_t i = 0; i < found; i += kWidth) {
    const auto keys = keys_at(i);
    auto tied = equal(keys, kth);
    if (count(tied) > ties) tied = first_lanes(tied, ties);
    ties -= count(tied);
    const auto taken = above(keys, kth) | tied;
    const auto v = load(scratch.values + i);
    const VecI ids = load_raw<VecI>(scratch.ids + i);
    const auto others = decltype(taken)(~taken);
    append(others, v, scratch.rest() + dropped);
    dropped += kWidth - count(taken);
    append(taken, v, scratch.values + kept);
    append(taken, ids, scratch.ids + kept);
    kept += count(taken);
  }
  return {kth, dropped};
}

// Copies the row to the rest, with -inf at the kept ids and at padding to the vector width.
template <class X, class A>
void copy_rest(const X* row, const TopkLogitsArgs& args, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  A* const out = scratch.rest();
  int64_t i = 0;
  for (; i + kWidth <= args.vocab_size; i += kWidth) store(out + i, load(row + i));
  if (i < args.vocab_size) store(out + i, load_part(row + i, args.vocab_size - i, -infinity<A>()));
  for (int64_t k = 0; k < args.top_k; ++k) out[scratch.ids[k]] = -infinity<A>();
}

// Returns the least sum of the rest's exponentials relative to the level that is exact enough. The exponent of an
// element far below the level is rounded, by up to 1e-6 at 32, and at a temperature other than 1 three times.
SK_INLINE double least_exact_sum(double temperature, int64_t count) {
  return double(count) * __builtin_exp(temperature == 1 ? -32.0 : -16.0);
}

// Writes the log-sum-exps of the rest: from the sums relative to the level, or from the row if they are not sound.
template <class X, class A>
void sum_rest(const X* row, const TopkLogitsArgs& args, A level, const TopkScratch<A>& scratch, A* rest_lse) {
  bool copied = false;
  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    const double least = least_exact_sum(args.temperatures[m], args.vocab_size - args.top_k);
    const double sum = scratch.below[m] > least ? scratch.below[m] : __builtin_nan("");
    if (!is_sound(sum) && !copied) {
      copy_rest(row, args, scratch);
      copied = true;
    }
    rest_lse[m] = A(log_sum_exp_of_row(scratch.rest(), args.vocab_size, 1 / args.temperatures[m], level, sum));
  }
}

template <class X>
void topk_row(const TopkLogitsArgs& args, int64_t n, const TopkScratch<typename Acc<X>::type>& scratch) {
  using A = typename Acc<X>::type;
  const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
  const int64_t top_k = args.top_k;

  RowGuess<A> guess = guess_row<X, A>(row, args, scratch);
  int64_t found = collect(row, args, guess, scratch);
  A* lse = static_cast<A*>(args.lse) + n * args.num_temperatures;
  A* rest_lse = static_cast<A*>(args.rest_lse) + n * args.num_temperatures;
  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    lse[m] = A(log_sum_exp_of_row(row, args.vocab_size, 1 / args.temperatures[m], guess.level, scratch.sums[m]));
  }
  if (found < top_k) {
    guess.threshold = -infinity<A>();
    found = collect(row, args, guess, scratch);
  }

  const int64_t dropped = keep_largest(found, top_k, scratch).dropped;
  memcpy(args.ids + n * top_k, scratch.ids, top_k * sizeof(int32_t));
  X* values = static_cast<X*>(args.values) + n * top_k;
  int64_t i = 0;
  for (; i + Lanes<A>::kWidth <= top_k; i += Lanes<A>::kWidth) store_exact(values + i, load(scratch.values + i));
  for (; i < top_k; ++i) store_one(values + i, scratch.values[i]);
  if (top_k < args.vocab_size) {
    add_dropped(args, guess.level, dropped, scratch);
    sum_rest(row, args, guess.level, scratch, rest_lse);
  } else {
    for (int64_t m = 0; m < args.num_temperatures; ++m) rest_lse[m] = -infinity<A>();
  }
}

// Copies the logit of a row's label, NaN where it has none. Returns whether the label is below the vocabulary size.
template <class X, class A>
SK_INLINE bool copy_target_logit(const X* row, const int64_t* target, int64_t n, int64_t vocab_size, A* target_logit) {
  if (target == nullptr) return true;
  if (target[n] >= vocab_size) return false;
  target_logit[n] = target[n] < 0 ? A(__builtin_nan("")) : load_one(row + target[n]);
  return true;
}

template <class X>
int64_t topk_rows(const TopkLogitsArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t capacity = padded<A>(args.vocab_size) + kMaxWidth;
  const int64_t bytes = capacity * (2 * sizeof(A) + sizeof(int32_t)) + 2 * args.num_temperatures * sizeof(double);
  char* memory = static_cast<char*>(malloc(bytes));
  if (memory == nullptr) return kNoMemory;
  TopkScratch<A> scratch;
  scratch.sums = reinterpret_cast<double*>(memory);
  scratch.below = scratch.sums + args.num_temperatures;
  scratch.values = reinterpret_cast<A*>(scratch.below + args.num_temperatures);
  scratch.keys = reinterpret_cast<typename Lanes<A>::Key*>(scratch.values + capacity);
  scratch.ids = reinterpret_cast<int32_t*>(scratch.keys + capacity);

  int64_t fault = kOk;
  for (int64_t n = begin; n < end; ++n) {
    const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
    if (!copy_target_logit(row, args.target, n, args.vocab_size, static_cast<A*>(args.target_logit))) {
      fault = n * kFaults + kBadTarget;
      break;
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
