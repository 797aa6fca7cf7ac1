// Arguments of topk_logits_kernel and the layout of its shared memory, for the kernel and its launcher.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace slimkernels {

constexpr int kMaxTemperatures = 32;
constexpr int kBins = 2048;
constexpr int kGroup = 8;    // elements that a lane reads at once; their marks are one byte
constexpr int kTile = 1024;  // elements that a warp sums in float32; their marks are one word per lane

struct Temperature {
  double inverse;
  float exponent_scale;  // log2(e) / T
};

struct TopkLogitsArgs {
  const void* logits;  // (N, V), rows `row_stride` elements apart
  int64_t row_stride;
  int32_t vocab_size;
  int32_t top_k;
  int32_t slice;          // elements of a row per block, a multiple of kTile
  int32_t list_capacity;  // candidates that a block can list; 0 to neither sample nor list
  const int64_t* target;  // (N,) or null
  int32_t* ids;           // (N, K)
  void* values;           // (N, K)
  float* lse;             // (N, M)
  float* rest_lse;        // (N, M), of the elements that are not kept
  float* target_logit;    // (N,), written if target is not null
  int32_t num_temperatures;
  Temperature temperatures[kMaxTemperatures];
};

// The fixed part of a block's shared memory. It is followed by the marks and their counts, the list and the slice.
template <int kThreads>
struct BlockState {
  static constexpr int kWarps = kThreads / 32;
  uint32_t histogram[kBins];
  unsigned long long sums[kMaxTemperatures];       // sums of the slice's exponentials, in fixed point
  unsigned long long rest_sums[kMaxTemperatures];  // the same of the elements that are not kept
  uint32_t found;                                  // number of candidates in the slice
  uint32_t largest_key[kWarps];
  uint32_t counted[kWarps];      // elements in the bins of a warp's threads
  uint32_t above[kWarps];        // candidates of a warp above the K-th largest
  uint32_t tied[kWarps];         // candidates of a warp equal to the K-th largest
  uint32_t bin, counted_higher;  // result of find_bin
};

template <class X, bool kStaged, int kThreads>
struct BlockMemory {
  using Bits = typename X::Bits;
  // A staged slice has at most kMaxSlice elements, which the launcher ensures, so its ids fit into 16 bits.
  using LocalId = std::conditional_t<kStaged, uint16_t, uint32_t>;
  static constexpr int64_t kMaxSlice = kStaged ? 65536 : INT32_MAX;

  BlockState<kThreads>* state;
  uint8_t* marks;         // (slice / 8) one bit per element, set for candidates
  uint32_t* tile_founds;  // (slice / kTile) number of candidates of every tile
  LocalId* list;          // (list_capacity) ids of candidates, ascending
  Bits* staged;           // (slice)

  // Returns the number of bytes that a block needs.
  __host__ __device__ static int64_t bytes(int64_t slice, int64_t list_capacity) {
    return BlockMemory().assign(nullptr, slice, list_capacity);
  }
  // Sets the pointers to parts of `memory` and returns the number of bytes used.
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
