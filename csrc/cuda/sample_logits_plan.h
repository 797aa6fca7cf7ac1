// Plans how sample_logits_kernel is launched. This is host code without CUDA, so that it can be tested without a GPU.
#pragma once

#include "row_plan.h"
#include "sample_logits_memory.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr int kLaunchedThreads = 256;
constexpr int kListCapacity = 2048;
constexpr int kMostDraws = 32;  // per row

template <class X, bool kStaged>
RowPlan plan_of(int64_t vocab_size, int num_blocks) {
  const int64_t slice = slice_of(vocab_size, num_blocks, kTile);
  return {num_blocks, kStaged, slice, SampleMemory<X, kStaged, kLaunchedThreads>::bytes(slice, kListCapacity)};
}

// A row that does not fit into shared memory is read through L2.
template <class X>
RowPlan make_plan(const Machine& machine, int64_t num_rows, int64_t vocab_size) {
  const int num_blocks = choose_num_blocks(machine, num_rows, vocab_size, kTile,
                                           [&](int blocks) { return plan_of<X, true>(vocab_size, blocks).bytes; });
  const RowPlan staged = plan_of<X, true>(vocab_size, num_blocks);
  return staged.bytes <= machine.block_bytes ? staged : plan_of<X, false>(vocab_size, num_blocks);
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
