// The operator slimkernels::topk_logits_rows of CUDA tensors. What this kernel does not compute, float64, rows of
// more than 2^21 logits and many temperatures, goes to the Triton kernel, which is
// slimkernels::topk_logits_rows_triton.
//
// The kernel has run on an emulated GPU (tests/support/cuda_emulator); neither it nor this file has run on a real one.
//
// The host never waits for the device, so bad data raises nothing: a label outside [0, V) gives a target_logit of NaN.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "chosen.h"
#include "launch.h"
#include "topk_logits.cuh"
#include "topk_logits_plan.h"

namespace slimkernels {
namespace cuda {
namespace {

constexpr char kOp[] = "topk_logits_rows";

template <class X>
void launch(const Launcher& launcher, TopkLogitsArgs& args, int64_t num_rows) {
  const TopkLogitsPlan plan = make_plan<X>(launcher.machine(), num_rows, args.vocab_size, args.top_k);
  args.slice = int32_t(plan.slice);
  args.list_capacity = int32_t(plan.list_capacity);
  const auto kernel =
      plan.staged ? topk_logits_kernel<X, true, kLaunchedThreads> : topk_logits_kernel<X, false, kLaunchedThreads>;
  launcher.launch(kernel, args, num_rows, plan, kLaunchedThreads);
}

struct CudaTopkLogits {
  static constexpr char kTriton[] = "slimkernels::topk_logits_rows_triton";

  template <class... Outputs>
  static bool serves(const Tensor& logits, int64_t, const OptionalTensor&, const std::vector<double>& temperatures,
                     const Outputs&...) {
    return logits.scalar_type() != ScalarType::Double && logits.size(1) <= kMaxVocabSize &&
           temperatures.size() <= kMaxTemperatures;
  }

  static int64_t run(Tensor logits, int64_t top_k, OptionalTensor target, std::vector<double> temperatures,
                     Tensor values, Tensor ids, Tensor lse, Tensor rest_lse, OptionalTensor target_logit) {
    const int device = logits.get_device_index();
    const OnDevice operands = {device};
    operands.check_rows(logits, "logits");
    const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
    if (num_rows == 0) return 0;
    const int64_t num_temperatures = static_cast<int64_t>(temperatures.size());
    STD_TORCH_CHECK(top_k >= 1 && top_k <= vocab_size, "top_k must be in [1, V]");
    STD_TORCH_CHECK(num_temperatures >= 1, "temperatures must be at least one number");
    STD_TORCH_CHECK(target.has_value() == target_logit.has_value(), "target and target_logit must be given together");
    TopkLogitsArgs args = {};
    args.logits = logits.const_data_ptr();
    args.row_stride = logits.stride(0);
    args.vocab_size = int32_t(vocab_size);
    args.top_k = int32_t(top_k);
    args.target = static_cast<const int64_t*>(operands.data_of(target, ScalarType::Long, num_rows, "target"));
    args.values = operands.out_of(values, logits.scalar_type(), num_rows * top_k, "values");
    args.ids = static_cast<int32_t*>(operands.out_of(ids, ScalarType::Int, num_rows * top_k, "ids"));
    const auto sums_of = [&](const OptionalTensor& t, int64_t numel, const char* argument) {
      return static_cast<float*>(operands.out_of(t, ScalarType::Float, numel, argument));
    };
    args.lse = sums_of(lse, num_rows * num_temperatures, "lse");
    args.rest_lse = sums_of(rest_lse, num_rows * num_temperatures, "rest_lse");
    args.target_logit = sums_of(target_logit, num_rows, "target_logit");
    set_sample(args);
    set_temperatures(args, temperatures.data(), int(num_temperatures));

    const Launcher launcher(device, kOp);
    with_format(dtype_of(logits, "logits"), [&](auto format) { launch<decltype(format)>(launcher, args, num_rows); });
    return 0;
  }
};

using Served = Chosen<CudaTopkLogits, decltype(CudaTopkLogits::run)>;

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

STABLE_TORCH_LIBRARY_IMPL(slimkernels, CUDA, m) {
  m.impl("topk_logits_rows", TORCH_BOX(&slimkernels::cuda::Served::run));
}
