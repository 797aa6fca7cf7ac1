// The parts of a block's shared memory.
#pragma once

#include "device.cuh"

namespace slimkernels {

// Places parts one after another, each at a multiple of 16 bytes.
struct Parts {
  int64_t bytes = 0;  // of all parts

  // Returns where a part of this size begins.
  __host__ __device__ int64_t add(int64_t size) {
    const int64_t place = bytes;
    bytes += (size + 15) / 16 * 16;
    return place;
  }
};

}  // namespace slimkernels
