// The pybind11 module `slimkernels._C`: information about the build and the instruction set, and the store's codec.
// Importing it also registers the CPU operators (ops.cpp).
#include <pybind11/pybind11.h>

#include "cpu/dispatch.h"
#include "store/codec.h"

#define SK_STRING_OF(x) #x
#define SK_STRING(x) SK_STRING_OF(x)

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native code of slimkernels.";
  m.def(
      "cpu_isa",
      [] {
        if (const char* error = slimkernels::kernels_error()) throw py::value_error(error);
        return slimkernels::kernels().isa;
      },
      "Returns the instruction set that the CPU kernels use; SLIMKERNELS_CPU_ISA overrides the choice.");
  m.def(
      "supported_cpu_isas", [] { return py::str(slimkernels::supported_isas()).attr("split")(); },
      "Returns the instruction sets that this build contains and this machine supports, best first.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = SK_STRING(SK_TORCH_VERSION);
        info["stable_abi"] = "2.10";
        return info;
      },
      "Returns the compiler, the version of torch at build time, and the oldest torch that the library works with.");
  bind_store_codec(m);
}
