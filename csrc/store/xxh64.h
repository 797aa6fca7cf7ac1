#pragma once

#include <cstdint>
#include <cstring>

namespace slimkernels::store {

inline uint64_t load64(const void* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline uint32_t load32(const void* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u, kPrime2 = 0xC2B2AE3D27D4EB4Fu, kPrime3 = 0x165667B19E3779F9u,
                   kPrime4 = 0x85EBCA77C2B2AE63u, kPrime5 = 0x27D4EB2F165667C5u;

inline uint64_t rotl(uint64_t x, int r) { return (x << r) | (x >> (64 - r)); }
inline uint64_t xxh_round(uint64_t acc, uint64_t lane) { return rotl(acc + lane * kPrime2, 31) * kPrime1; }
inline uint64_t xxh_merge(uint64_t h, uint64_t acc) { return (h ^ xxh_round(0, acc)) * kPrime1 + kPrime4; }

// Computes XXH64 as published by its author; it is the checksum of the store's rows.
inline uint64_t xxh64(const void* data, uint64_t size, uint64_t seed) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint64_t left = size, h = seed + kPrime5;
  if (size >= 32) {
    uint64_t a = seed + kPrime1 + kPrime2, b = seed + kPrime2, c = seed, d = seed - kPrime1;
    for (; left >= 32; left -= 32, p += 32) {
      a = xxh_round(a, load64(p));
      b = xxh_round(b, load64(p + 8));
      c = xxh_round(c, load64(p + 16));
      d = xxh_round(d, load64(p + 24));
    }
    h = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
    h = xxh_merge(xxh_merge(xxh_merge(xxh_merge(h, a), b), c), d);
  }
  h += size;
  for (; left >= 8; left -= 8, p += 8) h = rotl(h ^ xxh_round(0, load64(p)), 27) * kPrime1 + kPrime4;
  for (; left >= 4; left -= 4, p += 4) h = rotl(h ^ (load32(p) * kPrime1), 23) * kPrime2 + kPrime3;
  for (; left > 0; --left, ++p) h = rotl(h ^ (*p * kPrime5), 11) * kPrime1;
  h = (h ^ (h >> 33)) * kPrime2;
  h = (h ^ (h >> 29)) * kPrime3;
  return h ^ (h >> 32);
}

}  // namespace slimkernels::store
