// Exponentials and logarithms on vectors, and on float64 under the same names.
#pragma once

#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// The least arguments whose exponentials are normal numbers. Below them exp is exactly 0, because many processors take
// a hundred cycles and more for an operation that makes or reads a denormal, and softmax needs none of them.
constexpr float kLeastNormalExp = -87.33654f;
constexpr double kLeastNormalExpDouble = -708.3964185322641;

// exp for x <= 88, which is enough for a softmax. NaN stays NaN; x < kLeastNormalExp, also -inf, gives 0. The relative
// error is below 2e-7 for x > -2 and grows with |x| to 4e-7 at -20, like the effect of rounding x itself to float32.
#if defined(__AVX512F__)
SK_INLINE VecF exp(VecF x) {
  // Not less than, so that NaN is included. The other lanes are masked and not clamped, because scaling them would
  // underflow.
  const __mmask16 normal = _mm512_cmp_ps_mask(bitcast<__m512>(x), _mm512_set1_ps(kLeastNormalExp), _CMP_NLT_UQ);
  const VecF n = bitcast<VecF>(
      _mm512_roundscale_ps(bitcast<__m512>(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  const VecF r = bitcast<VecF>(_mm512_fmsub_ps(bitcast<__m512>(x), _mm512_set1_ps(1.44269504f), bitcast<__m512>(n)));
  VecF p = r * 0x1.5bba14p-10f + 0x1.3cea88p-7f;  // minimax of (2^r - 1) / r on [-1/2, 1/2], relative to 2^r
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.0f;
  return bitcast<VecF>(_mm512_maskz_scalef_ps(normal, bitcast<__m512>(p), bitcast<__m512>(n)));
}
#else
SK_INLINE VecF exp(VecF x) {
  const VecI tiny = x < kLeastNormalExp;  // false for NaN
  x = min(VecF{} + 89.0f, max(VecF{} + kLeastNormalExp, x));
  const VecF magic = VecF{} + 0x1.8p23f;
  const VecF n = (x * 1.44269504f + magic) - magic;
  const VecF r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // Cody-Waite, as fused multiply-add may be missing
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;             // Cephes expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n, which is a normal number up to 127; 128, above the promised range, gives infinity.
  const VecF power = bitcast<VecF>((convert<VecI>(n) + 127) << 23);
  return bitcast<VecF>(bitcast<VecI>(p * power) & ~tiny);
}
#endif

template <class F>
SK_INLINE VecD each_lane(VecD x, F f) {
  double lanes[8];
  store_raw(lanes, x);
  for (int lane = 0; lane < 8; ++lane) lanes[lane] = f(lanes[lane]);
  return load_raw<VecD>(lanes);
}

SK_INLINE VecD exp(VecD x) {
  return each_lane(x, [](double lane) { return lane < kLeastNormalExpDouble ? 0 : __builtin_exp(lane); });
}

SK_INLINE double exp(double x) { return __builtin_exp(x); }

// tanh with a relative error below 2e-7.
SK_INLINE VecF tanh(VecF x) {
  const VecF square = x * x;
  VecF p = square * -5.70498872745e-3f + 2.06390887954e-2f;  // Cephes tanhf, for |x| < 0.625
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const VecF small = p * square * x + x;
  const VecU sign = bitcast<VecU>(x) & 0x80000000u;
  const VecF magnitude = bitcast<VecF>(bitcast<VecU>(x) ^ sign);
  const VecF large = 1.0f - 2.0f / (exp(magnitude * 2.0f) + 1.0f);
  return select(magnitude < 0.625f, small, bitcast<VecF>(bitcast<VecU>(large) | sign));
}

SK_INLINE VecD tanh(VecD x) {
  return each_lane(x, [](double lane) { return __builtin_tanh(lane); });
}

// log of a normal number x > 0; anything else gives an arbitrary number that is finite. The error is below two units in
// the last place. Without a division, which would take longer than the polynomial.
SK_INLINE VecF log(VecF x) {
  const VecI bits = bitcast<VecI>(x);
  const VecI exponent = (bits - 0x3f3504f3) >> 23;  // of sqrt(1/2), so that the significand is within a factor of it
  const VecF f = bitcast<VecF>(bits - (exponent << 23)) - 1.0f;
  const VecF k = convert<VecF>(exponent);
  VecF p = f * 7.0376836292e-2f - 1.1514610310e-1f;  // Cephes logf
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const VecF square = f * f;
  return f * square * p + k * -2.12194440e-4f - square * 0.5f + f + k * 0.693359375f;
}

SK_INLINE VecD log(VecD x) {
  return each_lane(x, [](double lane) { return __builtin_log(lane); });
}

SK_INLINE double log(double x) { return __builtin_log(x); }

// log(1 + x) for x in [0, 1], the range that log_add_exp needs.
SK_INLINE VecF log1p_unit(VecF x) {
  const VecF y = x + 1.0f;
  const VecF carry = x - (y - 1.0f);  // rounding error of the addition
  const VecI upper = bitcast<VecI>(y > 1.41421356f);
  const VecF m = select(upper, y * 0.5f, y);
  const VecF f = m - 1.0f;
  const VecF s = f / (f + 2.0f);
  const VecF z = s * s;
  const VecF w = z * z;  // musl logf
  const VecF r = z * (w * 0.28498786688f + 0.66666662693f) + w * (w * 0.24279078841f + 0.40000972152f);
  const VecF half_square = f * f * 0.5f;
  const VecF log_m = s * (half_square + r) - half_square + f;
  return log_m + select(upper, VecF{} + 0.69314718f, VecF{}) + carry / y;
}

SK_INLINE VecD log1p_unit(VecD x) {
  return each_lane(x, [](double lane) { return __builtin_log1p(lane); });
}

SK_INLINE double log1p_unit(double x) { return __builtin_log1p(x); }

SK_INLINE double log1p(double x) { return __builtin_log1p(x); }
SK_INLINE double expm1(double x) { return __builtin_expm1(x); }

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
