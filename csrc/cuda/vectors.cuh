// Vectors of 16 bytes at any address.
#pragma once

#include "staging.cuh"

namespace slimkernels {

// Returns the 16 bytes that start `offset` bytes after the start of `low`, of which `high` is the continuation.
__device__ inline uint4 shifted(const uint4& low, const uint4& high, uint32_t offset) {
  uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (offset & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = words[i + 2];
  }
  if (offset & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = words[i + 1];
  }
  const uint32_t bits = offset % 4 * 8;
  return {__funnelshift_r(words[0], words[1], bits), __funnelshift_r(words[1], words[2], bits),
          __funnelshift_r(words[2], words[3], bits), __funnelshift_r(words[3], words[4], bits)};
}

}  // namespace slimkernels
