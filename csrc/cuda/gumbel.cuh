// The Gumbel noise of the draws, as slimkernels/reference_sampling.py defines it.
#pragma once

#include <math.h>

#include "device.cuh"

namespace slimkernels {
namespace cuda {
namespace {

// The state that the noise of a row's ids depends on.
struct Noise {
  uint64_t seed, position;
};

// Sets `words` to Philox-4x32-10 of the counter (c0, c1, position) with the seed as its key.
__device__ inline void philox(uint32_t c0, uint32_t c1, uint64_t position, uint64_t seed, uint32_t (&words)[4]) {
  uint32_t c2 = uint32_t(position), c3 = uint32_t(position >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Computes the random bits of ids first_id to first_id + 3, where first_id is a multiple of 4.
__device__ inline void random_bits(uint32_t first_id, uint64_t position, uint64_t seed, uint32_t (&bits)[4]) {
  philox(first_id / 4, 0, position, seed, bits);
}

__device__ inline uint32_t random_bits_of(uint32_t id, uint64_t position, uint64_t seed) {
  uint32_t bits[4];
  random_bits(id, position, seed, bits);
  const uint32_t low = id & 1 ? bits[1] : bits[0], high = id & 1 ? bits[3] : bits[2];
  return id & 2 ? high : low;
}

// Returns the seed of row n from the one seed of a call.
__device__ inline uint64_t spread_seed(uint64_t seed, int64_t n) {
  if (n == 0) return seed;
  uint32_t words[4];
  philox(uint32_t(n), 0xFFFFFFFFu, 0, seed, words);
  return uint64_t(words[1]) << 32 | words[0];
}

__device__ inline double gumbel(uint32_t bits) {
  const double u = (double(bits) + 0.5) * 0x1p-32;
  return -::log(-::log1p(-u));
}

// The most by which noise_bound exceeds the noise / ln 2, within rounding: that of u just below 1.
constexpr float kLoosestBound = 4.6f;

// Returns an upper bound of gumbel(bits) / ln 2, because -log(1 - u) >= u, with u rounded down to 23 bits.
__device__ inline float noise_bound(uint32_t bits) {
  // The upper 23 bits become the fraction of a number in [1, 2), because a conversion would cost four times as much.
  const float u = __uint_as_float((bits >> 9) + 0x3f800000u) - 1.0f;
  return -log2_approx(u);
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
