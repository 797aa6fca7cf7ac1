// Sums of exponentials for the log-sum-exps of topk_logits: step 2, and what step 4 sums. Included by topk_logits.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

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

__device__ inline double number_of(const FixedSum& sum) {
  double total = 0;
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) total += double(sum.limbs[i]) * double(1ull << i * kLimbBits);
  return total / double(kFixedPoint);
}

// Adds to a sum in shared memory what the lanes of a warp have; numbers below 2 ** 58.
template <class X, bool kStaged, int kThreads>
__device__ void TopkRow<X, kStaged, kThreads>::add_up(FixedSum& sum, unsigned long long value) const {
  constexpr uint32_t kMask = (1u << kLimbBits) - 1;
  uint32_t limb = 0;
#pragma unroll
  for (int i = 0; i < kLimbs; ++i) {
    const uint32_t part = __reduce_add_sync(kAllLanes, uint32_t(value >> i * kLimbBits) & kMask);
    if (lane == i) limb = part;
  }
  if (lane < kLimbs) atomicAdd(&sum.limbs[lane], limb);
}

// Marks a lane's elements of a tile that reach the threshold, and returns the sum of the others' exponentials.
template <class X, bool kStaged, int kThreads>
__device__ float TopkRow<X, kStaged, kThreads>::sum_below(const uint4* tile, float threshold_value, uint32_t threshold,
                                                          float scale, uint32_t (&marks)[kMarks]) const {
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
      const uint32_t others = (words[w] & ~reaching) | (kMinusInfinity<X> * kHalves & reaching);
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
template <class X, bool kStaged, int kThreads>
__device__ uint32_t TopkRow<X, kStaged, kThreads>::mark(uint32_t reaching, int w, uint32_t marks) {
  if constexpr (sizeof(Bits) == 4) return marks | (reaching & 1u << w);
  // Bytes of all ones are -1, and each half has two.
  const uint32_t low = uint8_t(-(1 << 2 * w)), high = uint8_t(-(2 << 2 * w));
  return uint32_t(__dp4a(int(reaching), int(low | high << 16), int(marks)));
}

// Lists the elements that reach the threshold and counts their keys, and sums the exponentials of the others.
template <class X, bool kStaged, int kThreads>
__device__ void TopkRow<X, kStaged, kThreads>::collect() {
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

// Sums the exponentials of candidates above and below the K-th largest. Each is rounded to fixed point, because
// which lanes have which candidates depends on the launch.
template <class X, bool kStaged, int kThreads>
__device__ void TopkRow<X, kStaged, kThreads>::sum_candidates(const Found& found, float level, float rest_level) {
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

template <class X, bool kStaged, int kThreads>
__device__ void TopkRow<X, kStaged, kThreads>::add_exponential(int m, uint32_t key, uint32_t count, uint32_t kth,
                                                               float level, float rest_level, unsigned long long& above,
                                                               unsigned long long& below) const {
  const float scale = args.temperatures[m].exponent_scale;
  // The difference of equal infinities is not used: then the level is the result.
  const float exponential = exp2_approx((value_of_key<X>(key) - (key > kth ? level : rest_level)) * scale);
  const unsigned long long fixed = exponential <= 1 ? __float2ull_rn(exponential * kFixedPoint) * count : 0;
  if (key > kth) above += fixed;
  if (key < kth) below += fixed;
}

// Writes the log-sum-exps of what is not kept and of the row, from the sums of all blocks. If a level is NaN or
// infinite, it is the result itself.
template <class X, bool kStaged, int kThreads>
__device__ void TopkRow<X, kStaged, kThreads>::write_lse(const Found& found, float level, float rest_level) {
  if (rank != 0 || thread >= args.num_temperatures) return;
  double above = 0, below = 0, others = 0;
#pragma unroll 1
  for (uint32_t block = 0; block < num_blocks; ++block) {
    above += number_of(state_of(block).above[thread]);
    below += number_of(state_of(block).below[thread]);
    others += number_of(state_of(block).rest[thread]);
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

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
