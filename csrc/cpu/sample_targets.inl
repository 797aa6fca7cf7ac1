// Makes a sparse teacher from draws with replacement: the distinct ids of a row and how often each was drawn.
//
// 1. A first read of the row finds its softmax, and with it the largest logit.
// 2. A second read sums the weights of every kDrawBlock ids.
// 3. Every draw is a point below the sum of all weights. The points are sorted, and a walk over the sums finds the
//    blocks that hold some; only these are weighed again, id by id.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "draw_weights.h"
#include "exponentials.h"
#include "gumbel.h"
#include "sample_logits.inl"

namespace slimkernels {
namespace SK_ISA {
namespace {

constexpr int64_t kDrawBlock = 256;  // a multiple of 16

template <class X, class A>
uint64_t sum_of_weights(const X* z, int64_t count, const Weighing<A>& weighing) {
  VecW sums = {};
  for (int64_t i = 0; i < count; i += 16) {
    prefetch_ahead(z + i);
    const Weights weights = weights_of(z + i, count - i, weighing);
    sums += weights.low + weights.high;
  }
  uint64_t sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += sums[lane];
  return sum;
}

inline int compare_points(const void* a, const void* b) {
  const uint64_t one = *static_cast<const uint64_t*>(a), other = *static_cast<const uint64_t*>(b);
  return (one > other) - (one < other);
}

// Writes the drawn ids, ascending, and the logarithm of the share of draws of each. Returns their number.
template <class X, class A>
int64_t draw_row(const X* row, int64_t vocab_size, const Weighing<A>& weighing, const NoiseKey& key, int64_t rounds,
                 uint64_t* sums, uint64_t* points, int32_t* ids, A* log_shares) {
  uint64_t total = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kDrawBlock) {
    const int64_t left = vocab_size - begin;
    total += sums[begin / kDrawBlock] = sum_of_weights(row + begin, left < kDrawBlock ? left : kDrawBlock, weighing);
  }
  draw_points(key, rounds, total, points);
  qsort(points, rounds, sizeof(uint64_t), compare_points);

  int64_t kept = 0, draw = 0;
  uint64_t below = 0;  // the sum of the weights of all ids before
  for (int64_t begin = 0; draw < rounds; begin += kDrawBlock) {
    if (points[draw] >= below + sums[begin / kDrawBlock]) {
      below += sums[begin / kDrawBlock];
      continue;
    }
    const int64_t end = vocab_size - begin < kDrawBlock ? vocab_size : begin + kDrawBlock;
    for (int64_t v = begin; v < end; v += 16) {
      const Weights weights = weights_of(row + v, end - v, weighing);
      uint64_t by_id[16];
      memcpy(by_id, &weights, sizeof(by_id));
      for (int i = 0; i < 16; ++i) {
        below += by_id[i];
        const int64_t first = draw;
        while (draw < rounds && points[draw] < below) ++draw;
        if (draw == first) continue;
        ids[kept] = int32_t(v + i);
        log_shares[kept++] = A(__builtin_log(double(draw - first) / double(rounds)));
      }
    }
  }
  return kept;
}

template <class X>
int64_t sample_targets_rows(const SampleTargetsArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t vocab_size = args.vocab_size, rounds = args.rounds;
  const int64_t top_k = rounds < vocab_size ? rounds : vocab_size;
  const int64_t num_blocks = (vocab_size + kDrawBlock - 1) / kDrawBlock;
  uint64_t* sums = static_cast<uint64_t*>(malloc((num_blocks + rounds) * sizeof(uint64_t)));
  if (sums == nullptr) return kNoMemory;
  uint64_t* points = sums + num_blocks;

  int64_t fault = kOk;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t target = args.target == nullptr ? -1 : args.target[n];
    if (target >= vocab_size) {
      fault = n * kFaults + kBadTarget;
      break;
    }
    const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
    // Nothing is truncated, so the softmax needs no scratch memory.
    const RowSoftmax<A> softmax = softmax_of_row<X, A>(row, vocab_size, {1, 0, 1, 0}, {});
    if (args.target != nullptr) {
      static_cast<A*>(args.target_logit)[n] =
          target < 0 || !softmax.exists ? A(__builtin_nan("")) : A(softmax.logprob(double(load_one(row + target))));
    }
    int32_t* ids = args.ids + n * top_k;
    A* log_shares = static_cast<A*>(args.log_shares) + n * top_k;
    int64_t kept = 0;
    if (softmax.exists) {
      const Weighing<A> weighing = weighing_of(softmax.scoring.max, softmax.infinite, args.temperature, vocab_size);
      const NoiseKey key = noise_key(seed_of_row(args.seed, n), args.position.values[n * args.position.step]);
      kept = draw_row(row, vocab_size, weighing, key, rounds, sums, points, ids, log_shares);
    }
    for (int64_t k = kept; k < top_k; ++k) {
      ids[k] = -1;
      log_shares[k] = 0;
    }
  }
  free(sums);
  return fault;
}

int64_t sample_targets(const SampleTargetsArgs& args, int64_t begin, int64_t end) {
  return with_element_type(args.dtype,
                           [&](auto element) { return sample_targets_rows<decltype(element)>(args, begin, end); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
