// Runs csrc/cuda/sample_logits.cuh on the emulated GPU.
#include "run.h"
// The kernel must be included after the emulator.
#include "cuda/sample_logits.cuh"
#include "cuda/sample_logits_plan.h"

namespace {

using namespace slimkernels;
using namespace slimkernels::cuda;

template <class X, bool kStaged, int kThreads>
const char* run(SampleArgs args, int64_t num_rows, const emulator::Launch& launch) {
  args.slice = int32_t(slice_of(args.vocab_size, launch.num_blocks, kTile));
  args.list_capacity = launch.list_capacity;
  const int64_t bytes = SampleMemory<X, kStaged, kThreads>::bytes(args.slice, args.list_capacity);
  return emulator::run_rows(launch, num_rows, bytes, [&] { sample_logits_kernel<X, kStaged, kThreads>(args); });
}

template <class X>
const char* run_variant(const SampleArgs& args, int64_t num_rows, const emulator::Launch& launch) {
  if constexpr (sizeof(typename X::Bits) == 2) {
    if (launch.num_threads == kLaunchedThreads) return run<X, true, kLaunchedThreads>(args, num_rows, launch);
  }
  return launch.staged ? run<X, true, 64>(args, num_rows, launch) : run<X, false, 64>(args, num_rows, launch);
}

}  // namespace

// Returns null or a description of the fault.
extern "C" const char* sample_logits(int dtype, int64_t num_rows, const SampleArgs* args,
                                     const emulator::Launch* launch) {
  return emulator::with_format(dtype, [&](auto x) { return run_variant<decltype(x)>(*args, num_rows, *launch); });
}

extern "C" void plan_sample_logits(int dtype, int64_t num_rows, int64_t vocab_size, const Machine* machine,
                                   emulator::Plan* plan) {
  const RowPlan made =
      emulator::with_format(dtype, [&](auto x) { return make_plan<decltype(x)>(*machine, num_rows, vocab_size); });
  *plan = emulator::plan_of(made, kListCapacity);
}
