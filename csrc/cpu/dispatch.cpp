#include "dispatch.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef SK_X86
#include <cpuid.h>
#endif

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

#ifdef SK_X86
// The features of this machine that the operating system supports, too: XCR0 says which registers it saves.
// __builtin_cpu_supports would do, but finds none where Zig's runtime library defines it.
struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;

  Features() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return;  // no XGETBV
    const bool has_fma = bit(c, 12), has_f16c = bit(c, 29);
    uint32_t xcr0, high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const bool has_vbmi2 = bit(c, 6);
    const bool saves_ymm = (xcr0 & 0x6) == 0x6, saves_zmm = (xcr0 & 0xe6) == 0xe6;
    avx2 = saves_ymm && has_fma && has_f16c && bit(b, 5) && bit(b, 8);  // AVX2, BMI2
    // AVX-512 F, DQ, CD, BW and VL.
    avx512 = saves_zmm && bit(b, 16) && bit(b, 17) && bit(b, 28) && bit(b, 30) && bit(b, 31);
    const bool has_subleaf_1 = a >= 1;
    if (has_subleaf_1) __get_cpuid_count(7, 1, &a, &b, &c, &d);
    avx512_bf16 = avx512 && has_vbmi2 && has_subleaf_1 && bit(a, 5);
  }

  static bool bit(uint32_t word, int index) { return (word >> index & 1) != 0; }
};
#endif

Choice choose() {
  Choice choice;
  const KernelTable* candidates[4];
  int count = 0;
#ifdef SK_X86
  const Features has;
  if (has.avx512_bf16) candidates[count++] = &avx512_bf16::table;
  if (has.avx512) candidates[count++] = &avx512::table;
  if (has.avx2) candidates[count++] = &avx2::table;
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
