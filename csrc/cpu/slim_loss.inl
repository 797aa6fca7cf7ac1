// Cross entropy plus the weighted divergence from a sparse teacher, and its gradient, in one visit to each row.
//
// The row is read once into scratch, with the kept ids S taken out and set to -inf: what is summed afterwards is the
// off-support log-sum-exp itself, never 1 minus the rest. The gradient off S is then one scalar per row times
// exp(z - lse_off) plus a constant, whatever the divergence; the K entries on S and the label are overwritten.
//
// Names: z student logits, s = softmax(z), p = softmax(z / T), q the teacher, w the token's weight; D the divergence.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "sparse_softmax.inl"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

template <class A>
struct SlimScratch {
  A* z;        // (padded V) effective logits, -inf at S
  A* kept_z;   // (padded K) effective logits at S
  A* teacher;  // (padded K) teacher logits / T, later p * dD/dp
  A* p;        // (padded K) student on S, later the gradient
};

// What the student's row sums to. `off` is outside S, `on` inside; `_one` is at temperature 1.
struct StudentRow {
  double target_z;
  double off, off_one, on, on_one, lse, lse_one;
  double sum_off = 0, sum_all = 0;  // of z: only for zero_logit and label smoothing
};

// logits -> effective logits, softcap * tanh(logit_scale * x / softcap).
template <class V>
SK_INLINE V transformed(V x, const SlimLossArgs& args) {
  using A = ElementOf<V>;
  x *= A(args.logit_scale);
  if (args.softcap > 0) {
    for (unsigned lane = 0; lane < sizeof(V) / sizeof(A); ++lane) {
      x[lane] = A(args.softcap * __builtin_tanh(double(x[lane]) / args.softcap));
    }
  }
  return x;
}

// d effective / d logits, from the effective logit.
template <class V>
SK_INLINE V transform_slope(V z, const SlimLossArgs& args) {
  using A = ElementOf<V>;
  const V capped = z * A(args.softcap > 0 ? 1 / args.softcap : 0);
  return (V{} + A(1) - capped * capped) * A(args.logit_scale);
}

template <class X, class A>
StudentRow read_student(const X* row, const int32_t* ids, int64_t kept, int64_t target, const SlimLossArgs& args,
                        const SlimScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  using Vec = typename Lanes<A>::Vec;
  const int64_t vocab_size = args.vocab_size;
  const bool transform = args.logit_scale != 1 || args.softcap > 0;
  const bool two_temperatures = args.temperature != 1;
  const bool sum_logits = args.label_smoothing > 0 || args.rest == kZeroLogit;
  StudentRow student;
  LogSum off, off_one;
  off.inv_temperature = 1 / args.temperature;
  int64_t k = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const int64_t length = vocab_size - begin < kBlock ? vocab_size - begin : kBlock;
    A* z = scratch.z + begin;
    for (int64_t i = 0; i < length; i += kWidth) {
      Vec x = i + kWidth <= length ? load(row + begin + i) : load_part(row + begin + i, length - i, -infinity<A>());
      if (transform) x = transformed(x, args);
      store(z + i, x);
    }
    for (int64_t i = length; i < padded<A>(length); ++i) z[i] = -infinity<A>();
    if (target >= begin && target < begin + length) student.target_z = z[target - begin];
    if (sum_logits) {
      for (int64_t i = 0; i < length; ++i) student.sum_all += z[i];
    }
    const int64_t first = k;
    for (; k < kept && ids[k] < begin + length; ++k) {
      scratch.kept_z[k] = z[ids[k] - begin];
      z[ids[k] - begin] = -infinity<A>();
    }
    if (sum_logits) {
      int64_t next = first;
      for (int64_t i = 0; i < length; ++i) {
        const bool on_support = next < k && ids[next] == begin + i;
        next += on_support;
        student.sum_off += on_support ? 0 : z[i];
      }
    }
    const A best = max_of(z, padded<A>(length));
    add_block(off, z, padded<A>(length), best);
    if (two_temperatures) add_block(off_one, z, padded<A>(length), best);
  }
  for (int64_t i = kept; i < padded<A>(kept); ++i) scratch.kept_z[i] = -infinity<A>();
  student.off = off.log();
  student.on = log_sum_exp(scratch.kept_z, padded<A>(kept), 1 / args.temperature);
  student.off_one = two_temperatures ? off_one.log() : student.off;
  student.on_one = two_temperatures ? log_sum_exp(scratch.kept_z, padded<A>(kept), 1) : student.on;
  student.lse = log_add_exp(student.off, student.on);
  student.lse_one = log_add_exp(student.off_one, student.on_one);
  return student;
}

// One outcome's share of D, and p * dD/dp. Works on vectors and on the ghost bucket's doubles alike.
template <class V>
SK_INLINE void diverge(int divergence, V log_q, V log_p, V q, V p, double beta, double alpha, V* share, V* p_slope) {
  using A = ElementOf<V>;
  const V zero = V{};
  switch (divergence) {
    case kForwardKl:
      *share = q == zero ? zero : q * (log_q - log_p);
      *p_slope = -q;
      return;
    case kSoftCe:
      *share = q == zero ? zero : -q * log_p;
      *p_slope = -q;
      return;
    case kReverseKl:
      // An outcome the teacher excludes would make D infinite, and a rounded-away tail with it: it is left out.
      *share = (p == zero) | (log_q == zero - infinity<A>()) ? zero : p * (log_p - log_q);
      *p_slope = log_q == zero - infinity<A>() ? zero : *share + p;
      return;
    case kJsd: {
      const V log_m = log_add_exp(log_q + A(__builtin_log(beta)), log_p + A(__builtin_log1p(-beta)));
      const V from_p = p == zero ? zero : p * (log_p - log_m) * A(1 - beta);
      *share = (q == zero ? zero : q * (log_q - log_m) * A(beta)) + from_p;
      *p_slope = from_p;
      return;
    }
    default: {
      const V log_m = log_add_exp(log_q + A(__builtin_log(alpha)), log_p + A(__builtin_log1p(-alpha)));
      *share = q == zero ? zero : q * (log_q - log_m);
      const V slope = exp(log_p + log_q - log_m) * A(alpha - 1);
      *p_slope = (q == zero) | (p == zero) ? zero : slope;
      return;
    }
  }
}

struct RowDivergence {
  double value = 0;            // D, without T^2
  double mean_slope = 0;       // sum of p * dD/dp over all outcomes
  double off_coefficient = 0;  // dD/d(z_v / T) off S is off_coefficient * exp(z_v / T - lse_off) + off_constant
  double off_constant = 0;
  double teacher_mass = 0, student_mass = 0;
};

template <class A>
RowDivergence measure(int64_t n, int64_t kept, const StudentRow& student, const SlimLossArgs& args,
                      const SlimScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  using Vec = typename Lanes<A>::Vec;
  const double log_kept = log_sum_exp(scratch.teacher, padded<A>(kept), 1);
  const bool has_lse = args.teacher_lse != nullptr;
  const double lse = has_lse ? double(static_cast<const A*>(args.teacher_lse)[n]) : __builtin_nan("");
  const double log_norm = teacher_log_norm(args.rest, log_kept, lse, kept, args.vocab_size);
  const double student_norm = args.rest == kRenormBoth ? student.on : student.lse;
  const A inv_temperature = A(1 / args.temperature);

  Vec share_sum = {}, slope_sum = {};
  for (int64_t k = 0; k < kept; k += kWidth) {
    const Vec log_q = load(scratch.teacher + k) - A(log_norm);
    const Vec log_p = load(scratch.kept_z + k) * inv_temperature - A(student_norm);
    const Vec p = exp(log_p);
    Vec share, slope;
    diverge(args.divergence, log_q, log_p, exp(log_q), p, args.beta, args.alpha, &share, &slope);
    share_sum += share;
    slope_sum += slope;
    store(scratch.teacher + k, slope);
    store(scratch.p + k, p);
  }

  RowDivergence d;
  d.value = sum_lanes(share_sum);
  d.mean_slope = sum_lanes(slope_sum);
  d.teacher_mass = __builtin_exp(log_kept - lse);
  d.student_mass = __builtin_exp(student.on - student.lse);
  const double log_tail = student.off - student.lse;
  const double tail = __builtin_exp(log_tail);
  const bool forward = args.divergence == kForwardKl || args.divergence == kSoftCe;
  if (args.rest == kGhost) {
    const double log_q = log_ghost(log_kept - lse, kept, args.vocab_size);
    double share, slope;
    diverge(args.divergence, log_q, log_tail, __builtin_exp(log_q), tail, args.beta, args.alpha, &share, &slope);
    d.value += share;
    // The forward slopes add up to exactly -1; rounding their sum would drown a small (1 - a) - (1 - P).
    d.mean_slope = forward ? -1 : d.mean_slope + slope;
    d.off_coefficient = slope - tail * d.mean_slope;
  } else if (args.rest == kZeroLogit) {
    const double unkept = double(args.vocab_size - kept);
    const double each = __builtin_exp(-log_norm);
    const double entropy = args.divergence == kForwardKl ? -unkept * log_norm : 0;
    if (unkept > 0) d.value += each * (entropy - (student.sum_off / args.temperature - unkept * student.lse));
    d.mean_slope = -1;
    d.off_coefficient = -tail * d.mean_slope;
    d.off_constant = -each;
  } else if (args.rest != kRenormBoth) {
    d.off_coefficient = -tail * d.mean_slope;
  }
  return d;
}

struct TokenWeight {
  double value = 1;
  double slope = 0;  // d value / d log s_y, 0 when detached
};

template <class A>
TokenWeight weigh(int64_t n, double log_student, double label_logit, const SlimLossArgs& args) {
  TokenWeight w;
  if (args.weight == kWeightOne) return w;
  if (args.weight == kWeightTensor) {
    w.value = static_cast<const A*>(args.token_weight)[n];
    return w;
  }
  const double log_teacher = label_logit - static_cast<const A*>(args.teacher_lse_one)[n];
  const double sign = args.weight == kTeacherOverStudent ? 1 : -1;
  // A label the teacher gives nothing decides alone, also where the student gives it nothing either.
  const bool impossible = log_teacher == -infinity<double>();
  const double log_ratio = sign * (impossible ? log_teacher : log_teacher - log_student);
  const double ratio = __builtin_exp(log_ratio > 30 ? 30 : log_ratio);
  w.value = -__builtin_expm1(-ratio);
  if (!args.detach_weight && log_ratio <= 30) w.slope = -sign * ratio * __builtin_exp(-ratio);
  return w;
}

// The gradient of the row: off S a scalar times exp(z - lse_off) plus a constant, then S and the label.
template <class X, class A>
void write_gradient(int64_t n, const int32_t* ids, int64_t kept, const StudentRow& student, const RowDivergence& d,
                    double kd_scale, double softmax_scale, double label_slope, const SlimLossArgs& args,
                    const SlimScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  using Vec = typename Lanes<A>::Vec;
  const int64_t vocab_size = args.vocab_size;
  const int64_t target = args.target[n];
  X* gradient = static_cast<X*>(args.dlogits) + n * args.dlogits_stride;
  const double row_scale = args.row_scale == nullptr ? 1 : double(static_cast<const A*>(args.row_scale)[n]);
  const bool transform = args.logit_scale != 1 || args.softcap > 0;
  const bool two_temperatures = args.temperature != 1;
  const A inv_temperature = A(1 / args.temperature);
  const double smoothing = -args.ce_weight * args.label_smoothing / vocab_size;

  // At T = 1 both softmaxes are the same exponentials: s = exp(z - lse_off) * exp(lse_off - lse), which cannot
  // overflow.
  const bool empty_off = student.off == -infinity<double>();
  const A shift = empty_off ? A(0) : A(student.off);
  const A shift_one = A(student.lse_one);
  double coefficient = kd_scale * d.off_coefficient;
  if (!two_temperatures) coefficient += softmax_scale * __builtin_exp(student.off - student.lse_one);
  if (empty_off) coefficient = 0;
  const A off_scale = A(row_scale * coefficient);
  const A one_scale = A(two_temperatures ? row_scale * softmax_scale : 0);
  const A constant = A(row_scale * (smoothing + kd_scale * d.off_constant));
  for (int64_t i = 0; i < vocab_size; i += kWidth) {
    const Vec z = load(scratch.z + i);
    Vec dz = exp(z * inv_temperature - shift) * off_scale + constant;
    if (two_temperatures) dz += exp(z - shift_one) * one_scale;
    if (transform) dz *= transform_slope(z, args);
    if (i + kWidth <= vocab_size) {
      store(gradient + i, dz);
    } else {
      store_part(gradient + i, dz, vocab_size - i);
    }
  }

  int64_t target_entry = -1;
  const A kd = A(row_scale * kd_scale), on_scale = A(row_scale * softmax_scale), mean_slope = A(d.mean_slope);
  for (int64_t k = 0; k < kept; k += kWidth) {
    const Vec z = load(scratch.kept_z + k);
    Vec dz = exp(z - shift_one) * on_scale + A(row_scale * smoothing);
    dz += (load(scratch.teacher + k) - load(scratch.p + k) * mean_slope) * kd;
    store(scratch.p + k, transform ? dz * transform_slope(z, args) : dz);
  }
  for (int64_t k = 0; k < kept; ++k) {
    store_one(gradient + ids[k], scratch.p[k]);
    if (ids[k] == target) target_entry = k;
  }

  double slope = args.logit_scale;
  if (args.softcap > 0) slope *= 1 - student.target_z * student.target_z / (args.softcap * args.softcap);
  double at_label = row_scale * label_slope * slope;
  if (target_entry >= 0) {
    at_label += scratch.p[target_entry];
  } else {
    double dz = coefficient * (empty_off ? 0 : __builtin_exp(student.target_z / args.temperature - student.off));
    if (two_temperatures) dz += softmax_scale * __builtin_exp(student.target_z - student.lse_one);
    at_label += row_scale * (dz + smoothing + kd_scale * d.off_constant) * slope;
  }
  store_one(gradient + target, A(at_label));
}

// Reads the teacher's row in whatever type it is stored; `out` is padded with -inf.
template <class A>
void load_teacher(const SlimLossArgs& args, int64_t n, int64_t kept, A* out) {
  const double inv_temperature = 1 / args.temperature;
  const int64_t offset = n * args.top_k;
  switch (args.teacher_dtype) {
    case kFloat32:
      return load_scaled(static_cast<const float*>(args.teacher_logits) + offset, kept, inv_temperature, out);
    case kBFloat16:
      return load_scaled(static_cast<const bf16*>(args.teacher_logits) + offset, kept, inv_temperature, out);
    case kFloat16:
      return load_scaled(static_cast<const f16*>(args.teacher_logits) + offset, kept, inv_temperature, out);
    default:
      return load_scaled(static_cast<const double*>(args.teacher_logits) + offset, kept, inv_temperature, out);
  }
}

template <class X, class A>
Fault slim_loss_row(const SlimLossArgs& args, int64_t n, const SlimScratch<A>& scratch) {
  const int64_t target = args.target[n];
  A* stats = static_cast<A*>(args.stats) + n;
  if (target == args.ignore_index) {
    for (int column = 0; column < 7; ++column) stats[column * args.num_rows] = 0;
    if (args.dlogits != nullptr) {
      memset(static_cast<X*>(args.dlogits) + n * args.dlogits_stride, 0, args.vocab_size * sizeof(X));
    }
    return kOk;
  }
  if (target < 0 || target >= args.vocab_size) return kBadTarget;
  const bool has_teacher = args.ids != nullptr;
  const int32_t* ids = has_teacher ? args.ids + n * args.top_k : nullptr;
  const int64_t kept = has_teacher ? count_kept(ids, args.top_k, args.vocab_size) : 0;
  if (kept < 0) return kBadIds;

  const X* row = static_cast<const X*>(args.logits) + n * args.logits_stride;
  const StudentRow student = read_student<X, A>(row, ids, kept, target, args, scratch);
  const double log_student = student.target_z - student.lse_one;
  const double smoothing = args.label_smoothing;
  double ce = -log_student;
  if (smoothing > 0) ce = (1 - smoothing) * ce + smoothing * (student.lse_one - student.sum_all / args.vocab_size);

  RowDivergence d;
  TokenWeight w;
  double kd = 0, kd_scale = 0;
  if (has_teacher) {
    load_teacher(args, n, kept, scratch.teacher);
    double label_logit = -infinity<double>();
    if (args.target_logit != nullptr) {
      label_logit = static_cast<const A*>(args.target_logit)[n];
    } else {
      for (int64_t k = 0; k < kept; ++k) {
        if (ids[k] == target) label_logit = double(scratch.teacher[k]) * args.temperature;
      }
    }
    w = weigh<A>(n, log_student, label_logit, args);
    d = measure<A>(n, kept, student, args, scratch);
    kd = d.value * args.temperature * args.temperature;
    kd_scale = args.kd_weight * w.value * args.temperature;
  }
  double loss = args.ce_weight == 0 ? 0 : args.ce_weight * ce;
  if (has_teacher && args.kd_weight != 0) loss += args.kd_weight * w.value * kd;
  if (args.z_loss_weight != 0) loss += args.z_loss_weight * student.lse_one * student.lse_one;
  const double columns[7] = {loss, ce, kd, has_teacher ? w.value : 0, d.teacher_mass, d.student_mass, student.lse_one};
  for (int column = 0; column < 7; ++column) stats[column * args.num_rows] = A(columns[column]);

  if (args.dlogits != nullptr) {
    const double through_weight = w.slope == 0 ? 0 : args.kd_weight * kd * w.slope;
    const double softmax_scale = args.ce_weight + 2 * args.z_loss_weight * student.lse_one - through_weight;
    const double label_slope = -args.ce_weight * (1 - smoothing) + through_weight;
    write_gradient<X, A>(n, ids, kept, student, d, kd_scale, softmax_scale, label_slope, args, scratch);
  }
  return kOk;
}

template <class X>
int64_t slim_loss_rows(const SlimLossArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t vocab = padded<A>(args.vocab_size), kept = padded<A>(args.top_k);
  A* memory = static_cast<A*>(malloc((vocab + 3 * kept) * sizeof(A)));
  if (memory == nullptr) return kNoMemory;
  const SlimScratch<A> scratch = {memory, memory + vocab, memory + vocab + kept, memory + vocab + 2 * kept};
  int64_t fault = kOk;
  for (int64_t n = begin; n < end && fault == kOk; ++n) {
    const Fault found = slim_loss_row<X, A>(args, n, scratch);
    if (found != kOk) fault = n * kFaults + found;
  }
  free(memory);
  return fault;
}

int64_t slim_loss(const SlimLossArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case kFloat32:
      return slim_loss_rows<float>(args, begin, end);
    case kBFloat16:
      return slim_loss_rows<bf16>(args, begin, end);
    case kFloat16:
      return slim_loss_rows<f16>(args, begin, end);
    default:
      return slim_loss_rows<double>(args, begin, end);
  }
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
