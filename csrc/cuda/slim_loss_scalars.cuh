// The scalars of slim_loss, which the first warp of every block computes for itself between the walks over a row.
// Included by slim_loss.cuh.
#pragma once

namespace slimkernels {
namespace cuda {
namespace {

// The sums of all tiles relative to one level: of exponentials, and of e * (level - x) times `scale`.
struct RowSum {
  float level;
  double e, one, spread;
};

// The entropy of the distribution of exponentials with a sum and a sum of e * (level - x).
__device__ inline double entropy_of(double sum, double spread) { return sum == 0 ? 0 : log(sum) + spread / sum; }

template <class X, bool kStaged, int kThreads>
template <class Tile>
__device__ RowSum SlimRow<X, kStaged, kThreads>::sum_of_tiles(float TileSums::* level_of_tile, float exponent,
                                                              float scale, Tile read) {
  float level = -infinity<float>();
  for (int32_t t = lane; t < num_tiles(); t += 32) level = fmaxf(level, tile_of(t).*level_of_tile);
  RowSum row = {max_of_warp(level), 0, 0, 0};
  level = level_of(row.level);
  for (int32_t t = lane; t < num_tiles(); t += 32) {
    const TileSums& tile = tile_of(t);
    const float below = level - tile.*level_of_tile;
    float e, one, spread;
    read(tile, e, one, spread);
    if (e == 0 && one == 0) continue;
    const float factor = exp2_approx(-below * exponent), factor_one = exp2_approx(-below * options.exponent_one);
    row.e += double(e * factor);
    row.one += double(one * factor_one);
    // The distance may be infinite where the factor is 0.
    if (scale == 1) {
      if (factor_one > 0) row.spread += double((spread + one * below) * factor_one);
    } else if (factor > 0) {
      row.spread += double((spread + e * below * scale) * factor);
    }
  }
  row.e = sum_of_warp(row.e);
  row.one = sum_of_warp(row.one);
  row.spread = sum_of_warp(row.spread);
  return row;
}

// The sums are taken one after the other, and what they give is kept in shared memory, since few registers are left.
// All lanes store the same numbers.

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_student_off() {
  const RowSum off =
      sum_of_tiles(&TileSums::off_level, options.exponent, 1, [](auto& tile, float& e, float& one, float& spread) {
        e = tile.off_e, one = tile.off_one, spread = tile.off_spread;
      });
  const bool empty = off.e == 0;  // the level ignores NaN, the sum does not
  OffSums& sums = state.student.off;
  sums.e = empty ? 1 : off.e;
  sums.lse = empty ? -infinity<double>() : off.level / args.temperature + log(off.e);
  sums.lse_one = empty || !two_temperatures() ? sums.lse : off.level + log(off.one);
  state.numbers.off_level = level_of(off.level);
  if (args.statistics != kNone) state.off_entropy = empty ? 0 : entropy_of(off.one, off.spread);
}

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_student_on() {
  const RowSum on =
      sum_of_tiles(&TileSums::on_level, options.exponent, 1, [](auto& tile, float& e, float& one, float& spread) {
        e = tile.on_e, one = tile.on_one, spread = tile.on_spread;
      });
  StudentSums& student = state.student;
  student.on = {level_of(on.level) / args.temperature, on.e};
  const double on_lse = student.on.log();
  student.lse = student.lse_one = log_add_exp(student.off.lse, on_lse);
  double on_lse_one = on_lse;
  if (two_temperatures()) {
    on_lse_one = ExpSum{level_of(on.level), on.one}.log();
    student.lse_one = log_add_exp(student.off.lse_one, on_lse_one);
  }
  state.numbers.on_level = level_of(on.level);
  if (args.statistics != kNone) {
    student.entropy = at_least_zero(entropy_of_part(student.off.lse_one - student.lse_one, state.off_entropy) +
                                    entropy_of_part(on_lse_one - student.lse_one, entropy_of(on.one, on.spread)));
  }
  student.label_z = effective(X::widen(static_cast<const Bits*>(args.logits)[n * args.logits_stride + label]));
  student.log_s_y = student.label_z - student.lse_one;
}

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_student_logits() {
  double off_z = 0, on_z = 0;
  for (int32_t t = lane; t < num_tiles(); t += 32) {
    off_z += double(tile_of(t).off_z);
    on_z += double(tile_of(t).on_z);
  }
  off_z = sum_of_warp(off_z);
  state.student.off.z = off_z;
  state.student.sum_z = off_z + sum_of_warp(on_z);
}

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_teacher() {
  const RowSum on = sum_of_tiles(
      &TileSums::teacher_level, options.exponent, options.inverse,
      [](auto& tile, float& e, float& one, float& spread) { e = one = tile.teacher_e, spread = tile.teacher_spread; });
  const int32_t kept = state.numbers.num_kept;
  const float label_logit = state_of(uint32_t(label / slice)).label_logit;
  TeacherSums& teacher = state.teacher;
  teacher = teacher_sums<float>(args, n, kept, {level_of(on.level) / args.temperature, on.e}, label_logit);
  if (needs_teacher_entropy(args)) {
    set_teacher_entropy<float>(args, n, kept, entropy_of(on.e, on.spread), &teacher);
  }
  state.numbers.teacher_level = level_of(on.level);
}

// Computes what the walks over S need. Follows sum_tiles and a barrier.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::sum_scalars() {
  RowNumbers& numbers = state.numbers;
  uint32_t kept = 0, bad = 0;
  for (int32_t t = lane; t < num_tiles(); t += 32) kept += uint32_t(tile_of(t).count);
  if (lane < int(num_blocks)) bad = state_of(lane).bad;
  numbers.num_kept = int32_t(__reduce_add_sync(kAllLanes, kept));
  numbers.faulty = __reduce_add_sync(kAllLanes, bad) > 0;
  sum_student_off();
  __syncwarp();
  sum_student_on();
  if (sums_logits()) sum_student_logits();
  if (ids == nullptr) return;
  __syncwarp();
  sum_teacher();
  __syncwarp();
  const double p_norm = p_norm_of(args, state.student);
  numbers.p_offset = float(state.student.on.level - p_norm);
  numbers.q_offset = float(state.teacher.on.level - state.teacher.norm.q_norm);
  numbers.q_scale = exp(numbers.q_offset);
  numbers.gate = float(state.teacher.gate);
  numbers.blend_norm = 0;
}

// Computes the teacher with which the student is compared. Follows blend_tiles and a barrier.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::blend() {
  const RowSum sum =
      sum_of_tiles(&TileSums::blend_level, options.exponent_one, 1,
                   [](auto& tile, float& e, float& one, float& spread) { e = one = tile.blend_e, spread = 0; });
  state.blended = state.teacher;
  set_blended(args, state.student, {level_of(sum.level), sum.e}, &state.blended);
  if (lane == 0) state.numbers.blend_norm = float(state.blended.norm.q_norm);
}

// Adds the share and the slope of a tile in a plain divergence. The tile's share is relative to its own levels.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::add_plain(const TileSums& tile, double& share, double& slope) const {
  const RowNumbers& numbers = state.numbers;
  if (tile.teacher_e == 0) return;
  const float x = tile.teacher_level - numbers.teacher_level, z = level_of(tile.on_level) - numbers.on_level;
  const float scale = exp2_approx(x * options.exponent_one) * numbers.q_scale, q = tile.teacher_e * scale;
  const float log_q = options.divergence == kSoftCe ? 0.0f : x + numbers.q_offset;
  share += double(tile.share * scale + q * (log_q - (z + numbers.p_offset)));
  slope -= double(q);
}

// Computes the loss and the numbers of the gradient; the first block stores the statistics.
template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::measure() {
  RowNumbers& numbers = state.numbers;
  state.divergence = DivergenceSums();
  if (ids != nullptr) {
    const TeacherSums& teacher = blends() ? state.blended : state.teacher;
    state.tail = tail_terms(args, state.student, teacher);
    __syncwarp();
    double share = 0, slope = 0;
    for (int32_t t = lane; t < num_tiles(); t += 32) {
      const TileSums& tile = tile_of(t);
      if (options.plain) {
        add_plain(tile, share, slope);
      } else {
        share += double(tile.share);
        slope += double(tile.slope);
      }
    }
    share = sum_of_warp(share);
    slope = sum_of_warp(slope);
    state.divergence = divergence_sums(args, state.student, teacher, state.tail, numbers.num_kept, share, slope);
    __syncwarp();
  }
  state.measures = measures_of<float>(args, n, state.student, state.teacher, state.divergence, &state.stats);
  __syncwarp();
  if (args.statistics != kNone) watch();
  store_stats();
  if (args.dlogits == nullptr) return;
  const GradientNumbers<float> found =
      gradient_numbers<float>(args, n, state.student, state.measures, numbers.off_level);
  numbers.dense = found.dense;
  numbers.kept = found.kept;
  numbers.on_scale = found.kept.scale * float(exp(double(numbers.on_level) - state.student.lse_one));
  numbers.p_factor = exp(numbers.p_offset) * found.kept.mean_slope * found.kept.kd_scale;
  // A weight of 0 drops the divergence, even where it is infinite.
  numbers.q_factor = args.kd_weight == 0 ? 0.0f : numbers.q_scale * found.kept.kd_scale;
  numbers.at_label = float(found.at_label) * slope_at(float(state.student.label_z));
}

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::watch() {
  double* const out = state.stats.columns + 7;
  const StudentSums& student = state.student;
  const TeacherSums& teacher = state.teacher;
  for (int i = 0; i < 6; ++i) out[i] = 0;
  out[0] = student.entropy;
  out[3] = state.argmax == uint32_t(label);
  if (ids != nullptr) {
    const int32_t entry = lower_bound(state.argmax);
    out[1] = teacher.entropy;
    out[2] = entry < state.numbers.num_kept && uint32_t(ids[entry]) == state.argmax;
    out[4] = teacher.log_t_y > student.log_s_y;
    if (args.statistics == kAll && state.numbers.num_kept > 0) {
      const uint32_t shared = __reduce_add_sync(kAllLanes, lane < int(num_blocks) ? state_of(lane).shared : 0u);
      out[5] = double(shared) / state.numbers.num_kept;
    }
  }
  if (student.lse_one == student.lse_one) return;
  for (int i = 0; i < 6; ++i) out[i] = student.lse_one;
}

template <class X, bool kStaged, int kThreads>
__device__ void SlimRow<X, kStaged, kThreads>::store_stats() const {
  if (rank != 0 || lane >= num_stats()) return;
  static_cast<float*>(args.stats)[lane * args.num_rows + n] = float(state.stats.columns[lane]);
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
