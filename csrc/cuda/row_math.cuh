// Definitions that the headers of csrc/slim_loss need of a device, for one element or a float64 scalar at a time.
#pragma once

#include <math.h>

#include "device.cuh"

#define SK_ISA cuda
#define SK_DEVICE __device__
#define SK_INLINE __device__ inline

namespace slimkernels {
namespace cuda {
namespace {

template <class V>
using ElementOf = V;

template <class T>
__host__ __device__ constexpr T infinity() {
  return T(HUGE_VAL);
}

__device__ inline double not_a_number() { return double(__uint_as_float(0x7fc00000)); }

template <class V>
__device__ inline V select(bool mask, V a, V b) {
  return mask ? a : b;
}

__device__ inline double exp(double x) { return ::exp(x); }
__device__ inline double log(double x) { return ::log(x); }
__device__ inline double expm1(double x) { return ::expm1(x); }
__device__ inline double log1p(double x) { return ::log1p(x); }
__device__ inline double log1p_unit(double x) { return ::log1p(x); }
__device__ inline float exp(float x) { return ::expf(x); }
__device__ inline float log(float x) { return ::logf(x); }
__device__ inline float log1p(float x) { return ::log1pf(x); }
__device__ inline float tanh(float x) { return ::tanhf(x); }

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

// After the functions that they call.
#include "../slim_loss/sums.h"
