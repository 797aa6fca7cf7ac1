// Exponentials and logarithms on vectors, and the sums of exponentials over a row that a softmax needs.
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
  x = tiny ? VecF{} + kLeastNormalExp : x;
  x = x > 89.0f ? VecF{} + 89.0f : x;
  const VecF magic = VecF{} + 0x1.8p23f;
  const VecF n = (x * 1.44269504f + magic) - magic;
  const VecF r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // Cody-Waite, as fused multiply-add may be missing
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;             // Cephes expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n is split into two factors, because n can be above the exponent of the largest number.
  const VecI whole = __builtin_convertvector(n, VecI);
  const VecI half = whole >> 1;
  const VecF low = bitcast<VecF>((half + 127) << 23);
  const VecF high = bitcast<VecF>((whole - half + 127) << 23);
  return bitcast<VecF>(bitcast<VecI>((p * low) * high) & ~tiny);
}
#endif

SK_INLINE VecD exp(VecD x) {
  for (int lane = 0; lane < 8; ++lane) x[lane] = x[lane] < kLeastNormalExpDouble ? 0 : __builtin_exp(x[lane]);
  return x;
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
  return magnitude < 0.625f ? small : bitcast<VecF>(bitcast<VecU>(large) | sign);
}

SK_INLINE VecD tanh(VecD x) {
  for (int lane = 0; lane < 8; ++lane) x[lane] = __builtin_tanh(x[lane]);
  return x;
}

// log of a normal number x > 0; anything else gives an arbitrary number that is finite. The error is below two units in
// the last place. Without a division, which would take longer than the polynomial.
SK_INLINE VecF log(VecF x) {
  const VecI bits = bitcast<VecI>(x);
  const VecI exponent = (bits - 0x3f3504f3) >> 23;  // of sqrt(1/2), so that the significand is within a factor of it
  const VecF f = bitcast<VecF>(bits - (exponent << 23)) - 1.0f;
  const VecF k = __builtin_convertvector(exponent, VecF);
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
  for (int lane = 0; lane < 8; ++lane) x[lane] = __builtin_log(x[lane]);
  return x;
}

SK_INLINE double log(double x) { return __builtin_log(x); }

// log(1 + x) for x in [0, 1], the range that log_add_exp needs.
SK_INLINE VecF log1p_unit(VecF x) {
  const VecF y = x + 1.0f;
  const VecF carry = x - (y - 1.0f);  // rounding error of the addition
  const VecI upper = VecI(y > 1.41421356f);
  const VecF m = upper ? y * 0.5f : y;
  const VecF f = m - 1.0f;
  const VecF s = f / (f + 2.0f);
  const VecF z = s * s;
  const VecF w = z * z;  // musl logf
  const VecF r = z * (w * 0.28498786688f + 0.66666662693f) + w * (w * 0.24279078841f + 0.40000972152f);
  const VecF half_square = f * f * 0.5f;
  const VecF log_m = s * (half_square + r) - half_square + f;
  return log_m + (upper ? VecF{} + 0.69314718f : VecF{}) + carry / y;
}

SK_INLINE VecD log1p_unit(VecD x) {
  for (int lane = 0; lane < 8; ++lane) x[lane] = __builtin_log1p(x[lane]);
  return x;
}

SK_INLINE double log1p_unit(double x) { return __builtin_log1p(x); }

// log(exp(a) + exp(b)); -inf stands for an absent term.
template <class V>
SK_INLINE V log_add_exp(V a, V b) {
  const V high = a > b ? a : b;
  const V low = a > b ? b : a;
  const V sum = high + log1p_unit(exp(low - high));
  return low == V{} - infinity<double>() ? high : sum;
}

// log(1 - exp(x)) for x <= 0; x >= 0, which rounding can produce, gives -inf.
SK_INLINE double log1m_exp(double x) {
  if (x >= 0) return -infinity<double>();
  return x > -0.69314718055994531 ? __builtin_log(-__builtin_expm1(x)) : __builtin_log1p(-__builtin_exp(x));
}

constexpr int64_t kBlock = 1024;  // elements that are summed in float32 lanes and fit into the first-level cache

// Sums an array that is padded to whole vectors.
template <class A>
SK_INLINE double sum_of(const A* x, int64_t count) {
  constexpr int kWidth = Lanes<A>::kWidth;
  typename Lanes<A>::Vec sums[4] = {};  // independent, so that additions overlap
  int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) sums[j] += load(x + i + j * kWidth);
  }
  for (; i < count; i += kWidth) sums[0] += load(x + i);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class A>
SK_INLINE A max_of(const A* x, int64_t count) {
  typename Lanes<A>::Vec best = {};
  best -= infinity<A>();
  for (int64_t i = 0; i < count; i += Lanes<A>::kWidth) best = max(best, load(x + i));
  return max_lanes(best);
}

// The sum of exponentials relative to a level.
struct ExpSum {
  double level = 0;
  double sum = 0;

  double log() const { return sum == 0 ? -infinity<double>() : level + __builtin_log(sum); }
  // Returns the factor that turns the exponentials into exp(x - norm).
  double scale(double norm) const { return sum == 0 ? 0 : __builtin_exp(level - norm); }
};

// Writes exp(x / T - level), with the largest x / T as the level, of an array padded with -inf to the vector width.
template <class A>
SK_INLINE ExpSum exponentials(const A* x, int64_t count, double inv_temperature, A* out) {
  const A best = max_of(x, count);
  const A shift = best == -infinity<A>() ? A(0) : best;
  ExpSum total;
  total.level = double(shift) * inv_temperature;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = count - begin < kBlock ? count : begin + kBlock;
    typename Lanes<A>::Vec sum = {};
    for (int64_t i = begin; i < end; i += Lanes<A>::kWidth) {
      const auto power = exp((load(x + i) - shift) * A(inv_temperature));
      store(out + i, power);
      sum += power;
    }
    total.sum += sum_lanes(sum);
  }
  return total;
}

// Returns sum(exp((x - level) * inv_temperature)) over a block that need not be padded.
template <class X, class A = typename Acc<X>::type>
SK_INLINE double sum_exp(const X* x, int64_t count, A level, A inv_temperature) {
  constexpr int kWidth = Lanes<A>::kWidth;
  typename Lanes<A>::Vec sum = {};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) sum += exp((load(x + i) - level) * inv_temperature);
  if (i < count) sum += exp((load_part(x + i, count - i, -infinity<A>()) - level) * inv_temperature);
  return sum_lanes(sum);
}

// The largest of the elements that were added; NaN if there was one.
template <class A>
struct LargestOf {
  using Vec = typename Lanes<A>::Vec;
  Vec best = Vec{} - infinity<A>();
  Vec nan = {};  // 0, or NaN in lanes that have seen one

  void add(Vec v) {
    best = max(v, best);
    nan = v != v ? v : nan;
  }
  template <class X>
  void add(const X* x, int64_t count) {
    int64_t i = 0;
    for (; i + Lanes<A>::kWidth <= count; i += Lanes<A>::kWidth) add(load(x + i));
    if (i < count) add(load_part(x + i, count - i, -infinity<A>()));
  }
  A value() const { return A(sum_lanes(nan)) + max_lanes(best); }
};

// Returns whether a sum of exponentials relative to a guessed level did not overflow; false for NaN. The level is at
// most the row's maximum, so nothing significant can underflow.
constexpr bool is_sound(double sum) { return sum < 1e25; }

// Returns log(sum(exp(x * inv_temperature))) of a row. Uses the sum relative to a guessed level if that is sound, else
// reads the row again.
template <class X, class A>
double log_sum_exp_of_row(const X* row, int64_t count, double inv_temperature, A level, double sum) {
  if (is_sound(sum)) return double(level) * inv_temperature + __builtin_log(sum);
  LargestOf<A> largest;
  largest.add(row, count);
  const A best = largest.value();
  if (best != best || best == infinity<A>() || best == -infinity<A>()) return best;
  sum = 0;
  for (int64_t i = 0; i < count; i += kBlock) {
    sum += sum_exp(row + i, count - i < kBlock ? count - i : kBlock, best, A(inv_temperature));
  }
  return double(best) * inv_temperature + __builtin_log(sum);
}

// Returns the maximum of a few evenly spaced vectors of the row; of more of them as long as they are all -inf, as in a
// masked vocabulary. NaN may be ignored.
template <class X, class A = typename Acc<X>::type>
SK_INLINE A sampled_max(const X* row, int64_t count) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const int64_t vectors = count / kWidth;
  for (int64_t samples = 8;; samples *= 8) {  // each is a cache miss
    samples = samples < vectors ? samples : vectors;
    typename Lanes<A>::Vec best = {};
    best -= infinity<A>();
    for (int64_t i = 0; i < samples; ++i) best = max(best, load(row + vectors * i / samples * kWidth));
    const A found = max_lanes(best);
    if (found != -infinity<A>()) return found;
    if (samples == vectors) break;
  }
  const int64_t rest = count % kWidth;
  return rest == 0 ? -infinity<A>() : max_lanes(load_part(row + count - rest, rest, -infinity<A>()));
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
