// Elements of a row of slim_loss in vectors of 16 bytes: how they are copied, taken apart and put together.
#pragma once

#include "keys.cuh"
#include "slim_loss_memory.cuh"
#include "vectors.cuh"
#include "warp.cuh"

namespace slimkernels {
namespace cuda {
namespace {

template <class X>
constexpr int kPerVector = 16 / sizeof(typename X::Bits);

__device__ inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class X>
__device__ void unpack(const uint4& vector, typename X::Bits (&elements)[kPerVector<X>]) {
  using Bits = typename X::Bits;
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int j = 0; j < kPerVector<X>; ++j) {
    elements[j] = Bits(words[j * sizeof(Bits) / 4] >> (j * sizeof(Bits) % 4 * 8));
  }
}

template <class X>
__device__ uint4 pack(const typename X::Bits (&elements)[kPerVector<X>]) {
  using Bits = typename X::Bits;
  uint32_t words[4] = {};
#pragma unroll
  for (int j = 0; j < kPerVector<X>; ++j) {
    words[j * sizeof(Bits) / 4] |= uint32_t(elements[j]) << (j * sizeof(Bits) % 4 * 8);
  }
  return {words[0], words[1], words[2], words[3]};
}

// Rounds numbers to a vector of elements.
template <class X>
__device__ uint4 narrow_vector(const float (&x)[kPerVector<X>]) {
  if constexpr (kPerVector<X> == 8) {
    return {narrow_pair(X(), x[0], x[1]), narrow_pair(X(), x[2], x[3]), narrow_pair(X(), x[4], x[5]),
            narrow_pair(X(), x[6], x[7])};
  } else {
    return {narrow(X(), x[0]), narrow(X(), x[1]), narrow(X(), x[2]), narrow(X(), x[3])};
  }
}

// The largest element of a maximum of words, see X::max_word.
template <class X>
__device__ float max_of_word(uint32_t word) {
  if constexpr (kPerVector<X> == 8) word = X::max_word(word, word >> 16);
  return X::widen(typename X::Bits(word));
}

// Starts to copy `length` elements to shared memory, where -inf follows them to the end of their last tile. A row that
// is not aligned is shifted on the way, in registers.
template <class X, int kThreads>
__device__ void start_copy(const typename X::Bits* row, typename X::Bits* staged, int32_t length, int thread) {
  constexpr int kCount = kPerVector<X>;
  const int32_t vectors = length / kCount;
  uint4* const to = reinterpret_cast<uint4*>(staged);
  int32_t first = 0, last = 0;  // the vectors that are not copied element by element
  if (is_aligned(row)) {
    last = vectors;
    const uint4* const from = reinterpret_cast<const uint4*>(row);
#pragma unroll 4
    for (int32_t i = thread; i < vectors; i += kThreads) copy_async(to + i, from + i);
  } else if (vectors > 2) {
    // Each is in two aligned vectors, which are within the row.
    first = 1;
    last = vectors - 1;
    const uintptr_t address = reinterpret_cast<uintptr_t>(row);
    const uint4* const from = reinterpret_cast<const uint4*>(address / 16 * 16);
    const uint32_t offset = uint32_t(address % 16);
#pragma unroll 2
    for (int32_t i = first + thread; i < last; i += kThreads) {
      to[i] = shifted(load_vector(from + i), load_vector(from + i + 1), offset);
    }
  }
  if (thread < first * kCount) staged[thread] = row[thread];
#pragma unroll 1
  for (int32_t i = last * kCount + thread; i < length; i += kThreads) staged[i] = row[i];
  const int32_t end = (length + kTile - 1) / kTile * kTile;
#pragma unroll 1
  for (int32_t i = length + thread; i < end; i += kThreads) staged[i] = kMinusInfinity<X>;
}

// Stores `size` elements of a tile from shared memory, by the lanes of a warp. If `to` is not aligned, the elements are
// shifted on the way.
template <class X>
__device__ void store_tile(const typename X::Bits* staged, typename X::Bits* to, int32_t size, int lane) {
  constexpr int kCount = kPerVector<X>;
  const uint4* const from = reinterpret_cast<const uint4*>(staged);
  const uint32_t offset = uint32_t(-reinterpret_cast<uintptr_t>(to) % 16);
  int32_t head = int32_t(offset / sizeof(typename X::Bits));  // elements before the first aligned vector
  if (head > size) head = size;
  const int32_t vectors = (size - head) / kCount;
  uint4* const aligned = reinterpret_cast<uint4*>(to + head);
  if (offset == 0 && size == kTile) {
#pragma unroll
    for (int v = 0; v < kTile / kCount; v += 32) aligned[v + lane] = from[v + lane];
    return;
  }
  if (offset == 0) {
#pragma unroll 1
    for (int32_t v = lane; v < vectors; v += 32) aligned[v] = from[v];
  } else {
#pragma unroll 2
    for (int32_t v = lane; v < vectors; v += 32) aligned[v] = shifted(from[v], from[v + 1], offset);
    if (lane < head) to[lane] = staged[lane];
  }
  const int32_t i = head + vectors * kCount + lane;
  if (i < size) to[i] = staged[i];
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
