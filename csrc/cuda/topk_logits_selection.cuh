// The choice of the logits that topk_logits keeps: the sample of step 1, the list of step 2 and the selection of
// step 3. Included by topk_logits.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

// Finds the bin that holds the element of a rank, counted from the highest bin over all blocks, the number of
// elements in it and in higher bins; all are 0 if there are fewer elements. Called by one warp.
template <class X, bool kStaged, int kThreads>
template <int kCount>
__device__ void TopkRow<X, kStaged, kThreads>::find_bin(uint32_t* histogram, uint32_t rank_from_above) {
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
__device__ inline int digit_shift(uint32_t largest_distance) {
  const int bits = 32 - __clz(largest_distance);
  return bits > kDigitBits ? bits - kDigitBits : 0;
}

// Adds a key to the histogram of distances from `low`; the last bin has all that are too far. Additions of one, whose
// result is not used, are combined by the GPU where lanes have the same bin, so rows of few distinct values are no
// slower.
template <class X, bool kStaged, int kThreads>
__device__ void TopkRow<X, kStaged, kThreads>::count_key(uint32_t key, uint32_t low, int shift) {
  const uint32_t bin = (key - low) >> shift;
  atomicAdd(&state.histogram[bin < kBins - 1 ? bin : kBins - 1], 1u);
}

// Returns the upper 16 bits of the keys of a word's elements, but for those of NaN and -0.0.
template <class X, bool kStaged, int kThreads>
__device__ uint32_t TopkRow<X, kStaged, kThreads>::upper_keys(uint32_t low, uint32_t high) {
  const uint32_t word = sizeof(Bits) == 4 ? low >> 16 | (high & 0xffff0000u) : low;
  return word ^ ((word >> 15 & 0x10001u) * 0xffffu | 0x80008000u);
}

// Estimates from a sample a key that a few more than K elements reach. Also waits for the staged slice.
template <class X, bool kStaged, int kThreads>
__device__ uint32_t TopkRow<X, kStaged, kThreads>::guess_threshold() {
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
  const uint32_t lowest = order_key<X>(kMinusInfinity<X>), highest = order_key<X>(Bits(X::kInfinity));
  return guess < lowest ? lowest : guess < highest ? guess : highest;
}

// Lists the marked elements of a tile in ascending order and counts their keys; returns the largest key of a lane.
template <class X, bool kStaged, int kThreads>
__device__ uint32_t TopkRow<X, kStaged, kThreads>::list(int32_t tile, const uint4* elements,
                                                        const uint32_t (&marks)[kMarks]) {
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

// Counts the keys of candidates from `low` to `high` in a new histogram.
template <class X, bool kStaged, int kThreads>
__device__ void TopkRow<X, kStaged, kThreads>::count_again(uint32_t low, uint32_t high, int shift) {
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

template <class X, bool kStaged, int kThreads>
__device__ Found TopkRow<X, kStaged, kThreads>::find_kth(bool is_sampled) {
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
template <class X, bool kStaged, int kThreads>
__device__ uint32_t TopkRow<X, kStaged, kThreads>::find_largest_below(uint32_t kth) {
  uint32_t largest = order_key<X>(kMinusInfinity<X>);
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

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
