// Stage 5 of sample_logits: the race of perturbed scores. Included by sample_logits.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

__device__ inline bool is_ahead(double score, uint32_t id, double other_score, uint32_t other_id) {
  return score > other_score || (score == other_score && id < other_id);
}

// Returns more than the rounding of bounds near this number.
__device__ inline float margin_of(float bound) { return 2e-4f + 2e-6f * fabsf(bound); }

__device__ inline Leader best_of_warp(Leader best) {
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

template <class X, bool kStaged, int kThreads>
__device__ Noise SampleRow<X, kStaged, kThreads>::noise_of_row() const {
  const int64_t seed = args.seeds == nullptr ? args.seed : args.seeds[args.seed_per_row ? n : 0];
  return {args.seed_per_row ? uint64_t(seed) : spread_seed(seed, n), uint64_t(args.position.of(n))};
}

// Evaluates the candidates from `least_key` on whose bound reaches `reach`, and returns the best of them that is
// behind `previous`. Bounds are in units of ln 2. Without `masks`, every id above -inf must be a candidate.
template <class X, bool kStaged, int kThreads>
__device__ Leader SampleRow<X, kStaged, kThreads>::race(uint32_t least_key, const Noise& noise, float reach, bool masks,
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

// Returns the best of all threads that have candidates. Calls take turns between the places.
template <class X, bool kStaged, int kThreads>
__device__ Leader SampleRow<X, kStaged, kThreads>::best_of_row(Leader best, int which) {
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
template <class X, bool kStaged, int kThreads>
__device__ void SampleRow<X, kStaged, kThreads>::draw(uint32_t least_key, bool masks, float log2_kept) {
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

// Raises the least key to that of the logits that may win. Noise is between -3.14 and 22.9, so none that is this far
// below the largest can.
template <class X, bool kStaged, int kThreads>
__device__ uint32_t SampleRow<X, kStaged, kThreads>::least_to_win(uint32_t least_key) const {
  if (args.num_distinct > 1) return least_key;
  const uint32_t possible = key_of(fmax(double(top) - 26.2 * temperature(), -double(kLargest)));
  return possible > least_key + 2 ? possible - 2 : least_key;
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
