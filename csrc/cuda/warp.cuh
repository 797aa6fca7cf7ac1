// Functions of all lanes of a warp.
#pragma once

#include <string.h>

#include "device.cuh"

namespace slimkernels {

constexpr unsigned kAllLanes = ~0u;

__device__ inline double shuffle_xor(double value, int distance) {
  uint32_t halves[2];
  memcpy(halves, &value, 8);
  halves[0] = __shfl_xor_sync(kAllLanes, halves[0], distance);
  halves[1] = __shfl_xor_sync(kAllLanes, halves[1], distance);
  memcpy(&value, halves, 8);
  return value;
}

__device__ inline unsigned long long shuffle_up(unsigned long long value, int distance) {
  const uint32_t low = __shfl_up_sync(kAllLanes, uint32_t(value), distance);
  const unsigned long long high = __shfl_up_sync(kAllLanes, uint32_t(value >> 32), distance);
  return high << 32 | low;
}

// Returns the largest number of all lanes. A NaN whose sign is not set is the largest.
__device__ inline float max_of_warp(float x) {
  const uint32_t bits = __float_as_uint(x);
  // Keys sort like their numbers.
  const uint32_t key = __reduce_max_sync(kAllLanes, bits >> 31 ? ~bits : bits | 0x80000000u);
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

__device__ inline double sum_of_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += shuffle_xor(x, distance);
  return x;
}

// The sum must be below 2 ** 64.
__device__ inline unsigned long long sum_of_warp(unsigned long long value) {
  constexpr int kBits = 26;  // so that 32 of the parts fit into 32 bits
  constexpr uint32_t kMask = (1u << kBits) - 1;
  const unsigned long long low = __reduce_add_sync(kAllLanes, uint32_t(value) & kMask);
  const unsigned long long middle = __reduce_add_sync(kAllLanes, uint32_t(value >> kBits) & kMask);
  const unsigned long long high = __reduce_add_sync(kAllLanes, uint32_t(value >> 2 * kBits));
  return low + (middle << kBits) + (high << 2 * kBits);
}

// Returns the sum of the values of this lane and those before it.
__device__ inline uint32_t inclusive_sum_of_warp(uint32_t value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t lower = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}
__device__ inline unsigned long long inclusive_sum_of_warp(unsigned long long value, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long lower = shuffle_up(value, distance);
    if (lane >= distance) value += lower;
  }
  return value;
}

}  // namespace slimkernels
