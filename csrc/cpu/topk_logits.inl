// The K largest logits of a row, ordered by id, and the row's log-sum-exp, from one read of the row.
//
// A strided sample gives a threshold that a few more than K elements pass; one pass collects them with their ids while
// it sums the exponentials; a radix select finds the exact K-th among them. A sample that misleads costs a second
// pass that collects everything: slower, never wrong.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// Larger key, larger logit: -0.0 equals 0.0, every NaN is the largest.
template <class A, class Key = typename Lanes<A>::Key>
SK_INLINE Key order_key(A value) {
  if (value != value) return ~Key(0);
  const Key bits = bitcast<Key>(value == 0 ? A(0) : value);
  constexpr int top = sizeof(Key) * 8 - 1;
  return bits >> top ? ~bits : bits | (Key(1) << top);
}

template <class A, class Key = typename Lanes<A>::Key>
SK_INLINE A value_of_key(Key key) {
  constexpr int top = sizeof(Key) * 8 - 1;
  return bitcast<A>(key >> top ? key ^ (Key(1) << top) : ~key);
}

// The rank-th largest of `keys` (rank 1 is the largest). Reorders nothing it does not own: `keys` is overwritten.
template <class Key>
Key select_key(Key* keys, int64_t count, int64_t rank) {
  constexpr int kDigitBits = 11;
  uint32_t histogram[1 << kDigitBits];
  for (;;) {
    Key low = keys[0], high = keys[0];
    for (int64_t i = 1; i < count; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
    if (low == high) return low;
    // Digits of the range that is really there, so that keys crowded into one binade still spread.
    const int range_bits = 64 - __builtin_clzll(uint64_t(high - low));
    const int shift = range_bits > kDigitBits ? range_bits - kDigitBits : 0;
    memset(histogram, 0, sizeof(histogram));
    for (int64_t i = 0; i < count; ++i) ++histogram[(keys[i] - low) >> shift];
    int64_t digit = int64_t((high - low) >> shift);
    while (histogram[digit] < rank) rank -= histogram[digit--];
    if (shift == 0) return low + Key(digit);
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Key key = keys[i];
      keys[kept] = key;
      kept += int64_t((key - low) >> shift) == digit;
    }
    count = kept;
  }
}

// ---- Which lanes are not below a threshold (a NaN is not), and appending them with their ids. Appending writes whole
// vectors, so the arrays have a vector of room behind their last entry; values and ids may be compacted in place.

#if defined(__AVX512F__)
using MaskF = __mmask16;
SK_INLINE MaskF not_below(VecF v, float threshold) {
  return _mm512_cmp_ps_mask(bitcast<__m512>(v), _mm512_set1_ps(threshold), _CMP_NLT_UQ);
}
SK_INLINE int64_t count(MaskF mask) { return __builtin_popcount(mask); }
SK_INLINE int64_t append(MaskF mask, VecF v, VecI id, float* values, int32_t* ids) {
  // Compressing in registers and storing whole vectors: compress-to-memory is microcoded on some machines.
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, bitcast<__m512>(v)));
  _mm512_storeu_si512(ids, _mm512_maskz_compress_epi32(mask, bitcast<__m512i>(id)));
  return count(mask);
}
#else
using MaskF = VecI;
SK_INLINE MaskF not_below(VecF v, float threshold) { return ~(v < threshold); }
SK_INLINE int64_t count(MaskF mask) { return int64_t(-sum_lanes(mask)); }
SK_INLINE int64_t append(MaskF mask, VecF v, VecI id, float* values, int32_t* ids) {
  int64_t found = 0;
  for (int lane = 0; lane < 16; ++lane) {
    values[found] = v[lane];
    ids[found] = id[lane];
    found -= mask[lane];
  }
  return found;
}
#endif

SK_INLINE VecL not_below(VecD v, double threshold) { return ~(v < threshold); }
SK_INLINE int64_t count(VecL mask) { return int64_t(-sum_lanes(mask)); }
SK_INLINE int64_t append(VecL mask, VecD v, VecI id, double* values, int32_t* ids) {
  int64_t found = 0;
  for (int lane = 0; lane < 8; ++lane) {
    values[found] = v[lane];
    ids[found] = id[lane];
    found -= mask[lane];
  }
  return found;
}

SK_INLINE VecI ids_from(int64_t first) {
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane + int32_t(first);
}

template <class A>
struct TopkScratch {
  using Key = typename Lanes<A>::Key;
  A* values;     // (V + width) candidates in id order
  int32_t* ids;  // (V + width)
  Key* keys;     // (V)
  A* block;      // (kBlock)
  LogSum* sums;  // (M)
};

// Appends everything not below the threshold, in id order, and where asked sums the row's exponentials.
template <class X, class A>
int64_t collect(const X* row, const TopkLogitsArgs& args, A threshold, bool sum_too, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  const int64_t vocab_size = args.vocab_size;
  int64_t found = 0;
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const int64_t length = vocab_size - begin < kBlock ? vocab_size - begin : kBlock;
    typename Lanes<A>::Vec best = {};
    best -= infinity<A>();
    for (int64_t i = 0; i < length; i += kWidth) {
      const int64_t left = length - i;
      const auto v = left >= kWidth ? load(row + begin + i) : load_part(row + begin + i, left, -infinity<A>());
      const int64_t more =
          append(not_below(v, threshold), v, ids_from(begin + i), scratch.values + found, scratch.ids + found);
      best = max(best, v);
      store(scratch.block + i, v);
      found += more;
    }
    if (!sum_too) continue;
    for (int64_t m = 0; m < args.num_temperatures; ++m) {
      add_block(scratch.sums[m], scratch.block, padded<A>(length), max_lanes(best));
    }
  }
  // Padding lanes of the last vector pass a threshold of -inf; they carry the ids past the row's end.
  while (found > 0 && scratch.ids[found - 1] >= vocab_size) --found;
  return found;
}

// A threshold that about K plus four standard deviations of the sampling error pass; -inf where sampling cannot help.
template <class X, class A>
A sampled_threshold(const X* row, const TopkLogitsArgs& args, const TopkScratch<A>& scratch) {
  const int64_t vocab_size = args.vocab_size;
  int64_t samples = vocab_size / 32;
  samples = samples < 512 ? 512 : samples > 4096 ? 4096 : samples;
  if (vocab_size < 4 * samples || 4 * args.top_k > vocab_size) return -infinity<A>();
  const int64_t stride = vocab_size / samples;
  for (int64_t i = 0; i < samples; ++i) scratch.keys[i] = order_key(load_one(row + i * stride));
  const double fraction = double(args.top_k) / vocab_size;
  const double expected = fraction * samples;
  const int64_t rank = int64_t(expected + 4 * __builtin_sqrt(expected * (1 - fraction)) + 4);
  return rank >= samples ? -infinity<A>() : value_of_key<A>(select_key(scratch.keys, samples, rank));
}

// Compacts the candidates in place to the top_k largest, still in id order, ties to the lowest id.
template <class A>
void keep_largest(int64_t found, int64_t top_k, const TopkScratch<A>& scratch) {
  constexpr int kWidth = Lanes<A>::kWidth;
  for (int64_t i = 0; i < found; ++i) scratch.keys[i] = order_key(scratch.values[i]);
  const auto kth = select_key(scratch.keys, found, top_k);
  const A threshold = value_of_key<A>(kth);
  for (int64_t i = found; i < padded<A>(found); ++i) scratch.values[i] = -infinity<A>();
  int64_t reaching = 0;
  for (int64_t i = 0; i < found; i += kWidth) reaching += count(not_below(load(scratch.values + i), threshold));

  int64_t kept = 0;
  if (reaching == top_k) {
    for (int64_t i = 0; i < found; i += kWidth) {
      VecI ids;
      memcpy(&ids, scratch.ids + i, sizeof(ids));
      const auto v = load(scratch.values + i);
      kept += append(not_below(v, threshold), v, ids, scratch.values + kept, scratch.ids + kept);
    }
    return;
  }
  int64_t ties = top_k;
  for (int64_t i = 0; i < found; ++i) ties -= order_key(scratch.values[i]) > kth;
  for (int64_t i = 0; i < found && kept < top_k; ++i) {
    const auto key = order_key(scratch.values[i]);
    const bool tie = key == kth && ties > 0;
    ties -= tie;
    scratch.values[kept] = scratch.values[i];
    scratch.ids[kept] = scratch.ids[i];
    kept += key > kth || tie;
  }
}

template <class X>
void topk_row(const TopkLogitsArgs& args, int64_t n, const TopkScratch<typename Acc<X>::type>& scratch) {
  using A = typename Acc<X>::type;
  const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
  const int64_t top_k = args.top_k;

  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    scratch.sums[m] = LogSum();
    scratch.sums[m].inv_temperature = 1 / args.temperatures[m];
  }
  const A threshold = sampled_threshold<X, A>(row, args, scratch);
  int64_t found = collect(row, args, threshold, true, scratch);
  if (found < top_k) found = collect(row, args, -infinity<A>(), false, scratch);

  keep_largest(found, top_k, scratch);
  X* values = static_cast<X*>(args.values) + n * top_k;
  memcpy(args.ids + n * top_k, scratch.ids, top_k * sizeof(int32_t));
  int64_t i = 0;
  for (; i + Lanes<A>::kWidth <= top_k; i += Lanes<A>::kWidth) store(values + i, load(scratch.values + i));
  if (i < top_k) store_part(values + i, load(scratch.values + i), top_k - i);

  A* lse = static_cast<A*>(args.lse) + n * args.num_temperatures;
  for (int64_t m = 0; m < args.num_temperatures; ++m) {
    lse[m] = A(scratch.sums[m].log());
    // exp(inf - inf) made the sum NaN; the row's sum is infinite unless a NaN is really there.
    if (scratch.sums[m].max == infinity<double>()) {
      lse[m] = infinity<A>();
      for (int64_t v = 0; v < args.vocab_size; ++v) {
        const A x = load_one(row + v);
        if (x != x) lse[m] = x;
      }
    }
  }
}

template <class X>
int64_t topk_rows(const TopkLogitsArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t capacity = padded<A>(args.vocab_size) + Lanes<A>::kWidth;
  const int64_t bytes =
      capacity * (2 * sizeof(A) + sizeof(int32_t)) + kBlock * sizeof(A) + args.num_temperatures * sizeof(LogSum);
  char* memory = static_cast<char*>(malloc(bytes));
  if (memory == nullptr) return kNoMemory;
  TopkScratch<A> scratch;
  scratch.sums = reinterpret_cast<LogSum*>(memory);
  scratch.values = reinterpret_cast<A*>(scratch.sums + args.num_temperatures);
  scratch.keys = reinterpret_cast<typename Lanes<A>::Key*>(scratch.values + capacity);
  scratch.block = reinterpret_cast<A*>(scratch.keys + capacity);
  scratch.ids = reinterpret_cast<int32_t*>(scratch.block + kBlock);

  int64_t fault = kOk;
  for (int64_t n = begin; n < end; ++n) {
    if (args.target != nullptr) {
      const int64_t target = args.target[n];
      A* target_logit = static_cast<A*>(args.target_logit) + n;
      if (target >= args.vocab_size) {
        fault = n * kFaults + kBadTarget;
        break;
      }
      const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
      *target_logit = target < 0 ? A(__builtin_nan("")) : load_one(row + target);
    }
    topk_row<X>(args, n, scratch);
  }
  free(memory);
  return fault;
}

int64_t topk_logits(const TopkLogitsArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case kFloat32:
      return topk_rows<float>(args, begin, end);
    case kBFloat16:
      return topk_rows<bf16>(args, begin, end);
    case kFloat16:
      return topk_rows<f16>(args, begin, end);
    default:
      return topk_rows<double>(args, begin, end);
  }
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
