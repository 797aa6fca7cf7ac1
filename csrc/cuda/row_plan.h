// The part that the launch plans of all kernels share: a row is processed by a cluster of blocks, each of which has a
// slice of it. This is host code without CUDA, so that plans can be tested without a GPU.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

namespace slimkernels {

// The properties of a device that a plan depends on.
struct Machine {
  bool has_clusters;
  int64_t block_bytes, processor_bytes;  // shared memory: the most that a block can use, and that of a multiprocessor
  int processors;
};

struct RowPlan {
  int num_blocks;        // blocks per row
  bool staged;           // whether the row is kept in shared memory
  int64_t slice, bytes;  // of a block: elements of the row, and bytes of shared memory
};

constexpr int kMaxBlocks = 8;             // cluster size that every device with clusters supports
constexpr int64_t kReservedBytes = 1024;  // of shared memory per block, by the system

// Limits the factor of an exponent, so that neither 0 nor -inf times the factor is NaN.
inline float limited_scale(double scale) { return float(fmin(fmax(scale, FLT_MIN), FLT_MAX)); }

// Returns the elements of a row that each block has, which are whole tiles.
inline int64_t slice_of(int64_t vocab_size, int num_blocks, int tile) {
  const int64_t tiles = (vocab_size + tile - 1) / tile;
  return (tiles + num_blocks - 1) / num_blocks * tile;
}

// Chooses the number of blocks per row: the fewest whose slices leave room for a second block on a multiprocessor,
// which loads while the first one computes, or more if multiprocessors would be idle. `bytes_of(num_blocks)` is the
// shared memory of a block that keeps its slice there.
template <class BytesOf>
int choose_num_blocks(const Machine& machine, int64_t num_rows, int64_t vocab_size, int tile, BytesOf bytes_of) {
  const int most = machine.has_clusters ? kMaxBlocks : 1;
  int num_blocks = 1;
  while (num_blocks < most && bytes_of(num_blocks) > machine.processor_bytes / 2 - kReservedBytes) num_blocks *= 2;
  while (num_blocks < most && 2 * num_blocks * num_rows <= machine.processors &&
         vocab_size >= int64_t(2) * num_blocks * tile) {
    num_blocks *= 2;
  }
  return num_blocks;
}

}  // namespace slimkernels
