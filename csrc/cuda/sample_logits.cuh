// Draws from the truncated softmax of a row, in one read of device memory.
//
// A row is processed by a cluster of blocks. Each keeps its slice of the row in shared memory, or reads it again
// through L2 if it does not fit.
//
// 1. load         finds the largest logit while the slice is copied to shared memory.
// 2. sum_slice    sums the exponentials, all relative to the largest logit.
// 3. find_bound   finds a key below which the truncation keeps nothing: from the largest logits of the threads if top-k
//                 truncates, else from a histogram of (top - z) / T. The few logits that reach it, the candidates, are
//                 listed in the first block, and the other blocks end. If the list is too short, or nothing is
//                 truncated, all blocks go on and every logit is a candidate.
// 4. truncate     finds the lowest key that is kept, by histograms of the digits of keys.
// 5. race         finds the largest score plus Gumbel noise. An upper bound of it takes a few instructions. Only ids
//                 whose bound reaches a number that the winner nearly always exceeds are evaluated in float64. If the
//                 winner did not exceed it, the race runs again with a lower one.
//
// Ids with equal logits are kept or cut together, so a truncation keeps exactly the logits at or above some threshold.
// Sums are integers, the exponentials in fixed point, so results do not depend on the order of atomics, the number of
// blocks or the alignment of the row.
//
// The kernel has run on an emulated GPU only (tests/support/cuda_emulator).
#pragma once

#include <string.h>

#include "gumbel.cuh"
#include "keys.cuh"
#include "sample_logits_memory.cuh"
#include "staging.cuh"
#include "vectors.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kLowestTemperature = 0x1p-126, kHighestTemperature = 0x1p126;
constexpr float kLargest = 3.4028234663852886e38f;
constexpr int32_t kMostOfWarp = 256;    // candidates of which one warp takes care
constexpr uint32_t kNoId = 0x7FFFFFFF;  // larger than every id, so it loses every tie

// Keys of float32 numbers that sort like them, for maxima over a warp.
__device__ inline float max_of_warp(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t key = __reduce_max_sync(kAllLanes, bits >> 31 ? ~bits : bits | 0x80000000u);
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Returns the sum over the warp, which is below 2 ** 64.
__device__ inline unsigned long long sum_of_warp(unsigned long long value) {
  constexpr int kBits = 26;  // so that 32 of the parts fit into 32 bits
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const unsigned long long low = __reduce_add_sync(kAllLanes, uint32_t(value) & kMask);
  const unsigned long long middle = __reduce_add_sync(kAllLanes, uint32_t(value >> kBits) & kMask);
  const unsigned long long high = __reduce_add_sync(kAllLanes, uint32_t(value >> 2 * kBits));
  return low + (middle << kBits) + (high << 2 * kBits);
}

__device__ inline uint64_t shuffle_up(uint64_t value, int distance) {
  const uint32_t low = __shfl_up_sync(kAllLanes, uint32_t(value), distance);
  return uint64_t(__shfl_up_sync(kAllLanes, uint32_t(value >> 32), distance)) << 32 | low;
}

__device__ inline double shuffle_xor(double value, int distance) {
  uint32_t halves[2];
  memcpy(halves, &value, 8);
  halves[0] = __shfl_xor_sync(kAllLanes, halves[0], distance);
  halves[1] = __shfl_xor_sync(kAllLanes, halves[1], distance);
  memcpy(&value, halves, 8);
  return value;
}

// The threads among which the candidates of a row are shared: all, which have the slices, or those of the first block
// or of its first warp, which have the list.
enum Sharing { kByCluster, kByBlock, kByWarp };

// The state and the steps of one block working on its slice of one row.
template <class X, bool kStaged, int kThreads>
struct SampleRow {
  using Bits = typename X::Bits;
  using State = SampleState<kThreads>;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPerVector = 16 / sizeof(Bits);
  static constexpr int kWords = kGroup * sizeof(Bits) / 4;
  using Words = uint32_t[kWords];
  static constexpr Bits kMinusInfinity = Bits(X::kInfinity | ((Bits(~0u) >> 1) + 1));

  const SampleArgs& args;
  const int32_t n;
  const uint32_t num_blocks, rank;
  const int thread, lane, warp;
  const int32_t begin, length;  // position of the slice in the row, and its number of elements
  const Bits* const row;        // the slice in device memory
  SampleMemory<X, kStaged, kThreads> memory;
  State& state;

  // Set by run.
  uint32_t top_key;   // of the largest logit
  float top;          // the largest logit, or the largest finite number
  float exponent;     // log2(e) / T
  float unit;         // 1 in fixed point: 2 ** 61 / V, rounded to a power of two
  int histogram = 0;  // of the two, the one that is filled next
  bool is_general;    // whether sum_slice takes the differences to the top before it scales them
  Sharing sharing = kByCluster;
  int32_t num_listed;    // number of candidates in the list
  uint32_t num_sharing;  // number of blocks that have candidates

  __device__ explicit SampleRow(const SampleArgs& args)
      : args(args),
        n(int32_t(blockIdx.x / cluster_size())),
        num_blocks(cluster_size()),
        rank(cluster_rank()),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        begin(rank * args.slice < uint32_t(args.vocab_size) ? rank * args.slice : args.vocab_size),
        length(args.vocab_size - begin < args.slice ? args.vocab_size - begin : args.slice),
        row(static_cast<const Bits*>(args.logits) + int64_t(n) * args.row_stride + begin),
        state(*reinterpret_cast<State*>(shared_memory())),
        num_sharing(num_blocks) {
    memory.assign(shared_memory(), args.slice, args.list_capacity);
  }

  __device__ State& state_of(uint32_t block) { return *in_block(&state, block); }

  // ---- Options of the row

  __device__ bool is_greedy() const { return args.temperature.of(n) == 0; }

  // The temperature that scores are divided by. Those of the largest logit are 0.
  __device__ double temperature() const { return is_greedy() ? 1.0 : args.temperature.of(n); }

  // The number of ids that top-k keeps; 0 if it keeps all.
  __device__ int64_t top_k_of_row() const {
    const int64_t top_k = args.top_k.of(n);
    return top_k < args.vocab_size ? top_k : 0;
  }

  // A barrier of all threads that have candidates.
  __device__ void sync_sharing() {
    if (sharing == kByWarp) {
      __syncwarp();
    } else if (sharing == kByBlock) {
      __syncthreads();
    } else {
      sync_cluster();
    }
  }

  __device__ int threads_of_block() const { return sharing == kByWarp ? 32 : kThreads; }

  // ---- Elements

  __device__ static uint32_t lowest_key() { return order_key<X>(kMinusInfinity) + 1; }
  __device__ static uint32_t infinite_key() { return order_key<X>(Bits(X::kInfinity)); }

  // Returns the key of a number that is rounded to the format; at least that of the lowest finite number.
  __device__ static uint32_t key_of(double value) {
    const uint32_t key = order_key<X>(narrow(X(), float(value)));
    return key < lowest_key() ? lowest_key() : key;
  }

  __device__ Bits element(int32_t i) const { return kStaged ? memory.staged[i] : row[i]; }

  __device__ static void unpack(const uint4& vector, uint32_t* words) {
    words[0] = vector.x;
    words[1] = vector.y;
    words[2] = vector.z;
    words[3] = vector.w;
  }

  // The aligned vector in which the slice begins, and how many bytes after the vector's start.
  __device__ const uint4* first_vector() const {
    return reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(row) / 16 * 16);
  }
  __device__ uint32_t misplaced() const { return uint32_t(reinterpret_cast<uintptr_t>(row) % 16); }

  // Reads elements i to i + 7, of any tile of the slice, as words; -inf past the end of the slice.
  __device__ void read_group(int32_t i, Words& words) const {
    if (kStaged) {
      const uint4* from = reinterpret_cast<const uint4*>(memory.staged + i);
#pragma unroll
      for (int part = 0; part < kWords / 4; ++part) unpack(from[part], words + 4 * part);
    } else if ((i > 0 && i + kGroup + kPerVector <= length) || (misplaced() == 0 && i + kGroup <= length)) {
      const uint4* from = first_vector() + i / kPerVector;
      const uint32_t offset = misplaced();
#pragma unroll
      for (int part = 0; part < kWords / 4; ++part) {
        // Both vectors have elements of the row, so reading them is allowed.
        const uint4 vector = load_vector(from + part);
        unpack(offset == 0 ? vector : shifted(vector, load_vector(from + part + 1), offset), words + 4 * part);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWords; ++j) words[j] = 0;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const uint32_t bits = i + j < length ? row[i + j] : kMinusInfinity;
        words[j * kWords / kGroup] |= bits << (j * sizeof(Bits) % 4 * 8);
      }
    }
  }

  __device__ static Bits element_of(const Words& words, int j) {
    return Bits(words[j * kWords / kGroup] >> (j * sizeof(Bits) % 4 * 8));
  }

  // Returns one bit for each element of a group whose key is at least this one, which is not that of a NaN.
  __device__ static uint32_t marks_of(const Words& words, uint32_t key) {
    uint32_t marks = 0;
    if constexpr (sizeof(Bits) == 2) {
      const uint32_t threshold = bits_of_key<X>(key) * 0x10001u;
      // Elements 2 j and 2 j + 1 are the low and the high half of word j.
#pragma unroll
      for (int j = 0; j < kWords; ++j) marks |= X::not_below(words[j], threshold) & 0x10001u << 2 * j;
      marks |= marks >> 15;
    } else {
      const float threshold = value_of_key<X>(key);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) marks |= X::widen(words[j]) < threshold ? 0u : 1u << j;
    }
    return marks & ((1u << kGroup) - 1);
  }

  // Returns whether any element of a group has a key that is at least this one.
  __device__ static bool reaches(const Words& words, uint32_t key) {
    uint32_t largest = words[0];
#pragma unroll
    for (int j = 1; j < kWords; ++j) largest = X::max_word(largest, words[j]);
    if constexpr (sizeof(Bits) == 2) return X::not_below(largest, bits_of_key<X>(key) * 0x10001u) != 0;
    return !(X::widen(Bits(largest)) < value_of_key<X>(key));
  }

  // Calls visit(i, words) for the groups of the slice that have an element whose key is at least this one.
  template <class Visit>
  __device__ void visit_groups(uint32_t key, Visit visit) const {
    constexpr int32_t kStride = kThreads * kGroup;
#pragma unroll 2
    for (int32_t i = thread * kGroup; i < length; i += 2 * kStride) {
      // One test of two groups.
      Words words, others;
      read_group(i, words);
      read_group(i + kStride < length ? i + kStride : i, others);
#pragma unroll
      for (int j = 0; j < kWords; ++j) words[j] = X::max_word(words[j], others[j]);
      if (!reaches(words, key)) continue;
#pragma unroll 1
      for (int32_t k = i; k < length && k <= i + kStride; k += kStride) {
        read_group(k, words);
        if (reaches(words, key)) visit(k, words);
      }
    }
  }

  // Calls visit(key) for the candidates that this thread has.
  template <class Visit>
  __device__ void visit_candidates(uint32_t least_key, Visit visit) const {
    if (sharing != kByCluster) {
#pragma unroll 1
      for (int32_t i = thread; i < num_listed; i += threads_of_block()) {
        if (memory.list[i].key >= least_key) visit(memory.list[i].key);
      }
    } else {
      visit_groups(least_key, [&](int32_t i, const Words& words) {
#pragma unroll 1
        for (uint32_t marks = marks_of(words, least_key); marks != 0; marks &= marks - 1)
          visit(order_key<X>(element(i + __ffs(marks) - 1)));
      });
    }
  }

  // ---- 1. The largest logit

  // Clears the counters and, if the slice is staged, copies it. Returns the key of the thread's largest element.
  __device__ uint32_t load() {
    for (int i = thread; i < 2 * kBins; i += kThreads) {
      (&state.masses[0][0])[i] = 0;
      (&state.counts[0][0])[i] = 0;
    }
    if (thread == 0) {
      state.found = state.infinite = state.position = 0;
    }

    uint32_t best = sizeof(Bits) == 4 ? kMinusInfinity : kMinusInfinity * 0x10001u;
    uint4* const to = reinterpret_cast<uint4*>(memory.staged);
    const auto visit = [&](const uint4& vector, int32_t i) {
      if (kStaged) to[i] = vector;
      best = X::max_word(X::max_word(best, vector.x), X::max_word(vector.y, X::max_word(vector.z, vector.w)));
    };
    const auto visit_elements = [&](int32_t first, int32_t last) {
#pragma unroll 1
      for (int32_t i = first + thread; i < last; i += kThreads) {
        const Bits bits = row[i];
        if (kStaged) memory.staged[i] = bits;
        best = X::max_word(best, sizeof(Bits) == 4 ? bits : bits * 0x10001u);
      }
    };
    const int32_t vectors = length / kPerVector;
    const uint4* const from = first_vector();
    const uint32_t offset = misplaced();
    if (offset == 0) {
      int32_t i = thread;
      for (; i + 3 * kThreads < vectors; i += 4 * kThreads) {
        uint4 loaded[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) loaded[j] = from[i + j * kThreads];
#pragma unroll
        for (int j = 0; j < 4; ++j) visit(loaded[j], i + j * kThreads);
      }
#pragma unroll 1
      for (; i < vectors; i += kThreads) visit(from[i], i);
      visit_elements(vectors * kPerVector, length);
    } else if (vectors > 2) {
      // Vectors of the slice are in two aligned ones, which are within the row for all but the first and the last.
#pragma unroll 2
      for (int32_t i = 1 + thread; i < vectors - 1; i += kThreads) {
        visit(shifted(load_vector(from + i), load_vector(from + i + 1), offset), i);
      }
      visit_elements(0, kPerVector);
      visit_elements((vectors - 1) * kPerVector, length);
    } else {
      visit_elements(0, length);
    }
    if (kStaged) {
      const int32_t end = (length + kTile - 1) / kTile * kTile;
#pragma unroll 1
      for (int32_t i = length + thread; i < end; i += kThreads) memory.staged[i] = kMinusInfinity;
    }
    const uint32_t key = order_key<X>(Bits(best));
    const uint32_t other = order_key<X>(Bits(best >> (sizeof(Bits) == 4 ? 0 : 16)));
    return key > other ? key : other;
  }

  // Returns the largest key of all threads of the row.
  __device__ uint32_t largest_in_row(uint32_t key) {
    key = __reduce_max_sync(kAllLanes, key);
    if (lane == 0) state.largest_key[warp] = key;
    sync_cluster();
#pragma unroll 1
    for (uint32_t i = lane; i < num_blocks * kWarps; i += 32) {
      const uint32_t found = state_of(i / kWarps).largest_key[i % kWarps];
      key = found > key ? found : key;
    }
    return __reduce_max_sync(kAllLanes, key);
  }

  // ---- 2. Sums

  // The bins of find_bound count logits by how far they are below the top: an eighth of T each.
  static constexpr float kBinsPerNat = 8;

  // Sums over the slice, of d = z - top: exp(d), -d exp(d) / ln 2 and, if asked for, exp(d / T). Counts -d / T if asked
  // for. If it is not general, d / ln 2 is one operation, which is accurate unless the top is so large that its
  // logarithm to base 2 is rounded by much.
  template <bool kGeneral>
  __device__ void sum_slice(bool tempers, bool counts) {
    const float level = level_of_sums();
    const float bins = fminf(exponent * (kBinsPerNat / kLog2E), kLargest);  // 0 is multiplied by it
    // If it is not general, logits this far below the top are raised to one whose exponential is 0, because -inf would
    // be multiplied by 0.
    constexpr float kNoMass = -200;
    uint32_t floor = bits_of_key<X>(key_of(fmaxf(top + kNoMass, -kLargest)));
    if (sizeof(Bits) == 2) floor *= 0x10001u;
    unsigned long long exps = 0, moments = 0, tempered = 0;
#pragma unroll 1
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      float e_sum = 0, moment_sum = 0, tempered_sum = 0;
      const int32_t first = tile * kTile + lane * kGroup;
#pragma unroll 4
      for (int step = 0; step < kTile / (32 * kGroup); ++step) {
        Words words;
        read_group(first + step * (32 * kGroup), words);
        if (!kGeneral) {
#pragma unroll
          for (int j = 0; j < kWords; ++j) words[j] = X::max_word(words[j], floor);
        }
        float below[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float z = X::widen(element_of(words, j));
          below[j] = z - top;
          const float y = kGeneral ? below[j] * kLog2E : fmaf(z, kLog2E, -level);
          const float e = exp2_approx(y);
          e_sum += e;
          moment_sum -= e * (kGeneral ? fmaxf(y, kNoMass) : y);
        }
        if (kGeneral && tempers) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) tempered_sum += exp2_approx(below[j] * exponent);
        }
        if (kGeneral && counts) {
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            atomicAdd(&state.counts[0][int(fminf(-below[j] * bins, float(kBins - 1)))], 1u);
          }
        }
      }
      exps += __float2ull_rn(e_sum * unit);
      moments += __float2ull_rn(moment_sum * unit);
      if (kGeneral && tempers) tempered += __float2ull_rn(tempered_sum * unit);
    }
    exps = sum_of_warp(exps);
    moments = sum_of_warp(moments);
    if (kGeneral && tempers) tempered = sum_of_warp(tempered);
    if (lane != 0) return;
    state.exps[warp] = exps;
    state.moments[warp] = moments;
    state.tempered[warp] = tempered;
  }

  // Returns the number that sum_slice subtracts from z / ln 2 if it is not general: that of the top, rounded up.
  __device__ float level_of_sums() const { return fmaf(fabsf(top), 0x1p-22f, top * kLog2E); }

  // Returns the number to add to the logarithm of the sum of exp(d), because that is relative to the level.
  __device__ double log_of_level() const {
    return is_general ? 0 : double(level_of_sums()) / double(kLog2E) - double(top);
  }

  // Returns the sum over all warps of the row.
  __device__ unsigned long long sum_of_row(unsigned long long (State::*sums)[kWarps]) {
    unsigned long long sum = 0;
#pragma unroll 1
    for (uint32_t i = lane; i < num_blocks * kWarps; i += 32) sum += (state_of(i / kWarps).*sums)[i % kWarps];
    return sum_of_warp(sum);
  }

  // Finds the lowest id of the largest logit, and counts the logits of +inf.
  __device__ void find_first() {
    uint32_t first = kNoId, infinite = 0;
    visit_groups(top_key, [&](int32_t i, const Words& words) {
      const uint32_t marks = marks_of(words, top_key);
      const uint32_t id = begin + i + __ffs(marks) - 1;
      first = id < first ? id : first;
      infinite += __popc(marks);
    });
    first = ~__reduce_max_sync(kAllLanes, ~first);
    infinite = __reduce_add_sync(kAllLanes, infinite);
    if (lane != 0) return;
    state.first_id[warp] = first;
    if (top_key == infinite_key()) atomicAdd(&state.infinite, infinite);
  }

  // ---- 3. Candidates

  // Returns the first bin at which the sum of the amounts reaches the target, and sets `before` to the sum without it;
  // kBins if the target is not reached. One warp searches for all.
  template <class Amount>
  __device__ uint32_t find_bin(unsigned long long target, unsigned long long& before, Amount amount) {
    if (rank == 0 && warp == 0) {
      constexpr int kPerLane = kBins / 32;
      unsigned long long own[kPerLane], sum = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += own[j] = amount(lane * kPerLane + j);
      unsigned long long lower = sum;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const unsigned long long other = shuffle_up(lower, distance);
        if (lane >= distance) lower += other;
      }
      const bool is_reached = __ballot_sync(kAllLanes, target <= lower) != 0;
      if (!is_reached && lane == 0) state.position = kBins;
      lower -= sum;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (lower < target && target <= lower + own[j]) {
          state.position = lane * kPerLane + j;
          state.before = lower;
        }
        lower += own[j];
      }
    }
    sync_sharing();
    before = state_of(0).before;
    return state_of(0).position;
  }

  // Returns the number of entries in a bin of the current histogram, of all blocks.
  __device__ uint32_t count_of(int bin) {
    uint32_t count = 0;
#pragma unroll 1
    for (uint32_t block = 0; block < num_sharing; ++block) count += state_of(block).counts[histogram][bin];
    return count;
  }

  // Bins of distances between keys, eight per power of two.
  __device__ static int bin_of_distance(uint32_t distance) {
    if (distance == 0) return 0;
    const int bin = int(__float_as_uint(float(distance)) >> 20) - (127 << 3) + 1;
    return bin < kBins ? bin : kBins - 1;
  }

  // Returns a key below which the truncation keeps nothing, from the largest logits of the threads: each is a logit,
  // and if K of them reach a key, so does the K-th largest logit.
  __device__ uint32_t bound_of_top_k(int64_t top_k) {
    unsigned long long before;
    const uint32_t bin = find_bin(top_k, before, [&](int bin) { return state.counts[0][bin]; });
    const uint32_t range = top_key - lowest_key();
    if (bin >= kBins - 1) return lowest_key();
    const float distance = bin == 0 ? 0.0f : __uint_as_float((bin + (127 << 3)) << 20);  // at most this
    return distance >= float(range) ? lowest_key() : top_key - uint32_t(distance);
  }

  // Returns a key below which top-p keeps nothing, from the counts of sum_slice: with upper bounds of the masses of the
  // bins, what lies below has less than the mass that is cut.
  __device__ uint32_t bound_of_top_p(unsigned long long total) {
    const double cut = double(total) * (1 - args.top_p.of(n)) * (1 - 1e-5);
    const float scale = unit * 1.0001f;
    unsigned long long target = cut < 0 ? 1 : static_cast<unsigned long long>(cut) + 1, before;
    const uint32_t position = find_bin(target, before, [&](int place) {
      const int bin = kBins - 1 - place;
      return count_of(bin) * __float2ull_rn(exp2_approx(bin * (-kLog2E / kBinsPerNat)) * scale);
    });
    const int bin = kBins - 1 - int(position);  // this one is the first that is not cut as a whole
    if (bin == kBins - 1) return lowest_key();
    const double least = double(top) - temperature() * ((bin + 1.01) / kBinsPerNat);
    const uint32_t key = key_of(least > -double(kLargest) ? least : -double(kLargest));
    return key > lowest_key() + 2 ? key - 2 : lowest_key();
  }

  // Adds the elements of the slice that reach the key to the list of the first block.
  __device__ void list_candidates(uint32_t least_key) {
    uint32_t& found = state_of(0).found;
    Candidate* const list = in_block(memory.list, 0);
    visit_groups(least_key, [&](int32_t i, const Words& words) {
      uint32_t marks = marks_of(words, least_key);
      uint32_t place = atomicAdd(&found, uint32_t(__popc(marks)));
#pragma unroll 1
      for (; marks != 0 && place < uint32_t(args.list_capacity); marks &= marks - 1) {
        const int32_t j = i + __ffs(marks) - 1;
        list[place++] = {uint32_t(begin + j), order_key<X>(element(j))};
      }
    });
  }

  // ---- 4. Truncation

  // Returns the mass of the element with this key.
  __device__ unsigned long long mass_of(uint32_t key) const {
    return __float2ull_rn(exp2_approx((value_of_key<X>(key) - top) * exponent) * unit);
  }

  // Returns the lowest key in [low, top_key] above which the candidates' number, or their mass, is less than the
  // target.
  __device__ uint32_t lowest_key_under(uint32_t low, bool by_mass, unsigned long long target) {
    uint32_t high = top_key;
    while (low < high) {
      const int bits = 32 - __clz(high - low);
      const int shift = bits > 8 ? bits - 8 : 0;
      static_assert(kBins == 1 << 8, "a digit has 8 bits");
      // If every bin has one key, its count tells its mass.
      const bool sums = by_mass && shift > 0;
      visit_candidates(low, [&](uint32_t key) {
        if (key > high) return;
        const uint32_t bin = (high - key) >> shift;
        if (sums) {
          atomicAdd(&state.masses[histogram][bin], mass_of(key));
        } else {
          atomicAdd(&state.counts[histogram][bin], 1u);
        }
      });
      sync_sharing();
      // No block reads the other histogram any more.
      for (int i = thread; i < kBins; i += threads_of_block()) {
        state.masses[histogram ^ 1][i] = 0;
        state.counts[histogram ^ 1][i] = 0;
      }
      unsigned long long before;
      const uint32_t position = find_bin(target, before, [&](int bin) -> unsigned long long {
        if (!sums) return count_of(bin) * (by_mass ? mass_of(high - bin) : 1ull);
        unsigned long long mass = 0;
#pragma unroll 1
        for (uint32_t block = 0; block < num_sharing; ++block) mass += state_of(block).masses[histogram][bin];
        return mass;
      });
      histogram ^= 1;
      if (position == kBins) return low;
      target -= before;
      high -= position << shift;
      const uint32_t lowest = high - ((1u << shift) - 1);
      low = lowest > low ? lowest : low;
    }
    return low;
  }

  // Returns the mass of the candidates whose key is at least this one. Calls take turns between the sums.
  __device__ unsigned long long mass_from(uint32_t key, int which) {
    unsigned long long mass = 0;
    visit_candidates(key, [&](uint32_t other) { mass += mass_of(other); });
    mass = sum_of_warp(mass);
    if (sharing == kByWarp) return mass;
    if (lane == 0) state.kept[which][warp] = mass;
    sync_sharing();
    mass = 0;
#pragma unroll 1
    for (uint32_t i = lane; i < num_sharing * kWarps; i += 32) mass += state_of(i / kWarps).kept[which][i % kWarps];
    return sum_of_warp(mass);
  }

  // Sets state.min_p_key to the lowest key whose exp((z - top) / T), computed in float64, is at least min_p.
  __device__ void find_min_p_key() {
    const double min_p = args.min_p.of(n);
    uint32_t low = lowest_key() - 1, high = top_key;
    while (high - low > 1) {
      const uint32_t step = (high - low + 31) / 32;
      const uint32_t probe = high - low > (lane + 1) * step ? low + (lane + 1) * step : high;
      const bool reaches = ::exp(score_of(value_of_key<X>(probe))) >= min_p;
      const uint32_t reaching = __ballot_sync(kAllLanes, reaches || probe == high);
      const uint32_t first = __ffs(reaching) - 1;
      high = high - low > (first + 1) * step ? low + (first + 1) * step : high;
      low += first * step;
    }
    if (lane == 0) state.min_p_key = high;
  }

  // ---- 5. The race

  __device__ double score_of(double z) const { return (z < double(top) ? z - double(top) : 0.0) / temperature(); }

  struct Noise {
    uint64_t seed, position;
  };

  __device__ Noise noise_of_row() const {
    const int64_t seed = args.seeds == nullptr ? args.seed : args.seeds[args.seed_per_row ? n : 0];
    return {args.seed_per_row ? uint64_t(seed) : spread_seed(seed, n), uint64_t(args.position.of(n))};
  }

  __device__ static bool is_ahead(double score, uint32_t id, double other_score, uint32_t other_id) {
    return score > other_score || (score == other_score && id < other_id);
  }

  // Returns more than the rounding of bounds near this number.
  __device__ static float margin_of(float bound) { return 2e-4f + 2e-6f * fabsf(bound); }

  // Evaluates the candidates from `least_key` on whose bound reaches `reach`, and returns the best of them that is
  // behind `previous`. Bounds are in units of ln 2. Without `masks`, every id above -inf must be a candidate.
  __device__ Leader race(uint32_t least_key, const Noise& noise, float reach, bool masks,
                         const Leader& previous) const {
    Leader best = {-HUGE_VAL, kNoId, -HUGE_VALF};
    const auto evaluate = [&](uint32_t id, float z, uint32_t bits) {
      const double score = score_of(z) + gumbel(bits);
      if (is_ahead(previous.score, previous.id, score, id) && is_ahead(score, id, best.score, best.id)) {
        best.score = score;
        best.id = id;
      }
    };
    if (sharing != kByCluster) {
#pragma unroll 1
      for (int32_t i = thread; i < num_listed; i += threads_of_block()) {
        const Candidate candidate = memory.list[i];
        if (candidate.key < least_key) continue;
        const uint32_t bits = random_bits_of(candidate.id, noise.position, noise.seed);
        const float z = value_of_key<X>(candidate.key);
        const float bound = (z - top) * exponent + noise_bound(bits);
        if (bound >= reach) {
          evaluate(candidate.id, z, bits);
        } else {
          best.missed = fmaxf(best.missed, bound);
        }
      }
      return best;
    }
    visit_groups(least_key, [&](int32_t i, const Words& words) {
      float bounds[kGroup], highest = -HUGE_VALF;
#pragma unroll
      for (int j = 0; j < kGroup; j += 4) {
        uint32_t bits[4];
        random_bits(begin + i + j, noise.position, noise.seed, bits);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          bounds[j + k] = (X::widen(element_of(words, j + k)) - top) * exponent + noise_bound(bits[k]);
        }
      }
      if (masks) {
        const uint32_t marks = marks_of(words, least_key);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) bounds[j] = marks >> j & 1 ? bounds[j] : -HUGE_VALF;
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) highest = fmaxf(highest, bounds[j]);
      if (highest < reach) {
        best.missed = fmaxf(best.missed, highest);
        return;
      }
      uint32_t reaching = 0;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        reaching |= bounds[j] >= reach ? 1u << j : 0u;
        if (bounds[j] < reach) best.missed = fmaxf(best.missed, bounds[j]);
      }
      reaching &= marks_of(words, least_key);
#pragma unroll 1
      for (; reaching != 0; reaching &= reaching - 1) {
        const int32_t k = i + __ffs(reaching) - 1;
        evaluate(begin + k, X::widen(element(k)), random_bits_of(begin + k, noise.position, noise.seed));
      }
    });
    return best;
  }

  __device__ static Leader best_of_warp(Leader best) {
    best.missed = max_of_warp(best.missed);
    if (__ballot_sync(kAllLanes, best.id != kNoId) == 0) return best;
#pragma unroll 1
    for (int distance = 16; distance > 0; distance /= 2) {
      const double score = shuffle_xor(best.score, distance);
      const uint32_t id = __shfl_xor_sync(kAllLanes, best.id, distance);
      if (is_ahead(score, id, best.score, best.id)) {
        best.score = score;
        best.id = id;
      }
    }
    return best;
  }

  // Returns the best of all threads that have candidates. Calls take turns between the places.
  __device__ Leader best_of_row(Leader best, int which) {
    best = best_of_warp(best);
    if (sharing == kByWarp) return best;
    if (lane == 0) state.leaders[which][warp] = best;
    sync_sharing();
#pragma unroll 1
    for (uint32_t i = lane; i < num_sharing * kWarps; i += 32) {
      const Leader other = state_of(i / kWarps).leaders[which][i % kWarps];
      best.missed = fmaxf(best.missed, other.missed);
      if (is_ahead(other.score, other.id, best.score, best.id)) {
        best.score = other.score;
        best.id = other.id;
      }
    }
    return best_of_warp(best);
  }

  // Draws m ids from the candidates from `least_key` on, largest perturbed score first, and writes them.
  __device__ void draw(uint32_t least_key, bool masks, float log2_kept) {
    const Noise noise = noise_of_row();
    Leader previous = {HUGE_VAL, kNoId, 0};
    int which = 0;
    for (int32_t i = 0; i < args.num_distinct; ++i) {
      // The winner exceeds the logarithm of the mass less 2.5 but for 5 rows in a million.
      float reach = log2_kept - 2.5f * kLog2E;
      if (i > 0) reach = fminf(reach, float(previous.score) * kLog2E) - 2;
      Leader leader;
      for (bool again = true; again; which ^= 1) {
        leader = best_of_row(race(least_key, noise, reach, masks, previous), which);
        const float bound = float(leader.score) * kLog2E;
        // Ids that were missed are below the leader if it is clearly above the reach.
        again = reach > -HUGE_VALF && !(leader.id != kNoId && bound >= reach + margin_of(reach));
        // The winner reaches this.
        reach = leader.id != kNoId ? bound - 2 * margin_of(bound)
                                   : leader.missed - kLoosestBound - 2 * margin_of(leader.missed);
      }
      if (leader.id == kNoId) {
        write_absent(i, -HUGE_VALF);
        return;
      }
      write_draw(i, leader.id);
      previous = leader;
    }
  }

  // ---- Results

  __device__ void write_draw(int32_t i, uint32_t id) {
    if (rank != 0 || thread != 0) return;
    const double z = X::widen((row - begin)[id]);
    const int64_t place = int64_t(n) * args.num_distinct + i;
    double logprob = z - double(top) - state.log_sum;
    if (top_key == infinite_key()) logprob = z > double(top) ? -state.log_sum : -HUGE_VAL;
    args.token[place] = id;
    args.logprob[place] = float(logprob);
    args.truncated_logprob[place] = float(score_of(z) - state.log_kept);
  }

  // Fills the draws from the i-th on.
  __device__ void write_absent(int32_t i, float value) {
    if (rank != 0) return;
    for (i += thread; i < args.num_distinct; i += threads_of_block()) {
      const int64_t place = int64_t(n) * args.num_distinct + i;
      args.token[place] = -1;
      args.logprob[place] = args.truncated_logprob[place] = value;
    }
  }

  // Writes the entropy and keeps the logarithm of the sum for the draws. Follows the barrier after the sums.
  __device__ void write_entropy() {
    if (rank != 0 || warp != 0) return;
    const unsigned long long exps = sum_of_row(&State::exps), moments = sum_of_row(&State::moments);
    const uint32_t infinite = infinite_in_row();
    if (lane != 0) return;
    double entropy = ::log(double(infinite));
    state.log_sum = entropy;
    if (top_key < infinite_key()) {
      entropy = ::log(double(exps) / unit);
      state.log_sum = entropy + log_of_level();
      entropy += double(moments) / double(exps) / double(kLog2E);
    }
    args.entropy[n] = float(entropy);
  }

  __device__ uint32_t infinite_in_row() {
    return __reduce_add_sync(kAllLanes, lane < int(num_blocks) ? state_of(lane).infinite : 0u);
  }

  // Returns the lowest id of the largest logit.
  __device__ uint32_t first_in_row() {
    uint32_t first = kNoId;
#pragma unroll 1
    for (uint32_t i = lane; i < num_blocks * kWarps; i += 32) {
      const uint32_t id = state_of(i / kWarps).first_id[i % kWarps];
      first = id < first ? id : first;
    }
    return ~__reduce_max_sync(kAllLanes, ~first);
  }

  // Whether the row's options are in their ranges; NaN is not.
  __device__ bool is_sound() const {
    const double t = args.temperature.of(n), top_p = args.top_p.of(n), min_p = args.min_p.of(n);
    return (t == 0 || (t >= kLowestTemperature && t <= kHighestTemperature)) && top_p >= 0 && top_p <= 1 &&
           min_p >= 0 && min_p <= 1 && args.top_k.of(n) >= 0;
  }

  // Lists the candidates if they fit. Returns whether this block has some.
  __device__ bool take_candidates(uint32_t least_key) {
    list_candidates(least_key);
    sync_cluster();
    num_listed = int32_t(state_of(0).found);
    sync_cluster();  // from here on no block needs the memory of one that has ended
    if (uint32_t(num_listed) > uint32_t(args.list_capacity)) return true;
    sharing = num_listed <= kMostOfWarp ? kByWarp : kByBlock;
    num_sharing = 1;
    return rank == 0 && (sharing == kByBlock || warp == 0);
  }

  // Finds the candidates and the lowest key that is kept, and sets `kept` to their mass, which is given for the whole
  // row. Returns 0 if the row goes on without this block. Follows the barrier after the sums.
  __device__ uint32_t truncate(bool counted, unsigned long long& kept) {
    const int64_t top_k = top_k_of_row();
    uint32_t least = lowest_key();
    if (counted) {
      least = top_k > 0 ? bound_of_top_k(top_k) : bound_of_top_p(kept);
      histogram = 1;
    }
    const uint32_t least_min_p = args.min_p.of(n) > 0 ? state.min_p_key : lowest_key();
    // The mass of top-k includes what min-p cuts.
    if (top_k == 0 && least_min_p > least) least = least_min_p;
    if (least > lowest_key() && args.list_capacity > 0 && !take_candidates(least)) return 0;
    if (top_k > 0) {
      least = lowest_key_under(least, false, top_k);
      kept = mass_from(least, 0);
    }
    least = least_min_p > least ? least_min_p : least;
    if (args.top_p.of(n) < 1) {
      const double target = ceil(double(kept) * args.top_p.of(n));
      least = lowest_key_under(least, true, target > 1 ? static_cast<unsigned long long>(target) : 1ull);
    }
    kept = mass_from(least, 1);
    return least;
  }

  // Raises the least key to that of the logits that may win. Noise is between -3.14 and 22.9, so none that is this far
  // below the largest can.
  __device__ uint32_t least_to_win(uint32_t least_key) const {
    if (args.num_distinct > 1) return least_key;
    const uint32_t possible = key_of(fmax(double(top) - 26.2 * temperature(), -double(kLargest)));
    return possible > least_key + 2 ? possible - 2 : least_key;
  }

  __device__ void run() {
    const uint32_t own_key = load();
    top_key = largest_in_row(own_key);
    if (!is_sound() || top_key < lowest_key() || top_key > infinite_key()) {
      const float nan = __uint_as_float(0x7fc00000);
      if (rank == 0 && thread == 0) args.entropy[n] = nan;
      write_absent(0, nan);
      sync_cluster();  // other blocks read this block's largest key
      return;
    }
    const bool is_finite = top_key < infinite_key(), sums = is_finite && !is_greedy();
    top = fminf(value_of_key<X>(top_key), kLargest);
    exponent = float(1.4426950408889634 / temperature());
    unit = __uint_as_float((127 + 61 - (32 - __clz(args.vocab_size))) << 23);

    const int64_t top_k = top_k_of_row();
    const bool by_maxima = top_k > 0 && top_k <= int64_t(num_blocks) * kThreads;
    const bool by_mass = top_k == 0 && args.top_p.of(n) < 1;
    const bool counts = sums && args.list_capacity > 0 && (by_maxima || by_mass);
    const bool tempers = sums && top_k == 0 && temperature() != 1;
    if (counts && by_maxima) atomicAdd(&state_of(0).counts[0][bin_of_distance(top_key - own_key)], 1u);
    if (sums && warp == 0 && args.min_p.of(n) > 0) find_min_p_key();
    if (!sums) find_first();
    is_general = tempers || by_mass || fabsf(top) >= 32768;
    if (is_finite) {
      if (is_general) {
        sum_slice<true>(tempers, counts && by_mass);
      } else {
        sum_slice<false>(false, false);
      }
    }
    sync_cluster();
    write_entropy();
    if (is_greedy()) {
      if (thread == 0) state.log_kept = 0;
      write_draw(0, first_in_row());
      write_absent(1, -HUGE_VALF);
    } else {
      const bool truncates = is_finite && (top_k > 0 || args.top_p.of(n) < 1 || args.min_p.of(n) > 0);
      unsigned long long kept = infinite_in_row();
      if (is_finite && top_k == 0) kept = sum_of_row(tempers ? &State::tempered : &State::exps);
      if (!is_finite) unit = 1;
      uint32_t least = is_finite ? lowest_key() : top_key;
      if (truncates) least = truncate(counts, kept);
      if (least == 0) return;
      if (thread == 0) state.log_kept = ::log(double(kept) / unit) + (truncates || !is_finite ? 0 : log_of_level());
      if (is_finite) least = least_to_win(least);
      draw(least, truncates || !is_finite, log2_approx(float(kept) / unit));
    }
    if (sharing == kByCluster) sync_cluster();  // other blocks read this block's results
  }
};

template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) sample_logits_kernel(const __grid_constant__ SampleArgs args) {
  SampleRow<X, kStaged, kThreads>(args).run();
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
