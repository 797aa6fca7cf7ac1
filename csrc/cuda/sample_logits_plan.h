// Plans how sample_logits_kernel is launched. This is host code without CUDA, so that it can be tested without a GPU.
#pragma once

#include "machine.h"
#include "sample_logits_memory.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr int kLaunchedThreads = 256;
constexpr int kMaxBlocks = 8;  // cluster size that every device with clusters supports
constexpr int kListCapacity = 2048;
constexpr int kMostDraws = 32;  // per row

struct SamplePlan {
  int num_blocks;  // blocks per row
  bool staged;     // whether the row is kept in shared memory
  int64_t slice, bytes;
};

inline int64_t slice_of(int64_t vocab_size, int num_blocks) {
  const int64_t tiles = (vocab_size + kTile - 1) / kTile;
  return (tiles + num_blocks - 1) / num_blocks * kTile;
}

template <class X, bool kStaged>
SamplePlan plan_of(int64_t vocab_size, int num_blocks) {
  const int64_t slice = slice_of(vocab_size, num_blocks);
  return {num_blocks, kStaged, slice, SampleMemory<X, kStaged, kLaunchedThreads>::bytes(slice, kListCapacity)};
}

// Chooses the number of blocks. It starts with the fewest whose slices leave room for a second block on a
// multiprocessor, which loads while the first one computes, and uses more while multiprocessors would be idle. A row
// that does not fit into shared memory is read through L2.
template <class X>
SamplePlan make_plan(const Machine& machine, int64_t num_rows, int64_t vocab_size) {
  const int max_blocks = machine.has_clusters ? kMaxBlocks : 1;
  int num_blocks = 1;
  const auto bytes = [&] { return plan_of<X, true>(vocab_size, num_blocks).bytes; };
  while (num_blocks < max_blocks && bytes() > machine.processor_bytes / 2 - kReservedBytes) num_blocks *= 2;
  while (num_blocks < max_blocks && 2 * num_blocks * num_rows <= machine.processors &&
         vocab_size >= 2 * num_blocks * kTile) {
    num_blocks *= 2;
  }
  if (bytes() <= machine.block_bytes) return plan_of<X, true>(vocab_size, num_blocks);
  return plan_of<X, false>(vocab_size, num_blocks);
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
