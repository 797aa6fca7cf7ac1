// Arguments of sample_logits_kernel and the layout of its shared memory, for the kernel and its launcher.
#pragma once

#include "parts.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr int kTile = 2048;  // elements that a warp sums in float32
constexpr int kGroup = 8;    // elements that a lane reads at once
constexpr int kBins = 256;

// A number for all rows, which a tensor of one number per row replaces if it is given.
template <class T>
struct RowOption {
  const T* per_row;  // (N,) or null
  T number;

  __device__ T of(int64_t n) const { return per_row == nullptr ? number : per_row[n]; }
};

struct SampleArgs {
  const void* logits;  // (N, V), rows `row_stride` elements apart
  int64_t row_stride;
  int32_t vocab_size;
  int32_t num_distinct;   // m
  int32_t slice;          // elements of a row per block, a multiple of kTile
  int32_t list_capacity;  // candidates of a row that can be listed; 0 for no list
  const int64_t* seeds;   // (N,), () or null
  int64_t seed;
  bool seed_per_row;  // whether `seeds` is (N,); otherwise the seeds of the rows are drawn from the one seed
  RowOption<int64_t> position;
  RowOption<double> temperature;
  RowOption<int64_t> top_k;
  RowOption<double> top_p;
  RowOption<double> min_p;
  int64_t* token;            // (N, m)
  float* logprob;            // (N, m)
  float* truncated_logprob;  // (N, m)
  float* entropy;            // (N,)
};

// A logit that the truncation may keep.
struct Candidate {
  uint32_t id, key;
};

// The id with the largest perturbed score of those that were evaluated, and the largest bound of those that were not.
struct Leader {
  double score;
  uint32_t id;
  float missed;
};

// The fixed part of a block's shared memory. Masses are exp((z - top) / T) in fixed point.
template <int kThreads>
struct SampleState {
  static constexpr int kWarps = kThreads / 32;
  unsigned long long masses[2][kBins];
  uint32_t counts[2][kBins];
  unsigned long long exps[kWarps], moments[kWarps], tempered[kWarps];  // sums over the slice
  unsigned long long kept[2][kWarps];                                  // mass of the candidates that are kept
  unsigned long long before;                                           // result of find_bin, like `position`
  Leader leaders[2][kWarps];
  double log_sum, log_kept;
  uint32_t position;
  uint32_t found;                // number of candidates in the row; of the first block
  uint32_t infinite;             // number of logits that are +inf
  uint32_t min_p_key;            // lowest key that min-p keeps
  uint32_t largest_key[kWarps];  // of the logits
  uint32_t first_id[kWarps];     // lowest id of the largest logit
};

template <class X, bool kStaged, int kThreads>
struct SampleMemory {
  using Bits = typename X::Bits;

  SampleState<kThreads>* state;
  Candidate* list;  // (list_capacity), of the first block
  Bits* staged;     // (slice)

  // Returns the number of bytes that a block needs.
  __host__ __device__ static int64_t bytes(int64_t slice, int64_t list_capacity) {
    return SampleMemory().assign(nullptr, slice, list_capacity);
  }
  // Sets the pointers to parts of `memory` and returns the number of bytes used.
  __host__ __device__ int64_t assign(char* memory, int64_t slice, int64_t list_capacity) {
    Parts parts;
    const auto take = [&](int64_t size) { return memory + parts.add(size); };
    state = reinterpret_cast<SampleState<kThreads>*>(take(sizeof(SampleState<kThreads>)));
    list = reinterpret_cast<Candidate*>(take(list_capacity * sizeof(Candidate)));
    staged = reinterpret_cast<Bits*>(take(kStaged ? slice * sizeof(Bits) : 0));
    return parts.bytes;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
