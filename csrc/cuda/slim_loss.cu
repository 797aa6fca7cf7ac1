// The operator slimkernels::slim_loss_rows of CUDA tensors. What this kernel does not compute, float64 and rows longer
// than kMaxVocabSize, goes to the Triton kernel, which is slimkernels::slim_loss_rows_triton.
//
// The kernel has run on an emulated GPU (tests/support/cuda_emulator); neither it nor this file has run on a real one.
#include "../slim_loss/operator.h"
#include "chosen.h"
#include "launch.h"
#include "slim_loss.cuh"
#include "slim_loss_plan.h"

namespace slimkernels {
namespace cuda {
namespace {

constexpr char kOp[] = "slim_loss_rows";

template <class X>
void launch(const Launcher& launcher, const SlimLossArgs& args) {
  const RowPlan plan = make_plan<X>(launcher.machine(), args);
  const auto kernel =
      plan.staged ? slim_loss_kernel<X, true, kLaunchedThreads> : slim_loss_kernel<X, false, kLaunchedThreads>;
  const SlimLossLaunch launched = plan.staged ? launch_of<X, true, kLaunchedThreads>(args, plan.slice)
                                              : launch_of<X, false, kLaunchedThreads>(args, plan.slice);
  launcher.launch(kernel, launched, args.num_rows, plan, kLaunchedThreads);
}

struct CudaSlimLoss {
  static OnDevice device_of(const Tensor& logits) { return {logits.get_device_index()}; }

  // Returns 0, because the host does not wait for the device: bad rows become NaN.
  static int64_t run(SlimLossArgs& args, const Tensor& logits) {
    STD_TORCH_CHECK(args.top_k <= args.vocab_size, "ids must have at most V columns, got ", args.top_k);
    const Launcher launcher(logits.get_device_index(), kOp);
    with_format(args.dtype, [&](auto format) { launch<decltype(format)>(launcher, args); });
    return 0;
  }
};

struct ChosenSlimLoss {
  static constexpr char kTriton[] = "slimkernels::slim_loss_rows_triton";
  static constexpr auto run = slim_loss_rows<CudaSlimLoss>;

  template <class... Rest>
  static bool serves(const Tensor& logits, const Rest&...) {
    return logits.scalar_type() != ScalarType::Double && logits.size(1) <= kMaxVocabSize;
  }
};

using Served = Chosen<ChosenSlimLoss, decltype(slim_loss_rows<CudaSlimLoss>)>;

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

STABLE_TORCH_LIBRARY_IMPL(slimkernels, CUDA, m) {
  m.impl("slim_loss_rows", TORCH_BOX(&slimkernels::cuda::Served::run));
}
