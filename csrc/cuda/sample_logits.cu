// The operator slimkernels::sample_logits_rows of CUDA tensors. What this kernel does not compute, float64, rows close
// to 2^31 logits and many draws per row, goes to the Triton kernel, which is slimkernels::sample_logits_rows_triton.
//
// The kernel has run on an emulated GPU (tests/support/cuda_emulator); neither it nor this file has run on a real one.
//
// The host never waits for the device, so bad options of a row raise nothing: its token is -1.
#include <torch/csrc/stable/library.h>

#include "chosen.h"
#include "launch.h"
#include "sample_logits.cuh"
#include "sample_logits_plan.h"

namespace slimkernels {
namespace cuda {
namespace {

constexpr char kOp[] = "sample_logits_rows";

template <class X>
void launch(const Launcher& launcher, SampleArgs& args, int64_t num_rows) {
  const RowPlan plan = make_plan<X>(launcher.machine(), num_rows, args.vocab_size);
  args.slice = int32_t(plan.slice);
  args.list_capacity = kListCapacity;
  const auto kernel =
      plan.staged ? sample_logits_kernel<X, true, kLaunchedThreads> : sample_logits_kernel<X, false, kLaunchedThreads>;
  launcher.launch(kernel, args, num_rows, plan, kLaunchedThreads);
}

struct CudaSampleLogits {
  static constexpr char kTriton[] = "slimkernels::sample_logits_rows_triton";

  // Every draw of a row is a race of its own, which is worth it for a few draws from few candidates. The limit of V
  // leaves room for a tile past the end of the longest row, whose ids must fit into 32 bits.
  template <class... Outputs>
  static bool serves(const Tensor& logits, int64_t num_distinct, int64_t, const OptionalTensor&, int64_t,
                     const OptionalTensor&, double, const OptionalTensor&, int64_t top_k, const OptionalTensor& top_ks,
                     double top_p, const OptionalTensor& top_ps, double min_p, const OptionalTensor& min_ps,
                     const Outputs&...) {
    const bool may_truncate =
        top_k > 0 || top_ks.has_value() || top_p < 1 || top_ps.has_value() || min_p > 0 || min_ps.has_value();
    return logits.scalar_type() != ScalarType::Double && logits.size(1) <= INT32_MAX - kMaxBlocks * kTile &&
           num_distinct <= (may_truncate ? kMostDraws : 1);
  }

  static int64_t run(Tensor logits, int64_t num_distinct, int64_t seed, OptionalTensor seeds, int64_t position,
                     OptionalTensor positions, double temperature, OptionalTensor temperatures, int64_t top_k,
                     OptionalTensor top_ks, double top_p, OptionalTensor top_ps, double min_p, OptionalTensor min_ps,
                     Tensor token, Tensor logprob, Tensor truncated_logprob, Tensor entropy) {
    const int device = logits.get_device_index();
    const OnDevice operands = {device};
    operands.check_rows(logits, "logits");
    const int64_t num_rows = logits.size(0), vocab_size = logits.size(1), drawn = num_rows * num_distinct;
    if (num_rows == 0) return 0;
    STD_TORCH_CHECK(num_distinct >= 1 && vocab_size >= 1, "m and V must be at least 1");
    const auto integers_of = [&](const OptionalTensor& t, const char* argument) {
      return static_cast<const int64_t*>(operands.data_of(t, ScalarType::Long, num_rows, argument));
    };
    const auto doubles_of = [&](const OptionalTensor& t, const char* argument) {
      return static_cast<const double*>(operands.data_of(t, ScalarType::Double, num_rows, argument));
    };
    const auto floats_out_of = [&](const Tensor& t, int64_t numel, const char* argument) {
      return static_cast<float*>(operands.out_of(t, ScalarType::Float, numel, argument));
    };
    SampleArgs args = {};
    args.logits = logits.const_data_ptr();
    args.row_stride = logits.stride(0);
    args.vocab_size = int32_t(vocab_size);
    args.num_distinct = int32_t(num_distinct);
    args.seed = seed;
    args.seed_per_row = seeds.has_value() && seeds->dim() > 0;
    args.seeds = static_cast<const int64_t*>(
        operands.data_of(seeds, ScalarType::Long, args.seed_per_row ? num_rows : 1, "seed"));
    args.position = {integers_of(positions, "position"), position};
    args.temperature = {doubles_of(temperatures, "temperature"), temperature};
    args.top_k = {integers_of(top_ks, "top_k"), top_k};
    args.top_p = {doubles_of(top_ps, "top_p"), top_p};
    args.min_p = {doubles_of(min_ps, "min_p"), min_p};
    args.token = static_cast<int64_t*>(operands.out_of(token, ScalarType::Long, drawn, "token"));
    args.logprob = floats_out_of(logprob, drawn, "logprob");
    args.truncated_logprob = floats_out_of(truncated_logprob, drawn, "truncated_logprob");
    args.entropy = floats_out_of(entropy, num_rows, "entropy");

    const Launcher launcher(device, kOp);
    with_format(dtype_of(logits, "logits"), [&](auto format) { launch<decltype(format)>(launcher, args, num_rows); });
    return 0;
  }
};

using Served = Chosen<CudaSampleLogits, decltype(CudaSampleLogits::run)>;

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

STABLE_TORCH_LIBRARY_IMPL(slimkernels, CUDA, m) {
  m.impl("sample_logits_rows", TORCH_BOX(&slimkernels::cuda::Served::run));
}
