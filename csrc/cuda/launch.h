// Host functions that launch a kernel on the current stream of a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../operands.h"
#include "device.cuh"
#include "row_plan.h"

namespace slimkernels {
namespace {

// Launches kernels of an operator on the current stream of a device, which is the current device meanwhile.
class Launcher {
 public:
  Launcher(int device, const char* op) : op_(op), guard_(device) {
    machine_ = {attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9,
                attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                int(attribute(cudaDevAttrMultiProcessorCount, device))};
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS, op_,
                    ": could not get the current stream of device ", device);
    stream_ = static_cast<cudaStream_t>(stream);
  }

  const Machine& machine() const { return machine_; }

  // Launches one cluster per row.
  template <class Args>
  void launch(void (*kernel)(const Args), const Args& args, int64_t num_rows, const RowPlan& plan,
              int num_threads) const {
    STD_TORCH_CHECK(num_rows <= INT32_MAX / plan.num_blocks, op_, ": logits must have at most ",
                    INT32_MAX / plan.num_blocks, " rows, got ", num_rows);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.bytes)));
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(plan.num_blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(num_rows * plan.num_blocks));
    config.blockDim = dim3(unsigned(num_threads));
    config.dynamicSmemBytes = size_t(plan.bytes);
    config.stream = stream_;
    config.attrs = &cluster;
    config.numAttrs = plan.num_blocks > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, args));
  }

 private:
  void check(cudaError_t error) const { STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error)); }
  int64_t attribute(cudaDeviceAttr which, int device) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device));
    return value;
  }

  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  Machine machine_;
  cudaStream_t stream_;
};

// Calls use(X()) for the format X of elements of a Dtype other than float64.
template <class Use>
void with_format(int dtype, const Use& use) {
  switch (dtype) {
    case kFloat32:
      use(Float32());
      break;
    case kBFloat16:
      use(BFloat16());
      break;
    default:
      use(Float16());
  }
}

}  // namespace
}  // namespace slimkernels
