// The teacher's log-probabilities at its kept ids, and the log of what it gives to all others together.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// The ids that come before the padding (-1), or -1 where the row is not strictly ascending inside [0, vocab_size).
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

// What the teacher's row is normalised by: log of the sum that every kept exp(logit / T) is divided by.
SK_INLINE double teacher_log_norm(int rest, double log_kept, double lse, int64_t kept, int64_t vocab_size) {
  switch (rest) {
    case kRenorm:
    case kRenormBoth:
      return log_kept == -infinity<double>() ? 0 : log_kept;  // nothing kept has mass, and so it stays
    case kZeroLogit: {
      const double unkept = double(vocab_size - kept);
      return unkept > 0 ? log_add_exp(log_kept, __builtin_log(unkept)) : log_kept;
    }
    default:
      return lse;
  }
}

// The log of what the teacher leaves outside its kept ids; nothing where it keeps every id, whatever rounding says.
SK_INLINE double log_ghost(double log_mass, int64_t kept, int64_t vocab_size) {
  return kept == vocab_size ? -infinity<double>() : log1m_exp(log_mass);
}

template <class X>
int64_t sparse_softmax_rows(const SparseSoftmaxArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  A* scaled = static_cast<A*>(malloc((2 * padded<A>(args.top_k) + 1) * sizeof(A)));
  if (scaled == nullptr) return kNoMemory;
  int64_t fault = kOk;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t kept = count_kept(args.ids + n * args.top_k, args.top_k, args.vocab_size);
    if (kept < 0) {
      fault = n * kFaults + kBadIds;
      break;
    }
    load_scaled(static_cast<const X*>(args.logits) + n * args.top_k, kept, 1 / args.temperature, scaled);
    const double log_kept = exponentials(scaled, padded<A>(kept), 1, scaled + padded<A>(args.top_k)).log();
    const double lse = args.lse == nullptr ? 0 : double(static_cast<const A*>(args.lse)[n]);
    const double log_norm = teacher_log_norm(args.rest, log_kept, lse, kept, args.vocab_size);
    A* logprobs = static_cast<A*>(args.logprobs) + n * args.top_k;
    for (int64_t k = 0; k < args.top_k; ++k) logprobs[k] = k < kept ? A(scaled[k] - log_norm) : -infinity<A>();
    double tail = -infinity<double>();
    if (args.rest == kGhost) tail = log_ghost(log_kept - lse, kept, args.vocab_size);
    if (args.rest == kZeroLogit && args.vocab_size > kept)
      tail = __builtin_log(double(args.vocab_size - kept)) - log_norm;
    static_cast<A*>(args.tail_logprob)[n] = A(tail);
  }
  free(scaled);
  return fault;
}

int64_t sparse_softmax(const SparseSoftmaxArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case kFloat32:
      return sparse_softmax_rows<float>(args, begin, end);
    case kBFloat16:
      return sparse_softmax_rows<bf16>(args, begin, end);
    case kFloat16:
      return sparse_softmax_rows<f16>(args, begin, end);
    default:
      return sparse_softmax_rows<double>(args, begin, end);
  }
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
