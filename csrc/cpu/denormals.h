// Results too small for a normal number. Softmax needs none of them, and many processors take a hundred cycles and more
// for an operation that makes or reads one.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace slimkernels {
namespace SK_ISA {
namespace {

// Makes denormal results of this thread exactly 0 (`flush`), or makes them as they are, for as long as it exists, and
// restores the caller's mode. Denormal inputs keep their values, so that comparisons and the conversion of float16 stay
// exact. Only x86 has such a mode; elsewhere, denormals are made.
template <bool flush>
class DenormalMode {
 public:
#if defined(__SSE2__)
  DenormalMode() : mode_(_mm_getcsr()) {
    _mm_setcsr(flush ? mode_ | _MM_FLUSH_ZERO_ON : mode_ & ~unsigned(_MM_FLUSH_ZERO_MASK));
  }
  ~DenormalMode() { _mm_setcsr(mode_); }

 private:
  unsigned mode_;

 public:
#else
  DenormalMode() {}
#endif
  DenormalMode(const DenormalMode&) = delete;
  DenormalMode& operator=(const DenormalMode&) = delete;
};

using FlushDenormals = DenormalMode<true>;
using KeepDenormals = DenormalMode<false>;

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
