// Operators of CUDA tensors that choose between the CUDA C++ kernel and the Triton kernel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

namespace slimkernels {
namespace {

// A function of type Operator that calls Kernel::run, or the operator Kernel::kTriton where Kernel::serves says no.
template <class Kernel, class Operator>
struct Chosen;
template <class Kernel, class... Rest>
struct Chosen<Kernel, int64_t(torch::stable::Tensor, Rest...)> {
  static int64_t run(torch::stable::Tensor logits, Rest... rest) {
    if (Kernel::serves(logits, rest...)) return Kernel::run(logits, rest...);
    using torch::stable::detail::from;
    std::array<StableIValue, 1 + sizeof...(Rest)> stack = {from(logits), from(rest)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(Kernel::kTriton, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<int64_t>(stack[0]);
  }
};

}  // namespace
}  // namespace slimkernels
