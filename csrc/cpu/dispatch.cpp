#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#include <string>

namespace slimkernels {

namespace baseline {
extern const KernelTable table;
}
#ifdef SK_X86
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
#endif

namespace {

struct Choice {
  const KernelTable* table = nullptr;
  std::string supported;
  std::string error;
};

// __builtin_cpu_supports checks cpuid and xgetbv, so an ISA whose registers the operating system does not save is not
// reported.
Choice choose() {
  Choice choice;
  const KernelTable* candidates[4];
  int count = 0;
#ifdef SK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16")) {
      candidates[count++] = &avx512_bf16::table;
    }
    candidates[count++] = &avx512::table;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    candidates[count++] = &avx2::table;
  }
#endif
  candidates[count++] = &baseline::table;
  for (int i = 0; i < count; ++i) {
    choice.supported += (i ? " " : "") + std::string(candidates[i]->isa);
  }
  const char* wanted = getenv("SLIMKERNELS_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    choice.table = candidates[0];
    return choice;
  }
  for (int i = 0; i < count; ++i) {
    if (strcmp(wanted, candidates[i]->isa) == 0) choice.table = candidates[i];
  }
  if (choice.table == nullptr) {
    choice.error = "SLIMKERNELS_CPU_ISA must be one of '" + choice.supported + "' on this machine, got '" + wanted +
                   "': unset it to use the best one";
  }
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const KernelTable& kernels() { return *choice().table; }
const char* kernels_error() { return choice().error.empty() ? nullptr : choice().error.c_str(); }
const char* supported_isas() { return choice().supported.c_str(); }

}  // namespace slimkernels
