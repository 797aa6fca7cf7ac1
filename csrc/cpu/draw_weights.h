// The weights of draws by inverse CDF: 2^-t in fixed point, the same bits on every device.
//
// The definition is that of draw_weights and draw_points in reference_sampling.py. All arithmetic is in integers but
// for a difference, a product and a conversion, which no compiler can fuse or reorder.
#pragma once

#include "gumbel.h"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

constexpr int kFractionBits = 25;
// The coefficients of 2^-x, alternately added and subtracted, times 2^31.
constexpr uint32_t kPowerOfHalf[] = {2147483648u, 1488521986u, 515877902u, 119165493u, 20571132u, 2737501u, 234126u};

// The rule that turns the logits of a row into weights.
template <class A>
struct Weighing {
  A top;          // the largest logit; 0 if logits of +inf share the mass
  A rate;         // 2^25 / (T ln 2)
  bool infinite;  // only logits of +inf have weight
  int shift;      // the sum of 2^31 << shift over V ids is at most 2^62
};

// Returns the rule for a row whose largest logit is `top`.
template <class A>
Weighing<A> weighing_of(A top, bool infinite, double temperature, int64_t vocab_size) {
  double rate = (1 << kFractionBits) * 0x1.71547652b82fep+0 / temperature;
  rate = rate < 0x1p-100 ? 0x1p-100 : rate > 0x1p124 ? 0x1p124 : rate;
  int shift = 31;
  for (int64_t last = vocab_size - 1; last > 0; last >>= 1) --shift;
  return {infinite ? A(0) : top, A(rate), infinite, shift};
}

// Returns t with kFractionBits bits of fraction, at most 63.
template <class A, class V>
SK_INLINE V scaled_falls(V z, const Weighing<A>& weighing) {
  constexpr A kMost = A(63ll << kFractionBits);
  if (weighing.infinite) z = select(z == infinity<A>(), V{}, V{} - infinity<A>());
  const V fall = (weighing.top - z) * weighing.rate;
  return min(fall, V{} + kMost);
}

SK_INLINE VecU multiply_high(VecU a, VecU b) {
#if defined(__AVX512F__)
  const __m512i x = bitcast<__m512i>(a), y = bitcast<__m512i>(b);
  const __m512i even = _mm512_mul_epu32(x, y);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), _mm512_srli_epi64(y, 32));
  return bitcast<VecU>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd));
#else
  return by_part<VecU>([&](int i) SK_INLINED { return products_of(a.part[i], b.part[i]).high; });
#endif
}

struct Weights {
  VecW low, high;  // of the first and the last 8 of 16 ids
};

SK_INLINE Weights weights_of_falls(VecI falls, int shift) {
  const VecU fraction = bitcast<VecU>(falls) << (32 - kFractionBits);
  VecU power = VecU{} + kPowerOfHalf[6];
#pragma GCC unroll 6
  for (int k = 5; k >= 0; --k) power = kPowerOfHalf[k] - multiply_high(fraction, power);
  const Halves<HalfU> powers = halves_of<HalfU>(power);
  const Halves<HalfU> exponents = halves_of<HalfU>(bitcast<VecU>(falls) >> kFractionBits);
  return {(convert<VecW>(powers.low) << shift) >> convert<VecW>(exponents.low),
          (convert<VecW>(powers.high) << shift) >> convert<VecW>(exponents.high)};
}

// Returns the weights of 16 ids; those at or after `count` have none.
template <class X>
SK_INLINE Weights weights_of(const X* z, int64_t count, const Weighing<float>& weighing) {
  const VecF logits = count >= 16 ? load(z) : load_part(z, count, -infinity<float>());
  return weights_of_falls(convert<VecI>(scaled_falls(logits, weighing)), weighing.shift);
}

SK_INLINE Weights weights_of(const double* z, int64_t count, const Weighing<double>& weighing) {
  HalfI falls[2];
  for (int half = 0; half < 2; ++half) {
    const int64_t left = count - 8 * half;
    const VecD logits =
        left >= 8 ? load(z + 8 * half) : load_part(z + 8 * half, left < 0 ? 0 : left, -infinity<double>());
    falls[half] = convert<HalfI>(scaled_falls(logits, weighing));
  }
  return weights_of_falls(load_raw<VecI>(falls), weighing.shift);
}

// Computes the points of all draws: floor(u total / 2^62), u being 62 bits of Philox.
inline void draw_points(const NoiseKey& key, int64_t rounds, uint64_t total, uint64_t* points) {
  for (int64_t pair = 0; 2 * pair < rounds; ++pair) {
    uint32_t words[4] = {uint32_t(pair), 0xFFFFFFFEu, key.position[0], key.position[1]};
    philox(key, words);
    for (int64_t draw = 2 * pair; draw < 2 * pair + 2 && draw < rounds; ++draw) {
      const uint32_t* of_draw = words + 2 * (draw % 2);
      const uint64_t uniform = uint64_t(of_draw[1] >> 1) << 31 | of_draw[0] >> 1;
      points[draw] = uint64_t((unsigned __int128)uniform * total >> 62);
    }
  }
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
