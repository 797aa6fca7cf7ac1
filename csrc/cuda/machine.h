// The properties of a device that a launch plan depends on. This is host code without CUDA.
#pragma once

#include <stdint.h>

namespace slimkernels {

struct Machine {
  bool has_clusters;
  int64_t block_bytes, processor_bytes;  // shared memory: the most that a block can use, and that of a multiprocessor
  int processors;
};

constexpr int64_t kReservedBytes = 1024;  // of shared memory per block, by the system

}  // namespace slimkernels
