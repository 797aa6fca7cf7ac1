// Device functions for moving rows between device memory, shared memory and registers. The emulator implements the
// same for a CPU (staging.h in tests/support/cuda_emulator); the file that is included first is used.
#ifndef SLIMKERNELS_STAGING
#define SLIMKERNELS_STAGING

#include "device.cuh"

namespace slimkernels {

// A vector in shared memory, as the destination of copies. Its address stays in a register.
struct SharedVector {
  uint32_t address;
  __device__ SharedVector operator+(int32_t distance) const { return {address + 16 * distance}; }
};
__device__ inline SharedVector shared_vector(uint4* vector) {
  uint32_t address = uint32_t(__cvta_generic_to_shared(vector));
  asm("" : "+r"(address));
  return {address};
}

// Starts to copy 16 bytes to shared memory; both addresses are multiples of 16.
__device__ inline void copy_async(SharedVector to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address), "l"(from) : "memory");
}
__device__ inline void copy_async(uint4* to, const uint4* from) {
  copy_async(SharedVector{uint32_t(__cvta_generic_to_shared(to))}, from);
}

// Loads 16 bytes of device memory at once. The compiler would otherwise load some of the words where only they are
// used.
__device__ inline uint4 load_vector(const uint4* from) {
  uint4 vector;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w)
               : "l"(__cvta_generic_to_global(from)));
  return vector;
}

// Waits for the copies that this thread started. Other threads see them after a barrier.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Rounds numbers to the nearest elements of a format.
__device__ inline uint32_t narrow(Float32, float x) { return __float_as_uint(x); }
__device__ inline uint16_t narrow(BFloat16, float x) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(0.0f), "f"(x));
  return uint16_t(word);
}
__device__ inline uint16_t narrow(Float16, float x) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(0.0f), "f"(x));
  return uint16_t(word);
}

// The same for two numbers; the word has `low` in its lower half.
__device__ inline uint32_t narrow_pair(BFloat16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ inline uint32_t narrow_pair(Float16, float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace slimkernels

#endif
