// The operator slimkernels::topk_logits_rows_cuda: topk_logits_rows by a CUDA C++ kernel. It exists for comparison with
// the Triton kernel, which serves CUDA tensors. The kernel has run on an emulated GPU (tests/support/cuda_emulator);
// neither it nor this file has run on a real one.
//
// The host never waits for the device, so bad data raises nothing: a label outside [0, V) gives a target_logit of NaN.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "topk_logits.cuh"
#include "topk_logits_plan.h"

namespace slimkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "topk_logits_rows_cuda: ", cudaGetErrorString(error));
}

int64_t attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Returns the data of a contiguous tensor of the given type and number of elements on the device; null for an absent
// one.
void* data_of(const OptionalTensor& t, ScalarType type, int64_t numel, int device, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == device && t->is_contiguous() && t->scalar_type() == type &&
                      t->numel() == numel,
                  name, " must be a contiguous tensor of the documented type with ", numel,
                  " elements on the device of logits, got ", t->numel());
  return t->mutable_data_ptr();
}

template <class X, bool kStaged>
void launch_variant(const Plan& plan, const TopkLogitsArgs& args, int64_t num_rows, cudaStream_t stream) {
  const auto kernel = topk_logits_kernel<X, kStaged, kLaunchedThreads>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.bytes)));
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(plan.num_blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(num_rows * plan.num_blocks));
  config.blockDim = dim3(kLaunchedThreads);
  config.dynamicSmemBytes = size_t(plan.bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.num_blocks > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args));
}

template <class X>
void launch(const Machine& machine, TopkLogitsArgs& args, int64_t num_rows, cudaStream_t stream) {
  const Plan plan = make_plan<X>(machine, num_rows, args.vocab_size, args.top_k);
  STD_TORCH_CHECK(num_rows <= INT32_MAX / plan.num_blocks, "logits must have at most ", INT32_MAX / plan.num_blocks,
                  " rows, got ", num_rows);
  args.slice = int32_t(plan.slice);
  args.list_capacity = int32_t(plan.list_capacity);
  if (plan.staged) {
    launch_variant<X, true>(plan, args, num_rows, stream);
  } else {
    launch_variant<X, false>(plan, args, num_rows, stream);
  }
}

int64_t topk_logits_rows_cuda(Tensor logits, int64_t top_k, OptionalTensor target, std::vector<double> temperatures,
                              Tensor values, Tensor ids, Tensor lse, Tensor rest_lse, OptionalTensor target_logit) {
  STD_TORCH_CHECK(logits.is_cuda() && logits.dim() == 2 && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  "logits must be a two-dimensional CUDA tensor whose last dimension is dense");
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  if (num_rows == 0) return 0;
  const int64_t num_temperatures = static_cast<int64_t>(temperatures.size());
  // The limit leaves room for a tile past the end of the longest row, whose ids must fit into 32 bits.
  STD_TORCH_CHECK(top_k >= 1 && top_k <= vocab_size && vocab_size <= INT32_MAX - kMaxBlocks * kTile,
                  "top_k must be in [1, V] and V below 2 ** 31 - 8192");
  STD_TORCH_CHECK(num_temperatures >= 1 && num_temperatures <= kMaxTemperatures, "temperatures must be 1 to ",
                  kMaxTemperatures, " numbers, got ", num_temperatures);
  STD_TORCH_CHECK(target.has_value() == target_logit.has_value(), "target and target_logit must be given together");
  const int device = logits.get_device_index();
  TopkLogitsArgs args = {};
  args.logits = logits.const_data_ptr();
  args.row_stride = logits.stride(0);
  args.vocab_size = int32_t(vocab_size);
  args.top_k = int32_t(top_k);
  args.target = static_cast<const int64_t*>(data_of(target, ScalarType::Long, num_rows, device, "target"));
  args.values = data_of(values, logits.scalar_type(), num_rows * top_k, device, "values");
  args.ids = static_cast<int32_t*>(data_of(ids, ScalarType::Int, num_rows * top_k, device, "ids"));
  args.lse = static_cast<float*>(data_of(lse, ScalarType::Float, num_rows * num_temperatures, device, "lse"));
  args.rest_lse =
      static_cast<float*>(data_of(rest_lse, ScalarType::Float, num_rows * num_temperatures, device, "rest_lse"));
  args.target_logit = static_cast<float*>(data_of(target_logit, ScalarType::Float, num_rows, device, "target_logit"));
  set_temperatures(args, temperatures.data(), int(num_temperatures));

  const torch::stable::accelerator::DeviceGuard guard(device);
  const Machine machine = {attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9,
                           attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                           attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                           int(attribute(cudaDevAttrMultiProcessorCount, device))};
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "topk_logits_rows_cuda: could not get the current stream of device ", device);
  const auto launch_type = [&] {
    switch (logits.scalar_type()) {
      case ScalarType::Float:
        return launch<Float32>;
      case ScalarType::BFloat16:
        return launch<BFloat16>;
      case ScalarType::Half:
        return launch<Float16>;
      default:
        STD_TORCH_CHECK(
            false, "logits must be float32, bfloat16 or float16 for the CUDA C++ kernel; call topk_logits for float64");
    }
  }();
  launch_type(machine, args, num_rows, static_cast<cudaStream_t>(stream));
  return 0;
}

}  // namespace
}  // namespace slimkernels

STABLE_TORCH_LIBRARY_FRAGMENT(slimkernels, m) {
  m.def(
      "topk_logits_rows_cuda(Tensor logits, int top_k, Tensor? target, float[] temperatures, Tensor(a!) values,"
      " Tensor(b!) ids, Tensor(c!) lse, Tensor(d!) rest_lse, Tensor(e!)? target_logit) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(slimkernels, CUDA, m) {
  m.impl("topk_logits_rows_cuda", TORCH_BOX(&slimkernels::topk_logits_rows_cuda));
}
