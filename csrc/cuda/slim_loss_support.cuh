// Stage 3 of slim_loss: the divergence, an entry of S at a time. Included by slim_loss.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

template <class X, bool kStaged, int kThreads>
__device__ Outcome SlimRow<X, kStaged, kThreads>::outcome_of(int32_t k) const {
  const RowNumbers& numbers = state.numbers;
  Outcome outcome;
  outcome.z = logit_on(k);
  outcome.log_p = (outcome.z - numbers.on_level) * options.inverse + numbers.p_offset;
  outcome.log_q = (teacher_logit(k) - numbers.teacher_level) * options.inverse + numbers.q_offset;
  if (blends()) {
    const float t = options.teacher_blend;
    outcome.log_q = outcome.log_q * t + (outcome.log_p * (1 - t) - numbers.blend_norm);
  }
  return outcome;
}

// Sums the exponentials of the teacher that is blended with the student.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::blend_tiles() {
  for (int32_t t = warp; t * kTile < length; t += kWarps) {
    TileSums& tile = tiles()[t];
    float level = -infinity<float>(), sum = 0;
    for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
      level = fmaxf(level, outcome_of(k).log_q);
    }
    level = max_of_warp(level);
    for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
      sum += exp2_approx((outcome_of(k).log_q - level_of(level)) * options.exponent_one);
    }
    sum = sum_of_warp(sum);
    if (lane == 0) {
      tile.blend_level = level;
      tile.blend_e = sum;
    }
  }
}

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::diverge_tiles() {
  const float gate = state.numbers.gate;
  for (int32_t t = warp; t * kTile < length; t += kWarps) {
    TileSums& tile = tiles()[t];
    float share_sum = 0, slope_sum = 0;
    for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
      const Outcome outcome = outcome_of(k);
      float share, slope;
      diverge(options, gate, outcome.log_q, outcome.log_p, exp(outcome.log_q), exp(outcome.log_p), &share, &slope);
      share_sum += share;
      slope_sum += slope;
    }
    share_sum = sum_of_warp(share_sum);
    slope_sum = sum_of_warp(slope_sum);
    if (lane == 0) {
      tile.share = share_sum;
      tile.slope = slope_sum;
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
