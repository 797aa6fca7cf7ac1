// Plans how topk_logits_kernel is launched. This is host code without CUDA, so that it can be tested without a GPU.
#pragma once

#include <float.h>
#include <math.h>

#include "machine.h"
#include "topk_logits_memory.cuh"

namespace slimkernels {

constexpr int kLaunchedThreads = 256;
constexpr int kMaxBlocks = 8;               // cluster size that every device with clusters supports
constexpr int64_t kMaxVocabSize = 1 << 21;  // the most whose tiles fit into the shared memory of one block

struct Plan {
  int num_blocks;  // blocks per row
  bool staged;     // whether the row is kept in shared memory
  int64_t slice, list_capacity, bytes;
};

template <class X>
int64_t slice_of(int64_t vocab_size, int num_blocks) {
  const int64_t tiles = (vocab_size + kTile<X> - 1) / kTile<X>;
  return (tiles + num_blocks - 1) / num_blocks * kTile<X>;
}

// No sample is taken if K is a large part of V: then all elements are candidates.
inline bool is_sampled(int64_t vocab_size, int64_t top_k) { return 4 * top_k <= vocab_size; }

// Plans one number of blocks. The list holds twice a block's share of K, because the sample is not exact and the
// largest elements are not spread evenly over the blocks.
template <class X, bool kStaged>
Plan plan_of(const Machine& machine, int64_t vocab_size, int64_t top_k, int num_blocks) {
  using Memory = BlockMemory<X, kStaged, kLaunchedThreads>;
  Plan plan = {num_blocks, kStaged, slice_of<X>(vocab_size, num_blocks), 0, 0};
  if (is_sampled(vocab_size, top_k)) plan.list_capacity = (2 * top_k + num_blocks - 1) / num_blocks + 1024;
  if (plan.list_capacity > plan.slice) plan.list_capacity = plan.slice;
  plan.bytes = Memory::bytes(plan.slice, plan.list_capacity);
  if (!kStaged && plan.bytes > machine.block_bytes) {
    plan.list_capacity = 0;
    plan.bytes = Memory::bytes(plan.slice, 0);
  }
  return plan;
}

// Chooses the number of blocks. It starts with the fewest whose slices leave room for a second block on a
// multiprocessor, which loads while the first one counts, and uses more while multiprocessors would be idle. A row that
// does not fit into shared memory is read through L2.
template <class X>
Plan make_plan(const Machine& machine, int64_t num_rows, int64_t vocab_size, int64_t top_k) {
  const int max_blocks = machine.has_clusters ? kMaxBlocks : 1;
  int num_blocks = 1;
  const auto bytes = [&] { return plan_of<X, true>(machine, vocab_size, top_k, num_blocks).bytes; };
  while (num_blocks < max_blocks && bytes() > machine.processor_bytes / 2 - kReservedBytes) num_blocks *= 2;
  while (num_blocks < max_blocks && 2 * num_blocks * num_rows <= machine.processors &&
         vocab_size >= 2 * num_blocks * kTile<X>) {
    num_blocks *= 2;
  }
  if (bytes() <= machine.block_bytes) return plan_of<X, true>(machine, vocab_size, top_k, num_blocks);
  return plan_of<X, false>(machine, vocab_size, top_k, num_blocks);
}

// Sets which elements are sampled, and the rank among them that allows for three standard deviations. Neither depends
// on the launch, so that all launches sum the same elements relative to the same threshold.
inline void set_sample(TopkLogitsArgs& args) {
  if (!is_sampled(args.vocab_size, args.top_k)) return;
  // The stride is odd, so that the sample meets a periodic row at every phase.
  args.sample_stride = (args.vocab_size / kGroup + kSampleGroups - 1) / kSampleGroups | 1;
  const double expected = double(args.top_k) / args.sample_stride;
  args.sample_rank = int32_t(expected + 3 * sqrt(expected) + 2);
}

inline void set_temperatures(TopkLogitsArgs& args, const double* temperatures, int num_temperatures) {
  args.num_temperatures = num_temperatures;
  for (int m = 0; m < num_temperatures; ++m) {
    const double scale = M_LOG2E / temperatures[m];
    // The scale is bounded, so that neither 0 nor -inf times the scale is NaN.
    args.temperatures[m] = {1 / temperatures[m], float(fmin(fmax(scale, FLT_MIN), FLT_MAX))};
  }
}

}  // namespace slimkernels
