// Vectors on machines whose registers have less than 64 bytes: several registers, one after the other.
//
// Compilers split the arithmetic of a longer vector well, but take comparisons and selections apart into single lanes.
#pragma once

#include <stdint.h>
#include <string.h>

#include "dispatch.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

#define SK_INLINE inline __attribute__((always_inline))
#define SK_INLINED __attribute__((always_inline))  // the same for a lambda

#if defined(__AVX2__)
constexpr int kParts = 2;
#else
constexpr int kParts = 4;
#endif

// Returns the vector whose i-th part is part(i). Written out, because only constant indices let the compiler keep the
// parts in registers.
template <class W, class Part>
SK_INLINE W by_part(Part part) {
  W whole;
  whole.part[0] = typename W::Part(part(0));
  whole.part[1] = typename W::Part(part(1));
  if constexpr (kParts == 4) {
    whole.part[2] = typename W::Part(part(2));
    whole.part[3] = typename W::Part(part(3));
  }
  return whole;
}

template <int bytes>
struct SignedOf {
  using type = int64_t;
};
template <>
struct SignedOf<4> {
  using type = int32_t;
};

// A vector of `lanes` numbers with the operators that the vectors of GCC and Clang have. A scalar stands for a vector
// with that number in every lane; a comparison gives a mask, -1 or 0 in every lane.
template <class T, int lanes>
struct Wide {
  static constexpr int kPartLanes = lanes / kParts;
  typedef T Part __attribute__((vector_size(sizeof(T) * kPartLanes)));
  using Mask = Wide<typename SignedOf<sizeof(T)>::type, lanes>;

  Part part[kParts];

  Wide() = default;
  SK_INLINE Wide(T value) {
    *this = by_part<Wide>([&](int) SK_INLINED { return value - Part{}; });  // x + 0 would lose the sign of -0
  }

  SK_INLINE T operator[](int64_t lane) const { return part[lane / kPartLanes][lane % kPartLanes]; }

  SK_INLINE Wide operator-() const {
    return by_part<Wide>([&](int i) SK_INLINED { return -part[i]; });
  }
  SK_INLINE Wide operator~() const {
    return by_part<Wide>([&](int i) SK_INLINED { return ~part[i]; });
  }

#define SK_OPERATOR(result, op)                                                       \
  friend SK_INLINE result operator op(const Wide& a, const Wide& b) {                 \
    return by_part<result>([&](int i) SK_INLINED { return a.part[i] op b.part[i]; }); \
  }
  SK_OPERATOR(Wide, +)
  SK_OPERATOR(Wide, -)
  SK_OPERATOR(Wide, *)
  SK_OPERATOR(Wide, /)
  SK_OPERATOR(Wide, &)
  SK_OPERATOR(Wide, |)
  SK_OPERATOR(Wide, ^)
  SK_OPERATOR(Wide, <<)
  SK_OPERATOR(Wide, >>)
  SK_OPERATOR(Mask, ==)
  SK_OPERATOR(Mask, !=)
  SK_OPERATOR(Mask, <)
  SK_OPERATOR(Mask, <=)
  SK_OPERATOR(Mask, >)
  SK_OPERATOR(Mask, >=)
#undef SK_OPERATOR

  SK_INLINE Wide& operator+=(const Wide& other) { return *this = *this + other; }
  SK_INLINE Wide& operator-=(const Wide& other) { return *this = *this - other; }
  SK_INLINE Wide& operator*=(const Wide& other) { return *this = *this * other; }
};

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
