// Stage 4 of slim_loss: the gradient. Included by slim_loss.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

template <class X, bool kStaged, int kThreads>
__device__ float SlimRow<X, kStaged, kThreads>::slope_at(float z) const {
  return transform() ? transform_slope(z, options) : 1.0f;
}

// The gradient off S by a logit.
template <class X, bool kStaged, int kThreads>
__device__ float SlimRow<X, kStaged, kThreads>::dense_gradient(float z) const {
  const DenseGradient<float>& dense = state.numbers.dense;
  const float below = z - state.numbers.off_level;
  float dz = exp2_approx(below * options.exponent) * dense.off_scale + dense.constant;
  if (two_temperatures()) dz += exp2_approx(below * options.exponent_one) * dense.one_scale;
  return transform() ? dz * transform_slope(z, options) : dz;
}

// The gradient by the logit of an entry of S.
template <class X, bool kStaged, int kThreads>
__device__ float SlimRow<X, kStaged, kThreads>::gradient_on(int32_t k) const {
  const RowNumbers& numbers = state.numbers;
  const KeptGradient<float>& kept = numbers.kept;
  const Outcome outcome = outcome_of(k);
  const float p = exp(outcome.log_p);
  float dz = exp2_approx((outcome.z - numbers.on_level) * options.exponent_one) * numbers.on_scale;
  dz += kept.constant;
  // A weight of 0 drops the divergence, even where it is infinite.
  if (args.kd_weight != 0) {
    float share, slope;
    diverge(options, numbers.gate, outcome.log_q, outcome.log_p, exp(outcome.log_q), p, &share, &slope);
    dz += (slope - p * kept.mean_slope) * kept.kd_scale;
  }
  return transform() ? dz * transform_slope(outcome.z, options) : dz;
}

// Replaces the logits on S of a tile by their gradient, and that of a label off S.
template <class X, bool kStaged, int kThreads>
template <class GradientOn>
__device__ void SlimRow<X, kStaged, kThreads>::write_on(int32_t start, const TileSums& tile, GradientOn gradient_on) {
  const float at_label = state.numbers.at_label;
  Bits* const to = kStaged ? staged() : gradient();
#pragma unroll 1
  for (int32_t k = tile.first + lane, end = tile.first + tile.count; k < end; k += 32) {
    const int32_t id = ids[k];
    const float dz = gradient_on(k);
    to[id - begin] = narrow(X(), id == label ? dz + at_label : dz);
  }
  const int32_t i = label - begin;
  if (lane == 0 && uint32_t(i) - uint32_t(start) < kTile && i < length && state.label_in_s == 0) {
    to[i] = narrow(X(), dense_gradient(float(state.student.label_z)) + at_label);
    if (!kStaged) marks()[i / 32] |= 1u << (i % 32);
  }
}

// The same for a plain divergence, whose gradient is a sum of two exponentials and a constant.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::write_on_plain(int32_t start, const TileSums& tile) {
  const RowNumbers& numbers = state.numbers;
  const float factor = options.exponent_one, constant = numbers.kept.constant;
  const float level = numbers.on_level, scale = numbers.on_scale - numbers.p_factor;
  const float teacher_level = numbers.teacher_level, teacher_scale = numbers.q_factor;
  const auto of_student = [&](int32_t k) { return exp2_approx((X::widen(bits_on(k)) - level) * factor) * scale; };
  // A weight of 0 drops the divergence, even where the teacher has no probabilities.
  if (args.kd_weight == 0) {
    write_on(start, tile, [&](int32_t k) { return of_student(k) + constant; });
    return;
  }
  with_teacher([&](const auto& teacher) {
    write_on(start, tile, [&](int32_t k) {
      const float teacher_e = exp2_approx((teacher(k) - teacher_level) * factor);
      return of_student(k) + (constant - teacher_e * teacher_scale);
    });
  });
}

// Whether a gradient off S takes one exponential, and float32 is exact enough to compute it in few instructions.
template <class X, bool kStaged, int kThreads>
__device__ bool SlimRow<X, kStaged, kThreads>::is_off_plain() const {
  return !transform() && !two_temperatures() && Exponent::is_exact(state.numbers.off_level);
}

// The gradient off S by a logit for which is_off_plain says yes.
struct PlainGradient {
  const Exponent exponent;
  const float scale, constant;

  __device__ PlainGradient(const RowNumbers& numbers, float factor)
      : exponent(numbers.off_level, factor),
        scale(numbers.dense.off_scale * exponent.correction),
        constant(numbers.dense.constant) {}
  __device__ float operator()(float z) const { return fmaf(exponent.uncorrected(z), scale, constant); }
};

// Replaces the logits of a tile in shared memory by their gradient off S.
template <class X, bool kStaged, int kThreads>
template <bool kOneExponential, class GradientOf>
__device__ void SlimRow<X, kStaged, kThreads>::write_off(int32_t start, GradientOf gradient_of) {
  for_each_vector<kOneExponential>(start, [&](int32_t i, const uint4& vector) {
    Bits elements[kCount];
    unpack<X>(vector, elements);
    float dz[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) dz[j] = gradient_of(X::widen(elements[j]));
    *reinterpret_cast<uint4*>(staged() + i) = narrow_vector<X>(dz);
  });
}

// Writes the gradient of a tile that is not in shared memory, but for the elements that are marked. A thread writes the
// elements that it reads, because both may be the same memory.
template <class X, bool kStaged, int kThreads>
template <class GradientOf>
__device__ void SlimRow<X, kStaged, kThreads>::write_unmarked(int32_t start, GradientOf gradient_of) {
  Bits* const output = gradient();
  const int32_t end = length - start < kTile ? length : start + kTile;
  const auto write = [&](int32_t from, int32_t to) {
#pragma unroll 1
    for (int32_t i = from + lane; i < to; i += 32) {
      if (!(marks()[i / 32] >> (i % 32) & 1)) output[i] = narrow(X(), gradient_of(X::widen(row[i])));
    }
  };
  int32_t done = start;
  const int32_t head = start + int32_t(-reinterpret_cast<uintptr_t>(output + start) % 16 / sizeof(Bits));
  if (head < end && is_aligned(row + head)) {
    write(start, head);
    const int32_t vectors = (end - head) / kCount;
#pragma unroll 1
    for (int32_t v = lane; v < vectors; v += 32) {
      const int32_t i = head + v * kCount;
      Bits elements[kCount];
      unpack<X>(*reinterpret_cast<const uint4*>(row + i), elements);
      const uint32_t marks = marks_from(i) & ((1u << kCount) - 1);
#pragma unroll
      for (int j = 0; j < kCount; ++j) elements[j] = narrow(X(), gradient_of(X::widen(elements[j])));
      if (marks == 0) {
        *reinterpret_cast<uint4*>(output + i) = pack<X>(elements);
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          if (!(marks >> j & 1)) output[i + j] = elements[j];
        }
      }
    }
    done = head + vectors * kCount;
  }
  write(done, end);
}

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::write_gradient() {
  const bool off_plain = is_off_plain();
  const PlainGradient plain_gradient(state.numbers, options.exponent_one);
  const auto gradient_of = [&](float x) { return dense_gradient(effective(x)); };
#pragma unroll 1
  for (int32_t t = warp; t * kTile < length; t += kWarps) {
    const int32_t start = t * kTile;
    if (kStaged && off_plain) write_off<true>(start, plain_gradient);
    if (kStaged && !off_plain) write_off<false>(start, gradient_of);
    __syncwarp();
    if (options.plain) {
      write_on_plain(start, tiles()[t]);
    } else {
      write_on(start, tiles()[t], [&](int32_t k) { return gradient_on(k); });
    }
    __syncwarp();
    if (kStaged) {
      store_tile<X>(staged() + start, gradient() + start, length - start < kTile ? length - start : kTile, lane);
    } else {
      // Twice the code would spill registers.
      write_unmarked(start, [&](float x) { return off_plain ? plain_gradient(x) : gradient_of(x); });
    }
  }
}

// Fills the results of a row that is ignored or faulty. Raising would need a synchronisation with the host, so bad
// rows become NaN.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::fill(float value) {
  if (rank == 0 && thread < num_stats()) static_cast<float*>(args.stats)[thread * args.num_rows + n] = value;
  if (args.dlogits == nullptr) return;
  Bits* const output = gradient();
  Bits elements[kCount];
#pragma unroll
  for (int j = 0; j < kCount; ++j) elements[j] = narrow(X(), value);
  const int32_t misplaced = int32_t(-reinterpret_cast<uintptr_t>(output) % 16 / sizeof(Bits));
  const int32_t head = misplaced < length ? misplaced : length, vectors = (length - head) / kCount;
  uint4* const to = reinterpret_cast<uint4*>(output + head);
  for (int32_t v = thread; v < vectors; v += kThreads) to[v] = pack<X>(elements);
  if (thread < head) output[thread] = elements[0];
  const int32_t i = head + vectors * kCount + thread;
  if (i < length) output[i] = elements[0];
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
