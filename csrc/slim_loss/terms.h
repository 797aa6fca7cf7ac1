// The terms of a row of slim_loss, independent of how the row is read: effective logits, divergences, the token weight.
// See row_math.h for what is defined before; a V is a vector of elements or one.
#pragma once

#include <float.h>

#include "args.h"
#include "row_math.h"

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

// Computes exp(x) - 1 - x for |x| < 1/2, where its terms would cancel, by a series.
template <class V>
SK_INLINE V exp_remainder(V x) {
  using A = ElementOf<V>;
  // x^2 / 2 * (1 + x / 3 * (1 + x / 4 * (1 + ...)))
  constexpr int kTerms = sizeof(A) == sizeof(float) ? 8 : 15;
  V series = V{} + A(1);
  for (int i = kTerms; i >= 3; --i) series = V{} + A(1) + x * A(1.0 / i) * series;
  return x * x * A(0.5) * series;
}

template <class V>
SK_INLINE auto is_small(V x) {
  using A = ElementOf<V>;
  return (x < V{} + A(0.5)) & (x > V{} - A(0.5));
}

// Computes a log(a / b) - a + b, which is at least 0, from log_ratio = log(a / b): a share of KL(a || b) whose outcomes
// sum to 1 on both sides. Near a = b its terms would cancel.
template <class V>
SK_INLINE V kl_share(V log_ratio, V a, V b) {
  const V near = a * exp_remainder(-log_ratio);
  const V far = a * log_ratio - a + b;
  const V share = select(is_small(log_ratio), near, far);
  return select(a == V{}, b, share);
}

// The mixture share * a + (1 - share) * b of two probabilities, and the normal number that stands for it where it is
// a denominator or within a log: one that is flushed to 0 would make a gradient infinite.
template <class V>
struct Mixture {
  using A = ElementOf<V>;
  V m, normal, log_m;

  template <class S>
  SK_DEVICE Mixture(V log_a, V log_b, V a, V b, S share) : m(a * A(share) + b * A(1 - share)) {
    const V least = V{} + (sizeof(A) == sizeof(float) ? A(FLT_MIN) : A(DBL_MIN));
    const auto is_tiny = m < least;
    normal = select(is_tiny, least, m);
    log_m = log(normal);
    // A part that counts may be no larger than this only where the other is negligible, and then m is that part.
    if (share > 1e-6 && share < 1 - 1e-6) return;
    const V log_of_a = log_a + A(log(share)), log_of_b = log_b + A(log1p(-share));
    log_m = select(is_tiny, select(log_of_a > log_of_b, log_of_a, log_of_b), log_m);
  }
};

// Computes an outcome's share of the alpha-beta divergence, and p * dD/dp. With x = log(q / p) and r = alpha + beta it
// is p^r / (alpha beta) times alpha / r (exp(r x) - 1 - r x) - (exp(alpha x) - 1 - alpha x).
template <class V, class S>
SK_INLINE void diverge_alpha_beta(S alpha, S beta, V log_q, V log_p, V* share, V* slope) {
  using A = ElementOf<V>;
  const S both = alpha + beta;
  const V log_ratio = log_q - log_p;
  const auto near = is_small(log_ratio * A(both));
  const V p_power = exp(log_p * A(both)), q_power = exp(log_q * A(both));
  const V product = exp(log_q * A(alpha) + log_p * A(beta));
  const V remainder = exp_remainder(log_ratio * A(alpha));
  const V near_share = p_power * (exp_remainder(log_ratio * A(both)) * A(alpha / both) - remainder);
  const V far_share = q_power * A(alpha / both) + p_power * A(beta / both) - product;
  *share = select(near, near_share, far_share) * A(1 / (alpha * beta));
  const V near_slope = -p_power * (remainder + log_ratio * A(alpha));
  *slope = select(near, near_slope, p_power - product) * A(1 / alpha);
}

// Computes an outcome's share of D, and slope = p * dD/dp, for vectors and for the ghost bucket's doubles. `gate` is
// the factor of the row's forward KL in "gated". The slopes of forward KL and skew KL are those of the divergence
// without - q + p, see `missing_slope`: where p sums to 1, this is the same gradient.
template <class V, class Args, class S>
SK_INLINE void diverge(const Args& args, S gate, V log_q, V log_p, V q, V p, V* share, V* slope) {
  using A = ElementOf<V>;
  const V zero = V{};
  switch (args.divergence) {
    case kForwardKl:
      *slope = -q;
      if (args.rest == kGhost || args.rest == kRenormBoth) {
        *share = kl_share(log_q - log_p, q, p);
      } else {
        *share = select(q == zero, zero, q * (log_q - log_p));
      }
      return;
    case kSoftCe:
      *share = select(q == zero, zero, -q * log_p);
      *slope = -q;
      return;
    case kReverseKl:
    case kGated: {
      // An outcome that the teacher excludes is skipped, because it would make D infinite.
      const auto excluded = log_q == zero - infinity<A>();
      *share = select(excluded, zero, kl_share(log_p - log_q, p, q));
      *slope = select((p == zero) | excluded, zero, p * (log_p - log_q));
      if (gate == 0) return;
      *share += kl_share(log_q - log_p, q, p) * A(gate);
      *slope -= q * A(gate);
      return;
    }
    case kJsd: {
      const auto [m, normal, log_m] = Mixture<V>(log_q, log_p, q, p, args.beta);
      *share = kl_share(log_q - log_m, q, m) * A(args.beta) + kl_share(log_p - log_m, p, m) * A(1 - args.beta);
      *slope = select(p == zero, zero, p * (log_p - log_m) * A(1 - args.beta));
      return;
    }
    case kSkewKl: {
      const auto [m, normal, log_m] = Mixture<V>(log_q, log_p, q, p, args.alpha);
      *share = kl_share(log_q - log_m, q, m);
      *slope = select((q == zero) | (p == zero), zero, p * (q / normal) * A(args.alpha - 1));
      return;
    }
    case kSkewReverseKl: {
      const auto [m, normal, log_m] = Mixture<V>(log_p, log_q, p, q, args.alpha);
      const auto excluded = log_m == zero - infinity<A>();
      *share = select(excluded, zero, kl_share(log_p - log_m, p, m));
      const V ratio = args.alpha == 0 ? zero : p / normal * A(args.alpha * (1 - args.alpha));
      *slope = select((p == zero) | excluded, zero, p * (log_p - log_m) + (q - p) * ratio);
      return;
    }
    case kTvd: {
      const V difference = q - p;
      *share = select(difference < zero, -difference, difference) * A(0.5);
      *slope = select(difference == zero, zero, select(difference < zero, p * A(0.5), p * A(-0.5)));
      return;
    }
    default:
      diverge_alpha_beta(args.alpha, args.beta, log_q, log_p, share, slope);
      return;
  }
}

// The factor c of the slopes c * p that `diverge` leaves out.
SK_INLINE double missing_slope(const SlimLossArgs& args, double gate) {
  switch (args.divergence) {
    case kForwardKl:
    case kSoftCe:
      return 1;
    case kSkewKl:
      return 1 - args.alpha;
    case kGated:
      return gate;
    default:
      return 0;
  }
}

// The token weight w.
struct TokenWeight {
  double value = 1;
  double slope = 0;  // d value / d log s_y, 0 when detached
};

template <class A>
SK_DEVICE TokenWeight weigh(int64_t n, double log_s_y, double log_t_y, const SlimLossArgs& args) {
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
  const double ratio = exp(log_ratio > 30 ? 30 : log_ratio);
  w.value = -expm1(-ratio);
  if (!args.detach_weight && log_ratio <= 30) w.slope = -sign * ratio * exp(-ratio);
  return w;
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
