// Operands of the row operators: checks of what the Python side promises, and the values of named options.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "slim_loss/args.h"

namespace slimkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

inline ScalarType acc_type(Dtype dtype) { return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float; }

inline int64_t size_of(Dtype dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// The device that the operands of a call must be on.
struct OnDevice {
  int cuda_index;  // -1 for the CPU

  bool holds(const Tensor& t) const {
    return cuda_index < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == cuda_index;
  }
  const char* name() const { return cuda_index < 0 ? "the CPU" : "the device of logits"; }

  // Returns the data of a contiguous tensor of the given type and number of elements; null for an absent one.
  const void* data_of(const OptionalTensor& t, ScalarType type, int64_t numel, const char* argument) const {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(holds(*t) && t->is_contiguous() && t->scalar_type() == type && t->numel() == numel, argument,
                    " must be a contiguous tensor on ", name(), " of the documented type with ", numel,
                    " elements, got ", t->numel());
    return t->const_data_ptr();
  }

  void* out_of(const OptionalTensor& t, ScalarType type, int64_t numel, const char* argument) const {
    return const_cast<void*>(data_of(t, type, numel, argument));
  }

  void check_rows(const Tensor& t, const char* argument) const {
    STD_TORCH_CHECK(holds(t) && t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), argument,
                    " must be a two-dimensional tensor on ", name(), " whose last dimension is dense");
  }
};

template <class Enum>
struct Choice {
  const char* name;
  Enum value;
};

template <class Enum>
Enum value_of(const std::string& name, const char* argument, std::initializer_list<Choice<Enum>> choices) {
  for (const Choice<Enum>& choice : choices) {
    if (name == choice.name) return choice.value;
  }
  STD_TORCH_CHECK(false, argument, " is unknown: '", name, "'");
}

inline Rest rest_of(const std::string& name) {
  return value_of<Rest>(name, "rest",
                        {{"renorm", kRenorm},
                         {"zero", kZero},
                         {"ghost", kGhost},
                         {"zero_logit", kZeroLogit},
                         {"renorm_both", kRenormBoth}});
}

}  // namespace slimkernels
