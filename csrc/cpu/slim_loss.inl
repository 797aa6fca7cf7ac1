// slim_loss on a CPU: many rows shared out over threads, or, for fewer rows than threads, each row over all of them.
#pragma once

#include <stdlib.h>

#include "denormals.h"
#include "dispatch.h"
#include "slim_row.h"
#include "stream.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

template <class X>
int64_t slim_loss_rows(const SlimLossArgs& args, int64_t begin, int64_t end) {
  void* scratch = malloc(SlimRow<X>::scratch_bytes(args));
  if (scratch == nullptr) return kNoMemory;
  int64_t fault = kOk;
  for (int64_t n = begin; n < end && fault == kOk; ++n) {
    SlimRow<X> row(args, n, scratch);
    const Fault found = row.prepare();
    if (found != kOk) {
      fault = n * kFaults + found;
      break;
    }
    row.read(0, row.num_blocks);
    row.write(row.evaluate(), 0, row.num_blocks);
  }
  stream_fence();
  free(scratch);
  return fault;
}

// Computes one row in `parts` tasks, for fewer rows than threads.
template <class X>
int64_t slim_loss_split_row(const SlimLossArgs& args, int64_t n, int64_t parts, RunTasks run_tasks) {
  void* scratch = malloc(SlimRow<X>::scratch_bytes(args));
  if (scratch == nullptr) return kNoMemory;
  struct Context {
    SlimRow<X> row;
    int64_t parts;
    typename SlimRow<X>::DenseGradient dense;
    int64_t edge(int64_t part) const { return row.num_blocks * part / parts; }
  } context = {SlimRow<X>(args, n, scratch), parts, {}};
  const Fault found = context.row.prepare();
  if (found == kOk) {
    run_tasks(parts, &context, [](void* opaque, int64_t part) {
      const FlushDenormals flush;
      Context& task = *static_cast<Context*>(opaque);
      task.row.read(task.edge(part), task.edge(part + 1));
    });
    context.dense = context.row.evaluate();
    run_tasks(parts, &context, [](void* opaque, int64_t part) {
      const FlushDenormals flush;
      const Context& task = *static_cast<Context*>(opaque);
      task.row.write(task.dense, task.edge(part), task.edge(part + 1));
      stream_fence();
    });
  }
  free(scratch);
  return found == kOk ? kOk : n * kFaults + found;
}

int64_t slim_loss(const SlimLossArgs& args, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  return with_element_type(args.dtype,
                           [&](auto element) { return slim_loss_rows<decltype(element)>(args, begin, end); });
}

int64_t slim_loss_split(const SlimLossArgs& args, int64_t n, int64_t parts, RunTasks run_tasks) {
  const FlushDenormals flush;
  return with_element_type(
      args.dtype, [&](auto element) { return slim_loss_split_row<decltype(element)>(args, n, parts, run_tasks); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
