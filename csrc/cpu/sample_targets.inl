// Makes a sparse teacher from draws with replacement: the distinct ids of a row and how often each was drawn.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "exponentials.h"
#include "gumbel.h"
#include "sample_logits.inl"

namespace slimkernels {
namespace SK_ISA {
namespace {

template <class X>
int64_t sample_targets_rows(const SampleTargetsArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t vocab_size = args.vocab_size, rounds = args.rounds;
  const int64_t capacity = padded<A>(vocab_size) + kMaxWidth;
  const int64_t top_k = rounds < vocab_size ? rounds : vocab_size;
  const int64_t leader_bytes = rounds * (sizeof(Leaders) + sizeof(Runner));
  char* memory = static_cast<char*>(malloc(leader_bytes + capacity * (3 * sizeof(A) + sizeof(int32_t))));
  if (memory == nullptr) return kNoMemory;
  Leaders* leaders = reinterpret_cast<Leaders*>(memory);
  Runner* runners = reinterpret_cast<Runner*>(leaders + rounds);
  for (int64_t draw = 0; draw < rounds; ++draw) leaders[draw] = {runners + draw, 1, 0, 0};
  SampleScratch<A> scratch;
  scratch.values = reinterpret_cast<A*>(runners + rounds);
  scratch.masses = scratch.values + capacity;
  scratch.keys = reinterpret_cast<typename Lanes<A>::Key*>(scratch.masses + capacity);
  int32_t* counts = reinterpret_cast<int32_t*>(scratch.keys + capacity);
  memset(counts, 0, capacity * sizeof(int32_t));

  int64_t fault = kOk;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t target = args.target == nullptr ? -1 : args.target[n];
    if (target >= vocab_size) {
      fault = n * kFaults + kBadTarget;
      break;
    }
    const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
    RowSoftmax<A> softmax = softmax_of_row<X, A>(row, vocab_size, {1, 0, 1, 0}, scratch);
    softmax.scoring.temperature = args.temperature;
    if (args.target != nullptr) {
      static_cast<A*>(args.target_logit)[n] =
          target < 0 || !softmax.exists ? A(__builtin_nan("")) : A(softmax.logprob(double(load_one(row + target))));
    }
    if (softmax.exists) {
      for (int64_t draw = 0; draw < rounds; ++draw) leaders[draw].clear();
      const NoiseKey key = noise_key(seed_of_row(args.seed, n), args.position.values[n * args.position.step]);
      race(row, vocab_size, softmax.scoring, key, rounds, leaders);
      for (int64_t draw = 0; draw < rounds; ++draw) ++counts[runners[draw].id];
    }
    int32_t* ids = args.ids + n * top_k;
    A* log_shares = static_cast<A*>(args.log_shares) + n * top_k;
    int64_t kept = 0;
    for (int64_t v = 0; softmax.exists && v < vocab_size; v += kMaxWidth) {
      // Nearly all counts are 0, so they are tested sixteen at a time.
      if (count(above(load_raw<VecI>(counts + v), 0)) == 0) continue;
      for (int64_t id = v; id < v + kMaxWidth; ++id) {
        if (counts[id] == 0) continue;
        ids[kept] = int32_t(id);
        log_shares[kept++] = A(__builtin_log(double(counts[id]) / double(rounds)));
        counts[id] = 0;
      }
    }
    for (int64_t k = kept; k < top_k; ++k) {
      ids[k] = -1;
      log_shares[k] = 0;
    }
  }
  free(memory);
  return fault;
}

int64_t sample_targets(const SampleTargetsArgs& args, int64_t begin, int64_t end) {
  return with_element_type(args.dtype,
                           [&](auto element) { return sample_targets_rows<decltype(element)>(args, begin, end); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
