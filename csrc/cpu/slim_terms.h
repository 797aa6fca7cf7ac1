// The terms of a row of slim_loss on a CPU: those of ../slim_loss/terms.h on vectors, and the teacher's logits.
#pragma once

#include "dispatch.h"
#include "exponentials.h"
#include "sparse_softmax.inl"
// After the functions on vectors that it calls.
#include "../slim_loss/terms.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// Writes the teacher's kept logits / T, from any dtype, padded with -inf.
template <class A>
void load_teacher(const SlimLossArgs& args, int64_t n, int64_t kept, A* out) {
  const double inv_temperature = 1 / args.temperature;
  const int64_t offset = n * args.top_k;
  with_element_type(args.teacher_dtype, [&](auto element) {
    load_scaled(static_cast<const decltype(element)*>(args.teacher_logits) + offset, kept, inv_temperature, out);
  });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
