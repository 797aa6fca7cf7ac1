// Plans how slim_loss_kernel is launched. This is host code without CUDA, so that it can be tested without a GPU.
#pragma once

#include <float.h>
#include <math.h>

#include "machine.h"
#include "slim_loss_memory.cuh"

namespace slimkernels {
namespace cuda {
namespace {

// Every warp does some work once per row, which fewer threads do less often, and a thread of fewer has more registers.
constexpr int kLaunchedThreads = 256;
constexpr int kMaxBlocks = 8;  // cluster size that every device with clusters supports

struct SlimLossPlan {
  int num_blocks;  // blocks per row
  bool staged;     // whether the row is kept in shared memory
  int64_t slice, bytes;
};

inline int64_t slice_of(int64_t vocab_size, int num_blocks) {
  const int64_t tiles = (vocab_size + kTile - 1) / kTile;
  return (tiles + num_blocks - 1) / num_blocks * kTile;
}

template <class X, bool kStaged>
SlimLossPlan plan_of(const SlimLossArgs& args, int num_blocks) {
  const int64_t slice = slice_of(args.vocab_size, num_blocks);
  return {num_blocks, kStaged, slice, layout_of<X, kStaged, kLaunchedThreads>(args, slice).bytes};
}

// Chooses the number of blocks. It starts with the fewest whose slices leave room for a second block on a
// multiprocessor, which loads while the first one computes, and uses more while multiprocessors would be idle. A row
// that does not fit into shared memory is read through L2.
template <class X>
SlimLossPlan make_plan(const Machine& machine, const SlimLossArgs& args) {
  const int max_blocks = machine.has_clusters ? kMaxBlocks : 1;
  int num_blocks = 1;
  const auto bytes = [&] { return plan_of<X, true>(args, num_blocks).bytes; };
  while (num_blocks < max_blocks && bytes() > machine.processor_bytes / 2 - kReservedBytes) num_blocks *= 2;
  while (num_blocks < max_blocks && 2 * num_blocks * args.num_rows <= machine.processors &&
         args.vocab_size >= 2 * num_blocks * kTile) {
    num_blocks *= 2;
  }
  if (bytes() <= machine.block_bytes) return plan_of<X, true>(args, num_blocks);
  return plan_of<X, false>(args, num_blocks);
}

template <class X, bool kStaged, int kThreads>
SlimLossLaunch launch_of(const SlimLossArgs& args, int64_t slice) {
  // The scale is bounded, so that neither 0 nor -inf times the scale is NaN.
  const auto bounded = [](double scale) { return float(fmin(fmax(scale, FLT_MIN), FLT_MAX)); };
  ElementOptions options = {};
  options.rest = args.rest;
  options.divergence = args.divergence;
  options.alpha = float(args.alpha);
  options.beta = float(args.beta);
  options.softcap = float(args.softcap);
  options.logit_scale = float(args.logit_scale);
  options.inverse = bounded(1 / args.temperature);
  options.exponent = bounded(M_LOG2E / args.temperature);
  options.exponent_one = float(M_LOG2E);
  options.teacher_blend = float(args.teacher_blend);
  options.two_temperatures = args.temperature != 1;
  options.marks = needs_marks(args);
  options.plain = is_plain(args);
  return {args, options, int32_t(slice), int32_t(capacity_of(args, slice)),
          layout_of<X, kStaged, kThreads>(args, slice)};
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
