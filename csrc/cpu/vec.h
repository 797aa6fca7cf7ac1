// Vectors for the CPU kernels, written once with GCC/Clang vector extensions and compiled per instruction set.
//
// A vector always has 64 bytes; on narrower machines the compiler splits it. Everything has internal linkage, because
// the same names are compiled for several instruction sets (see dispatch.h).
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "dispatch.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

#define SK_INLINE inline __attribute__((always_inline))
#define SK_NOINLINE __attribute__((noinline))
#define SK_DEVICE

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float VecF __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));
typedef uint16_t VecH __attribute__((vector_size(32)));
typedef double VecD __attribute__((vector_size(64)));
typedef int64_t VecL __attribute__((vector_size(64)));

// The vector, the order-preserving key and the number of lanes of each accumulation type.
template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using Vec = VecF;
  using Key = int32_t;
  static constexpr int kWidth = 16;
};
template <>
struct Lanes<double> {
  using Vec = VecD;
  using Key = int64_t;
  static constexpr int kWidth = 8;
};

template <class T>
struct UnsignedOf {
  using type = uint64_t;
};
template <>
struct UnsignedOf<int32_t> {
  using type = uint32_t;
};

template <class V>
struct Element {
  using type = double;
};
template <>
struct Element<VecF> {
  using type = float;
};
template <class V>
using ElementOf = typename Element<V>::type;

// The accumulation type of logits of type X.
template <class X>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};

template <class To, class From>
SK_INLINE To bitcast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bitcast changes the type, not the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
constexpr T infinity() {
  return T(__builtin_inf());
}

constexpr double not_a_number() { return __builtin_nan(""); }

// Prefetches a cache line that will be needed soon; an address past the end of an array is harmless.
SK_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Prefetches for a sequential pass over a row. This saves a third of the time of a pass that computes as it reads, on
// one core of a Zen 5, whose hardware prefetcher does not run far enough ahead.
SK_INLINE void prefetch_ahead(const void* p) { prefetch(static_cast<const char*>(p) + 8192); }

// Calls run(element) with a value of the element type that `dtype` names, and returns its result.
template <class Run>
auto with_element_type(int dtype, Run run) {
  switch (dtype) {
    case kFloat32:
      return run(float());
    case kBFloat16:
      return run(bf16());
    case kFloat16:
      return run(f16());
    default:
      return run(double());
  }
}

// ---- Conversion between stored logits and the accumulation type

SK_INLINE VecF half_to_float(VecH half) {
#if defined(__AVX512F__)
  return bitcast<VecF>(_mm512_cvtph_ps(bitcast<__m256i>(half)));
#else
  const VecU bits = __builtin_convertvector(half, VecU);
  // Raising the exponent by 112 with a multiplication also turns half denormals into normal floats.
  VecF magnitude = bitcast<VecF>((bits & 0x7fffu) << 13) * 0x1p112f;
  const VecU special = VecU((bits & 0x7c00u) == 0x7c00u);
  const VecU result = bitcast<VecU>(magnitude) | (special & 0x7f800000u) | ((bits & 0x8000u) << 16);
  return bitcast<VecF>(result);
#endif
}

SK_INLINE VecH float_to_half(VecF x) {
#if defined(__AVX512F__)
  return bitcast<VecH>(_mm512_cvtps_ph(bitcast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  const VecU bits = bitcast<VecU>(x);
  const VecU sign = bits & 0x80000000u;
  const VecU magnitude = bits ^ sign;
  const VecU normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the last bit of a half denormal with that of the float, so the addition rounds to nearest even.
  const VecF half = VecF{} + 0.5f;
  const VecU denormal = bitcast<VecU>(bitcast<VecF>(magnitude) + half) - bitcast<VecU>(half);
  const VecU special = magnitude > 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  const VecU finite = magnitude < 0x38800000u ? denormal : normal;
  const VecU result = magnitude >= 0x47800000u ? special : finite;
  return __builtin_convertvector(result | (sign >> 16), VecH);
#endif
}

SK_INLINE VecF bf16_to_float(VecH raw) {
#if defined(__AVX512F__)
  return bitcast<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bitcast<__m256i>(raw)), 16));
#else
  return bitcast<VecF>(__builtin_convertvector(raw, VecU) << 16);
#endif
}

#if defined(__AVX512BF16__)
SK_INLINE VecH float_to_bf16(VecF x) { return bitcast<VecH>(_mm512_cvtneps_pbh(bitcast<__m512>(x))); }
#else
SK_INLINE VecH float_to_bf16(VecF x) {
  const VecU bits = bitcast<VecU>(x);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(x != x ? VecU{} + 0x7fc0u : rounded, VecH);
}
#endif

template <class V, class X>
SK_INLINE V load_raw(const X* p) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}

SK_INLINE VecF load(const float* p) { return load_raw<VecF>(p); }
SK_INLINE VecD load(const double* p) { return load_raw<VecD>(p); }
SK_INLINE VecF load(const bf16* p) { return bf16_to_float(load_raw<VecH>(p)); }
SK_INLINE VecF load(const f16* p) { return half_to_float(load_raw<VecH>(p)); }

SK_INLINE void store(float* p, VecF v) { memcpy(p, &v, sizeof(v)); }
SK_INLINE void store(double* p, VecD v) { memcpy(p, &v, sizeof(v)); }
SK_INLINE void store(bf16* p, VecF v) {
  const VecH raw = float_to_bf16(v);
  memcpy(p, &raw, sizeof(raw));
}
SK_INLINE void store(f16* p, VecF v) {
  const VecH raw = float_to_half(v);
  memcpy(p, &raw, sizeof(raw));
}

// Loads `count` elements; the other lanes are `fill`.
template <class X, class A = typename Acc<X>::type>
SK_INLINE typename Lanes<A>::Vec load_part(const X* p, int64_t count, A fill) {
  X padded[Lanes<A>::kWidth] = {};
  memcpy(padded, p, count * sizeof(X));
  typename Lanes<A>::Vec v = load(padded);
  for (int lane = 0; lane < Lanes<A>::kWidth; ++lane) v[lane] = lane < count ? v[lane] : fill;
  return v;
}

template <class X, class V>
SK_INLINE void store_part(X* p, V v, int64_t count) {
  X whole[Lanes<typename Acc<X>::type>::kWidth];
  store(whole, v);
  memcpy(p, whole, count * sizeof(X));
}

// Stores values that the type holds exactly, without rounding and without flushing denormals.
template <class X, class V>
SK_INLINE void store_exact(X* p, V v) {
  store(p, v);
}
SK_INLINE void store_exact(bf16* p, VecF v) {
  const VecH raw = __builtin_convertvector(bitcast<VecU>(v) >> 16, VecH);
  memcpy(p, &raw, sizeof(raw));
}

SK_INLINE float load_one(const float* p) { return *p; }
SK_INLINE double load_one(const double* p) { return *p; }
SK_INLINE float load_one(const bf16* p) { return bitcast<float>(uint32_t(p->bits) << 16); }
#if defined(__F16C__)
SK_INLINE float load_one(const f16* p) { return _cvtsh_ss(p->bits); }
#else
SK_INLINE float load_one(const f16* p) { return load_part(p, 1, 0.0f)[0]; }
#endif

SK_INLINE void store_one(float* p, float value) { *p = value; }
SK_INLINE void store_one(double* p, double value) { *p = value; }
#if defined(__F16C__)
SK_INLINE void store_one(f16* p, float value) { p->bits = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
SK_INLINE void store_one(f16* p, float value) { store_part(p, VecF{value}, 1); }
#endif
SK_INLINE void store_one(bf16* p, float value) {
  const uint32_t bits = bitcast<uint32_t>(value);
  p->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- Reductions, in a fixed order that is the same on every machine

template <class V>
SK_INLINE double sum_lanes(V v) {
  double sum = 0;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) sum += v[lane];
  return sum;
}

template <class V>
SK_INLINE V max(V a, V b) {
  return a > b ? a : b;  // returns `b` if either is NaN
}

template <class V>
SK_INLINE auto max_lanes(V v) {
  auto best = v[0];
  for (unsigned lane = 1; lane < sizeof(V) / sizeof(v[0]); ++lane) best = v[lane] > best ? v[lane] : best;
  return best;
}

constexpr int64_t kMaxWidth = 16;  // lanes of the widest vector

template <class A>
SK_INLINE int64_t padded(int64_t count) {
  return (count + Lanes<A>::kWidth - 1) / Lanes<A>::kWidth * Lanes<A>::kWidth;
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
