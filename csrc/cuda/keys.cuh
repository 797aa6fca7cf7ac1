// Order-preserving keys of logits, for kernels that select.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace slimkernels {

template <class X>
constexpr typename X::Bits kMinusInfinity = X::kInfinity | ((typename X::Bits(~0u) >> 1) + 1);

// Returns a key that sorts like its logit: -0.0 equals 0.0, and NaN is the largest.
template <class X>
__device__ uint32_t order_key(typename X::Bits bits) {
  using Bits = typename X::Bits;
  constexpr uint32_t kAll = Bits(~0u), kSign = (kAll >> 1) + 1;
  const int32_t x = std::make_signed_t<Bits>(X::canonical(bits));
  return (uint32_t(x) ^ (uint32_t(x >> 31) | kSign)) & kAll;
}

// Returns the element with this key; NaN for keys below that of -inf, which no element has.
template <class X>
__device__ typename X::Bits bits_of_key(uint32_t key) {
  using Bits = typename X::Bits;
  constexpr uint32_t kSign = (Bits(~0u) >> 1) + 1;
  return Bits(key & kSign ? key ^ kSign : ~key);
}

template <class X>
__device__ float value_of_key(uint32_t key) {
  return X::widen(bits_of_key<X>(key));
}

}  // namespace slimkernels
