// The operator slimkernels::slim_loss_rows of CUDA tensors. What this kernel does not compute, float64 and rows longer
// than kMaxVocabulary, goes to the Triton kernel, which is slimkernels::slim_loss_rows_triton.
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

template <class X, bool kStaged>
void launch_variant(const SlimLossPlan& plan, const SlimLossArgs& args, cudaStream_t stream) {
  launch_rows(slim_loss_kernel<X, kStaged, kLaunchedThreads>, launch_of<X, kStaged, kLaunchedThreads>(args, plan.slice),
              args.num_rows, plan.num_blocks, kLaunchedThreads, plan.bytes, stream, kOp);
}

template <class X>
void launch(const Machine& machine, const SlimLossArgs& args, cudaStream_t stream) {
  const SlimLossPlan plan = make_plan<X>(machine, args);
  if (plan.staged) {
    launch_variant<X, true>(plan, args, stream);
  } else {
    launch_variant<X, false>(plan, args, stream);
  }
}

struct CudaSlimLoss {
  static OnDevice device_of(const Tensor& logits) { return {logits.get_device_index()}; }

  // Returns 0, because the host does not wait for the device: bad rows become NaN.
  static int64_t run(SlimLossArgs& args, const Tensor& logits) {
    STD_TORCH_CHECK(args.top_k <= args.vocab_size, "ids must have at most V columns, got ", args.top_k);
    const int device = logits.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const Machine machine = machine_of(device, kOp);
    const cudaStream_t stream = current_stream(device, kOp);
    switch (args.dtype) {
      case kFloat32:
        launch<Float32>(machine, args, stream);
        break;
      case kBFloat16:
        launch<BFloat16>(machine, args, stream);
        break;
      default:
        launch<Float16>(machine, args, stream);
    }
    return 0;
  }
};

struct ChosenSlimLoss {
  static constexpr char kTriton[] = "slimkernels::slim_loss_rows_triton";
  static constexpr auto run = slim_loss_rows<CudaSlimLoss>;

  template <class... Rest>
  static bool serves(const Tensor& logits, const Rest&...) {
    return logits.scalar_type() != ScalarType::Double && logits.size(1) <= kMaxVocabulary;
  }
};

using Served = Chosen<ChosenSlimLoss, decltype(slim_loss_rows<CudaSlimLoss>)>;

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

STABLE_TORCH_LIBRARY_IMPL(slimkernels, CUDA, m) {
  m.impl("slim_loss_rows", TORCH_BOX(&slimkernels::cuda::Served::run));
}
