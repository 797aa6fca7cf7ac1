// Runs csrc/cuda/topk_logits.cuh on the emulated GPU.
#include "run.h"
// The kernel must be included after the emulator.
#include "cuda/topk_logits.cuh"
#include "cuda/topk_logits_plan.h"

namespace {

using namespace slimkernels;
using namespace slimkernels::cuda;

template <class X, bool kStaged, int kThreads>
const char* run(TopkLogitsArgs args, int64_t num_rows, const emulator::Launch& launch) {
  args.slice = int32_t(slice_of(args.vocab_size, launch.num_blocks, kTile<X>));
  args.list_capacity = launch.list_capacity;
  const int64_t bytes = TopkMemory<X, kStaged, kThreads>::bytes(args.slice, args.list_capacity);
  return emulator::run_rows(launch, num_rows, bytes, [&] { topk_logits_kernel<X, kStaged, kThreads>(args); });
}

template <class X>
const char* run_variant(const TopkLogitsArgs& args, int64_t num_rows, const emulator::Launch& launch) {
  if (launch.num_threads == kLaunchedThreads) {
    return launch.staged ? run<X, true, kLaunchedThreads>(args, num_rows, launch)
                         : run<X, false, kLaunchedThreads>(args, num_rows, launch);
  }
  return launch.staged ? run<X, true, 64>(args, num_rows, launch) : run<X, false, 64>(args, num_rows, launch);
}

}  // namespace

// Returns null or a description of the fault. `given` lacks what the launcher sets.
extern "C" const char* topk_logits(int dtype, int64_t num_rows, const TopkLogitsArgs* given, const double* temperatures,
                                   int num_temperatures, const emulator::Launch* launch) {
  TopkLogitsArgs args = *given;
  set_sample(args);
  set_temperatures(args, temperatures, num_temperatures);
  return emulator::with_format(dtype, [&](auto x) { return run_variant<decltype(x)>(args, num_rows, *launch); });
}

extern "C" void plan_topk_logits(int dtype, int64_t num_rows, int64_t vocab_size, int64_t top_k,
                                 const Machine* machine, emulator::Plan* plan) {
  const auto made = emulator::with_format(
      dtype, [&](auto x) { return make_plan<decltype(x)>(*machine, num_rows, vocab_size, top_k); });
  *plan = emulator::plan_of(made, made.list_capacity);
}
