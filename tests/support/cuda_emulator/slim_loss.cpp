// Runs csrc/cuda/slim_loss.cuh on the emulated GPU.
#include "run.h"
// The kernel must be included after the emulator.
#include "cuda/slim_loss.cuh"
#include "cuda/slim_loss_plan.h"

namespace {

using namespace slimkernels;
using namespace slimkernels::cuda;

template <class X, bool kStaged, int kThreads>
const char* run(const SlimLossArgs& args, const emulator::Launch& launch) {
  const int64_t slice = slice_of(args.vocab_size, launch.num_blocks, kTile);
  const SlimLossLaunch launched = launch_of<X, kStaged, kThreads>(args, slice);
  return emulator::run_rows(launch, args.num_rows, launched.layout.bytes,
                            [&] { slim_loss_kernel<X, kStaged, kThreads>(launched); });
}

template <class X>
const char* run_variant(const SlimLossArgs& args, const emulator::Launch& launch) {
  if (launch.num_threads == kLaunchedThreads) {
    return launch.staged ? run<X, true, kLaunchedThreads>(args, launch) : run<X, false, kLaunchedThreads>(args, launch);
  }
  return launch.staged ? run<X, true, 64>(args, launch) : run<X, false, 64>(args, launch);
}

}  // namespace

// Returns null or a description of the fault.
extern "C" const char* slim_loss(const SlimLossArgs* args, const emulator::Launch* launch) {
  return emulator::with_format(args->dtype, [&](auto x) { return run_variant<decltype(x)>(*args, *launch); });
}

extern "C" void plan_slim_loss(int dtype, int64_t num_rows, int64_t vocab_size, int64_t top_k, int selects,
                               const Machine* machine, emulator::Plan* plan) {
  SlimLossArgs args = {};
  args.num_rows = num_rows;
  args.vocab_size = vocab_size;
  args.top_k = top_k;
  args.temperature = args.logit_scale = args.teacher_blend = 1;
  args.statistics = selects != 0 ? kAll : kNone;
  const RowPlan made = emulator::with_format(dtype, [&](auto x) { return make_plan<decltype(x)>(*machine, args); });
  *plan = emulator::plan_of(made, 0);
}
