// Finds the K largest logits of a row, ordered by id, and the log-sum-exps of the row and of what is not kept, in one
// read of device memory.
//
// A row is processed by a cluster of blocks. Each block keeps its slice of the row in shared memory, or reads it again
// through L2 if it does not fit.
//
// 1. A strided sample gives a threshold that a few more than K elements pass.
// 2. One pass lists the elements that pass.
// 3. A radix selection (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units") counts digits
//    of order-preserving keys and finds the exact K-th largest among the listed elements.
// 4. A second pass sums the exponentials of what is not kept, relative to the largest of it. Those of what is kept are
//    relative to the row's largest. Together they give both log-sum-exps, so every exponential is computed once.
//
// If the sample misleads, step 3 counts the whole slice, which is slower but still exact.
//
// Blocks exchange integers only. Exponentials are summed in fixed point, those of what is not kept first in float32 per
// lane and tile. So the results do not depend, bit for bit, on the order of atomics, the number of blocks or the
// alignment of the row.
#pragma once

#include "keys.cuh"
#include "topk_logits_memory.cuh"

namespace slimkernels {

constexpr int kDigitBits = 11;
constexpr float kFixedPoint = 4294967296.0f;  // 1.0 is 2 ** 32, so that 2 ** 31 exponentials fit into 64 bits

// The state and the steps of one block working on its slice of one row.
template <class X, bool kStaged, int kThreads>
struct RowSlice {
  using Bits = typename X::Bits;
  using State = BlockState<kThreads>;
  static constexpr int kWarps = State::kWarps;
  static constexpr int kPerVector = 16 / sizeof(Bits);
  static constexpr int kWords = kGroup * sizeof(Bits) / 4;
  using Words = uint32_t[kWords];
  static constexpr Bits kMinusInfinity = Bits(X::kInfinity | ((Bits(~0u) >> 1) + 1));

  const TopkLogitsArgs& args;
  const int64_t n;
  const uint32_t num_blocks, rank;
  const int thread, lane, warp;
  const int32_t begin, length;  // position of the slice in the row, and its number of elements
  const Bits* const row;        // the slice in device memory
  const bool aligned;
  BlockMemory<X, kStaged, kThreads> memory;
  State& state;

  // Whether the candidates are the listed elements; otherwise they are all elements of the slice.
  bool listed = false;
  int32_t num_candidates;

  __device__ explicit RowSlice(const TopkLogitsArgs& args)
      : args(args),
        n(blockIdx.x / cluster_size()),
        num_blocks(cluster_size()),
        rank(cluster_rank()),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        begin(rank * args.slice < uint32_t(args.vocab_size) ? rank * args.slice : args.vocab_size),
        length(args.vocab_size - begin < args.slice ? args.vocab_size - begin : args.slice),
        row(static_cast<const Bits*>(args.logits) + n * args.row_stride + begin),
        aligned(reinterpret_cast<uintptr_t>(row) % 16 == 0),
        state(*reinterpret_cast<State*>(shared_memory())),
        num_candidates(length) {
    memory.assign(shared_memory(), args.slice, args.list_capacity);
  }

  __device__ State& state_of(uint32_t block) { return *in_block(&state, block); }

  __device__ Bits element(int32_t i) const { return kStaged ? memory.staged[i] : row[i]; }

  // Reads elements i to i + 7, of any tile of the slice, as words; -inf past the end of the slice.
  __device__ void read_group(int32_t i, Words& words) const {
    if (kStaged || (aligned && i + kGroup <= length)) {
      const uint4* from = reinterpret_cast<const uint4*>((kStaged ? memory.staged : row) + i);
#pragma unroll
      for (int part = 0; part < kWords / 4; ++part) {
        const uint4 vector = from[part];
        words[4 * part] = vector.x;
        words[4 * part + 1] = vector.y;
        words[4 * part + 2] = vector.z;
        words[4 * part + 3] = vector.w;
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

  // Clears the counters and, if the slice is staged, copies it. Returns the key of the row's largest element.
  __device__ uint32_t load() {
    static_assert(kBins % (4 * kThreads) == 0 && kThreads >= kMaxTemperatures, "one step clears the sums");
#pragma unroll
    for (int i = 0; i < kBins / 4; i += kThreads) reinterpret_cast<uint4*>(state.histogram)[i + thread] = {0, 0, 0, 0};
    if (thread < kMaxTemperatures) state.sums[thread] = state.rest_sums[thread] = 0;
    if (thread == 0) state.found = 0;

    const uint32_t minus_infinities = sizeof(Bits) == 4 ? kMinusInfinity : kMinusInfinity * 0x10001u;
    uint32_t best = minus_infinities;
    int32_t done = 0;
    if (aligned) {
      const uint4* from = reinterpret_cast<const uint4*>(row);
      uint4* to = reinterpret_cast<uint4*>(memory.staged);
      const int32_t vectors = length / kPerVector;
      const auto visit = [&](const uint4& vector, int32_t i) {
        if (kStaged) to[i] = vector;
        best = X::max_word(X::max_word(best, vector.x), X::max_word(vector.y, X::max_word(vector.z, vector.w)));
      };
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
      done = vectors * kPerVector;
    }
#pragma unroll 4
    for (int32_t i = done + thread; i < length; i += kThreads) {
      const Bits bits = row[i];
      if (kStaged) memory.staged[i] = bits;
      best = X::max_word(best, sizeof(Bits) == 4 ? bits : bits * 0x10001u);
    }
    if (kStaged) {
      const int32_t end = (length + kTile - 1) / kTile * kTile;
#pragma unroll 1
      for (int32_t i = length + thread; i < end; i += kThreads) memory.staged[i] = kMinusInfinity;
    }

    uint32_t key = order_key<X>(Bits(best));
    const uint32_t other = order_key<X>(Bits(best >> (sizeof(Bits) == 4 ? 0 : 16)));
    return largest_in_row(key > other ? key : other);
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

  // Adds the candidates' keys from `low` to `high` to the histogram of their distance from `low`. Additions of one,
  // whose result is not used, are combined by the GPU where lanes have the same bin, so rows of few distinct values are
  // no slower.
  __device__ void count_candidates(uint32_t low, uint32_t high, int shift) {
#pragma unroll 2
    for (int32_t i = thread; i < num_candidates; i += kThreads) {
      const uint32_t distance = order_key<X>(element(candidate(i))) - low;
      if (distance <= high - low) atomicAdd(&state.histogram[distance >> shift], 1u);
    }
  }

  // Finds the bin that holds the element of a rank, counted from the highest bin over all blocks, and the number of
  // elements in higher bins; both are 0 if there are fewer elements. Clears the histogram.
  __device__ void find_bin(uint32_t rank_from_above, uint32_t& bin, uint32_t& counted_higher) {
    constexpr int kBinsPerThread = kBins / kThreads;
    const int first = kBins - (thread + 1) * kBinsPerThread;  // thread 0 has the highest bins
    sync_cluster();
    uint32_t counts[kBinsPerThread] = {};
#pragma unroll 1
    for (uint32_t block = 0; block < num_blocks; ++block) {
      const uint4* from = reinterpret_cast<const uint4*>(state_of(block).histogram + first);
#pragma unroll
      for (int j = 0; j < kBinsPerThread; j += 4) {
        const uint4 part = from[j / 4];
        counts[j] += part.x;
        counts[j + 1] += part.y;
        counts[j + 2] += part.z;
        counts[j + 3] += part.w;
      }
    }
    uint32_t own = 0;
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) own += counts[j];
    uint32_t up_to_here = inclusive_sum_of_warp(own, lane);
    if (lane == 31) state.counted[warp] = up_to_here;
    if (thread == 0) state.bin = state.counted_higher = 0;
    __syncthreads();
    up_to_here += __reduce_add_sync(kAllLanes, lane < warp ? state.counted[lane] : 0u);
    uint32_t higher = up_to_here - own;
    if (higher < rank_from_above && rank_from_above <= up_to_here) {
#pragma unroll
      for (int j = kBinsPerThread - 1; j >= 0; --j) {
        if (higher < rank_from_above && rank_from_above <= higher + counts[j]) {
          state.bin = first + j;
          state.counted_higher = higher;
        }
        higher += counts[j];
      }
    }
    // After this all blocks have read the histogram, and all threads can read the bin.
    sync_cluster();
    bin = state.bin;
    counted_higher = state.counted_higher;
#pragma unroll
    for (int j = 0; j < kBinsPerThread; j += 4) *reinterpret_cast<uint4*>(state.histogram + first + j) = {0, 0, 0, 0};
    __syncthreads();
  }

  // Estimates from a sample a key that a few more than K elements reach. The rank allows for four standard deviations.
  __device__ uint32_t guess_threshold(uint32_t high) {
    constexpr int32_t kGroups = kThreads;
    // The stride is an odd number of groups, so that the sample meets a periodic row at every phase.
    const int32_t stride = args.slice / kGroup / kGroups | 1;
    const int shift = digit_shift(high);
#pragma unroll 1
    for (int32_t group = thread; int64_t(group + 1) * (stride * kGroup) <= length; group += kThreads) {
      Words words;
      read_group(group * stride * kGroup, words);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) atomicAdd(&state.histogram[order_key<X>(element_of(words, j)) >> shift], 1u);
    }
    const float expected = float(args.top_k) / stride;
    uint32_t bin, counted_higher;
    find_bin(uint32_t(expected + 4 * sqrtf(expected) + 2), bin, counted_higher);
    const uint32_t guess = bin << shift, infinity = order_key<X>(Bits(X::kInfinity));
    return guess < infinity ? guess : infinity;  // never the key of a NaN
  }

  // Returns the shift that leaves the highest digit of a distance, which is its bin.
  __device__ static int digit_shift(uint32_t largest_distance) {
    const int bits = 32 - __clz(largest_distance);
    return bits > kDigitBits ? bits - kDigitBits : 0;
  }

  // Returns one bit for each element of a group that is not below the element with this key.
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
      for (int j = 0; j < kGroup; ++j) marks |= X::widen(words[j]) < threshold ? 0u : 1u << j;  // NaN is never below
    }
    return marks & ((1u << kGroup) - 1);
  }

  // Marks the elements of a tile that are not below the element with this key; returns how many a lane marked.
  template <bool kWhole>
  __device__ uint32_t mark_tile(int32_t tile, uint32_t key) {
    uint32_t found = 0;
    // Unrolling further would spill registers.
#pragma unroll 2
    for (int step = 0; step < kTile / (32 * kGroup); ++step) {
      const int32_t i = tile * kTile + (step * 32 + lane) * kGroup;
      Words words;
      read_group(i, words);
      uint32_t marks = marks_of(words, key);
      if (!kWhole && length - i < kGroup) marks &= i < length ? (1u << (length - i)) - 1 : 0u;
      memory.marks[i / kGroup] = uint8_t(marks);
      found += __popc(marks);
    }
    return found;
  }

  // Marks and counts the elements that are not below the element with this key.
  __device__ void mark_candidates(uint32_t key) {
    uint32_t found = 0;
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      const bool is_whole = length - tile * kTile >= kTile;
      const uint32_t found_by_lane = is_whole ? mark_tile<true>(tile, key) : mark_tile<false>(tile, key);
      const uint32_t found_here = __reduce_add_sync(kAllLanes, found_by_lane);
      if (lane == 0) memory.tile_founds[tile] = found_here;
      found += found_here;
    }
    if (lane == 0) atomicAdd(&state.found, found);
  }

  __device__ uint32_t found_in_row() {
    return __reduce_add_sync(kAllLanes, lane < int(num_blocks) ? state_of(lane).found : 0u);
  }

  // Writes the log-sum-exps of what is not kept and of the row, from the sums of all blocks. If a level is NaN or
  // infinite, it is the result itself.
  __device__ void write_lse(float level, float kth, float rest_level, uint32_t ties_kept, uint32_t ties_dropped) {
    if (rank != 0 || thread >= args.num_temperatures) return;
    unsigned long long above = 0, below = 0;
#pragma unroll 1
    for (uint32_t block = 0; block < num_blocks; ++block) {
      above += state_of(block).sums[thread];
      below += state_of(block).rest_sums[thread];
    }
    const double inverse = args.temperatures[thread].inverse, unit = 1 / double(kFixedPoint);
    const double rest = double(below) * unit + ties_dropped;
    // The difference of equal infinities is not used: then the level is infinite too.
    const double sum = double(above) * unit + ties_kept * exp((double(kth) - level) * inverse) +
                       rest * exp((double(rest_level) - level) * inverse);
    const int64_t place = n * args.num_temperatures + thread;
    args.lse[place] = level - level == 0 ? float(double(level) * inverse + log(sum)) : level;
    args.rest_lse[place] = rest_level - rest_level == 0 ? float(double(rest_level) * inverse + log(rest)) : rest_level;
  }

  // Returns the largest key of the row that is smaller than `key`; that of -inf if there is none.
  __device__ uint32_t largest_key_below(uint32_t key) {
    uint32_t best = order_key<X>(kMinusInfinity);
    for (int32_t i = thread * kGroup; i < length; i += kThreads * kGroup) {
      Words words;
      read_group(i, words);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const uint32_t other = order_key<X>(element_of(words, j));
        if (other < key && other > best) best = other;
      }
    }
    return largest_in_row(best);
  }

  // Returns the sum over the warp of numbers below 2 ** 58.
  __device__ static unsigned long long sum_of_warp(unsigned long long value) {
    constexpr int kBits = 26;  // so that 32 of the parts fit into 32 bits
    constexpr uint32_t kMask = (1u << kBits) - 1;
    const unsigned long long low = __reduce_add_sync(kAllLanes, uint32_t(value) & kMask);
    const unsigned long long middle = __reduce_add_sync(kAllLanes, uint32_t(value >> kBits) & kMask);
    const unsigned long long high = __reduce_add_sync(kAllLanes, uint32_t(value >> 2 * kBits));
    return low + (middle << kBits) + (high << 2 * kBits);
  }

  // Adds exp((x - level) / T) over the elements of the slice below the limit to the rest's sum of temperature m.
  __device__ void sum_below(int m, float level, float limit) {
    const float scale = args.temperatures[m].exponent_scale;
    unsigned long long total = 0;
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      float sum = 0;
#pragma unroll 2
      for (int step = 0; step < kTile / (32 * kGroup); ++step) {
        const int32_t i = tile * kTile + (step * 32 + lane) * kGroup;
        Words words;
        read_group(i, words);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const float x = X::widen(element_of(words, j));
          const float exponential = exp2_approx((x - level) * scale);
          if (x < limit) sum += exponential;
        }
      }
      total += __float2ull_rn(sum * kFixedPoint);
    }
    total = sum_of_warp(total);
    if (lane == 0) atomicAdd(&state.rest_sums[m], total);
  }

  // Adds exp((x - level) / T) over the candidates above the K-th largest to the sum of temperature m. Each is rounded
  // to fixed point, because which threads have which candidates depends on the launch.
  __device__ void sum_above(int m, float level, float kth) {
    const float scale = args.temperatures[m].exponent_scale;
    unsigned long long total = 0;
#pragma unroll 2
    for (int32_t i = thread; i < num_candidates; i += kThreads) {
      const float x = X::widen(element(candidate(i)));
      if (x > kth) total += __float2ull_rn(exp2_approx((x - level) * scale) * kFixedPoint);
    }
    total = sum_of_warp(total);
    if (lane == 0) atomicAdd(&state.sums[m], total);
  }

  // Writes the log-sum-exps, relative to the largest of what they sum. Follows write_largest.
  __device__ void write_lses(float level, uint32_t kth_key, uint32_t ties_kept) {
    uint32_t ties = 0;
#pragma unroll 1
    for (uint32_t i = lane; i < num_blocks * kWarps; i += 32) ties += state_of(i / kWarps).tied[i % kWarps];
    const uint32_t ties_dropped = __reduce_add_sync(kAllLanes, ties) - ties_kept;
    const float kth = value_of_key<X>(kth_key);
    const float rest_level = ties_dropped > 0 ? kth : value_of_key<X>(largest_key_below(kth_key));
    const float limit = kth == kth ? kth : __uint_as_float(Float32::kInfinity);  // numbers are below NaN
    for (int m = 0; m < args.num_temperatures; ++m) {
      sum_above(m, level, kth);
      sum_below(m, rest_level, limit);
    }
    sync_cluster();
    write_lse(level, kth, rest_level, ties_kept, ties_dropped);
    sync_cluster();  // other blocks read this block's counts and sums, so it must not end earlier
  }

  __device__ void write_target_logit() {
    if (args.target == nullptr || rank != 0 || thread != 0) return;
    const int64_t target = args.target[n];
    const bool labelled = target >= 0 && target < args.vocab_size;
    args.target_logit[n] = labelled ? X::widen(row[target]) : __uint_as_float(0x7fc00000);
  }

  // Lists the marked elements in ascending order of ids.
  __device__ void list_marked() {
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      uint32_t before = 0;
#pragma unroll 1
      for (int32_t i = lane; i < tile; i += 32) before += memory.tile_founds[i];
      uint32_t marks = reinterpret_cast<const uint32_t*>(memory.marks)[tile * 32 + lane];
      const uint32_t own = __popc(marks);
      uint32_t place = __reduce_add_sync(kAllLanes, before) + inclusive_sum_of_warp(own, lane) - own;
      for (; marks != 0; marks &= marks - 1) memory.list[place++] = tile * kTile + lane * 32 + __ffs(marks) - 1;
    }
    __syncthreads();
  }

  __device__ int32_t candidate(int32_t i) const { return listed ? int32_t(memory.list[i]) : i; }

  // Narrows [low, high] to the K-th largest key; returns the number of elements equal to it that are kept.
  __device__ uint32_t find_kth(uint32_t& low, uint32_t high) {
    uint32_t wanted = args.top_k;
    while (low < high) {
      const int shift = digit_shift(high - low);
      count_candidates(low, high, shift);
      uint32_t bin, counted_higher;
      find_bin(wanted, bin, counted_higher);
      wanted -= counted_higher;
      low += bin << shift;
      const uint32_t last = low + ((1u << shift) - 1);
      high = last < high ? last : high;
    }
    return wanted;
  }

  // Writes the candidates above the K-th largest key and, lowest ids first, as many of its ties as are kept.
  __device__ void write_largest(uint32_t kth, uint32_t ties_kept) {
    const int32_t share = (num_candidates + kThreads - 1) / kThreads * 32;  // consecutive candidates of a warp
    const int32_t first = warp * share;
    const int32_t last = num_candidates - first < share ? num_candidates : first + share;
    const auto compare = [&](int32_t i, uint32_t& above, uint32_t& tied) {
      const uint32_t key = i < last ? order_key<X>(element(candidate(i))) : 0u;
      above = __ballot_sync(kAllLanes, i < last && key > kth);
      tied = __ballot_sync(kAllLanes, i < last && key == kth);
    };
    uint32_t all_above = 0, all_tied = 0, above, tied;
    for (int32_t base = first; base < last; base += 32) {
      compare(base + lane, above, tied);
      all_above += __popc(above);
      all_tied += __popc(tied);
    }
    if (lane == 0) {
      state.above[warp] = all_above;
      state.tied[warp] = all_tied;
    }
    sync_cluster();

    uint32_t above_before = 0, tied_before = 0;
#pragma unroll 1
    for (uint32_t i = lane; i < rank * kWarps + warp; i += 32) {
      above_before += state_of(i / kWarps).above[i % kWarps];
      tied_before += state_of(i / kWarps).tied[i % kWarps];
    }
    above_before = __reduce_add_sync(kAllLanes, above_before);
    tied_before = __reduce_add_sync(kAllLanes, tied_before);
    int32_t* ids = args.ids + n * args.top_k;
    Bits* values = static_cast<Bits*>(args.values) + n * args.top_k;
    const uint32_t lower_lanes = (1u << lane) - 1;
    for (int32_t base = first; base < last; base += 32) {
      compare(base + lane, above, tied);
      const uint32_t rank_of_tie = tied_before + __popc(tied & lower_lanes);
      const uint32_t ties_before = rank_of_tie < ties_kept ? rank_of_tie : ties_kept;
      if (above >> lane & 1 || (tied >> lane & 1 && rank_of_tie < ties_kept)) {
        const uint32_t place = above_before + __popc(above & lower_lanes) + ties_before;
        const int32_t i = candidate(base + lane);
        ids[place] = begin + i;
        values[place] = element(i);
      }
      above_before += __popc(above);
      tied_before += __popc(tied);
    }
  }

  __device__ void run() {
    const uint32_t high = load();
    const float level = value_of_key<X>(high);
    write_target_logit();

    uint32_t low = 0;
    if (args.list_capacity > 0) {
      low = guess_threshold(high);
      mark_candidates(low);
      sync_cluster();
      if (found_in_row() < uint32_t(args.top_k)) {
        low = 0;
      } else if (state.found <= uint32_t(args.list_capacity)) {
        listed = true;
        num_candidates = state.found;
        list_marked();
      }
    }
    const uint32_t ties_kept = find_kth(low, high);
    write_largest(low, ties_kept);
    write_lses(level, low, ties_kept);
  }
};

template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    topk_logits_kernel(const __grid_constant__ TopkLogitsArgs args) {
  RowSlice<X, kStaged, kThreads>(args).run();
}

}  // namespace slimkernels
