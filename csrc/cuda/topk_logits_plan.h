// How topk_logits_kernel is launched: host code only, and none of CUDA's, so that it is tested without a GPU.
#pragma once

#include <float.h>
#include <math.h>

#include "topk_logits_memory.cuh"

namespace slimkernels {

constexpr int kLaunchedThreads = 512;
constexpr int kMaxBlocks = 8;  // what every device with clusters can co-schedule

// What a plan depends on of the device.
struct Machine {
  bool has_clusters;
  int64_t block_bytes, processor_bytes;  // of shared memory, at most for a block and of a multiprocessor
  int processors;
};

struct Plan {
  int num_blocks;  // of a row
  bool staged;     // the row is kept in shared memory
  int64_t slice, list_capacity, bytes;
};

inline int64_t slice_of(int64_t vocab_size, int num_blocks) {
  const int64_t tiles = (vocab_size + kTile - 1) / kTile;
  return (tiles + num_blocks - 1) / num_blocks * kTile;
}

// Twice a block's share of K, since neither the sample nor the spread of the largest over the row is exact. A K that
// is a large part of V, or a slice whose marks take a large part of the memory, is not worth a list.
template <class X, bool kStaged>
Plan plan_of(const Machine& machine, int64_t vocab_size, int64_t top_k, int num_blocks) {
  using Memory = BlockMemory<X, kStaged, kLaunchedThreads>;
  Plan plan = {num_blocks, kStaged, slice_of(vocab_size, num_blocks), 0, 0};
  if (4 * top_k <= vocab_size) plan.list_capacity = (2 * top_k + num_blocks - 1) / num_blocks + kTile;
  if (plan.list_capacity > plan.slice) plan.list_capacity = plan.slice;
  plan.bytes = Memory::bytes(plan.slice, plan.list_capacity);
  if (!kStaged && plan.bytes > machine.block_bytes) {
    plan.list_capacity = 0;
    plan.bytes = Memory::bytes(plan.slice, 0);
  }
  return plan;
}

// The fewest blocks whose slices leave a multiprocessor room for a second block, which loads while the first one
// counts; more, as long as there are multiprocessors without a block. A row that does not fit is read through L2.
template <class X>
Plan make_plan(const Machine& machine, int64_t num_rows, int64_t vocab_size, int64_t top_k) {
  constexpr int64_t kReserved = 1024;  // bytes of a block that the system takes
  const int max_blocks = machine.has_clusters ? kMaxBlocks : 1;
  int num_blocks = 1;
  const auto fits = [&](int64_t bytes) {
    const Plan plan = plan_of<X, true>(machine, vocab_size, top_k, num_blocks);
    return plan.bytes <= bytes && plan.slice <= BlockMemory<X, true, kLaunchedThreads>::kMaxSlice;
  };
  while (num_blocks < max_blocks && !fits(machine.processor_bytes / 2 - kReserved)) num_blocks *= 2;
  while (num_blocks < max_blocks && 2 * num_blocks * num_rows <= machine.processors &&
         vocab_size >= 2 * num_blocks * kTile) {
    num_blocks *= 2;
  }
  if (fits(machine.block_bytes)) return plan_of<X, true>(machine, vocab_size, top_k, num_blocks);
  return plan_of<X, false>(machine, vocab_size, top_k, num_blocks);
}

inline void set_temperatures(TopkLogitsArgs& args, const double* temperatures, int num_temperatures) {
  args.num_temperatures = num_temperatures;
  for (int m = 0; m < num_temperatures; ++m) {
    const double scale = M_LOG2E / temperatures[m];
    // Bounded, so that neither 0 nor -inf times the scale is NaN.
    args.temperatures[m] = {1 / temperatures[m], float(fmin(fmax(scale, FLT_MIN), FLT_MAX))};
  }
}

}  // namespace slimkernels
