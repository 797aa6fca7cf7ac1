// Runs csrc/cuda/sample_logits.cuh on the emulated GPU; called with ctypes.
#include "device.h"
#include "staging.h"
// The kernel must be included after the emulator.
#include "cuda/sample_logits.cuh"
#include "cuda/sample_logits_plan.h"

namespace {

using namespace slimkernels;
using namespace slimkernels::cuda;

struct Launch {
  int num_blocks, num_threads, staged, list_capacity, seed, skipped_barrier;
};

template <class X, bool kStaged, int kThreads>
const char* run(SampleArgs args, int64_t num_rows, const Launch& launch) {
  args.slice = int32_t(slice_of(args.vocab_size, launch.num_blocks));
  args.list_capacity = launch.list_capacity;
  emulator::Machine& machine = emulator::machine;
  machine.num_threads = kThreads;
  machine.num_blocks = launch.num_blocks;
  machine.skipped_barrier = launch.skipped_barrier;
  machine.memory_size = SampleMemory<X, kStaged, kThreads>::bytes(args.slice, args.list_capacity);
  machine.random.seed(launch.seed);
  machine.by_rank = launch.seed % 2 != 0;
  machine.kernel = [&] { sample_logits_kernel<X, kStaged, kThreads>(args); };
  machine.fault = nullptr;
  for (int64_t n = 0; n < num_rows; ++n) {
    machine.grid_block.x = unsigned(n * launch.num_blocks);
    if (!emulator::run_cluster()) break;
  }
  return machine.fault;
}

template <class X>
const char* run_variant(const SampleArgs& args, int64_t num_rows, const Launch& launch) {
  if constexpr (sizeof(typename X::Bits) == 2) {
    if (launch.num_threads == kLaunchedThreads) return run<X, true, kLaunchedThreads>(args, num_rows, launch);
  }
  return launch.staged ? run<X, true, 64>(args, num_rows, launch) : run<X, false, 64>(args, num_rows, launch);
}

}  // namespace

// Returns null or a description of the fault. The dtypes are numbered as in tests/support/emulated_cuda.py.
extern "C" const char* sample_logits(int dtype, int64_t num_rows, const SampleArgs* args, const Launch* launch) {
  const auto variant = dtype == 0 ? run_variant<Float32> : dtype == 1 ? run_variant<BFloat16> : run_variant<Float16>;
  return variant(*args, num_rows, *launch);
}

// Returns the number of barriers that a thread reached in the last row.
extern "C" int barriers_of_last_row() { return emulator::machine.fibers[0].barriers; }

// Writes the plan that the launcher chooses: blocks per row, staged, slice and bytes.
extern "C" void plan_sample_logits(int dtype, int64_t num_rows, int64_t vocab_size, const Machine* machine,
                                   int64_t* plan) {
  const auto make = dtype == 0 ? make_plan<Float32> : dtype == 1 ? make_plan<BFloat16> : make_plan<Float16>;
  const SamplePlan made = make(*machine, num_rows, vocab_size);
  plan[0] = made.num_blocks;
  plan[1] = made.staged;
  plan[2] = made.slice;
  plan[3] = made.bytes;
}
