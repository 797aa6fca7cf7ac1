// The functions of csrc/cuda/staging.cuh on the emulated GPU. A copy is made when its thread waits for it, so that a
// result is wrong where nobody does.
#pragma once
#define SLIMKERNELS_STAGING

#include "device.h"

namespace emulator {

struct Copy {
  uint4* to;
  const uint4* from;
};
// The copies that a thread of the machine has started.
inline std::vector<std::vector<Copy>> copies;

}  // namespace emulator

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}

inline void __syncwarp() { emulator::of_warp(~0u, 7, 0); }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline uint32_t atomicOr(uint32_t* place, uint32_t bits) {
  const uint32_t before = *place;
  *place |= bits;
  return before;
}

namespace slimkernels {

inline std::vector<emulator::Copy>& copies_of_thread() {
  emulator::copies.resize(emulator::machine.fibers.size());
  return emulator::copies[emulator::machine.running - emulator::machine.fibers.data()];
}

using SharedVector = uint4*;
inline SharedVector shared_vector(uint4* vector) { return vector; }

inline void copy_async(uint4* to, const uint4* from) { copies_of_thread().push_back({to, from}); }

inline uint4 load_vector(const uint4* from) { return *from; }

inline void wait_for_copies() {
  for (const emulator::Copy& copy : copies_of_thread()) *copy.to = *copy.from;
  copies_of_thread().clear();
}

inline uint32_t narrow(Float32, float x) { return __float_as_uint(x); }

inline uint16_t narrow(BFloat16, float x) {
  const uint32_t bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t narrow(Float16, float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) return sign | uint16_t(std::lrint(magnitude * 0x1p24f));  // denormal, or the least normal
  const uint32_t bits = __float_as_uint(magnitude) - (112u << 23);
  return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

template <class X>
uint32_t narrow_pair(X, float low, float high) {
  return narrow(X(), low) | uint32_t(narrow(X(), high)) << 16;
}

}  // namespace slimkernels
