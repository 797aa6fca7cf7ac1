// Writes that bypass the caches, for outputs larger than the caches that are not read again soon.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kStreamBytes = 64;
SK_INLINE void stream_vector(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
constexpr int64_t kStreamBytes = 32;
SK_INLINE void stream_vector(char* to, const char* from) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__SSE2__)
constexpr int64_t kStreamBytes = 16;
SK_INLINE void stream_vector(char* to, const char* from) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#else
constexpr int64_t kStreamBytes = 16;
SK_INLINE void stream_vector(char* to, const char* from) { memcpy(to, from, kStreamBytes); }
#endif

// Copies like memcpy, but does not fetch the cache lines that it overwrites; any alignment.
SK_INLINE void stream(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t head = int64_t(-reinterpret_cast<uintptr_t>(out) & (kStreamBytes - 1));
  head = head < bytes ? head : bytes;
  memcpy(out, in, head);
  int64_t i = head;
  for (; i + kStreamBytes <= bytes; i += kStreamBytes) stream_vector(out + i, in + i);
  memcpy(out + i, in + i, bytes - i);
}

// Orders streamed writes before later writes, which may tell another thread that the data is ready.
SK_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
