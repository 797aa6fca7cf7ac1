// softmax_gradient_rows on a CPU: factor * exp((z - level) / T) + factor_one * exp(z - level_one) + constant, times
// dz/dlogits. That is the gradient of a loss at all but a few entries of the row. It serves the loss over a vocabulary
// that several ranks share; where a rank has the whole row, slim_row.h writes the gradient.
#pragma once

#include "denormals.h"
#include "dispatch.h"
#include "exponentials.h"
#include "slim_terms.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

template <class X>
void softmax_gradient_row(const SoftmaxGradientArgs& args, int64_t n) {
  using A = typename Acc<X>::type;
  using Vec = typename Lanes<A>::Vec;
  constexpr int kWidth = Lanes<A>::kWidth;
  const X* const row = static_cast<const X*>(args.logits) + n * args.logits_stride;
  X* const gradient = static_cast<X*>(args.gradient) + n * args.gradient_stride;
  const A* const numbers = static_cast<const A*>(args.numbers) + n;
  const A factor = numbers[0], factor_one = numbers[2 * args.num_rows];
  const A level = numbers[args.num_rows], level_one = numbers[3 * args.num_rows];
  const A constant = numbers[4 * args.num_rows];
  if (factor == 0 && factor_one == 0 && constant == 0) {
    // The gradient is exactly 0 whatever the row holds, also NaN.
    memset(gradient, 0, args.vocab_size * sizeof(X));
    return;
  }
  const bool transform = args.logit_scale != 1 || args.softcap > 0, two_temperatures = args.temperature != 1;
  const A inv_temperature = A(1 / args.temperature);
  for (int64_t i = 0; i < args.vocab_size; i += kWidth) {
    const int64_t left = args.vocab_size - i;
    Vec z = left >= kWidth ? load(row + i) : load_part(row + i, left, level);
    if (transform) z = transformed(z, args);
    Vec dz = exp((z - level) * inv_temperature) * factor + constant;
    if (two_temperatures) dz += exp(z - level_one) * factor_one;
    if (transform) dz *= transform_slope(z, args);
    if (left >= kWidth) {
      store(gradient + i, dz);
    } else {
      store_part(gradient + i, dz, left);
    }
  }
}

template <class X>
int64_t softmax_gradient_rows(const SoftmaxGradientArgs& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) softmax_gradient_row<X>(args, n);
  return kOk;
}

int64_t softmax_gradient(const SoftmaxGradientArgs& args, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  return with_element_type(args.dtype,
                           [&](auto element) { return softmax_gradient_rows<decltype(element)>(args, begin, end); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
