// Device functions and types that kernels need beyond CUDA's own names. The emulator implements the same for a CPU
// (device.h in tests/support/cuda_emulator); the file that is included first is used.
#ifndef SLIMKERNELS_DEVICE
#define SLIMKERNELS_DEVICE

#include <stdint.h>

namespace slimkernels {

// ---- Thread block clusters, whose blocks can read each other's shared memory. Before sm_90 a cluster is one block.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline uint32_t cluster_size() { return __clusterSizeInBlocks(); }
__device__ inline uint32_t cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ inline uint32_t cluster_index() { return __clusterIdx().x; }
template <class T>
__device__ inline T* in_block(T* shared, uint32_t rank) {
  return static_cast<T*>(__cluster_map_shared_rank(shared, rank));
}
// A barrier of all threads of the cluster, so also of the block, that orders accesses to shared memory. As for
// __syncthreads, all threads of a warp reach it together.
__device__ inline void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#else
__device__ inline uint32_t cluster_size() { return 1; }
__device__ inline uint32_t cluster_rank() { return 0; }
__device__ inline uint32_t cluster_index() { return blockIdx.x; }
template <class T>
__device__ inline T* in_block(T* shared, uint32_t) {
  return shared;
}
__device__ inline void sync_cluster() { __syncthreads(); }
#endif

__device__ inline char* shared_memory() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<char*>(dynamic_shared_memory);
}

// Returns the pointer to device memory, which the compiler keeps in a register instead of computing it again.
template <class T>
__device__ T* kept_pointer(T* pointer) {
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// 2 ** x to two units in the last place; results below 2 ** -126 are 0.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) to four units in the last place, or to 2 ** -22 near 1; -inf at 0.
__device__ inline float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- Element formats. Bits is an element in memory; a word is four bytes of elements.

struct Float32 {
  using Bits = uint32_t;
  static constexpr uint32_t kInfinity = 0x7f800000;
  __device__ static float widen(Bits x) { return __uint_as_float(x); }
  // Returns the same number; 0.0 for -0.0 and the positive quiet NaN of all ones for any NaN.
  __device__ static Bits canonical(Bits x) {
    asm("add.rn.f32 %0, %1, 0f00000000;" : "=r"(x) : "r"(x));
    return x;
  }
  // Returns the larger of each pair of elements; NaN if either is NaN.
  __device__ static uint32_t max_word(uint32_t a, uint32_t b) {
    asm("max.NaN.f32 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
  // Returns all ones where a is not below b, so also if either is NaN, and zeros otherwise.
  __device__ static uint32_t not_below(uint32_t a, uint32_t b) {
    asm("set.geu.u32.f32 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr uint32_t kInfinity = 0x7f80;
  __device__ static float widen(Bits x) { return __uint_as_float(uint32_t(x) << 16); }
  __device__ static Bits canonical(Bits x) {
    asm("fma.rn.bf16 %0, %1, %2, %3;" : "=h"(x) : "h"(x), "h"(uint16_t(0x3f80)), "h"(uint16_t(0)));
    return x;
  }
  __device__ static uint32_t max_word(uint32_t a, uint32_t b) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
  // Returns all ones in each half where a is not below b, so also if either is NaN, and zeros in the others.
  __device__ static uint32_t not_below(uint32_t a, uint32_t b) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm("set.geu.u32.bf16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
#else
    return (widen(Bits(a)) < widen(Bits(b)) ? 0u : 0xffffu) |
           (widen(Bits(a >> 16)) < widen(Bits(b >> 16)) ? 0u : 0xffff0000u);
#endif
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr uint32_t kInfinity = 0x7c00;
  __device__ static float widen(Bits x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  }
  __device__ static Bits canonical(Bits x) {
    asm("add.rn.f16 %0, %1, %2;" : "=h"(x) : "h"(x), "h"(uint16_t(0)));
    return x;
  }
  __device__ static uint32_t max_word(uint32_t a, uint32_t b) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
  // Returns all ones in each half where a is not below b, so also if either is NaN, and zeros in the others.
  __device__ static uint32_t not_below(uint32_t a, uint32_t b) {
    asm("set.geu.u32.f16x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));
    return a;
  }
};

}  // namespace slimkernels

#endif
