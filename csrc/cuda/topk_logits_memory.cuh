// Arguments of topk_logits_kernel and the layout of its shared memory, for the kernel and its launcher.
#pragma once

#include <type_traits>

#include "parts.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr int kMaxTemperatures = 32;
constexpr int kDigitBits = 9;
constexpr int kBins = 1 << kDigitBits;
constexpr int kGroup = 8;           // elements that are sampled together
constexpr int kSampleGroups = 256;  // the most that are sampled of a row
constexpr int kSampleBins = 256;
constexpr int kTileBytes = 4096;  // of a row, which a warp processes at a time
constexpr int kLimbs = 3;         // parts of a sum, of kLimbBits each
constexpr int kLimbBits = 22;

template <class X>
constexpr int kTile = kTileBytes / sizeof(typename X::Bits);

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
  int32_t list_capacity;  // candidates that a block can list
  int32_t sample_stride;  // groups between two that are sampled, from the first of one to the first of the next
  int32_t sample_rank;  // the threshold's rank in the sample; 0 to take no sample, so that all elements are candidates
  const int64_t* target;  // (N,) or null
  int32_t* ids;           // (N, K)
  void* values;           // (N, K)
  float* lse;             // (N, M)
  float* rest_lse;        // (N, M), of the elements that are not kept
  float* target_logit;    // (N,), written if target is not null
  int32_t num_temperatures;
  Temperature temperatures[kMaxTemperatures];
};

// A tile's candidates, and how many of them are above the K-th largest or equal to it.
struct Tile {
  uint32_t first, found;  // position in the list, and number
  uint32_t above, tied;
};

// A candidate: its key, and its position within its tile in the lower half.
template <class X>
using Candidate = std::conditional_t<sizeof(typename X::Bits) == 4, uint64_t, uint32_t>;

// A sum in fixed point: the sum of limbs[i] << i * kLimbBits.
struct FixedSum {
  uint32_t limbs[kLimbs];
};

// The fixed part of a block's shared memory. It is followed by the tiles, the list and the slice.
struct alignas(128) TopkState {
  uint32_t histogram[kBins];         // of the candidates' keys
  uint32_t samples[2][kSampleBins];  // histograms of the sample's keys, by their high and their low byte
  FixedSum above[kMaxTemperatures];  // sums of the slice's exponentials: of candidates above the K-th largest,
  FixedSum below[kMaxTemperatures];  // of candidates below it,
  FixedSum rest[kMaxTemperatures];   // and of the elements that are no candidates
  uint32_t found;                    // number of candidates in the slice
  uint32_t largest_key;              // of them
  uint32_t largest_below;            // of those below the K-th largest, if it is searched for
  uint32_t num_above, num_tied;      // candidates above the K-th largest, and equal to it
  // Results of the first warp, for the others. All blocks find the same.
  uint32_t bin, counted, counted_higher;  // a bin, the number of elements in it, and of those in higher bins
  uint32_t found_in_row, largest_in_row;
  uint32_t is_listed;  // whether every block has a list of all its candidates
};

template <class X, bool kStaged, int kThreads>
struct TopkMemory {
  using Bits = typename X::Bits;

  TopkState* state;
  uint4* staged;       // the slice, or a tile per warp, with permuted vectors
  Tile* tiles;         // (slice / kTile)
  Candidate<X>* list;  // (list_capacity + 32) ascending in positions within a tile; the last 32 can be read

  // Returns the number of bytes that a block needs.
  __host__ __device__ static int64_t bytes(int64_t slice, int64_t list_capacity) {
    return TopkMemory().assign(nullptr, slice, list_capacity);
  }
  // Sets the pointers to parts of `memory` and returns the number of bytes used.
  __host__ __device__ int64_t assign(char* memory, int64_t slice, int64_t list_capacity) {
    Parts parts;
    const auto take = [&](int64_t size) { return memory + parts.add(size); };
    const int64_t num_tiles = slice / kTile<X>;
    state = reinterpret_cast<TopkState*>(take(sizeof(TopkState)));
    staged = reinterpret_cast<uint4*>(take((kStaged ? num_tiles : kThreads / 32) * kTileBytes));
    tiles = reinterpret_cast<Tile*>(take(num_tiles * sizeof(Tile)));
    list = reinterpret_cast<Candidate<X>*>(take((list_capacity + 32) * sizeof(Candidate<X>)));
    return parts.bytes;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
