// Finds the K largest logits of a row, ordered by id, and the log-sum-exps of the row and of what is not kept, in one
// read of device memory.
//
// A row is processed by a cluster of blocks. Each block keeps its slice of the row in shared memory, or reads it again
// through L2 if it does not fit.
//
// 1. A strided sample gives a threshold that a few more than K elements pass.
// 2. One pass sums the exponentials and lists the elements that pass.
// 3. A radix selection (Alabi et al. 2012, "Fast k-selection algorithms for graphics processing units") counts digits
// of
//    order-preserving keys and finds the exact K-th largest among the listed elements.
// 4. A second pass over the slice sums the exponentials of what is not kept, relative to the largest of it.
//
// If the sample misleads, step 3 counts the whole slice, which is slower but still exact.
//
// Blocks exchange integers only, and exponentials are summed per tile and then in fixed point. So the results do not
// depend, bit for bit, on the order of atomics, the number of blocks or the alignment of the row.
#pragma once

#include "device.cuh"
#include "topk_logits_memory.cuh"

namespace slimkernels {

constexpr int kDigitBits = 11;
constexpr unsigned kAllLanes = ~0u;
constexpr float kFixedPoint = 4294967296.0f;  // 1.0 is 2 ** 32, so that 2 ** 31 exponentials fit into 64 bits

// Keys sort like logits: -0.0 equals 0.0, and NaN is the largest.

template <class X>
__device__ uint32_t order_key(typename X::Bits bits) {
  constexpr uint32_t kAll = typename X::Bits(~0u), kSign = (kAll >> 1) + 1;
  const uint32_t magnitude = bits & ~kSign;
  if (magnitude > X::kInfinity) return kAll;
  return bits > kSign ? kAll - bits : magnitude | kSign;
}

// Returns the element with this key; NaN for keys below that of -inf, which no element has.
template <class X>
__device__ float value_of_key(uint32_t key) {
  using Bits = typename X::Bits;
  constexpr uint32_t kSign = (Bits(~0u) >> 1) + 1;
  return X::widen(Bits(key & kSign ? key ^ kSign : ~key));
}

// The state and the steps of one block working on its slice of one row.
template <class X, bool kStaged, int kThreads>
struct RowSlice {
  using Bits = typename X::Bits;
  using State = BlockState<kThreads>;
  static constexpr int kWarps = State::kWarps;
  static constexpr int kPerVector = 16 / sizeof(Bits);
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

  // Reads elements i to i + 7; -inf past the end of the slice.
  __device__ void read_group(int32_t i, Bits (&group)[kGroup]) const {
    if (kStaged || (aligned && i + kGroup <= length)) {
      const uint4* from = reinterpret_cast<const uint4*>((kStaged ? memory.staged : row) + i);
#pragma unroll
      for (int part = 0; part < kGroup / kPerVector; ++part) {
        const uint4 vector = from[part];
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) {
          group[part * kPerVector + j] = Bits(words[j * sizeof(Bits) / 4] >> (j * sizeof(Bits) % 4 * 8));
        }
      }
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) group[j] = i + j < length ? row[i + j] : kMinusInfinity;
    }
  }

  // Clears the counters and, if the slice is staged, copies it. Returns the key of the row's largest element.
  __device__ uint32_t load() {
    for (int i = thread; i < kBins; i += kThreads) state.histogram[i] = 0;
    for (int i = thread; i < kMaxTemperatures; i += kThreads) state.sums[i] = state.rest_sums[i] = 0;
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
      for (; i < vectors; i += kThreads) visit(from[i], i);
      done = vectors * kPerVector;
    }
#pragma unroll 8
    for (int32_t i = done + thread; i < length; i += kThreads) {
      const Bits bits = row[i];
      if (kStaged) memory.staged[i] = bits;
      best = X::max_word(best, sizeof(Bits) == 4 ? bits : bits * 0x10001u);
    }
    if (kStaged && thread < kGroup && length + thread < args.slice) memory.staged[length + thread] = kMinusInfinity;

    uint32_t key = order_key<X>(Bits(best));
    const uint32_t other = order_key<X>(Bits(best >> (sizeof(Bits) == 4 ? 0 : 16)));
    return largest_in_row(key > other ? key : other);
  }

  // Returns the largest key of all threads of the row.
  __device__ uint32_t largest_in_row(uint32_t key) {
    key = __reduce_max_sync(kAllLanes, key);
    if (lane == 0) state.largest_key[warp] = key;
    sync_cluster();
    for (uint32_t i = lane; i < num_blocks * kWarps; i += 32) {
      const uint32_t found = state_of(i / kWarps).largest_key[i % kWarps];
      key = found > key ? found : key;
    }
    return __reduce_max_sync(kAllLanes, key);
  }

  // Adds the keys from `low` to `high` to the histogram of their distance from `low`. The lanes of a warp with the same
  // bin do a single atomic addition, because rows of few distinct values would otherwise serialise at one counter.
  template <class IdOf>
  __device__ void count_keys(int32_t num_ids, IdOf id_of, uint32_t low, uint32_t high, int shift) {
    for (int32_t base = warp * 32; base < num_ids; base += kThreads) {
      uint32_t bin = kBins;
      if (base + lane < num_ids) {
        const uint32_t distance = order_key<X>(element(id_of(base + lane))) - low;
        if (distance <= high - low) bin = distance >> shift;
      }
      const uint32_t peers = __match_any_sync(kAllLanes, bin);
      if (bin < kBins && lane == __ffs(peers) - 1) atomicAdd(&state.histogram[bin], uint32_t(__popc(peers)));
    }
  }

  // Finds the bin that holds the element of a rank, counted from the highest bin over all blocks, and the number of
  // elements in higher bins; both are 0 if there are fewer elements. Clears the histogram.
  __device__ void find_bin(uint32_t rank_from_above, uint32_t& bin, uint32_t& counted_higher) {
    constexpr int kBinsPerThread = kBins / kThreads;
    const int first = kBins - (thread + 1) * kBinsPerThread;  // thread 0 has the highest bins
    sync_cluster();
    uint32_t counts[kBinsPerThread] = {};
    // Unrolling further would spill registers.
#pragma unroll 2
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
    uint32_t up_to_here = inclusive_sum(own);
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
    for (int j = 0; j < kBinsPerThread; ++j) state.histogram[first + j] = 0;
    __syncthreads();
  }

  __device__ uint32_t inclusive_sum(uint32_t value) const {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t lower = __shfl_up_sync(kAllLanes, value, distance);
      if (lane >= distance) value += lower;
    }
    return value;
  }

  // Estimates from a sample a key that a few more than K elements reach. The rank allows for four standard deviations.
  __device__ uint32_t guess_threshold(uint32_t high) {
    constexpr int32_t kGroups = kThreads;
    // The stride is an odd number of groups, so that the sample meets a periodic row at every phase.
    const int32_t stride = args.slice / kGroup / kGroups | 1;
    const int32_t samples = length / kGroup / stride * kGroup;
    const int shift = digit_shift(high);
    count_keys(samples, [&](int32_t i) { return i / kGroup * stride * kGroup + i % kGroup; }, 0u, high, shift);
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

  // Adds exp((x - level) / T) over the slice to the sum of temperature m. With kMark, also marks and counts the
  // elements that are not below the threshold.
  template <bool kMark>
  __device__ void sum_exponentials(int m, float level, float threshold) {
    const float scale = args.temperatures[m].exponent_scale;
    unsigned long long total = 0;
    uint32_t found = 0;
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      float sum = 0;
      uint32_t found_here = 0;
#pragma unroll 2
      for (int step = 0; step < kTile / (32 * kGroup); ++step) {
        const int32_t i = tile * kTile + (step * 32 + lane) * kGroup;
        uint32_t marks = 0;
        if (i < length) {
          Bits group[kGroup];
          read_group(i, group);
#pragma unroll
          for (int j = 0; j < kGroup; ++j) {
            const float x = X::widen(group[j]);
            sum += exp2_approx((x - level) * scale);
            if (kMark && !(x < threshold)) marks |= 1u << j;  // NaN is never below
          }
          if (length - i < kGroup) marks &= (1u << (length - i)) - 1;
        }
        if (kMark) memory.marks[i / kGroup] = uint8_t(marks);
        found_here += __popc(marks);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      total += __float2ull_rn(sum * kFixedPoint);
      if (!kMark) continue;
      found_here = __reduce_add_sync(kAllLanes, found_here);
      if (lane == 0) memory.tile_founds[tile] = found_here;
      found += found_here;
    }
    if (lane == 0) {
      atomicAdd(&state.sums[m], total);
      if (kMark) atomicAdd(&state.found, found);
    }
  }

  __device__ uint32_t found_in_row() {
    return __reduce_add_sync(kAllLanes, lane < int(num_blocks) ? state_of(lane).found : 0u);
  }

  // Writes log-sum-exps from the sums of all blocks and, in addition, `ones` exponentials of 1. If the level is NaN or
  // infinite, it is the result itself.
  __device__ void write_lse(float level, unsigned long long (State::*sums)[kMaxTemperatures], uint32_t ones,
                            float* out) {
    if (rank != 0 || thread >= args.num_temperatures) return;
    unsigned long long sum = static_cast<unsigned long long>(ones) << 32;
    for (uint32_t block = 0; block < num_blocks; ++block) sum += (state_of(block).*sums)[thread];
    const double shift = double(level) * args.temperatures[thread].inverse;
    const bool finite = level - level == 0;
    out[n * args.num_temperatures + thread] = finite ? float(shift + log(double(sum) / kFixedPoint)) : level;
  }

  // Returns the largest key of the row that is smaller than `key`; that of -inf if there is none.
  __device__ uint32_t largest_key_below(uint32_t key) {
    uint32_t best = order_key<X>(kMinusInfinity);
    for (int32_t i = thread * kGroup; i < length; i += kThreads * kGroup) {
      Bits group[kGroup];
      read_group(i, group);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const uint32_t other = order_key<X>(group[j]);
        if (other < key && other > best) best = other;
      }
    }
    return largest_in_row(best);
  }

  // Adds exp((x - level) / T) over the elements of the slice below the key to the rest's sum of temperature m.
  __device__ void sum_below(int m, float level, uint32_t key) {
    const float scale = args.temperatures[m].exponent_scale;
    unsigned long long total = 0;
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      float sum = 0;
#pragma unroll 2
      for (int step = 0; step < kTile / (32 * kGroup); ++step) {
        const int32_t i = tile * kTile + (step * 32 + lane) * kGroup;
        if (i >= length) continue;
        Bits group[kGroup];
        read_group(i, group);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          if (order_key<X>(group[j]) < key) sum += exp2_approx((X::widen(group[j]) - level) * scale);
        }
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      total += __float2ull_rn(sum * kFixedPoint);
    }
    if (lane == 0) atomicAdd(&state.rest_sums[m], total);
  }

  // Writes the log-sum-exps of what is not kept, relative to the largest of it. Follows write_largest.
  __device__ void write_rest_lse(uint32_t kth, uint32_t ties_kept) {
    uint32_t ties = 0;
    for (uint32_t i = lane; i < num_blocks * kWarps; i += 32) ties += state_of(i / kWarps).tied[i % kWarps];
    const uint32_t dropped = __reduce_add_sync(kAllLanes, ties) - ties_kept;
    const float level = value_of_key<X>(dropped > 0 ? kth : largest_key_below(kth));
    for (int m = 0; m < args.num_temperatures; ++m) sum_below(m, level, kth);
    sync_cluster();
    write_lse(level, &State::rest_sums, dropped, args.rest_lse);
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
      for (int32_t i = lane; i < tile; i += 32) before += memory.tile_founds[i];
      uint32_t marks = reinterpret_cast<const uint32_t*>(memory.marks)[tile * 32 + lane];
      const uint32_t own = __popc(marks);
      uint32_t place = __reduce_add_sync(kAllLanes, before) + inclusive_sum(own) - own;
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
      count_keys(num_candidates, [&](int32_t i) { return candidate(i); }, low, high, shift);
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
      sum_exponentials<true>(0, level, value_of_key<X>(low));
    } else {
      sum_exponentials<false>(0, level, 0);
    }
    for (int m = 1; m < args.num_temperatures; ++m) sum_exponentials<false>(m, level, 0);
    sync_cluster();
    write_lse(level, &State::sums, 0, args.lse);

    if (args.list_capacity > 0) {
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
    write_rest_lse(low, ties_kept);
  }
};

template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    topk_logits_kernel(const __grid_constant__ TopkLogitsArgs args) {
  RowSlice<X, kStaged, kThreads>(args).run();
}

}  // namespace slimkernels
