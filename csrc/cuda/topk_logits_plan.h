// Plans how topk_logits_kernel is launched. This is host code without CUDA, so that it can be tested without a GPU.
#pragma once

#include <math.h>

#include "row_plan.h"
#include "topk_logits_memory.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr int kLaunchedThreads = 256;
constexpr int64_t kMaxVocabSize = 1 << 21;  // the most whose tiles fit into the shared memory of one block

struct TopkLogitsPlan : RowPlan {
  int64_t list_capacity;
};

// No sample is taken if K is a large part of V: then all elements are candidates.
inline bool is_sampled(int64_t vocab_size, int64_t top_k) { return 4 * top_k <= vocab_size; }

// Plans one number of blocks. The list holds twice a block's share of K, because the sample is not exact and the
// largest elements are not spread evenly over the blocks.
template <class X, bool kStaged>
TopkLogitsPlan plan_of(const Machine& machine, int64_t vocab_size, int64_t top_k, int num_blocks) {
  using Memory = TopkMemory<X, kStaged, kLaunchedThreads>;
  TopkLogitsPlan plan = {{num_blocks, kStaged, slice_of(vocab_size, num_blocks, kTile<X>), 0}, 0};
  if (is_sampled(vocab_size, top_k)) plan.list_capacity = (2 * top_k + num_blocks - 1) / num_blocks + 1024;
  if (plan.list_capacity > plan.slice) plan.list_capacity = plan.slice;
  plan.bytes = Memory::bytes(plan.slice, plan.list_capacity);
  if (!kStaged && plan.bytes > machine.block_bytes) {
    plan.list_capacity = 0;
    plan.bytes = Memory::bytes(plan.slice, 0);
  }
  return plan;
}

// A row that does not fit into shared memory is read through L2.
template <class X>
TopkLogitsPlan make_plan(const Machine& machine, int64_t num_rows, int64_t vocab_size, int64_t top_k) {
  const auto bytes_of = [&](int blocks) { return plan_of<X, true>(machine, vocab_size, top_k, blocks).bytes; };
  const int num_blocks = choose_num_blocks(machine, num_rows, vocab_size, kTile<X>, bytes_of);
  const TopkLogitsPlan staged = plan_of<X, true>(machine, vocab_size, top_k, num_blocks);
  return staged.bytes <= machine.block_bytes ? staged : plan_of<X, false>(machine, vocab_size, top_k, num_blocks);
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
    args.temperatures[m] = {1 / temperatures[m], limited_scale(M_LOG2E / temperatures[m])};
  }
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
