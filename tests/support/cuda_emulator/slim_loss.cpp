// Runs csrc/cuda/slim_loss.cuh on the emulated GPU; called with ctypes.
#include "device.h"
#include "staging.h"
// The kernel must be included after the emulator.
#include "cuda/slim_loss.cuh"
#include "cuda/slim_loss_plan.h"

namespace {

using namespace slimkernels;
using namespace slimkernels::cuda;

struct Launch {
  int num_blocks, num_threads, staged, seed, skipped_barrier, first_row;
};

template <class X, bool kStaged, int kThreads>
const char* run(const SlimLossArgs& args, const Launch& launch) {
  const int64_t slice = slice_of(args.vocab_size, launch.num_blocks);
  const SlimLossLaunch arguments = launch_of<X, kStaged, kThreads>(args, slice);
  emulator::Machine& machine = emulator::machine;
  machine.num_threads = kThreads;
  machine.num_blocks = launch.num_blocks;
  machine.skipped_barrier = launch.skipped_barrier;
  machine.memory_size = arguments.layout.bytes;
  machine.random.seed(launch.seed);
  machine.by_rank = launch.seed % 2 != 0;
  machine.kernel = [&] { slim_loss_kernel<X, kStaged, kThreads>(arguments); };
  machine.fault = nullptr;
  for (int64_t n = launch.first_row; n < args.num_rows; ++n) {
    machine.grid_block.x = unsigned(n * launch.num_blocks);
    emulator::copies.clear();
    if (!emulator::run_cluster()) break;
  }
  return machine.fault;
}

template <class X>
const char* run_variant(const SlimLossArgs& args, const Launch& launch) {
  if (launch.num_threads == kLaunchedThreads)
    return launch.staged ? run<X, true, kLaunchedThreads>(args, launch) : run<X, false, kLaunchedThreads>(args, launch);
  return launch.staged ? run<X, true, 64>(args, launch) : run<X, false, 64>(args, launch);
}

}  // namespace

// Returns null or a description of the fault.
extern "C" const char* slim_loss(const SlimLossArgs* args, const Launch* launch) {
  const auto variant = args->dtype == kFloat32    ? run_variant<Float32>
                       : args->dtype == kBFloat16 ? run_variant<BFloat16>
                                                  : run_variant<Float16>;
  return variant(*args, *launch);
}

// Returns the number of barriers that a thread reached in the last row.
extern "C" int barriers_of_last_row() { return emulator::machine.fibers[0].barriers; }

// Writes the plan that the launcher chooses: blocks per row, staged, slice and bytes.
extern "C" void plan_slim_loss(int dtype, int64_t num_rows, int64_t vocab_size, int64_t top_k, int selects,
                               const Machine* machine, int64_t* plan) {
  SlimLossArgs args = {};
  args.num_rows = num_rows;
  args.vocab_size = vocab_size;
  args.top_k = top_k;
  args.temperature = args.logit_scale = args.teacher_blend = 1;
  args.statistics = selects != 0 ? kAll : kNone;
  const auto make = dtype == kFloat32    ? make_plan<Float32>
                    : dtype == kBFloat16 ? make_plan<BFloat16>
                                         : make_plan<Float16>;
  const SlimLossPlan made = make(*machine, args);
  plan[0] = made.num_blocks;
  plan[1] = made.staged;
  plan[2] = made.slice;
  plan[3] = made.bytes;
}
