// The terms of a row of slim_loss, independent of how the row is read: effective logits, divergences, the token weight,
// the teacher's logits.
#pragma once

#include "dispatch.h"
#include "exponentials.h"
#include "sparse_softmax.inl"

namespace slimkernels {
namespace SK_ISA {
namespace {

// Turns logits x into effective logits z = softcap * tanh(logit_scale * x / softcap).
template <class V, class Args>
SK_INLINE V transformed(V x, const Args& args) {
  using A = ElementOf<V>;
  x *= A(args.logit_scale);
  return args.softcap > 0 ? tanh(x * A(1 / args.softcap)) * A(args.softcap) : x;
}

// The derivative of z by x, from z. Without a softcap it does not read z, which may be -inf.
template <class V, class Args>
SK_INLINE V transform_slope(V z, const Args& args) {
  using A = ElementOf<V>;
  if (args.softcap <= 0) return V{} + A(args.logit_scale);
  const V capped = z * A(1 / args.softcap);
  return (V{} + A(1) - capped * capped) * A(args.logit_scale);
}

// Computes a log(a / b) - a + b, which is at least 0, from log_ratio = log(a / b): a share of KL(a || b) whose outcomes
// sum to 1 on both sides. Near a = b its terms would cancel, and a series takes their place.
template <class V>
SK_INLINE V kl_share(V log_ratio, V a, V b) {
  using A = ElementOf<V>;
  const V zero = V{};
  // exp(-x) - 1 + x = x^2 / 2 * (1 - x / 3 * (1 - x / 4 * (1 - ...))). The terms suffice for |x| < 1/2.
  constexpr int kTerms = sizeof(A) == sizeof(float) ? 8 : 15;
  V series = zero + A(1);
  for (int i = kTerms; i >= 3; --i) series = zero + A(1) - log_ratio * A(1.0 / i) * series;
  const V near = a * log_ratio * log_ratio * A(0.5) * series;
  const V far = a * log_ratio - a + b;
  const V share = (log_ratio < zero + A(0.5)) & (log_ratio > zero - A(0.5)) ? near : far;
  return a == zero ? b : share;
}

// Computes an outcome's share of D, and slope = p * dD/dp, for vectors and for the ghost bucket's doubles. The slopes
// of forward KL and skew KL are those of the divergence without - q + p: where p sums to 1, this is the same gradient.
template <class V>
SK_INLINE void diverge(const SlimLossArgs& args, V log_q, V log_p, V q, V p, V* share, V* slope) {
  using A = ElementOf<V>;
  const V zero = V{};
  switch (args.divergence) {
    case kForwardKl:
      *slope = -q;
      if (args.rest == kGhost || args.rest == kRenormBoth) {
        *share = kl_share(log_q - log_p, q, p);
      } else {
        *share = q == zero ? zero : q * (log_q - log_p);
      }
      return;
    case kSoftCe:
      *share = q == zero ? zero : -q * log_p;
      *slope = -q;
      return;
    case kReverseKl: {
      // An outcome that the teacher excludes is skipped, because it would make D infinite.
      const auto excluded = log_q == zero - infinity<A>();
      *share = excluded ? zero : kl_share(log_p - log_q, p, q);
      *slope = (p == zero) | excluded ? zero : p * (log_p - log_q);
      return;
    }
    case kJsd: {
      const V log_m = log_add_exp(log_q + A(__builtin_log(args.beta)), log_p + A(__builtin_log1p(-args.beta)));
      const V m = q * A(args.beta) + p * A(1 - args.beta);
      *share = kl_share(log_q - log_m, q, m) * A(args.beta) + kl_share(log_p - log_m, p, m) * A(1 - args.beta);
      *slope = p == zero ? zero : p * (log_p - log_m) * A(1 - args.beta);
      return;
    }
    default: {
      const V log_m = log_add_exp(log_q + A(__builtin_log(args.alpha)), log_p + A(__builtin_log1p(-args.alpha)));
      *share = kl_share(log_q - log_m, q, q * A(args.alpha) + p * A(1 - args.alpha));
      const V both = exp(log_p + log_q - log_m) * A(args.alpha - 1);
      *slope = (q == zero) | (p == zero) ? zero : both;
      return;
    }
  }
}

// The token weight w.
struct TokenWeight {
  double value = 1;
  double slope = 0;  // d value / d log s_y, 0 when detached
};

template <class A>
TokenWeight weigh(int64_t n, double log_s_y, double log_t_y, const SlimLossArgs& args) {
  TokenWeight w;
  if (args.weighting == kWeightOne) return w;
  if (args.weighting == kWeightTensor) {
    w.value = static_cast<const A*>(args.token_weight)[n];
    return w;
  }
  const double sign = args.weighting == kTeacherOverStudent ? 1 : -1;
  // If the teacher's probability of the label is 0, the ratio ignores the student's, even at 0/0.
  const bool impossible = log_t_y == -infinity<double>();
  const double log_ratio = sign * (impossible ? log_t_y : log_t_y - log_s_y);
  const double ratio = __builtin_exp(log_ratio > 30 ? 30 : log_ratio);
  w.value = -__builtin_expm1(-ratio);
  if (!args.detach_weight && log_ratio <= 30) w.slope = -sign * ratio * __builtin_exp(-ratio);
  return w;
}

// Writes the teacher's kept logits / T, from any dtype, padded with -inf.
template <class A>
void load_teacher(const SlimLossArgs& args, int64_t n, int64_t kept, A* out) {
  const double inv_temperature = 1 / args.temperature;
  const int64_t offset = n * args.top_k;
  with_element_type(args.teacher_dtype, [&](auto element) {
    load_scaled(static_cast<const decltype(element)*>(args.teacher_logits) + offset, kept, inv_temperature, out);
  });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
