// sparse_softmax on a CPU: the teacher's log-probabilities at its kept ids, and of all other ids together. slim_loss
// shares the functions over a teacher's row.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "exponentials.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// Counts the ids that come before the padding (-1); -1 if they do not ascend strictly inside [0, vocab_size).
SK_INLINE int64_t count_kept(const int32_t* ids, int64_t top_k, int64_t vocab_size) {
  int64_t kept = top_k > 0 && ids[top_k - 1] >= 0 ? top_k : 0;
  while (kept < top_k && ids[kept] >= 0) ++kept;
  bool bad = kept > 0 && (ids[0] < 0 || ids[kept - 1] >= vocab_size);
  for (int64_t k = 1; k < kept; ++k) bad |= ids[k] <= ids[k - 1];
  for (int64_t k = kept; k < top_k; ++k) bad |= ids[k] != -1;
  return bad ? -1 : kept;
}

// Writes the kept logits divided by the temperature, padded with -inf to the vector width.
template <class X, class A>
SK_INLINE void load_scaled(const X* logits, int64_t kept, double inv_temperature, A* out) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const A scale = A(inv_temperature);
  int64_t k = 0;
  if constexpr (sizeof(typename Acc<X>::type) == sizeof(A)) {
    for (; k + kWidth <= kept; k += kWidth) store(out + k, load(logits + k) * scale);
  }
  for (; k < kept; ++k) out[k] = A(load_one(logits + k)) * scale;
  for (; k < padded<A>(kept); ++k) out[k] = -infinity<A>();
}

template <class X>
int64_t sparse_softmax_rows(const SparseSoftmaxArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  A* teacher_z = static_cast<A*>(malloc((2 * padded<A>(args.top_k) + 1) * sizeof(A)));
  if (teacher_z == nullptr) return kNoMemory;
  A* teacher_e = teacher_z + padded<A>(args.top_k);
  int64_t fault = kOk;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t kept = count_kept(args.ids + n * args.top_k, args.top_k, args.vocab_size);
    if (kept < 0) {
      fault = n * kFaults + kBadIds;
      break;
    }
    load_scaled(static_cast<const X*>(args.logits) + n * args.top_k, kept, 1 / args.temperature, teacher_z);
    const double lse_on = exponentials(teacher_z, padded<A>(kept), 1, teacher_e).log();
    const double lse = args.lse == nullptr ? 0 : double(static_cast<const A*>(args.lse)[n]);
    const double rest_lse = known_or_nan<A>(args.rest_lse, n);
    const TeacherNorm norm = teacher_norm(args.rest, lse_on, lse, rest_lse, kept, args.vocab_size);
    A* logprobs = static_cast<A*>(args.logprobs) + n * args.top_k;
    for (int64_t k = 0; k < args.top_k; ++k) logprobs[k] = k < kept ? A(teacher_z[k] - norm.q_norm) : -infinity<A>();
    static_cast<A*>(args.tail_logprob)[n] = A(norm.log_q_tail);
  }
  free(teacher_z);
  return fault;
}

int64_t sparse_softmax(const SparseSoftmaxArgs& args, int64_t begin, int64_t end) {
  return with_element_type(args.dtype,
                           [&](auto element) { return sparse_softmax_rows<decltype(element)>(args, begin, end); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
