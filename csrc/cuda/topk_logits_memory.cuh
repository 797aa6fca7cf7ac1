// What topk_logits_kernel is given, and how each of its blocks divides up its shared memory; the launcher counts
// on both.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace slimkernels {

constexpr int kMaxTemperatures = 32;
constexpr int kBins = 2048;
constexpr int kGroup = 8;    // elements that a lane reads at once; their marks are a byte
constexpr int kTile = 1024;  // elements that a warp sums in float32; their marks are a word for each lane

struct Temperature {
  double inverse;
  float exponent_scale;  // log2(e) / T
};

struct TopkLogitsArgs {
  const void* logits;  // (N, V), rows `row_stride` elements apart
  int64_t row_stride;
  int32_t vocab_size;
  int32_t top_k;
  int32_t slice;          // elements of a row that each of its blocks takes, whole tiles
  int32_t list_capacity;  // candidates that a block can list; 0: neither sample nor list
  const int64_t* target;  // (N,) or null
  int32_t* ids;           // (N, K)
  void* values;           // (N, K)
  float* lse;             // (N, M)
  float* target_logit;    // (N,) where target is not null
  int32_t num_temperatures;
  Temperature temperatures[kMaxTemperatures];
};

// A block's shared memory: this, the marks and their counts, the list, the slice.

template <int kThreads>
struct BlockState {
  static constexpr int kWarps = kThreads / 32;
  uint32_t histogram[kBins];
  unsigned long long sums[kMaxTemperatures];  // of the slice's exponentials, in fixed point
  uint32_t found;                             // candidates of the slice
  uint32_t largest_key[kWarps];
  uint32_t counted[kWarps];      // by the histogram, in the bins of a warp's threads
  uint32_t above[kWarps];        // candidates of a warp that are kept for certain,
  uint32_t tied[kWarps];         // and those equal to the K-th largest
  uint32_t bin, counted_higher;  // the bin that was looked for, and what is counted in higher ones
};

template <class X, bool kStaged, int kThreads>
struct BlockMemory {
  using Bits = typename X::Bits;
  // Half the bytes where a slice is short enough, which the launcher sees to.
  using LocalId = std::conditional_t<kStaged, uint16_t, uint32_t>;
  static constexpr int64_t kMaxSlice = kStaged ? 65536 : INT32_MAX;

  BlockState<kThreads>* state;
  uint8_t* marks;         // (slice / 8) a bit for every candidate
  uint32_t* tile_founds;  // (slice / kTile) candidates of every tile
  LocalId* list;          // (list_capacity) of candidates, ascending
  Bits* staged;           // (slice)

  // Divides up `memory`; returns how many bytes of it are used.
  __host__ __device__ static int64_t bytes(int64_t slice, int64_t list_capacity) {
    return BlockMemory().assign(nullptr, slice, list_capacity);
  }
  __host__ __device__ int64_t assign(char* memory, int64_t slice, int64_t list_capacity) {
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      char* place = memory + used;
      used += (size + 15) / 16 * 16;
      return place;
    };
    const int64_t marked = list_capacity > 0 ? slice : 0;
    state = reinterpret_cast<BlockState<kThreads>*>(take(sizeof(BlockState<kThreads>)));
    marks = reinterpret_cast<uint8_t*>(take(marked / kGroup));
    tile_founds = reinterpret_cast<uint32_t*>(take(marked / kTile * 4));
    list = reinterpret_cast<LocalId*>(take(list_capacity * sizeof(LocalId)));
    staged = reinterpret_cast<Bits*>(take(kStaged ? slice * sizeof(Bits) : 0));
    return used;
  }
};

}  // namespace slimkernels
