// Vectors for the CPU kernels, written once with GCC/Clang vector extensions and compiled per instruction set.
//
// A vector always has 64 bytes, so that sums are taken in the same order on every machine: one register with AVX-512,
// else several (see wide.h). Everything has internal linkage, because the same names are compiled for several
// instruction sets (see dispatch.h).
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dispatch.h"
#include "wide.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

#define SK_NOINLINE __attribute__((noinline))
#define SK_DEVICE

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// A vector, in the operators of GCC and Clang. Those of comparisons give masks, -1 or 0 in every lane.
#if defined(__AVX512F__)
template <class T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};
#else
template <class T, int lanes>
struct VectorOf {
  using type = Wide<T, lanes>;
};
#endif
using VecF = VectorOf<float, 16>::type;
using VecI = VectorOf<int32_t, 16>::type;
using VecU = VectorOf<uint32_t, 16>::type;
using VecH = VectorOf<uint16_t, 16>::type;
using VecD = VectorOf<double, 8>::type;
using VecL = VectorOf<int64_t, 8>::type;
using VecW = VectorOf<uint64_t, 8>::type;
// The types with as many lanes as a vector of 8-byte elements.
using HalfF = VectorOf<float, 8>::type;
using HalfI = VectorOf<int32_t, 8>::type;
using HalfU = VectorOf<uint32_t, 8>::type;

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

template <class Key>
struct KeyVec {
  using type = VecI;
};
template <>
struct KeyVec<int64_t> {
  using type = VecL;
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

template <class V>
constexpr bool kIsWide = false;
template <class T, int lanes>
constexpr bool kIsWide<Wide<T, lanes>> = true;

template <class To, class From>
SK_INLINE To bitcast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bitcast changes the type, not the size");
  if constexpr (kIsWide<To> && kIsWide<From>) {
    return by_part<To>([&](int i) SK_INLINED { return bitcast<typename To::Part>(from.part[i]); });
  } else {
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
  }
}

// Converts every lane.
template <class To, class From>
SK_INLINE To convert(From from) {
  if constexpr (kIsWide<To>) {
    return by_part<To>([&](int i) SK_INLINED { return __builtin_convertvector(from.part[i], typename To::Part); });
  } else {
    return __builtin_convertvector(from, To);
  }
}

// Returns `a` in the lanes of the mask and `b` in the others; also for scalars.
template <class M, class V>
SK_INLINE V select(M mask, V a, V b) {
  if constexpr (kIsWide<V>) {
    return by_part<V>([&](int i) SK_INLINED { return mask.part[i] ? a.part[i] : b.part[i]; });
  } else {
    return mask ? a : b;
  }
}

template <class V, class X>
SK_INLINE V load_raw(const X* p) {
  if constexpr (kIsWide<V>) {
    return by_part<V>([&](int i) SK_INLINED {
      return load_raw<typename V::Part>(reinterpret_cast<const char*>(p) + i * sizeof(typename V::Part));
    });
  } else {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class X, class V>
SK_INLINE void store_raw(X* p, const V& v) {
  if constexpr (kIsWide<V>) {
    char* to = reinterpret_cast<char*>(p);
    for (int i = 0; i < kParts; ++i) memcpy(to + i * sizeof(v.part[0]), &v.part[i], sizeof(v.part[0]));
  } else {
    memcpy(p, &v, sizeof(v));
  }
}

template <class Half>
struct Halves {
  Half low, high;
};

// Returns the first and the last lanes of a vector.
template <class Half, class V>
SK_INLINE Halves<Half> halves_of(const V& v) {
  if constexpr (kIsWide<V>) {
    struct Pair {
      typename Half::Part part[2];
    };
    const auto half_from = [&](int first) SK_INLINED {
      return by_part<Half>([&](int i) SK_INLINED { return bitcast<Pair>(v.part[first + i / 2]).part[i % 2]; });
    };
    return {half_from(0), half_from(kParts / 2)};
  } else {
    return bitcast<Halves<Half>>(v);
  }
}

// Returns first, first + 1, ...
template <class V, class T>
SK_INLINE V lanes_from(T first) {
  if constexpr (kIsWide<V>) {
    return by_part<V>([&](int i) SK_INLINED {
      constexpr int kLanes = V::kPartLanes;
      return lanes_from<typename V::Part>(T(first + i * kLanes));
    });
  } else {
    constexpr T kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static_assert(sizeof(V) <= sizeof(kLanes), "a vector has at most 16 lanes");
    return load_raw<V>(kLanes) + first;
  }
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
#elif defined(__AVX2__) && defined(__F16C__)
  return by_part<VecF>([&](int i) SK_INLINED { return _mm256_cvtph_ps(bitcast<__m128i>(half.part[i])); });
#else
  const VecU bits = convert<VecU>(half);
  // Raising the exponent by 112 with a multiplication also turns half denormals into normal floats.
  VecF magnitude = bitcast<VecF>((bits & 0x7fffu) << 13) * 0x1p112f;
  const VecU special = bitcast<VecU>((bits & 0x7c00u) == 0x7c00u);
  const VecU result = bitcast<VecU>(magnitude) | (special & 0x7f800000u) | ((bits & 0x8000u) << 16);
  return bitcast<VecF>(result);
#endif
}

SK_INLINE VecH float_to_half(VecF x) {
#if defined(__AVX512F__)
  return bitcast<VecH>(_mm512_cvtps_ph(bitcast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__) && defined(__F16C__)
  return by_part<VecH>([&](int i) SK_INLINED {
    return _mm256_cvtps_ph(bitcast<__m256>(x.part[i]), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  });
#else
  const VecU bits = bitcast<VecU>(x);
  const VecU sign = bits & 0x80000000u;
  const VecU magnitude = bits ^ sign;
  const VecU normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the last bit of a half denormal with that of the float, so the addition rounds to nearest even.
  const VecF half = VecF{} + 0.5f;
  const VecU denormal = bitcast<VecU>(bitcast<VecF>(magnitude) + half) - bitcast<VecU>(half);
  const VecU special = select(magnitude > 0x7f800000u, VecU{} + 0x7e00u, VecU{} + 0x7c00u);
  const VecU finite = select(magnitude < 0x38800000u, denormal, normal);
  const VecU result = select(magnitude >= 0x47800000u, special, finite);
  return convert<VecH>(result | (sign >> 16));
#endif
}

SK_INLINE VecF bf16_to_float(VecH raw) {
#if defined(__AVX512F__)
  return bitcast<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bitcast<__m256i>(raw)), 16));
#else
  return bitcast<VecF>(convert<VecU>(raw) << 16);
#endif
}

#if defined(__AVX512BF16__)
SK_INLINE VecH float_to_bf16(VecF x) { return bitcast<VecH>(_mm512_cvtneps_pbh(bitcast<__m512>(x))); }
#else
SK_INLINE VecH float_to_bf16(VecF x) {
  const VecU bits = bitcast<VecU>(x);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return convert<VecH>(select(x != x, VecU{} + 0x7fc0u, rounded));
}
#endif

SK_INLINE VecF load(const float* p) { return load_raw<VecF>(p); }
SK_INLINE VecD load(const double* p) { return load_raw<VecD>(p); }
SK_INLINE VecF load(const bf16* p) { return bf16_to_float(load_raw<VecH>(p)); }
SK_INLINE VecF load(const f16* p) { return half_to_float(load_raw<VecH>(p)); }

SK_INLINE void store(float* p, VecF v) { store_raw(p, v); }
SK_INLINE void store(double* p, VecD v) { store_raw(p, v); }
SK_INLINE void store(bf16* p, VecF v) { store_raw(p, float_to_bf16(v)); }
SK_INLINE void store(f16* p, VecF v) { store_raw(p, float_to_half(v)); }

// Returns a vector with `fill` in the lanes from `count` on.
template <class V, class A>
SK_INLINE V first_lanes_of(V v, int64_t count, A fill) {
  using Key = typename Lanes<A>::Key;
  using KeyVector = typename KeyVec<Key>::type;
  return select(lanes_from<KeyVector>(Key(0)) < Key(count), v, V{} + fill);
}

// Loads `count` elements; the other lanes are `fill`.
template <class X, class A = typename Acc<X>::type>
SK_INLINE typename Lanes<A>::Vec load_part(const X* p, int64_t count, A fill) {
  X padded[Lanes<A>::kWidth] = {};
  memcpy(padded, p, count * sizeof(X));
  return first_lanes_of(load(padded), count, fill);
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
SK_INLINE void store_exact(bf16* p, VecF v) { store_raw(p, convert<VecH>(bitcast<VecU>(v) >> 16)); }

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
SK_INLINE void store_one(f16* p, float value) { store_part(p, VecF(value), 1); }
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

// Returns the larger of two numbers, `b` if either is NaN.
template <class V>
SK_INLINE V max(V a, V b) {
  return select(a > b, a, b);
}

// Returns the smaller of two numbers, `b` if either is NaN.
template <class V>
SK_INLINE V min(V a, V b) {
  return select(a < b, a, b);
}

// GCC takes the selections apart if `a` or `b` is a constant.
#if defined(__SSE2__) && !defined(__AVX512F__)
SK_INLINE VecF max(VecF a, VecF b) {
  return by_part<VecF>([&](int i) SK_INLINED {
#if defined(__AVX2__)
    return _mm256_max_ps(bitcast<__m256>(a.part[i]), bitcast<__m256>(b.part[i]));
#else
    return _mm_max_ps(bitcast<__m128>(a.part[i]), bitcast<__m128>(b.part[i]));
#endif
  });
}
SK_INLINE VecF min(VecF a, VecF b) {
  return by_part<VecF>([&](int i) SK_INLINED {
#if defined(__AVX2__)
    return _mm256_min_ps(bitcast<__m256>(a.part[i]), bitcast<__m256>(b.part[i]));
#else
    return _mm_min_ps(bitcast<__m128>(a.part[i]), bitcast<__m128>(b.part[i]));
#endif
  });
}
#endif

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
