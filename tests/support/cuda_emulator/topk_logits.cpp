// Runs csrc/cuda/topk_logits.cuh on the emulated GPU; called with ctypes.
#include "staging.h"
// The kernel must be included after the emulator.
#include "cuda/topk_logits.cuh"
#include "cuda/topk_logits_plan.h"

namespace {

using namespace slimkernels;

template <class X, bool kStaged, int kThreads>
const char* run(TopkLogitsArgs& args, int64_t num_rows, int num_blocks, int seed, int skipped_barrier) {
  args.slice = int32_t(slice_of<X>(args.vocab_size, num_blocks));
  emulator::Machine& machine = emulator::machine;
  machine.num_threads = kThreads;
  machine.num_blocks = num_blocks;
  machine.skipped_barrier = skipped_barrier;
  machine.memory_size = BlockMemory<X, kStaged, kThreads>::bytes(args.slice, args.list_capacity);
  machine.random.seed(seed);
  machine.by_rank = seed % 2 != 0;
  machine.kernel = [&] { topk_logits_kernel<X, kStaged, kThreads>(args); };
  machine.fault = nullptr;
  for (int64_t n = 0; n < num_rows; ++n) {
    machine.grid_block.x = unsigned(n * num_blocks);
    if (!emulator::run_cluster()) break;
  }
  return machine.fault;
}

template <class X>
const char* run_variant(TopkLogitsArgs& args, int64_t num_rows, int num_blocks, int num_threads, bool staged, int seed,
                        int skipped_barrier) {
  if (num_threads == 256) {
    return staged ? run<X, true, 256>(args, num_rows, num_blocks, seed, skipped_barrier)
                  : run<X, false, 256>(args, num_rows, num_blocks, seed, skipped_barrier);
  }
  return staged ? run<X, true, 64>(args, num_rows, num_blocks, seed, skipped_barrier)
                : run<X, false, 64>(args, num_rows, num_blocks, seed, skipped_barrier);
}

}  // namespace

// Returns null or a description of the fault. `dtype` is 0 for float32, 1 for bfloat16, 2 for float16.
extern "C" const char* topk_logits(int dtype, const void* logits, int64_t num_rows, int64_t row_stride, int vocab_size,
                                   int top_k, const int64_t* target, const double* temperatures, int num_temperatures,
                                   void* values, int32_t* ids, float* lse, float* rest_lse, float* target_logit,
                                   int num_blocks, int num_threads, int staged, int list_capacity, int seed,
                                   int skipped_barrier) {
  TopkLogitsArgs args = {};
  args.logits = logits;
  args.row_stride = row_stride;
  args.vocab_size = vocab_size;
  args.top_k = top_k;
  args.list_capacity = list_capacity;
  args.target = target;
  args.ids = ids;
  args.values = values;
  args.lse = lse;
  args.rest_lse = rest_lse;
  args.target_logit = target_logit;
  set_sample(args);
  set_temperatures(args, temperatures, num_temperatures);
  const auto variant = dtype == 0 ? run_variant<Float32> : dtype == 1 ? run_variant<BFloat16> : run_variant<Float16>;
  return variant(args, num_rows, num_blocks, num_threads, staged != 0, seed, skipped_barrier);
}

// Returns the number of barriers that a thread reached in the last row.
extern "C" int barriers_of_last_row() { return emulator::machine.fibers[0].barriers; }

// Writes the plan that the launcher chooses: blocks per row, staged, slice, list capacity and bytes.
extern "C" void plan_topk_logits(int dtype, int64_t num_rows, int vocab_size, int top_k, int has_clusters,
                                 int64_t block_bytes, int64_t processor_bytes, int processors, int64_t* plan) {
  const Machine machine = {has_clusters != 0, block_bytes, processor_bytes, processors};
  const auto make = dtype == 0 ? make_plan<Float32> : dtype == 1 ? make_plan<BFloat16> : make_plan<Float16>;
  const Plan made = make(machine, num_rows, vocab_size, top_k);
  plan[0] = made.num_blocks;
  plan[1] = made.staged;
  plan[2] = made.slice;
  plan[3] = made.list_capacity;
  plan[4] = made.bytes;
}
