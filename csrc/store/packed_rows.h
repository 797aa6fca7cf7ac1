// The CPU kernel of decode_logits, which decodes rows padded to one width (slimkernels/packed_logits.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../cpu/dispatch.h"
#include "elias_fano.h"

namespace slimkernels {

struct DecodeLogitsArgs {
  const uint32_t* id_words;  // (N, W)
  int64_t num_words;
  const void* values;     // (N, K)
  const float* affine;    // (N, 2) scale, zero; null unless values are uint8
  const int32_t* counts;  // (N,), or null if every row keeps K entries
  int64_t vocab_size;
  int64_t top_k;
  int32_t* ids;   // (N, K)
  float* logits;  // (N, K)
  void (*decode)(const DecodeLogitsArgs&, int64_t row, int64_t count);
};

inline float logit_of(float value, const float*) { return value; }

inline float logit_of(uint16_t value, const float*) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float logit;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

inline float logit_of(uint8_t value, const float* affine) { return affine[1] + affine[0] * static_cast<float>(value); }

template <class Value>
void decode_values(const DecodeLogitsArgs& args, int64_t row, int64_t count) {
  const Value* values = static_cast<const Value*>(args.values) + row * args.top_k;
  const float* affine = args.affine == nullptr ? nullptr : args.affine + 2 * row;
  float* logits = args.logits + row * args.top_k;
  for (int64_t k = 0; k < count; ++k) logits[k] = logit_of(values[k], affine);
}

// Decodes rows [begin, end). Stops at the first row whose ids are invalid and returns row * kFaults + kBadIds.
inline int64_t decode_packed_rows(const DecodeLogitsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t count = args.counts == nullptr ? args.top_k : args.counts[row];
    const int64_t bad = row * kFaults + kBadIds;
    if (count < 1 || count > args.top_k) return bad;
    const store::RowLayout layout = store::row_layout(args.vocab_size, count);
    if (layout.words() > args.num_words) return bad;
    int32_t* ids = args.ids + row * args.top_k;
    float* logits = args.logits + row * args.top_k;
    const uint32_t* words = args.id_words + row * args.num_words;
    if (store::decode_ids(words, layout, args.vocab_size, count, ids) != store::RowFault::kNone) return bad;
    args.decode(args, row, count);
    std::fill(ids + count, ids + args.top_k, -1);
    std::fill(logits + count, logits + args.top_k, 0.0f);
  }
  return kOk;
}

}  // namespace slimkernels
