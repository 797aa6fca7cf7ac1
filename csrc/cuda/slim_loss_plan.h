// Plans how slim_loss_kernel is launched. This is host code without CUDA, so that it can be tested without a GPU.
#pragma once

#include <math.h>

#include "row_plan.h"
#include "slim_loss_memory.cuh"

namespace slimkernels {
namespace cuda {
namespace {

// Every warp does some work once per row, which fewer threads do less often, and a thread of fewer has more registers.
constexpr int kLaunchedThreads = 256;

template <class X, bool kStaged>
RowPlan plan_of(const SlimLossArgs& args, int num_blocks) {
  const int64_t slice = slice_of(args.vocab_size, num_blocks, kTile);
  return {num_blocks, kStaged, slice, layout_of<X, kStaged, kLaunchedThreads>(args, slice).bytes};
}

// A row that does not fit into shared memory is read through L2.
template <class X>
RowPlan make_plan(const Machine& machine, const SlimLossArgs& args) {
  const int num_blocks = choose_num_blocks(machine, args.num_rows, args.vocab_size, kTile,
                                           [&](int blocks) { return plan_of<X, true>(args, blocks).bytes; });
  const RowPlan staged = plan_of<X, true>(args, num_blocks);
  return staged.bytes <= machine.block_bytes ? staged : plan_of<X, false>(args, num_blocks);
}

template <class X, bool kStaged, int kThreads>
SlimLossLaunch launch_of(const SlimLossArgs& args, int64_t slice) {
  ElementOptions options = {};
  options.rest = args.rest;
  options.divergence = args.divergence;
  options.alpha = float(args.alpha);
  options.beta = float(args.beta);
  options.softcap = float(args.softcap);
  options.logit_scale = float(args.logit_scale);
  options.inverse = limited_scale(1 / args.temperature);
  options.exponent = limited_scale(M_LOG2E / args.temperature);
  options.exponent_one = float(M_LOG2E);
  options.teacher_blend = float(args.teacher_blend);
  options.two_temperatures = args.temperature != 1;
  options.general = is_general(args);
  options.marks = needs_marks(args);
  options.plain = is_plain(args);
  return {args, options, int32_t(slice), int32_t(capacity_of(args, slice)),
          layout_of<X, kStaged, kThreads>(args, slice)};
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
