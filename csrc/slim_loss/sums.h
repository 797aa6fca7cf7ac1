// The scalars of a row of slim_loss: from its sums to the loss, and to the coefficients of its gradient.
//
// Stage 1 and 2 of a kernel (slimkernels/ops/README.md) sum over the row and over S; stage 3 sums the shares of the
// divergence; stage 4 writes the gradient. What happens between these walks is here, in float64. See row_math.h for
// what is defined before.
#pragma once

#include "args.h"
#include "row_math.h"
#include "terms.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// Sums over the ids off S. `_one` is at temperature 1 here and below, everything else at T.
struct OffSums {
  double e = 0;  // sum of e
  double lse = 0, lse_one = 0;
  double z = 0;  // sum of z, only where the row keeps z
};

struct StudentSums {
  OffSums off;
  ExpSum on;                    // sum of exp(z / T) over S
  double lse = 0, lse_one = 0;  // log-sum-exps of the whole row
  double label_z = 0, log_s_y = 0;
  double sum_z = 0;    // sum of z over the whole row, only where the row keeps z
  double entropy = 0;  // at temperature 1, only with statistics
};

struct TeacherSums {
  ExpSum on;         // sum of exp(teacher_z) over S
  double lse = 0;    // the given log-sum-exp of the teacher's whole row at T, NaN where it is unknown
  TeacherNorm norm;  // q on S and off S
  double log_t_y = 0;
  double entropy = 0;  // of the ids in S and of one outcome for all others, only with statistics or "gated"
  double gate = 0;     // factor of the forward KL in "gated"

  SK_DEVICE double log_mass() const { return on.log() - finite_norm(lse); }  // log a
};

// The share of D that the outcome off S has, and its slope; 0 unless `rest` is "ghost".
struct TailTerms {
  double share = 0, slope = 0;
};

// D without T^2, and the numbers of its gradient by z / T.
struct DivergenceSums {
  double value = 0;
  double mean_slope = 0;  // sum of p * dD/dp over all outcomes
  double off_factor = 0;  // dD/d(z / T) off S is off_factor * exp(z / T - off.lse) + off_constant
  double off_constant = 0;
};

struct Measures {
  TokenWeight w;
  DivergenceSums d;
  double kd = 0;
};

// The first columns are those of every call, see SlimLossArgs.
struct Stats {
  double columns[kNumStats[kAll]] = {};
};

// The gradient off S is e * off_scale + e_one * one_scale + constant, times dz/dlogits.
template <class A>
struct DenseGradient {
  A off_scale = 0, one_scale = 0, constant = 0;
  A label_change = 0;  // added at a label off S
};

// The gradient on S is s * scale + constant + (slope - p * mean_slope) * kd_scale, times dz/dlogits.
template <class A>
struct KeptGradient {
  A scale = 0, constant = 0, mean_slope = 0, kd_scale = 0;
};

// The numbers of a row's gradient; `at_label` is added at the label and not yet multiplied by dz/dlogits.
template <class A>
struct GradientNumbers {
  DenseGradient<A> dense;
  KeptGradient<A> kept;
  double at_label = 0;
};

SK_INLINE bool has_two_temperatures(const SlimLossArgs& args) { return args.temperature != 1; }

SK_INLINE bool transforms(const SlimLossArgs& args) { return args.logit_scale != 1 || args.softcap > 0; }

// Whether z is needed after it was exponentiated.
SK_INLINE bool keeps_logits(const SlimLossArgs& args) {
  return transforms(args) || args.label_smoothing > 0 || args.rest == kZeroLogit;
}

// Returns the part that outcomes with the mass exp(log_mass), and the entropy `inside` among themselves, have in the
// entropy of a distribution.
SK_DEVICE inline double entropy_of_part(double log_mass, double inside) {
  const double mass = exp(log_mass);
  return mass == 0 ? 0 : mass * (inside - log_mass);
}

// Rounding can make the entropy of a row with a single outcome negative. NaN stays NaN.
SK_DEVICE inline double at_least_zero(double entropy) { return entropy < 0 ? 0 : entropy; }

// ---- Stage 2: teacher sums, from the sum over S and the logit of a label in S, -inf if it is not in S

template <class A>
SK_INLINE TeacherSums teacher_sums(const SlimLossArgs& args, int64_t n, int64_t kept, ExpSum on, double label_logit) {
  TeacherSums teacher;
  teacher.on = on;
  teacher.lse = known_or_nan<A>(args.teacher_lse, n);
  const double rest_lse = known_or_nan<A>(args.teacher_rest_lse, n);
  teacher.norm = teacher_norm(args.rest, on.log(), teacher.lse, rest_lse, kept, args.vocab_size);
  const double known = known_or_nan<A>(args.target_logit, n);
  teacher.log_t_y = known == known ? known : label_logit;
  if (args.teacher_lse_one != nullptr) teacher.log_t_y -= finite_norm(static_cast<const A*>(args.teacher_lse_one)[n]);
  return teacher;
}

SK_INLINE bool needs_teacher_entropy(const SlimLossArgs& args) {
  return args.statistics != kNone || args.divergence == kGated;
}

// Sets the entropy of the outcomes of "ghost", whatever `rest` is, from the entropy `inside` of S alone.
template <class A>
SK_INLINE void set_teacher_entropy(const SlimLossArgs& args, int64_t n, int64_t kept, double inside,
                                   TeacherSums* teacher) {
  const double rest_lse = known_or_nan<A>(args.teacher_rest_lse, n);
  const TeacherNorm ghost = teacher_norm(kGhost, teacher->on.log(), teacher->lse, rest_lse, kept, args.vocab_size);
  teacher->entropy =
      at_least_zero(entropy_of_part(teacher->on.log() - ghost.q_norm, inside) + entropy_of_part(ghost.log_q_tail, 0));
  if (args.divergence == kGated && teacher->entropy > args.entropy_threshold) teacher->gate = args.forward_weight;
}

// ---- Stage 3: measure

// The norm of the student on S: log p = z / T - p_norm.
SK_INLINE double p_norm_of(const SlimLossArgs& args, const StudentSums& student) {
  return args.rest == kRenormBoth ? finite_norm(student.on.log()) : student.lse;
}

// Gives a blended teacher, whose sum over S is `on`, its norms. Its mass off S is blended here.
SK_INLINE void set_blended(const SlimLossArgs& args, const StudentSums& student, ExpSum on, TeacherSums* teacher) {
  const double t = args.teacher_blend;
  teacher->on = on;
  double tail = -infinity<double>();
  if (args.rest == kGhost) tail = t * teacher->norm.log_q_tail + (1 - t) * (student.off.lse - student.lse);
  teacher->norm.q_norm = finite_norm(log_add_exp(on.log(), tail));
  teacher->norm.log_q_tail = tail - teacher->norm.q_norm;
}

SK_INLINE TailTerms tail_terms(const SlimLossArgs& args, const StudentSums& student, const TeacherSums& teacher) {
  TailTerms tail;
  if (args.rest != kGhost) return tail;
  const double gate = teacher.gate;
  const double log_q_tail = teacher.norm.log_q_tail, log_p_tail = student.off.lse - student.lse;
  diverge(args, gate, log_q_tail, log_p_tail, exp(log_q_tail), exp(log_p_tail), &tail.share, &tail.slope);
  return tail;
}

// Computes D from the sums over S of its shares and slopes.
SK_INLINE DivergenceSums divergence_sums(const SlimLossArgs& args, const StudentSums& student,
                                         const TeacherSums& teacher, TailTerms tail, int64_t kept, double kept_share,
                                         double kept_slope) {
  const double q_norm = teacher.norm.q_norm;
  DivergenceSums d;
  d.value = kept_share;
  d.mean_slope = kept_slope;
  const double log_p_tail = student.off.lse - student.lse;
  const double p_tail = exp(log_p_tail);
  const bool forward = args.divergence == kForwardKl || args.divergence == kSoftCe;
  const double log_q_tail = teacher.norm.log_q_tail;
  // The forward slopes add up to exactly -1, or to 0 in a teacher's row of nothing but -inf; rounding their sum would
  // drown a small (1 - a) - (1 - P).
  const bool is_empty = teacher.on.log() == -infinity<double>() && log_q_tail == -infinity<double>();
  const double forward_slope = is_empty ? 0 : -1;
  if (args.rest == kGhost) {
    double slope = tail.slope;
    if (args.tail_weight != 0) d.value += args.tail_weight * tail.share;
    d.mean_slope = forward ? forward_slope : d.mean_slope + slope;
    if (args.tail_weight != 1) {
      const double change = (args.tail_weight - 1) * (slope + missing_slope(args, teacher.gate) * p_tail);
      slope += change;
      d.mean_slope += change;
    }
    d.off_factor = slope - p_tail * d.mean_slope;
  } else if (args.rest == kZeroLogit) {
    const double unkept = double(args.vocab_size - kept);
    const double each = exp(-q_norm);
    const double entropy = args.divergence == kForwardKl ? -unkept * q_norm : 0;
    // An outcome of the mass 0 has no share, whatever the student gives it.
    if (unkept > 0 && each != 0)
      d.value += each * (entropy - (student.off.z / args.temperature - unkept * student.lse));
    d.mean_slope = forward_slope;
    d.off_factor = -p_tail * d.mean_slope;
    d.off_constant = -each;
  } else if (args.rest != kRenormBoth) {
    d.off_factor = -p_tail * d.mean_slope;
  }
  return d;
}

// Computes the columns of the statistics that every call has. Returns what the gradient needs, which is nothing of the
// divergence where its weight is 0, even where it is infinite.
template <class A>
SK_INLINE Measures measures_of(const SlimLossArgs& args, int64_t n, const StudentSums& student,
                               const TeacherSums& teacher, const DivergenceSums& d, Stats* stats) {
  const bool has_teacher = args.ids != nullptr;
  const double smoothing = args.label_smoothing;
  double ce = -student.log_s_y;
  if (smoothing > 0) ce = (1 - smoothing) * ce + smoothing * (student.lse_one - student.sum_z / args.vocab_size);
  double loss = args.ce_weight == 0 ? 0 : args.ce_weight * ce;
  Measures m;
  double teacher_mass = 0, student_mass = 0;
  if (has_teacher) {
    m.w = weigh<A>(n, student.log_s_y, teacher.log_t_y, args);
    m.d = d;
    m.kd = m.d.value * args.temperature * args.temperature;
    teacher_mass = exp(teacher.log_mass());
    student_mass = exp(student.on.log() - student.lse);
    if (args.kd_weight != 0) loss += args.kd_weight * m.w.value * m.kd;
  }
  const double lse_one = student.lse_one;
  if (args.z_loss_weight != 0) loss += args.z_loss_weight * lse_one * lse_one;
  const double w = has_teacher ? m.w.value : 0;
  const double columns[] = {loss, ce, m.kd, w, teacher_mass, student_mass, lse_one};
  for (int i = 0; i < 7; ++i) stats->columns[i] = columns[i];
  if (args.kd_weight == 0 && has_teacher) {
    m = {};
    m.w.value = 0;
  }
  return m;
}

// ---- Stage 4: gradient. By z it is softmax_scale * s + uniform + kd_scale * dD/d(z / T), plus label_slope at the
// label, all times row_scale.

template <class A>
SK_INLINE GradientNumbers<A> gradient_numbers(const SlimLossArgs& args, int64_t n, const StudentSums& student,
                                              const Measures& m, A level) {
  const OffSums& off = student.off;
  const bool two_temperatures = has_two_temperatures(args);
  const double lse_one = student.lse_one, smoothing = args.label_smoothing;
  const double through_weight = m.w.slope == 0 ? 0 : args.kd_weight * m.kd * m.w.slope;
  const double softmax_scale = args.ce_weight + 2 * args.z_loss_weight * lse_one - through_weight;
  const double label_slope = -args.ce_weight * (1 - smoothing) + through_weight;
  const double uniform = -args.ce_weight * smoothing / args.vocab_size;
  const double kd_scale = args.ids == nullptr ? 0 : args.kd_weight * m.w.value * args.temperature;
  const double row_scale = args.row_scale == nullptr ? 1 : double(static_cast<const A*>(args.row_scale)[n]);

  GradientNumbers<A> numbers;
  DenseGradient<A>& dense = numbers.dense;
  const bool off_is_empty = off.lse == -infinity<double>();
  double coefficient = kd_scale * m.d.off_factor;
  // At T = 1 both softmaxes are the same exponentials.
  if (!two_temperatures) coefficient += softmax_scale * exp(off.lse - lse_one);
  if (!off_is_empty) dense.off_scale = A(row_scale * coefficient / off.e);
  if (!off_is_empty && two_temperatures) {
    dense.one_scale = A(row_scale * softmax_scale * exp(double(level) - lse_one));
  }
  dense.constant = A(row_scale * (uniform + kd_scale * m.d.off_constant));
  numbers.kept.scale = A(row_scale * softmax_scale);
  numbers.kept.constant = A(row_scale * uniform);
  numbers.kept.mean_slope = A(m.d.mean_slope);
  numbers.kept.kd_scale = A(row_scale * kd_scale);
  numbers.at_label = row_scale * label_slope;
  return numbers;
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
