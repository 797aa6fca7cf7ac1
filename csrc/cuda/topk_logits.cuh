// Finds the K largest logits of a row, ordered by id, and the log-sum-exps of the row and of what is not kept, in one
// read of device memory.
//
// A row is processed by a cluster of blocks. Each block keeps its slice of the row in shared memory, or reads it again
// through L2, a tile at a time, if it does not fit. A warp processes the same tiles in every step.
//
// 1. A strided sample gives a threshold that a few more than K elements pass. It is read while the row is copied.
// 2. One pass sums the exponentials of the elements below the threshold, relative to it, and lists the others, the
//    candidates, with a histogram of their keys.
// 3. A radix selection (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units") finds the exact
//    K-th largest among the candidates; for 16-bit formats the histogram is nearly always enough.
// 4. The kept candidates are written, and the exponentials of the candidates are summed: of those above the K-th
//    largest relative to the row's largest, of those below it relative to the largest that is not kept. With the sum of
//    step 2 they give both log-sum-exps, so every exponential is computed once and no sum is a difference.
//
// The kept logits are found in topk_logits_selection.cuh, and the sums are made in topk_logits_sums.cuh.
//
// If the sample misleads, all elements are candidates, or those that pass are found again in each step, which is slower
// but still exact.
//
// Blocks exchange integers only. Exponentials are summed in fixed point, those of step 2 first in float32 per lane and
// tile. The sample depends on nothing but V and K. So the results do not depend, bit for bit, on the order of atomics,
// the number of blocks or the alignment of the row.
#pragma once

#include "keys.cuh"
#include "topk_logits_memory.cuh"
#include "vectors.cuh"
#include "warp.cuh"

namespace slimkernels {
namespace cuda {
namespace {

__device__ inline uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The K-th largest key, and how many of the elements that equal it are kept and are not.
struct Found {
  uint32_t kth, ties_kept, ties_dropped;
  uint32_t largest;  // key of the row
  bool has_bins;     // whether the histogram has a bin for every key of candidates, except those of the last bin
};

// The state and the steps of one block working on its slice of one row.
template <class X, bool kStaged, int kThreads>
struct TopkRow {
  using Bits = typename X::Bits;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPerWord = 4 / sizeof(Bits), kPerVector = 16 / sizeof(Bits);
  static constexpr int kTile = cuda::kTile<X>;
  static constexpr int kVectors = kTile / kPerVector;  // of a tile
  static constexpr int kPerLane = kTile / 32;          // consecutive elements of a tile that a lane marks and sums
  static constexpr int kMarks = kPerLane / 32;
  static constexpr int kKeyBits = 8 * sizeof(Bits);
  static constexpr uint32_t kAllKeys = Bits(~0u);
  static constexpr uint32_t kHalves = sizeof(Bits) == 4 ? 1 : 0x10001;  // repeats an element in a word
  // Shift of the first digit of candidates' keys above the threshold: exact for 16 bits.
  static constexpr int kFirstShift = sizeof(Bits) == 4 ? 14 : 0;

  const TopkLogitsArgs& args;
  const int64_t n;
  const uint32_t num_blocks, rank;
  const int thread, lane, warp;
  const int32_t begin, length;  // position of the slice in the row, and its number of elements
  const Bits* const row;        // the slice in device memory
  TopkMemory<X, kStaged, kThreads> memory;
  TopkState& state;

  uint32_t least = 0;   // least key of a candidate; elements below it are in the sums of the rest
  bool listed = false;  // whether the candidates are those in the lists; otherwise they are found in the row

  __device__ explicit TopkRow(const TopkLogitsArgs& args, TopkMemory<X, kStaged, kThreads> memory)
      : args(args),
        n(cluster_index()),
        num_blocks(cluster_size()),
        rank(cluster_rank()),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(int(__shfl_sync(kAllLanes, threadIdx.x / 32, 0))),  // the compiler sees that it is the same in all lanes
        begin(rank * args.slice < uint32_t(args.vocab_size) ? rank * args.slice : args.vocab_size),
        length(args.vocab_size - begin < args.slice ? args.vocab_size - begin : args.slice),
        row(static_cast<const Bits*>(args.logits) + n * args.row_stride + begin),
        memory(memory),
        state(*memory.state) {}

  __device__ TopkState& state_of(uint32_t block) { return *in_block(&state, block); }

  // A barrier of all threads of the row.
  __device__ void sync_row() const {
    if (num_blocks == 1) {
      __syncthreads();
    } else {
      sync_cluster();
    }
  }

  // ---- The row

  // Returns where a vector is kept: permuted within 128 bytes, so that lanes that read vectors at a distance of 128
  // bytes use different banks.
  __device__ static int32_t place_of(int32_t vector) { return vector ^ (vector >> 3 & 7); }

  // Returns where an element is kept, which is in the vector of that place.
  __device__ static uint32_t element_place(uint32_t i) { return i ^ (i >> 3 & 7 * kPerVector); }
  __device__ static Bits element(const uint4* tile, uint32_t i) {
    return reinterpret_cast<const Bits*>(tile)[element_place(i)];
  }

  // Starts to copy `size` elements of the slice, from `first` on, to shared memory, followed by -inf up to the end of
  // their last tile. Shared by kSharers threads, of which this one is number `me`.
  template <int kSharers>
  __device__ void stage(uint4* to, int32_t first, int32_t size, int me) const {
    const Bits* const source = row + first;
    const int32_t vectors = size / kPerVector, end = (size + kTile - 1) / kTile * kVectors;
    const auto copy = [&](int32_t begin, int32_t end) {
#pragma unroll 1
      for (int32_t i = begin + me; i < end; i += kSharers) {
        reinterpret_cast<Bits*>(to)[element_place(i)] = i < size ? source[i] : kMinusInfinity<X>;
      }
    };
    int32_t copied = 0;  // vectors, from the first on
    const uintptr_t address = reinterpret_cast<uintptr_t>(source);
    if (address % 16 == 0) {
      copied = vectors;
      // Places at a distance that is a multiple of 64 keep that distance.
      constexpr int kAtOnce = kSharers % 64 == 0 ? 8 : 1;
      const uint4* const from = reinterpret_cast<const uint4*>(source);
#pragma unroll 1
      for (int32_t i = me; i < vectors; i += kAtOnce * kSharers) {
        const SharedVector to_here = shared_vector(to + place_of(i));
        const uint4* const from_here = kept_pointer(from + i);
#pragma unroll
        for (int j = 0; j < kAtOnce * kSharers; j += kSharers) {
          if (j < vectors - i) copy_async(to_here + j, from_here + j);
        }
      }
    } else if (vectors > 2) {
      // All but the first and the last are in two aligned vectors each, which are within the row.
      copied = vectors - 1;
      const uint4* const from = reinterpret_cast<const uint4*>(address / 16 * 16);
#pragma unroll 2
      for (int32_t i = 1 + me; i < copied; i += kSharers) {
        to[place_of(i)] = shifted(load_vector(from + i), load_vector(from + i + 1), uint32_t(address % 16));
      }
      copy(0, kPerVector);
    }
    const int32_t started = (size + kPerVector - 1) / kPerVector;
    copy(copied * kPerVector, started * kPerVector);
    constexpr uint32_t kWord = kMinusInfinity<X> * kHalves;
#pragma unroll 1
    for (int32_t i = started + me; i < end; i += kSharers) to[place_of(i)] = {kWord, kWord, kWord, kWord};
  }

  // Returns a tile in shared memory; called by all lanes of a warp.
  __device__ const uint4* staged_tile(int32_t tile) const {
    if (kStaged) return memory.staged + tile * kVectors;
    uint4* const to = memory.staged + warp * kVectors;
    __syncwarp();  // no lane reads the tile before
    const int32_t first = tile * kTile;
    stage<32>(to, first, length - first < kTile ? length - first : kTile, lane);
    wait_for_copies();
    __syncwarp();
    return to;
  }

  // Calls visit(is_candidate, key, i) for the candidates of a tile, element i of it; all lanes call together.
  template <class Visit>
  __device__ void for_candidates(int32_t tile, const Visit& visit) const {
    if (listed) {
      const Candidate<X>* from = memory.list + (memory.tiles[tile].first + lane);
      const int32_t found = memory.tiles[tile].found, limit = found - lane;
#pragma unroll 1
      for (int32_t base = 0; base < found; base += 32, from += 32) {
        const Candidate<X> candidate = *from;
        visit(base < limit, uint32_t(candidate >> kKeyBits), uint32_t(candidate) & kAllKeys);
      }
    } else {
      const uint4* const elements = staged_tile(tile);
      const int32_t left = length - tile * kTile;
#pragma unroll 1
      for (int32_t i = lane; i < kTile; i += 32) {
        const uint32_t key = order_key<X>(element(elements, i));
        visit(i < left && key >= least, key, uint32_t(i));
      }
    }
  }

  // ---- Steps, in the files named above

  // Histograms.
  template <int kCount>
  __device__ void find_bin(uint32_t* histogram, uint32_t rank_from_above);
  __device__ void count_key(uint32_t key, uint32_t low, int shift);

  // 1. The sample.
  __device__ static uint32_t upper_keys(uint32_t low, uint32_t high);
  __device__ uint32_t guess_threshold();

  // 2. The candidates.
  __device__ void add_up(FixedSum& sum, unsigned long long value) const;
  __device__ static uint32_t mark(uint32_t reaching, int w, uint32_t marks);
  __device__ float sum_below(const uint4* tile, float threshold_value, uint32_t threshold, float scale,
                             uint32_t (&marks)[kMarks]) const;
  __device__ uint32_t list(int32_t tile, const uint4* elements, const uint32_t (&marks)[kMarks]);
  __device__ void collect();

  // 3. The selection.
  __device__ void count_again(uint32_t low, uint32_t high, int shift);
  __device__ Found find_kth(bool is_sampled);
  __device__ uint32_t find_largest_below(uint32_t kth);

  // 4. The results.
  __device__ void add_exponential(int m, uint32_t key, uint32_t count, uint32_t kth, float level, float rest_level,
                                  unsigned long long& above, unsigned long long& below) const;
  __device__ void sum_candidates(const Found& found, float level, float rest_level);
  __device__ void write_lse(const Found& found, float level, float rest_level);

  // ---- Results

  // Counts every tile's candidates above the K-th largest and equal to it.
  __device__ void count_tiles(uint32_t kth) {
    uint32_t num_above = 0, num_tied = 0;
#pragma unroll 1
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      uint32_t counts = 0;  // of candidates above the K-th largest and, in the upper half, of ties
      for_candidates(tile, [&](bool is_candidate, uint32_t key, uint32_t) {
        if (is_candidate && key > kth) counts += 1;
        if (is_candidate && key == kth) counts += 0x10000;
      });
      counts = __reduce_add_sync(kAllLanes, counts);
      const uint32_t above = counts & 0xffff, tied = counts >> 16;
      if (lane == 0) {
        memory.tiles[tile].above = above;
        memory.tiles[tile].tied = tied;
      }
      num_above += above;
      num_tied += tied;
    }
    if (lane == 0) {
      atomicAdd(&state.num_above, num_above);
      atomicAdd(&state.num_tied, num_tied);
    }
    sync_row();
  }

  // Writes the candidates above the K-th largest key and, lowest ids first, as many of its ties as are kept.
  __device__ void write_tiles(const Found& found) {
    const bool is_before = lane < int(rank);
    const uint32_t above_before = __reduce_add_sync(kAllLanes, is_before ? state_of(lane).num_above : 0u);
    const uint32_t tied_before = __reduce_add_sync(kAllLanes, is_before ? state_of(lane).num_tied : 0u);
    const uint32_t lower_lanes = (1u << lane) - 1;
#pragma unroll 1
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      uint32_t above = 0, tied = 0;
#pragma unroll 1
      for (int32_t t = lane; t < tile; t += 32) {
        above += memory.tiles[t].above;
        tied += memory.tiles[t].tied;
      }
      above = above_before + __reduce_add_sync(kAllLanes, above);
      tied = tied_before + __reduce_add_sync(kAllLanes, tied);
      // Ties that are kept: before the tile, and at most of it.
      const uint32_t kept_before = tied < found.ties_kept ? tied : found.ties_kept;
      uint32_t keeps = found.ties_kept - kept_before;
      const bool keeps_all = memory.tiles[tile].tied <= keeps;
      const uint32_t largest_dropped = keeps_all ? found.kth - 1 : found.kth;
      int32_t* const ids = kept_pointer(args.ids + n * args.top_k + (above + kept_before));
      Bits* const values = kept_pointer(static_cast<Bits*>(args.values) + n * args.top_k + (above + kept_before));
      uint32_t written = 0;
      const auto write = [&](bool is_kept, uint32_t i) {
        const uint32_t kept = __ballot_sync(kAllLanes, is_kept);
        if (is_kept) {
          const uint32_t k = written + __popc(kept & lower_lanes);
          ids[k] = begin + tile * kTile + i;
          values[k] = kStaged ? element(memory.staged + tile * kVectors, i) : row[tile * kTile + i];
        }
        written += __popc(kept);
      };
      if (keeps == 0 || keeps_all) {
        for_candidates(tile, [&](bool is_candidate, uint32_t key, uint32_t i) {
          write(is_candidate && key > largest_dropped, i);
        });
      } else {
        for_candidates(tile, [&](bool is_candidate, uint32_t key, uint32_t i) {
          const bool is_tied = is_candidate && key == found.kth;
          const uint32_t ties = __ballot_sync(kAllLanes, is_tied);
          write(is_tied ? uint32_t(__popc(ties & lower_lanes)) < keeps : is_candidate && key > found.kth, i);
          const uint32_t here = __popc(ties);
          keeps -= here < keeps ? here : keeps;
        });
      }
    }
  }

  __device__ void write_target_logit() {
    if (args.target == nullptr || rank != 0 || thread != 0) return;
    const int64_t target = args.target[n];
    const bool labelled = target >= 0 && target < args.vocab_size;
    args.target_logit[n] = labelled ? X::widen(row[target]) : __uint_as_float(0x7fc00000);
  }

  __device__ void wait_for_row() const {
    if (kStaged) wait_for_copies();
    __syncthreads();
  }

  __device__ void clear() {
    const uint4 zero = {0, 0, 0, 0};
    for (int i = thread; i < int(sizeof(TopkState) / 16); i += kThreads) reinterpret_cast<uint4*>(&state)[i] = zero;
    __syncthreads();
  }

  __device__ void run() {
    if (kStaged) stage<kThreads>(memory.staged, 0, length, thread);
    write_target_logit();
    clear();
    const bool is_sampled = args.sample_rank > 0;
    if (is_sampled) {
      least = guess_threshold();
      collect();
    } else {
      wait_for_row();
    }
    const Found found = find_kth(is_sampled);
    const float level = value_of_key<X>(found.largest);
    const float rest_level = value_of_key<X>(found.ties_dropped > 0 ? found.kth : find_largest_below(found.kth));
    sum_candidates(found, level, rest_level);
    count_tiles(found.kth);
    write_lse(found, level, rest_level);
    write_tiles(found);
    sync_row();  // other blocks read this block's counts and sums, so it must not end earlier
  }
};

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

#include "topk_logits_selection.cuh"
#include "topk_logits_sums.cuh"

namespace slimkernels {
namespace cuda {
namespace {

template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) topk_logits_kernel(const __grid_constant__ TopkLogitsArgs args) {
  TopkMemory<X, kStaged, kThreads> memory;
  memory.assign(shared_memory(), args.slice, args.list_capacity);
  TopkRow<X, kStaged, kThreads>(args, memory).run();
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
