// The sums of exponentials over a row that a softmax needs.
#pragma once

#include "vec_math.h"
// After the functions on vectors that it calls.
#include "../slim_loss/row_math.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements that are summed in float32 lanes and fit into the first-level cache

// Sums an array that is padded to whole vectors.
template <class A>
SK_INLINE double sum_of(const A* x, int64_t count) {
  constexpr int kWidth = Lanes<A>::kWidth;
  typename Lanes<A>::Vec sums[4] = {};  // independent, so that additions overlap
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) sums[j] += load(x + i + j * kWidth);
  }
  for (; i < count; i += kWidth) sums[0] += load(x + i);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class A>
SK_INLINE A max_of(const A* x, int64_t count) {
  typename Lanes<A>::Vec best = {};
  best -= infinity<A>();
  for (int64_t i = 0; i < count; i += Lanes<A>::kWidth) best = max(best, load(x + i));
  return max_lanes(best);
}

// Writes exp(x / T - level), with the largest x / T as the level, of an array padded with -inf to the vector width.
template <class A>
SK_INLINE ExpSum exponentials(const A* x, int64_t count, double inv_temperature, A* out) {
  const A best = max_of(x, count);
  const A shift = best == -infinity<A>() ? A(0) : best;
  ExpSum total;
  total.level = double(shift) * inv_temperature;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = count - begin < kBlock ? count : begin + kBlock;
    typename Lanes<A>::Vec sum = {};
    for (int64_t i = begin; i < end; i += Lanes<A>::kWidth) {
      const auto power = exp((load(x + i) - shift) * A(inv_temperature));
      store(out + i, power);
      sum += power;
    }
    total.sum += sum_lanes(sum);
  }
  return total;
}

// Returns sum(exp((x - level) * inv_temperature)) over a block that need not be padded.
template <class X, class A = typename Acc<X>::type>
SK_INLINE double sum_exp(const X* x, int64_t count, A level, A inv_temperature) {
  constexpr int kWidth = Lanes<A>::kWidth;
  typename Lanes<A>::Vec sum = {};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) sum += exp((load(x + i) - level) * inv_temperature);
  if (i < count) sum += exp((load_part(x + i, count - i, -infinity<A>()) - level) * inv_temperature);
  return sum_lanes(sum);
}

// The largest of the elements that were added; NaN if there was one.
template <class A>
struct LargestOf {
  using Vec = typename Lanes<A>::Vec;
  Vec best = Vec{} - infinity<A>();
  Vec nan = {};  // 0, or NaN in lanes that have seen one

  void add(Vec v) {
    best = max(v, best);
    nan = select(v != v, v, nan);
  }
  template <class X>
  void add(const X* x, int64_t count) {
    int64_t i = 0;
    for (; i + Lanes<A>::kWidth <= count; i += Lanes<A>::kWidth) add(load(x + i));
    if (i < count) add(load_part(x + i, count - i, -infinity<A>()));
  }
  A value() const { return A(sum_lanes(nan)) + max_lanes(best); }
};

// Returns whether a sum of exponentials relative to a guessed level did not overflow; false for NaN. The level is at
// most the row's maximum, so nothing significant can underflow.
constexpr bool is_sound(double sum) { return sum < 1e25; }

// Returns log(sum(exp(x * inv_temperature))) of a row. Uses the sum relative to a guessed level if that is sound, else
// reads the row again.
template <class X, class A>
double log_sum_exp_of_row(const X* row, int64_t count, double inv_temperature, A level, double sum) {
  if (is_sound(sum)) return double(level) * inv_temperature + __builtin_log(sum);
  LargestOf<A> largest;
  largest.add(row, count);
  const A best = largest.value();
  if (best != best || best == infinity<A>() || best == -infinity<A>()) return best;
  sum = 0;
  for (int64_t i = 0; i < count; i += kBlock) {
    sum += sum_exp(row + i, count - i < kBlock ? count - i : kBlock, best, A(inv_temperature));
  }
  return double(best) * inv_temperature + __builtin_log(sum);
}

// Returns the maximum of a few evenly spaced vectors of the row; of more of them as long as they are all -inf, as in a
// masked vocabulary. NaN may be ignored.
template <class X, class A = typename Acc<X>::type>
SK_INLINE A sampled_max(const X* row, int64_t count) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const int64_t vectors = count / kWidth;
  for (int64_t samples = 8;; samples *= 8) {  // each is a cache miss
    samples = samples < vectors ? samples : vectors;
    typename Lanes<A>::Vec best = {};
    best -= infinity<A>();
    for (int64_t i = 0; i < samples; ++i) best = max(best, load(row + vectors * i / samples * kWidth));
    const A found = max_lanes(best);
    if (found != -infinity<A>()) return found;
    if (samples == vectors) break;
  }
  const int64_t rest = count % kWidth;
  return rest == 0 ? -infinity<A>() : max_lanes(load_part(row + count - rest, rest, -infinity<A>()));
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
