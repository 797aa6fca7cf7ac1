// Host functions that launch a kernel on the current stream of a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "machine.h"

namespace slimkernels {
namespace {

inline void check(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

inline int64_t attribute(cudaDeviceAttr which, int device, const char* op) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), op);
  return value;
}

inline Machine machine_of(int device, const char* op) {
  return {attribute(cudaDevAttrComputeCapabilityMajor, device, op) >= 9,
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, op),
          attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, op),
          int(attribute(cudaDevAttrMultiProcessorCount, device, op))};
}

inline cudaStream_t current_stream(int device, const char* op) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, op,
                  ": could not get the current stream of device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Launches one cluster of `num_blocks` blocks per row.
template <class Args>
void launch_rows(void (*kernel)(const Args), const Args& args, int64_t num_rows, int num_blocks, int num_threads,
                 int64_t bytes, cudaStream_t stream, const char* op) {
  STD_TORCH_CHECK(num_rows <= INT32_MAX / num_blocks, op, ": logits must have at most ", INT32_MAX / num_blocks,
                  " rows, got ", num_rows);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)), op);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(num_blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(num_rows * num_blocks));
  config.blockDim = dim3(unsigned(num_threads));
  config.dynamicSmemBytes = size_t(bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = num_blocks > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args), op);
}

}  // namespace
}  // namespace slimkernels
