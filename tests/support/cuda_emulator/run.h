// What the libraries of emulated kernels share; called with ctypes (tests/support/emulated_cuda.py).
#pragma once

#include "staging.h"
// The kernel's headers must be included after the emulator.
#include "cuda/row_plan.h"

namespace emulator {

// Launch parameters, none of which may change the results of a kernel.
struct Launch {
  int num_blocks, staged, list_capacity, num_threads, seed, skipped_barrier, first_row;
};

// Runs a kernel for every row from the first one of the launch on. Returns null or a description of the fault.
template <class Kernel>
const char* run_rows(const Launch& launch, int64_t num_rows, int64_t memory_size, Kernel kernel) {
  machine.num_threads = launch.num_threads;
  machine.num_blocks = launch.num_blocks;
  machine.skipped_barrier = launch.skipped_barrier;
  machine.memory_size = memory_size;
  machine.random.seed(launch.seed);
  machine.by_rank = launch.seed % 2 != 0;
  machine.kernel = kernel;
  machine.fault = nullptr;
  for (int64_t n = launch.first_row; n < num_rows; ++n) {
    machine.grid_block.x = unsigned(n * launch.num_blocks);
    copies.clear();
    if (!run_cluster()) break;
  }
  return machine.fault;
}

// Returns use(X()) for the format X of elements; the dtypes are numbered as in tests/support/emulated_cuda.py.
template <class Use>
auto with_format(int dtype, const Use& use) {
  if (dtype == 0) return use(slimkernels::Float32());
  if (dtype == 1) return use(slimkernels::BFloat16());
  return use(slimkernels::Float16());
}

// The plan that a launcher chooses, as ctypes sees it.
struct Plan {
  int64_t num_blocks, staged, slice, bytes, list_capacity;
};
inline Plan plan_of(const slimkernels::RowPlan& plan, int64_t list_capacity) {
  return {plan.num_blocks, plan.staged, plan.slice, plan.bytes, list_capacity};
}

}  // namespace emulator

// Returns the number of barriers that a thread reached in the last row.
extern "C" int barriers_of_last_row() { return emulator::machine.fibers[0].barriers; }
