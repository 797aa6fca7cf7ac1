// Reads the logits of a row at given ids, with the log-sum-exps of the whole row and of the rest, the logits at all
// other ids, in one read of the row.
//
// A block of the row is copied with -inf at the given ids, and what is left of it is summed relative to the largest
// logit of the rest so far. The given logits are summed apart. So the rest is summed itself: the whole row minus the
// given logits would cancel.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "exponentials.h"
#include "sparse_softmax.inl"
#include "topk_logits.inl"

namespace slimkernels {
namespace SK_ISA {
namespace {

template <class A>
struct GatherScratch {
  double* sums;  // (M) of the rest, relative to its largest logit
  A* kept;       // (K + width) the logits at the ids
  A* block;      // (kBlock + width)
};

// Adds the exponentials of a block that is padded with -inf to the vector width to the sums of the blocks before, which
// are relative to `level`. Returns the new level, the largest element so far; sums relative to +inf have no meaning.
template <class A>
A add_block(const GatherArgs& args, const A* block, int64_t count, A level, A largest, double* sums) {
  if (largest == -infinity<A>() || largest == infinity<A>()) return largest;
  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    const double inv_temperature = 1 / args.temperatures[m];
    if (largest > level) sums[m] *= exp((double(level) - double(largest)) * inv_temperature);
    sums[m] += sum_exp(block, count, largest, A(inv_temperature));
  }
  return largest;
}

// A sum of exponentials relative to the largest element, in which no sum has a meaning if that is infinite or NaN.
template <class A>
struct PartSum {
  A largest = -infinity<A>();
  double sum = 0;
};

// Returns the log of two sums together.
template <class A>
double log_of_sums(PartSum<A> a, PartSum<A> b, double inv_temperature) {
  if (a.largest != a.largest || b.largest != b.largest) return double(a.largest) + double(b.largest);
  const double level = double(a.largest > b.largest ? a.largest : b.largest);
  if (level - level != 0) return level;
  double sum = 0;
  const PartSum<A> parts[] = {a, b};
  for (const PartSum<A>& part : parts) {
    if (part.largest != -infinity<A>()) sum += part.sum * exp((double(part.largest) - level) * inv_temperature);
  }
  return level * inv_temperature + __builtin_log(sum);
}

template <class X, class A>
void gather_row(const GatherArgs& args, int64_t n, int64_t kept, const GatherScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
  const int32_t* ids = args.ids + n * args.top_k;
  X* values = static_cast<X*>(args.values) + n * args.top_k;
  for (int64_t k = 0; k < kept; ++k) scratch.kept[k] = load_one(row + ids[k]);
  for (int64_t k = 0; k < kept; ++k) values[k] = row[ids[k]];
  for (int64_t k = kept; k < args.top_k; ++k) store_one(values + k, A(0));
  LargestOf<A> largest_kept;
  largest_kept.add(scratch.kept, kept);

  for (int64_t m = 0; m < args.num_temperatures; ++m) scratch.sums[m] = 0;
  LargestOf<A> largest;
  A level = -infinity<A>();
  int64_t k = 0;
  for (int64_t begin = 0; begin < args.vocab_size; begin += kBlock) {
    const int64_t length = args.vocab_size - begin < kBlock ? args.vocab_size - begin : kBlock;
    int64_t i = 0;
    for (; i + kWidth <= length; i += kWidth) {
      prefetch_ahead(row + begin + i);
      store(scratch.block + i, load(row + begin + i));
    }
    if (i < length) store(scratch.block + i, load_part(row + begin + i, length - i, -infinity<A>()));
    for (; k < kept && ids[k] < begin + length; ++k) scratch.block[ids[k] - begin] = -infinity<A>();
    largest.add(scratch.block, length);
    level = add_block(args, scratch.block, length, level, max_lanes(largest.best), scratch.sums);
  }

  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    const double inv_temperature = 1 / args.temperatures[m];
    PartSum<A> on = {largest_kept.value(), 0};
    for (int64_t i = 0; i < kept; i += kBlock) {
      const int64_t length = kept - i < kBlock ? kept - i : kBlock;
      on.sum += sum_exp(scratch.kept + i, length, on.largest, A(inv_temperature));
    }
    const PartSum<A> rest = {largest.value(), scratch.sums[m]};
    const int64_t out = n * args.num_temperatures + m;
    static_cast<A*>(args.lse)[out] = A(log_of_sums(on, rest, inv_temperature));
    static_cast<A*>(args.rest_lse)[out] = A(log_of_sums(rest, PartSum<A>{}, inv_temperature));
  }
}

template <class X>
int64_t gather_rows(const GatherArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t kept_room = padded<A>(args.top_k) + kMaxWidth;
  const int64_t bytes = (kept_room + kBlock + kMaxWidth) * sizeof(A) + args.num_temperatures * sizeof(double);
  char* memory = static_cast<char*>(malloc(bytes));
  if (memory == nullptr) return kNoMemory;
  GatherScratch<A> scratch;
  scratch.sums = reinterpret_cast<double*>(memory);
  scratch.kept = reinterpret_cast<A*>(scratch.sums + args.num_temperatures);
  scratch.block = scratch.kept + kept_room;

  int64_t fault = kOk;
  for (int64_t n = begin; n < end && fault == kOk; ++n) {
    const int64_t kept = count_kept(args.ids + n * args.top_k, args.top_k, args.vocab_size);
    const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
    if (kept < 0) {
      fault = n * kFaults + kBadIds;
    } else if (!copy_target_logit(row, args.target, n, args.vocab_size, static_cast<A*>(args.target_logit))) {
      fault = n * kFaults + kBadTarget;
    } else {
      gather_row<X, A>(args, n, kept, scratch);
    }
  }
  free(memory);
  return fault;
}

int64_t gather_logits(const GatherArgs& args, int64_t begin, int64_t end) {
  return with_element_type(args.dtype, [&](auto element) { return gather_rows<decltype(element)>(args, begin, end); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
