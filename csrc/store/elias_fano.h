// Encodes sorted ids of a vocabulary in a number of bits that depends on (vocab_size, K) only: the low bits of the ids
// are stored consecutively, the high parts as a unary bitmap (slimkernels/store/FORMAT.md).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "xxh64.h"

namespace slimkernels::store {

// Reasons for rejecting a row. slimkernels/store/codec.py uses the same numbers.
enum class RowFault : int {
  kNone = 0,
  kOffsets = 1,     // a ragged row's offsets leave the shard or disagree with its number of entries
  kChecksum = 2,    // the bytes differ from those written
  kIdBits = 3,      // the high bitmap does not hold exactly K ones, or a padding bit is set
  kIdOrder = 4,     // ids not strictly ascending
  kIdRange = 5,     // an id outside [0, vocab_size)
  kPadding = 6,     // an entry after padding (encoding only)
  kEmpty = 7,       // no entry at all (encoding only)
  kNotFinite = 8,   // a kept logit is NaN or infinite
  kMagnitude = 9,   // a logit, or the span of a row, is too large for the codec (encoding only)
  kAffine = 10,     // scale or zero is not a value that an encoder writes
  kLse = 11,        // an lse is NaN or infinite
  kTarget = 12,     // a target_logit is +inf
  kMass = 13,       // the kept logits hold more probability than lse allows (encoding only)
  kValueBits = 14,  // a bit behind the values of a row is set
  kRest = 15,       // a rest_lse is +inf
  kRestMass = 16,   // rest_lse holds more probability than lse allows (encoding only)
};

// The layout of a row's ids in 32-bit words: K fields of `low_bits` bits, then the high bitmap.
struct RowLayout {
  int low_bits;
  int64_t low_words;
  int64_t high_words;
  int64_t high_bits;
  int64_t words() const { return low_words + high_words; }
};

// Returns the layout of a row; requires 1 <= top_k <= vocab_size < 2^31.
inline RowLayout row_layout(int64_t vocab_size, int64_t top_k) {
  RowLayout layout{};
  while ((top_k << (layout.low_bits + 1)) <= vocab_size) ++layout.low_bits;
  const int64_t buckets = (vocab_size + (int64_t{1} << layout.low_bits) - 1) >> layout.low_bits;
  layout.high_bits = top_k + buckets;
  layout.low_words = (top_k * layout.low_bits + 31) / 32;
  layout.high_words = (layout.high_bits + 31) / 32;
  return layout;
}

// Reads a field of `width` bits at bit `position`, without touching bytes at or past `end`.
inline uint32_t read_field(const uint8_t* bytes, const uint8_t* end, int64_t position, int width) {
  const uint8_t* p = bytes + (position >> 3);
  uint64_t v = 0;
  std::memcpy(&v, p, static_cast<size_t>(std::min<int64_t>(8, end - p)));
  return static_cast<uint32_t>((v >> (position & 7)) & ((uint64_t{1} << width) - 1));
}

// Merges low fields of L <= 8 bits into ids, eight at a time: they are L whole bytes, so one load and constant shifts
// suffice. Returns the number of merged ids.
template <int L>
inline int64_t merge_low_by_eight(const uint8_t* bytes, const uint8_t* end, int64_t n, int32_t* ids) {
  constexpr uint64_t mask = (uint64_t{1} << L) - 1;
  const uint8_t* p = bytes;
  int64_t j = 0;
  for (; j + 8 <= n && end - p >= 8; j += 8, p += L) {
    const uint64_t w = load64(p);
    for (int i = 0; i < 8; ++i) ids[j + i] |= static_cast<int32_t>((w >> (i * L)) & mask);
  }
  return j;
}

inline void merge_low(const uint8_t* bytes, const uint8_t* end, int64_t n, int low_bits, int32_t* ids) {
  int64_t j = 0;
  switch (low_bits) {
    case 0:
      return;
    case 1:
      j = merge_low_by_eight<1>(bytes, end, n, ids);
      break;
    case 2:
      j = merge_low_by_eight<2>(bytes, end, n, ids);
      break;
    case 3:
      j = merge_low_by_eight<3>(bytes, end, n, ids);
      break;
    case 4:
      j = merge_low_by_eight<4>(bytes, end, n, ids);
      break;
    case 5:
      j = merge_low_by_eight<5>(bytes, end, n, ids);
      break;
    case 6:
      j = merge_low_by_eight<6>(bytes, end, n, ids);
      break;
    case 7:
      j = merge_low_by_eight<7>(bytes, end, n, ids);
      break;
    case 8:
      j = merge_low_by_eight<8>(bytes, end, n, ids);
      break;
    default:
      break;
  }
  for (; j < n; ++j) ids[j] |= static_cast<int32_t>(read_field(bytes, end, j * low_bits, low_bits));
}

// Returns whether the padding bits, from `used` to the end of the last word, are 0.
inline bool padding_is_zero(const uint32_t* words, int64_t num_words, int64_t used) {
  const int tail = static_cast<int>(used & 31);
  return num_words == 0 || tail == 0 || (words[num_words - 1] >> tail) == 0;
}

// Decodes layout.words() words into n ids.
inline RowFault decode_ids(const uint32_t* words, const RowLayout& layout, int64_t vocab_size, int64_t n,
                           int32_t* ids) {
  const uint32_t* high = words + layout.low_words;
  if (!padding_is_zero(words, layout.low_words, n * layout.low_bits)) return RowFault::kIdBits;
  if (!padding_is_zero(high, layout.high_words, layout.high_bits)) return RowFault::kIdBits;
  // The ones are counted first, so that the loop below cannot write more than n ids.
  int64_t ones = 0;
  for (int64_t w = 0; w < layout.high_words; ++w) ones += __builtin_popcount(high[w]);
  if (ones != n) return RowFault::kIdBits;
  // Unsigned, because in a malicious row high part << low_bits can exceed 2^31 (never 2^32).
  const int low_bits = layout.low_bits;
  uint32_t j = 0;
  for (int64_t w = 0; w < layout.high_words; w += 2) {
    uint64_t bits = w + 1 < layout.high_words ? load64(high + w) : high[w];
    const uint32_t base = static_cast<uint32_t>(w * 32);
    for (; bits != 0; bits &= bits - 1, ++j) {
      ids[j] = static_cast<int32_t>((base + static_cast<uint32_t>(__builtin_ctzll(bits)) - j) << low_bits);
    }
  }
  merge_low(reinterpret_cast<const uint8_t*>(words), reinterpret_cast<const uint8_t*>(words + layout.words()), n,
            low_bits, ids);
  // High parts never decrease, so if the last id is in range, no earlier id has its top bit set either.
  if (static_cast<uint32_t>(ids[n - 1]) >= static_cast<uint64_t>(vocab_size)) return RowFault::kIdRange;
  int32_t unordered = 0;
  for (int64_t i = 1; i < n; ++i) unordered |= ids[i] <= ids[i - 1];
  return unordered ? RowFault::kIdOrder : RowFault::kNone;
}

inline RowFault encode_ids(const int32_t* ids, int64_t n, int64_t vocab_size, const RowLayout& layout,
                           uint32_t* words) {
  std::memset(words, 0, static_cast<size_t>(layout.words()) * sizeof(uint32_t));
  uint32_t* high = words + layout.low_words;
  const uint32_t mask = (uint32_t{1} << layout.low_bits) - 1;
  uint64_t pending = 0;
  int filled = 0;
  uint32_t* low = words;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t id = ids[j];
    if (id < 0 || id >= vocab_size) return RowFault::kIdRange;
    if (j > 0 && id <= ids[j - 1]) return RowFault::kIdOrder;
    const int64_t bit = (id >> layout.low_bits) + j;
    high[bit >> 5] |= uint32_t{1} << (bit & 31);
    pending |= static_cast<uint64_t>(static_cast<uint32_t>(id) & mask) << filled;
    filled += layout.low_bits;
    if (filled >= 32) {
      *low++ = static_cast<uint32_t>(pending);
      pending >>= 32;
      filled -= 32;
    }
  }
  if (filled > 0) *low = static_cast<uint32_t>(pending);
  return RowFault::kNone;
}

}  // namespace slimkernels::store
