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

namespace slimkernels {

constexpr float kFixedPoint = 4294967296.0f;  // 1.0 is 2 ** 32, so that 2 ** 22 exponentials fit into 64 bits

// Exponentials of logits at a temperature, relative to a level that none exceeds.
template <class X>
struct Exponentials {
  float level, scale, offset;

  __device__ Exponentials(float level, float scale) : level(level), scale(scale), offset(-level * scale) {
    if (sizeof(typename X::Bits) == 4) {
      // So that -inf - (-inf) never occurs.
      if (level == -__uint_as_float(Float32::kInfinity)) this->level = 0;
    } else if (!(offset > -1048576.0f && offset < 1048576.0f)) {
      // Two different 16-bit numbers of this magnitude differ by more than any exponential can tell.
      offset = -__uint_as_float(Float32::kInfinity);
    }
  }
  // The rounded offset replaces the level for 16-bit formats, for which one operation is enough.
  __device__ float of(float x) const {
    return exp2_approx(sizeof(typename X::Bits) == 4 ? (x - level) * scale : fmaf(x, scale, offset));
  }
  // Returns log2 of the factor that makes sums relative to another level.
  __device__ double relative_to(float other) const {
    return sizeof(typename X::Bits) == 4 ? (double(level) - other) * scale : -double(offset) - double(other) * scale;
  }
};

// The state and the steps of one block working on its slice of one row.
template <class X, bool kStaged, int kThreads>
struct RowSlice {
  using Bits = typename X::Bits;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPerWord = 4 / sizeof(Bits), kPerVector = 16 / sizeof(Bits);
  static constexpr int kTile = slimkernels::kTile<X>;
  static constexpr int kVectors = kTile / kPerVector;  // of a tile
  static constexpr int kPerLane = kTile / 32;          // consecutive elements of a tile that a lane marks and sums
  static constexpr int kMarks = kPerLane / 32;
  static constexpr int kKeyBits = 8 * sizeof(Bits);
  static constexpr uint32_t kAllKeys = Bits(~0u);
  static constexpr uint32_t kHalves = sizeof(Bits) == 4 ? 1 : 0x10001;  // repeats an element in a word
  static constexpr Bits kMinusInfinity = Bits(X::kInfinity | ((Bits(~0u) >> 1) + 1));
  // Shift of the first digit of candidates' keys above the threshold: exact for 16 bits.
  static constexpr int kFirstShift = sizeof(Bits) == 4 ? 14 : 0;

  const TopkLogitsArgs& args;
  const int64_t n;
  const uint32_t num_blocks, rank;
  const int thread, lane, warp;
  const int32_t begin, length;  // position of the slice in the row, and its number of elements
  const Bits* const row;        // the slice in device memory
  BlockMemory<X, kStaged, kThreads> memory;
  BlockState& state;

  uint32_t least = 0;   // least key of a candidate; elements below it are in the sums of the rest
  bool listed = false;  // whether the candidates are those in the lists; otherwise they are found in the row

  __device__ explicit RowSlice(const TopkLogitsArgs& args, BlockMemory<X, kStaged, kThreads> memory)
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

  __device__ BlockState& state_of(uint32_t block) { return *in_block(&state, block); }

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
        reinterpret_cast<Bits*>(to)[element_place(i)] = i < size ? source[i] : kMinusInfinity;
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
    constexpr uint32_t kWord = kMinusInfinity * kHalves;
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

  // ---- Histograms

  // Finds the bin that holds the element of a rank, counted from the highest bin over all blocks, the number of
  // elements in it and in higher bins; all are 0 if there are fewer elements. Called by one warp.
  template <int kCount>
  __device__ void find_bin(uint32_t* histogram, uint32_t rank_from_above) {
    constexpr int kPerThread = kCount / 32;
    const int first = kCount - (lane + 1) * kPerThread;  // lane 0 has the highest bins
    uint32_t counts[kPerThread] = {};
#pragma unroll 1
    for (uint32_t block = 0; block < num_blocks; ++block) {
      const uint4* const from = reinterpret_cast<const uint4*>(in_block(histogram, block) + first);
#pragma unroll
      for (int j = 0; j < kPerThread; j += 4) {
        const uint4 part = from[j / 4];
        counts[j] += part.x;
        counts[j + 1] += part.y;
        counts[j + 2] += part.z;
        counts[j + 3] += part.w;
      }
    }
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) own += counts[j];
    uint32_t higher = inclusive_sum_of_warp(own, lane) - own;
    uint32_t bin = 0, counted = 0, counted_higher = 0;
#pragma unroll
    for (int j = kPerThread - 1; j >= 0; --j) {
      if (higher < rank_from_above && rank_from_above <= higher + counts[j]) {
        bin = first + j;
        counted = counts[j];
        counted_higher = higher;
      }
      higher += counts[j];
    }
    state.bin = __reduce_max_sync(kAllLanes, bin);
    state.counted = __reduce_max_sync(kAllLanes, counted);
    state.counted_higher = __reduce_max_sync(kAllLanes, counted_higher);
  }

  // Returns the shift that leaves the highest digit of a distance, which is its bin.
  __device__ static int digit_shift(uint32_t largest_distance) {
    const int bits = 32 - __clz(largest_distance);
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }

  // Adds a key to the histogram of distances from `low`; the last bin has all that are too far. Additions of one, whose
  // result is not used, are combined by the GPU where lanes have the same bin, so rows of few distinct values are no
  // slower.
  __device__ void count_key(uint32_t key, uint32_t low, int shift) {
    const uint32_t bin = (key - low) >> shift;
    atomicAdd(&state.histogram[bin < kBins - 1 ? bin : kBins - 1], 1u);
  }

  // ---- The sample

  // Returns the upper 16 bits of the keys of a word's elements, but for those of NaN and -0.0.
  __device__ static uint32_t upper_keys(uint32_t low, uint32_t high) {
    const uint32_t word = sizeof(Bits) == 4 ? low >> 16 | (high & 0xffff0000u) : low;
    return word ^ ((word >> 15 & 0x10001u) * 0xffffu | 0x80008000u);
  }

  // Estimates from a sample a key that a few more than K elements reach. Also waits for the staged slice.
  __device__ uint32_t guess_threshold() {
    constexpr int kEach = kSampleGroups / kThreads;
    static_assert(kSampleGroups % kThreads == 0, "every thread samples as many groups");
    uint32_t keys[kEach][kGroup / 2];
    bool sampled[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int32_t i = (e * kThreads + thread) * args.sample_stride * kGroup - begin;
      sampled[e] = i >= 0 && i + kGroup <= length;
      if (!sampled[e]) continue;
      uint32_t words[kGroup / kPerWord];
#pragma unroll
      for (int part = 0; part < kGroup / kPerVector; ++part) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(row + i + part * kPerVector);
        const uint4* const from = reinterpret_cast<const uint4*>(address / 16 * 16);
        uint4 vector = load_vector(from);
        // Both vectors have elements of the row.
        if (address % 16 != 0) vector = shifted(vector, load_vector(from + 1), uint32_t(address % 16));
        words[4 * part] = vector.x;
        words[4 * part + 1] = vector.y;
        words[4 * part + 2] = vector.z;
        words[4 * part + 3] = vector.w;
      }
#pragma unroll
      for (int j = 0; j < kGroup / 2; ++j) {
        constexpr int kStep = 2 / kPerWord;
        keys[e][j] = upper_keys(words[kStep * j], words[kStep * j + kStep - 1]);
        atomicAdd(&state.samples[0][keys[e][j] >> 8 & 0xff], 1u);
        atomicAdd(&state.samples[0][keys[e][j] >> 24], 1u);
      }
    }
    sync_row();
    if (warp == 0) find_bin<kSampleBins>(state.samples[0], args.sample_rank);
    __syncthreads();
    const uint32_t high_byte = state.bin, wanted = args.sample_rank - state.counted_higher;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (!sampled[e]) continue;
#pragma unroll
      for (int j = 0; j < kGroup / 2; ++j) {
        if ((keys[e][j] >> 8 & 0xff) == high_byte) atomicAdd(&state.samples[1][keys[e][j] & 0xff], 1u);
        if (keys[e][j] >> 24 == high_byte) atomicAdd(&state.samples[1][keys[e][j] >> 16 & 0xff], 1u);
      }
    }
    sync_row();
    if (warp == 0) find_bin<kSampleBins>(state.samples[1], wanted);
    wait_for_row();
    const uint32_t guess = (high_byte << 8 | state.bin) << (sizeof(Bits) == 4 ? 16 : 0);
    // Never the key of a NaN.
    const uint32_t lowest = order_key<X>(kMinusInfinity), highest = order_key<X>(Bits(X::kInfinity));
    return guess < lowest ? lowest : guess < highest ? guess : highest;
  }

  __device__ void wait_for_row() const {
    if (kStaged) wait_for_copies();
    __syncthreads();
  }

  // ---- Sums

  // Adds to a sum in shared memory what the lanes of a warp have; numbers below 2 ** 58.
  __device__ void add_up(FixedSum& sum, unsigned long long value) const {
    constexpr uint32_t kMask = (1u << kLimbBits) - 1;
    uint32_t limb = 0;
#pragma unroll
    for (int i = 0; i < kLimbs; ++i) {
      const uint32_t part = __reduce_add_sync(kAllLanes, uint32_t(value >> i * kLimbBits) & kMask);
      if (lane == i) limb = part;
    }
    if (lane < kLimbs) atomicAdd(&sum.limbs[lane], limb);
  }

  __device__ static double number(const FixedSum& sum) {
    double total = 0;
#pragma unroll
    for (int i = 0; i < kLimbs; ++i) total += double(sum.limbs[i]) * double(1ull << i * kLimbBits);
    return total / double(kFixedPoint);
  }

  // Marks a lane's elements of a tile that reach the threshold, and returns the sum of the others' exponentials.
  __device__ float sum_below(const uint4* tile, float threshold_value, uint32_t threshold, float scale,
                             uint32_t (&marks)[kMarks]) const {
    const Exponentials<X> exponentials(threshold_value, scale);
    float sums[2] = {};
#pragma unroll
    for (int s = 0; s < kVectors / 32; ++s) {
      const uint4 vector = tile[lane * (kVectors / 32) + (s ^ (lane & 7))];
      const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
      uint32_t found = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t reaching = X::not_below(words[w], threshold);
        found = mark(reaching, w, found);
        const uint32_t others = (words[w] & ~reaching) | (kMinusInfinity * kHalves & reaching);
#pragma unroll
        for (int j = 0; j < kPerWord; ++j) {
          sums[(kPerWord * w + j) % 2] += exponentials.of(X::widen(Bits(others >> j * 16)));
        }
      }
      marks[s * kPerVector / 32] |= found << s * kPerVector % 32;
    }
    return sums[0] + sums[1];
  }

  // Sets the bits of the elements of word w, of which all ones in `reaching` tell those to mark.
  __device__ static uint32_t mark(uint32_t reaching, int w, uint32_t marks) {
    if constexpr (sizeof(Bits) == 4) return marks | (reaching & 1u << w);
    // Bytes of all ones are -1, and each half has two.
    const uint32_t low = uint8_t(-(1 << 2 * w)), high = uint8_t(-(2 << 2 * w));
    return uint32_t(__dp4a(int(reaching), int(low | high << 16), int(marks)));
  }

  // ---- Candidates

  // Lists the elements that reach the threshold and counts their keys, and sums the exponentials of the others.
  __device__ void collect() {
    const float threshold_value = value_of_key<X>(least), scale = args.temperatures[0].exponent_scale;
    const uint32_t threshold = bits_of_key<X>(least) * kHalves;
    unsigned long long total = 0;
    uint32_t largest = 0;
#pragma unroll 1
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      const uint4* const elements = staged_tile(tile);
      uint32_t marks[kMarks] = {};
      total += __float2ull_rn(sum_below(elements, threshold_value, threshold, scale, marks) * kFixedPoint);
      const int32_t left = length - tile * kTile - lane * kPerLane;  // elements from the lane's first on
      if (length - tile * kTile < kTile) {
#pragma unroll
        for (int i = 0; i < kMarks; ++i) {
          if (left - 32 * i < 32) marks[i] &= left > 32 * i ? (1u << (left - 32 * i)) - 1 : 0u;
        }
      }
      largest = max_of(largest, list(tile, elements, marks));
    }
    add_up(state.rest[0], total);
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane == 0) atomicMax(&state.largest_key, largest);
    // The sums of the other temperatures.
    for (int m = 1; m < args.num_temperatures; ++m) {
      total = 0;
#pragma unroll 1
      for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
        uint32_t marks[kMarks] = {};
        const float sum =
            sum_below(staged_tile(tile), threshold_value, threshold, args.temperatures[m].exponent_scale, marks);
        total += __float2ull_rn(sum * kFixedPoint);
      }
      add_up(state.rest[m], total);
    }
  }

  __device__ static uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

  // Lists the marked elements of a tile in ascending order and counts their keys; returns the largest key of a lane.
  __device__ uint32_t list(int32_t tile, const uint4* elements, const uint32_t (&marks)[kMarks]) {
    uint32_t own = 0, first = 0;
#pragma unroll
    for (int i = 0; i < kMarks; ++i) own += __popc(marks[i]);
    const uint32_t up_to = inclusive_sum_of_warp(own, lane);
    if (lane == 31) {
      first = atomicAdd(&state.found, up_to);
      memory.tiles[tile].first = first;
      memory.tiles[tile].found = up_to;
    }
    first = __shfl_sync(kAllLanes, first, 31);
    const uint32_t found = __shfl_sync(kAllLanes, up_to, 31);
    if (first + found > uint32_t(args.list_capacity)) return 0;

    // From the last on, because the highest bit is found with one operation.
    Candidate<X>* place = memory.list + (first + up_to);
#pragma unroll
    for (int i = kMarks - 1; i >= 0; --i) {
#pragma unroll 1
      for (uint32_t left = marks[i]; left != 0;) {
        const int bit = 31 - __clz(left);
        left ^= 1u << bit;
        *--place = lane * kPerLane + 32 * i + bit;
      }
    }
    __syncwarp();
    uint32_t largest = 0;
    const Candidate<X>* const end = memory.list + (first + found);
#pragma unroll 1
    for (place = memory.list + (first + lane); place < end; place += 32) {
      const uint32_t i = uint32_t(*place), key = order_key<X>(element(elements, i));
      *place = Candidate<X>(key) << kKeyBits | i;
      largest = max_of(largest, key);
      count_key(key, least, kFirstShift);
    }
    return largest;
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

  // Counts the keys of candidates from `low` to `high` in a new histogram.
  __device__ void count_again(uint32_t low, uint32_t high, int shift) {
    sync_row();  // all blocks have read the histogram
    for (int i = thread; i < kBins; i += kThreads) state.histogram[i] = 0;
    __syncthreads();
    uint32_t largest = 0;
#pragma unroll 1
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      for_candidates(tile, [&](bool is_candidate, uint32_t key, uint32_t) {
        if (is_candidate) largest = max_of(largest, key);
        if (is_candidate && key - low <= high - low) count_key(key, low, shift);
      });
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane == 0) atomicMax(&state.largest_key, largest);
  }

  // The K-th largest key, and how many of the elements that equal it are kept and are not.
  struct Found {
    uint32_t kth, ties_kept, ties_dropped;
    uint32_t largest;  // key of the row
    bool has_bins;     // whether the histogram has a bin for every key of candidates, except those of the last bin
  };

  __device__ Found find_kth(bool is_sampled) {
    uint32_t low = least, high = kAllKeys, wanted = args.top_k;
    int shift = kFirstShift;
    bool has_bins = is_sampled && kFirstShift == 0;
    if (!is_sampled) {
      shift = digit_shift(high - low);
      count_again(low, high, shift);
    }
    while (true) {
      sync_row();
      if (warp == 0) {
        const bool is_block = lane < int(num_blocks);
        const uint32_t found = is_block ? state_of(lane).found : 0u;
        state.largest_in_row = __reduce_max_sync(kAllLanes, is_block ? state_of(lane).largest_key : 0u);
        state.found_in_row = __reduce_add_sync(kAllLanes, found);
        state.is_listed = __ballot_sync(kAllLanes, found > uint32_t(args.list_capacity)) == 0;
        find_bin<kBins>(state.histogram, wanted);
      }
      __syncthreads();
      if (is_sampled) {
        is_sampled = false;
        // A candidate that is not kept bounds the rest.
        const bool is_enough = state.found_in_row > uint32_t(args.top_k);
        listed = is_enough && state.is_listed;
        if (!listed) {
          has_bins = false;
          if (!is_enough) low = least = 0;
          shift = digit_shift(high - low);
          count_again(low, high, shift);
          continue;
        }
      }
      wanted -= state.counted_higher;
      low += state.bin << shift;
      if (state.bin < kBins - 1) high = low + ((1u << shift) - 1);
      if (low == high) return {low, wanted, state.counted - wanted, state.largest_in_row, has_bins};
      has_bins = false;
      shift = digit_shift(high - low);
      count_again(low, high, shift);
    }
  }

  // Returns the largest key of a candidate that is smaller than the K-th largest; that of -inf if there is none.
  __device__ uint32_t find_largest_below(uint32_t kth) {
    uint32_t largest = order_key<X>(kMinusInfinity);
#pragma unroll 1
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      for_candidates(tile, [&](bool is_candidate, uint32_t key, uint32_t) {
        if (is_candidate && key < kth) largest = max_of(largest, key);
      });
    }
    largest = __reduce_max_sync(kAllLanes, largest);
    if (lane == 0) atomicMax(&state.largest_below, largest);
    sync_row();
    return __reduce_max_sync(kAllLanes, lane < int(num_blocks) ? state_of(lane).largest_below : 0u);
  }

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

  // Sums the exponentials of candidates above and below the K-th largest. Each is rounded to fixed point, because
  // which lanes have which candidates depends on the launch.
  __device__ void sum_candidates(const Found& found, float level, float rest_level) {
    // Equal candidates are counted already, except those of the last bin.
    const uint32_t num_bins = found.has_bins ? kBins - 1 : 0;
    for (int m = warp; m < args.num_temperatures; m += kWarps) {
      unsigned long long above = 0, below = 0;
      const uint32_t range = found.largest - least + 1;
#pragma unroll 1
      for (uint32_t bin = lane; bin < num_bins && bin < range; bin += 32) {
        add_exponential(m, least + bin, state.histogram[bin], found.kth, level, rest_level, above, below);
      }
      add_up(state.above[m], above);
      add_up(state.below[m], below);
    }
    if (found.has_bins && state.histogram[kBins - 1] == 0) return;
    for (int m = 0; m < args.num_temperatures; ++m) {
      unsigned long long above = 0, below = 0;
#pragma unroll 1
      for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
        for_candidates(tile, [&](bool is_candidate, uint32_t key, uint32_t) {
          if (is_candidate && key - least >= num_bins) {
            add_exponential(m, key, 1, found.kth, level, rest_level, above, below);
          }
        });
      }
      add_up(state.above[m], above);
      add_up(state.below[m], below);
    }
  }

  __device__ void add_exponential(int m, uint32_t key, uint32_t count, uint32_t kth, float level, float rest_level,
                                  unsigned long long& above, unsigned long long& below) const {
    const float scale = args.temperatures[m].exponent_scale;
    // The difference of equal infinities is not used: then the level is the result.
    const float exponential = exp2_approx((value_of_key<X>(key) - (key > kth ? level : rest_level)) * scale);
    const unsigned long long fixed = exponential <= 1 ? __float2ull_rn(exponential * kFixedPoint) * count : 0;
    if (key > kth) above += fixed;
    if (key < kth) below += fixed;
  }

  // Writes the log-sum-exps of what is not kept and of the row, from the sums of all blocks. If a level is NaN or
  // infinite, it is the result itself.
  __device__ void write_lse(const Found& found, float level, float rest_level) {
    if (rank != 0 || thread >= args.num_temperatures) return;
    double above = 0, below = 0, others = 0;
#pragma unroll 1
    for (uint32_t block = 0; block < num_blocks; ++block) {
      above += number(state_of(block).above[thread]);
      below += number(state_of(block).below[thread]);
      others += number(state_of(block).rest[thread]);
    }
    const float kth = value_of_key<X>(found.kth);
    const double inverse = args.temperatures[thread].inverse;
    double rest = below + found.ties_dropped;
    if (least > 0 && others > 0) {
      const Exponentials<X> exponentials(value_of_key<X>(least), args.temperatures[thread].exponent_scale);
      rest += others * exp(exponentials.relative_to(rest_level) * 0.69314718055994530942);
    }
    // The difference of equal infinities is not used: then the level is infinite too.
    const double sum = above + found.ties_kept * exp((double(kth) - level) * inverse) +
                       rest * exp((double(rest_level) - level) * inverse);
    const int64_t place = n * args.num_temperatures + thread;
    args.lse[place] = level - level == 0 ? float(double(level) * inverse + log(sum)) : level;
    args.rest_lse[place] = rest_level - rest_level == 0 ? float(double(rest_level) * inverse + log(rest)) : rest_level;
  }

  __device__ void write_target_logit() {
    if (args.target == nullptr || rank != 0 || thread != 0) return;
    const int64_t target = args.target[n];
    const bool labelled = target >= 0 && target < args.vocab_size;
    args.target_logit[n] = labelled ? X::widen(row[target]) : __uint_as_float(0x7fc00000);
  }

  __device__ void clear() {
    const uint4 zero = {0, 0, 0, 0};
    for (int i = thread; i < int(sizeof(BlockState) / 16); i += kThreads) reinterpret_cast<uint4*>(&state)[i] = zero;
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

template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 2) topk_logits_kernel(const __grid_constant__ TopkLogitsArgs args) {
  BlockMemory<X, kStaged, kThreads> memory;
  memory.assign(shared_memory(), args.slice, args.list_capacity);
  RowSlice<X, kStaged, kThreads>(args, memory).run();
}

}  // namespace slimkernels
