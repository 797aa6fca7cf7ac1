// Draws from the truncated softmax of a row, in one read of device memory.
//
// A row is processed by a cluster of blocks. Each keeps its slice of the row in shared memory, or reads it again
// through L2 if it does not fit.
//
// 1. load         finds the largest logit while the slice is copied to shared memory.
// 2. sum_slice    sums the exponentials, all relative to the largest logit.
// 3. bound_of_..  finds a key below which the truncation keeps nothing: from the largest logits of the threads if top-k
//                 truncates, else from a histogram of (top - z) / T. The few logits that reach it, the candidates, are
//                 listed in the first block, and the other blocks end. If the list is too short, or nothing is
//                 truncated, all blocks go on and every logit is a candidate.
// 4. truncate     finds the lowest key that is kept, by histograms of the digits of keys. Like stage 3, this is in
//                 sample_logits_truncation.cuh.
// 5. draw         finds the largest score plus Gumbel noise. An upper bound of it takes a few instructions. Only ids
//                 whose bound reaches a number that the winner nearly always exceeds are evaluated in float64. If the
//                 winner did not exceed it, the race runs again with a lower one (sample_logits_race.cuh).
//
// Ids with equal logits are kept or cut together, so a truncation keeps exactly the logits at or above some threshold.
// Sums are integers, the exponentials in fixed point, so results do not depend on the order of atomics, the number of
// blocks or the alignment of the row.
//
// The kernel has run on an emulated GPU only (tests/support/cuda_emulator).
#pragma once

#include "gumbel.cuh"
#include "keys.cuh"
#include "sample_logits_memory.cuh"
#include "staging.cuh"
#include "vectors.cuh"
#include "warp.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kLowestTemperature = 0x1p-126, kHighestTemperature = 0x1p126;
constexpr float kLargest = 3.4028234663852886e38f;
constexpr int32_t kMostOfWarp = 256;    // candidates of which one warp takes care
constexpr uint32_t kNoId = 0x7FFFFFFF;  // larger than every id, so it loses every tie

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
        n(int32_t(cluster_index())),
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

  __device__ static uint32_t lowest_key() { return order_key<X>(kMinusInfinity<X>) + 1; }
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
        const uint32_t bits = i + j < length ? row[i + j] : kMinusInfinity<X>;
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

    uint32_t best = sizeof(Bits) == 4 ? kMinusInfinity<X> : kMinusInfinity<X> * 0x10001u;
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
      for (int32_t i = length + thread; i < end; i += kThreads) memory.staged[i] = kMinusInfinity<X>;
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

  // Returns the score of a logit, which is that of the largest one for +inf.
  __device__ double score_of(double z) const { return (z < double(top) ? z - double(top) : 0.0) / temperature(); }

  // ---- Steps, in the files named above

  // 3. Candidates.
  template <class Amount>
  __device__ uint32_t find_bin(unsigned long long target, unsigned long long& before, Amount amount);
  __device__ uint32_t count_of(int bin);
  __device__ static int bin_of_distance(uint32_t distance);
  __device__ uint32_t bound_of_top_k(int64_t top_k);
  __device__ uint32_t bound_of_top_p(unsigned long long total);
  __device__ void list_candidates(uint32_t least_key);
  __device__ bool take_candidates(uint32_t least_key);

  // 4. Truncation.
  __device__ unsigned long long mass_of(uint32_t key) const;
  __device__ uint32_t lowest_key_under(uint32_t low, bool by_mass, unsigned long long target);
  __device__ unsigned long long mass_from(uint32_t key, int which);
  __device__ void find_min_p_key();
  __device__ uint32_t truncate(bool counted, unsigned long long& kept);

  // 5. The race.
  __device__ Noise noise_of_row() const;
  __device__ Leader race(uint32_t least_key, const Noise& noise, float reach, bool masks, const Leader& previous) const;
  __device__ Leader best_of_row(Leader best, int which);
  __device__ uint32_t least_to_win(uint32_t least_key) const;
  __device__ void draw(uint32_t least_key, bool masks, float log2_kept);

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

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

#include "sample_logits_race.cuh"
#include "sample_logits_truncation.cuh"

namespace slimkernels {
namespace cuda {
namespace {

template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) sample_logits_kernel(const __grid_constant__ SampleArgs args) {
  SampleRow<X, kStaged, kThreads>(args).run();
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
