// The pieces of a row of slim_loss that do not depend on how the row is read: the divergences, the token's weight, the
// teacher's logits.
#pragma once

#include "dispatch.h"
#include "sparse_softmax.inl"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// logits -> effective logits, softcap * tanh(logit_scale * x / softcap).
template <class V, class Args>
SK_INLINE V transformed(V x, const Args& args) {
  using A = ElementOf<V>;
  x *= A(args.logit_scale);
  return args.softcap > 0 ? tanh(x * A(1 / args.softcap)) * A(args.softcap) : x;
}

// d effective / d logits, from the effective logit.
template <class V, class Args>
SK_INLINE V transform_slope(V z, const Args& args) {
  using A = ElementOf<V>;
  if (args.softcap <= 0) return V{} + A(args.logit_scale);  // also where z is -inf
  const V capped = z * A(1 / args.softcap);
  return (V{} + A(1) - capped * capped) * A(args.logit_scale);
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

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
