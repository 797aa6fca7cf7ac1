// Sums of exponentials and the teacher's normaliser, in code that the CPU and the CUDA kernels compile.
//
// The headers of this folder have no intrinsics. Whoever includes them defines before
//
//   SK_ISA              the namespace
//   SK_DEVICE           what marks a function for the device
//   SK_INLINE           the same for functions that must be inlined
//   exp, log, expm1, log1p, log1p_unit, tanh, select, infinity, not_a_number, ElementOf
//                       for the type of a scalar, double, and that of several or one element of a row
//
// in csrc/cpu/vec.h and vec_math.h, and in csrc/cuda/row_math.cuh.
#pragma once

#include "args.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// log(exp(a) + exp(b)); -inf stands for an absent term.
template <class V>
SK_INLINE V log_add_exp(V a, V b) {
  const V high = select(a > b, a, b);
  const V low = select(a > b, b, a);
  const V sum = high + log1p_unit(exp(low - high));
  return select(low == V{} - infinity<double>(), high, sum);
}

// log(1 - exp(x)) for x <= 0; x >= 0, which rounding can produce, gives -inf.
SK_INLINE double log1m_exp(double x) {
  if (x >= 0) return -infinity<double>();
  return x > -0.69314718055994531 ? log(-expm1(x)) : log1p(-exp(x));
}

// The sum of exponentials relative to a level.
struct ExpSum {
  double level = 0;
  double sum = 0;

  SK_DEVICE double log() const { return sum == 0 ? -infinity<double>() : level + SK_ISA::log(sum); }
  // Returns the factor that turns the exponentials into exp(x - norm).
  SK_DEVICE double scale(double norm) const { return sum == 0 ? 0 : exp(level - norm); }
};

// The teacher's distribution: log q = teacher_z - q_norm on S, with teacher_z = logit / T, and its mass off S.
struct TeacherNorm {
  double q_norm = 0;
  double log_q_tail = -infinity<double>();
};

// If everything that a normaliser sums is -inf, 0 takes its place so that -inf - (-inf) never occurs.
SK_INLINE double finite_norm(double norm) { return norm == -infinity<double>() ? 0 : norm; }

// Computes the distribution from the log-sum-exps of the logits on S, of the whole row, and of the row off S, which is
// NaN where it is not known.
SK_INLINE TeacherNorm teacher_norm(int rest, double lse_on, double lse, double rest_lse, int64_t kept,
                                   int64_t vocab_size) {
  TeacherNorm norm;
  switch (rest) {
    case kRenorm:
    case kRenormBoth:
      norm.q_norm = finite_norm(lse_on);
      return norm;
    case kZeroLogit: {
      const double unkept = double(vocab_size - kept);
      norm.q_norm = unkept > 0 ? log_add_exp(lse_on, log(unkept)) : finite_norm(lse_on);
      if (unkept > 0) norm.log_q_tail = log(unkept) - norm.q_norm;
      return norm;
    }
    case kGhost:
      if (rest_lse == rest_lse) {
        norm.q_norm = finite_norm(log_add_exp(lse_on, rest_lse));
        norm.log_q_tail = rest_lse - norm.q_norm;
        return norm;
      }
      norm.q_norm = finite_norm(lse);
      // A row that is kept whole has no mass off S, whatever the mass on S rounds to, and one without mass has none.
      if (kept < vocab_size && lse != -infinity<double>()) norm.log_q_tail = log1m_exp(lse_on - lse);
      return norm;
    default:
      norm.q_norm = finite_norm(lse);
      return norm;
  }
}

// A number of a row, NaN where no row has it.
template <class A>
SK_INLINE double known_or_nan(const void* values, int64_t n) {
  return values == nullptr ? not_a_number() : double(static_cast<const A*>(values)[n]);
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
