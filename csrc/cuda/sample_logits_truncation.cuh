// Stages 3 and 4 of sample_logits: the candidates, and the lowest key that is kept. Included by sample_logits.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

// ---- 3. Candidates

// Returns the first bin at which the sum of the amounts reaches the target, and sets `before` to the sum without it;
// kBins if the target is not reached. One warp searches for all.
template <class X, bool kStaged, int kThreads>
template <class Amount>
__device__ uint32_t SampleRow<X, kStaged, kThreads>::find_bin(unsigned long long target, unsigned long long& before,
                                                              Amount amount) {
  if (rank == 0 && warp == 0) {
    constexpr int kPerLane = kBins / 32;
    unsigned long long own[kPerLane], sum = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sum += own[j] = amount(lane * kPerLane + j);
    unsigned long long lower = inclusive_sum_of_warp(sum, lane);
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
template <class X, bool kStaged, int kThreads>
__device__ uint32_t SampleRow<X, kStaged, kThreads>::count_of(int bin) {
  uint32_t count = 0;
#pragma unroll 1
  for (uint32_t block = 0; block < num_sharing; ++block) count += state_of(block).counts[histogram][bin];
  return count;
}

// Bins of distances between keys, eight per power of two.
template <class X, bool kStaged, int kThreads>
__device__ int SampleRow<X, kStaged, kThreads>::bin_of_distance(uint32_t distance) {
  if (distance == 0) return 0;
  const int bin = int(__float_as_uint(float(distance)) >> 20) - (127 << 3) + 1;
  return bin < kBins ? bin : kBins - 1;
}

// Returns a key below which the truncation keeps nothing, from the largest logits of the threads: each is a logit,
// and if K of them reach a key, so does the K-th largest logit.
template <class X, bool kStaged, int kThreads>
__device__ uint32_t SampleRow<X, kStaged, kThreads>::bound_of_top_k(int64_t top_k) {
  unsigned long long before;
  const uint32_t bin = find_bin(top_k, before, [&](int bin) { return state.counts[0][bin]; });
  const uint32_t range = top_key - lowest_key();
  if (bin >= kBins - 1) return lowest_key();
  const float distance = bin == 0 ? 0.0f : __uint_as_float((bin + (127 << 3)) << 20);  // at most this
  return distance >= float(range) ? lowest_key() : top_key - uint32_t(distance);
}

// Returns a key below which top-p keeps nothing, from the counts of sum_slice: with upper bounds of the masses of the
// bins, what lies below has less than the mass that is cut.
template <class X, bool kStaged, int kThreads>
__device__ uint32_t SampleRow<X, kStaged, kThreads>::bound_of_top_p(unsigned long long total) {
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
template <class X, bool kStaged, int kThreads>
__device__ void SampleRow<X, kStaged, kThreads>::list_candidates(uint32_t least_key) {
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
template <class X, bool kStaged, int kThreads>
__device__ unsigned long long SampleRow<X, kStaged, kThreads>::mass_of(uint32_t key) const {
  return __float2ull_rn(exp2_approx((value_of_key<X>(key) - top) * exponent) * unit);
}

// Returns the lowest key in [low, top_key] above which the candidates' number, or their mass, is less than the
// target.
template <class X, bool kStaged, int kThreads>
__device__ uint32_t SampleRow<X, kStaged, kThreads>::lowest_key_under(uint32_t low, bool by_mass,
                                                                      unsigned long long target) {
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
template <class X, bool kStaged, int kThreads>
__device__ unsigned long long SampleRow<X, kStaged, kThreads>::mass_from(uint32_t key, int which) {
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
template <class X, bool kStaged, int kThreads>
__device__ void SampleRow<X, kStaged, kThreads>::find_min_p_key() {
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

// Lists the candidates if they fit. Returns whether this block has some.
template <class X, bool kStaged, int kThreads>
__device__ bool SampleRow<X, kStaged, kThreads>::take_candidates(uint32_t least_key) {
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
template <class X, bool kStaged, int kThreads>
__device__ uint32_t SampleRow<X, kStaged, kThreads>::truncate(bool counted, unsigned long long& kept) {
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

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
