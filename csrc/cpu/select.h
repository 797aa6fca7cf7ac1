// Exact selection without a sort: order-preserving integer keys, counting bisection, ordered compaction.
#pragma once

#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// ---- Keys sort like logits: -0.0 equals 0.0, and NaN is the largest. No logit has the lowest key, which therefore
// pads arrays of keys to the vector width.

template <class A, class Key = typename Lanes<A>::Key>
SK_INLINE Key order_key(A value) {
  constexpr Key magnitude = ~(Key(1) << (sizeof(Key) * 8 - 1));
  if (value != value) return magnitude;
  const Key bits = bitcast<Key>(value + A(0));  // -0.0 + 0.0 is 0.0
  return bits < 0 ? bits ^ magnitude : bits;
}

SK_INLINE VecI order_keys(VecF v) {
  const VecI bits = bitcast<VecI>(v + 0.0f);
  const VecI key = bits ^ ((bits >> 31) & 0x7fffffff);
  return select(v != v, VecI{} + 0x7fffffff, key);
}

SK_INLINE VecL order_keys(VecD v) {
  const VecL bits = bitcast<VecL>(v + 0.0);
  const VecL key = bits ^ ((bits >> 63) & INT64_MAX);
  return select(v != v, VecL{} + INT64_MAX, key);
}

template <class A, class Key = typename Lanes<A>::Key>
SK_INLINE A value_of_key(Key key) {
  constexpr Key magnitude = ~(Key(1) << (sizeof(Key) * 8 - 1));
  return bitcast<A>(key < 0 ? key ^ magnitude : key);
}

template <class Key>
constexpr Key lowest_key() {
  return Key(1) << (sizeof(Key) * 8 - 1);
}

#if !defined(__AVX512F__)
// ---- Masks of one register, on machines with narrower vectors

using PartI = VecI::Part;
constexpr int kPartLanes = VecI::kPartLanes;

// The selected lanes of a register by the bits of its mask, in order, as indices of groups of bytes.
template <int bytes>
struct SelectedLanes {
  uint8_t index[1 << kPartLanes][kPartLanes * bytes];

  constexpr SelectedLanes() : index() {
    for (int mask = 0; mask < 1 << kPartLanes; ++mask) {
      int to = 0;
      for (int lane = 0; lane < kPartLanes; ++lane) {
        for (int byte = 0; (mask >> lane & 1) && byte < bytes; ++byte) index[mask][to++] = uint8_t(lane * bytes + byte);
      }
    }
  }
};

// Returns a mask with a bit per lane.
SK_INLINE uint32_t bits_of_part(PartI mask) {
#if defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(bitcast<__m256>(mask)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(bitcast<__m128>(mask)));
#else
  mask &= PartI{1, 2, 4, 8};
  return uint32_t((mask[0] | mask[1]) | (mask[2] | mask[3]));
#endif
}

SK_INLINE uint32_t bits_of(VecI mask) {
  uint32_t bits = 0;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) bits |= bits_of_part(mask.part[i]) << (i * kPartLanes);
  return bits;
}

// Writes the selected lanes, and anything behind them up to a whole register.
SK_INLINE void compress(uint32_t bits, PartI v, int32_t* out) {
#if defined(__AVX2__)
  static constexpr SelectedLanes<1> selected;
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(selected.index[bits])));
  store_raw(out, _mm256_permutevar8x32_epi32(bitcast<__m256i>(v), lanes));
#elif defined(__SSSE3__)
  static constexpr SelectedLanes<4> selected;
  store_raw(out, _mm_shuffle_epi8(bitcast<__m128i>(v), load_raw<__m128i>(selected.index[bits])));
#elif defined(__aarch64__)
  static constexpr SelectedLanes<4> selected;
  store_raw(out, vqtbl1q_u8(bitcast<uint8x16_t>(v), load_raw<uint8x16_t>(selected.index[bits])));
#else
  for (int lane = 0; lane < kPartLanes; ++lane) {
    *out = v[lane];
    out += bits >> lane & 1;
  }
#endif
}
#endif

// ---- Masks of lanes, and appending the selected lanes to an array. Appending writes whole vectors, so arrays need
// room for a vector behind their last entry. Arrays may be compacted in place.

#if defined(__AVX512F__)
using MaskF = __mmask16;
SK_INLINE MaskF not_below(VecF v, float threshold) {  // NaN is never below
  return _mm512_cmp_ps_mask(bitcast<__m512>(v), _mm512_set1_ps(threshold), _CMP_NLT_UQ);
}
SK_INLINE MaskF above(VecI keys, int32_t pivot) {
  return _mm512_cmpgt_epi32_mask(bitcast<__m512i>(keys), _mm512_set1_epi32(pivot));
}
SK_INLINE MaskF equal(VecI keys, int32_t pivot) {
  return _mm512_cmpeq_epi32_mask(bitcast<__m512i>(keys), _mm512_set1_epi32(pivot));
}
SK_INLINE int64_t count(MaskF mask) { return __builtin_popcount(mask); }
SK_INLINE MaskF first_lanes(MaskF mask, int64_t lanes) { return MaskF(_pdep_u32((1u << lanes) - 1, mask)); }
// Compresses in registers and stores whole vectors, because compress-to-memory is microcoded on some machines.
SK_INLINE void append(MaskF mask, VecI v, int32_t* out) {
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, bitcast<__m512i>(v)));
}
#else
using MaskF = VecI;
SK_INLINE MaskF not_below(VecF v, float threshold) { return ~(v < threshold); }
SK_INLINE MaskF above(VecI keys, int32_t pivot) { return keys > pivot; }
SK_INLINE MaskF equal(VecI keys, int32_t pivot) { return keys == pivot; }
SK_INLINE int64_t count(MaskF mask) { return __builtin_popcount(bits_of(mask)); }
SK_INLINE void append(MaskF mask, VecI v, int32_t* out) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const uint32_t bits = bits_of_part(mask.part[i]);
    compress(bits, v.part[i], out);
    out += __builtin_popcount(bits);
  }
}
#endif
SK_INLINE void append(MaskF mask, VecF v, float* out) {
  append(mask, bitcast<VecI>(v), reinterpret_cast<int32_t*>(out));
}

// Sets the selected lanes to 0.
SK_INLINE VecF without(MaskF mask, VecF v) {
#if defined(__AVX512F__)
  return bitcast<VecF>(_mm512_maskz_mov_ps(MaskF(~mask), bitcast<__m512>(v)));
#else
  return bitcast<VecF>(bitcast<VecI>(v) & ~mask);
#endif
}
SK_INLINE VecD without(VecL mask, VecD v) { return bitcast<VecD>(bitcast<VecL>(v) & ~mask); }

SK_INLINE VecL not_below(VecD v, double threshold) { return ~(v < threshold); }
SK_INLINE VecL above(VecL keys, int64_t pivot) { return keys > pivot; }
SK_INLINE VecL equal(VecL keys, int64_t pivot) { return keys == pivot; }
SK_INLINE int64_t count(VecL mask) { return int64_t(-sum_lanes(mask)); }
// Drops the selected lanes but for the first `lanes` of them.
template <class Mask>
SK_INLINE Mask first_lanes(Mask mask, int64_t lanes) {
  typename SignedOf<sizeof(mask[0])>::type each[sizeof(mask) / sizeof(mask[0])];
  store_raw(each, mask);
  for (auto& lane : each) {
    if (lanes == 0) lane = 0;
    lanes += lane;
  }
  return load_raw<Mask>(each);
}
template <class V, class T>
SK_INLINE void append(VecL mask, V v, T* out) {
  for (int lane = 0; lane < 8; ++lane) {
    *out = v[lane];
    out -= mask[lane];
  }
}

// Returns the number of keys that are at least `pivot`; the array is padded to whole vectors.
template <class Key>
SK_INLINE int64_t count_reaching(const Key* keys, int64_t length, Key pivot) {
  using Vec = typename KeyVec<Key>::type;
  constexpr int kWidth = sizeof(Vec) / sizeof(Key);
  Vec reaching = {};
  for (int64_t i = 0; i < length; i += kWidth) reaching -= bitcast<Vec>(load_raw<Vec>(keys + i) >= pivot);
  return int64_t(sum_lanes(reaching));
}

// Returns the rank-th largest of `keys` (rank 1 is the largest). `keys` is overwritten and must have room for padding
// to the vector width. The range from the smallest to the largest key is bisected. Each step counts the keys in the
// upper half; keys outside the range are dropped once they are half of the array. Well-spread keys cost a few passes,
// the worst input as many passes as a key has bits.
template <class Key>
Key select_key(Key* keys, int64_t length, int64_t rank) {
  using Vec = typename KeyVec<Key>::type;
  constexpr int kWidth = sizeof(Vec) / sizeof(Key);
  const auto pad = [&] {
    for (int64_t i = length; i % kWidth != 0; ++i) keys[i] = lowest_key<Key>();
  };
  pad();
  Vec low_lanes = {}, high_lanes = {};
  low_lanes += ~lowest_key<Key>();
  high_lanes += lowest_key<Key>();
  for (int64_t i = 0; i < length; i += kWidth) {
    const Vec key = load_raw<Vec>(keys + i);
    const Vec real = select(key == lowest_key<Key>(), low_lanes, key);
    low_lanes = select(real < low_lanes, real, low_lanes);
    high_lanes = select(key > high_lanes, key, high_lanes);
  }
  Key high = max_lanes(high_lanes), low = ~max_lanes(~low_lanes);
  int64_t inside = length;  // number of keys in the array that are in [low, high]
  int64_t over = 0;         // number of keys in the array above high
  while (low < high) {
    using Bits = typename UnsignedOf<Key>::type;
    const Key middle = Key(Bits(low) + (Bits(high) - Bits(low)) / 2 + 1);
    const int64_t upper = count_reaching(keys, length, middle) - over;
    if (upper >= rank) {
      low = middle;
      inside = upper;
    } else {
      high = middle - 1;
      rank -= upper;
      over += upper;
      inside -= upper;
    }
    if (2 * inside > length || length <= kWidth) continue;
    int64_t kept = 0;
    for (int64_t i = 0; i < length; i += kWidth) {
      const Vec key = load_raw<Vec>(keys + i);
      const auto in_range = above(key, Key(low - 1)) & ~above(key, high);
      append(in_range, key, keys + kept);
      kept += count(in_range);
    }
    length = kept;
    over = 0;
    pad();
  }
  return low;
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
