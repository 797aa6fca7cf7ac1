#include "codec.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace slimkernels::store {
namespace {

uint32_t float_bits(float x) { return load32(&x); }

float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

bool is_finite(float x) { return (float_bits(x) & 0x7F800000u) != 0x7F800000u; }

// Computes exp(x) for x <= 0 to about 1e-5 relative, which is enough for choose_zero and the mass check.
float exp_below_zero(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float t = std::max(x, -87.0f) * 1.44269504f;
  const float whole = (t + magic) - magic;
  const float f = (t - whole) * 0.69314718f;
  const float p = 1.0f + f * (1.0f + f * (0.5f + f * (0.16666667f + f * (0.041666667f + f * 0.0083333f))));
  return bits_float(float_bits(p) + (static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23));
}

// Computes sum_j w_j (exp(decoded_j - x_j) - 1): the kept mass that rounding with this zero adds, relative to the
// weight of the largest logit.
float mass_error(const float* x, const float* w, int64_t n, float zero, float scale, float last_code) {
  constexpr float magic = 12582912.0f;
  constexpr int lanes = 8;
  const float inverse = 1.0f / scale;
  const auto term = [&](int64_t j) {
    const float at = (x[j] - zero) * inverse;
    const float code = std::min(std::max((at + magic) - magic, 0.0f), last_code);
    const float e = (code - at) * scale;
    return w[j] * e * (1.0f + e * (0.5f + e * 0.16666667f));
  };
  float sums[lanes] = {};
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    for (int i = 0; i < lanes; ++i) sums[i] += term(j + i);
  }
  float sum = 0;
  for (; j < n; ++j) sum += term(j);
  for (float s : sums) sum += s;
  return sum;
}

// Chooses the zero of a row's grid in [first, last]. Every choice keeps all rounding errors within half a step, so the
// one that preserves the row's mass best is taken. The mass error rises with the zero except for jumps down, so between
// a negative and a positive error it crosses 0 continuously, and bisection finds the crossing.
float choose_zero(const float* x, const float* w, int64_t n, double first, double last, float scale, float last_code) {
  constexpr int coarse_steps = 16, fine_steps = 10;
  double best = 0.5 * (first + last), below = 0;
  float best_error = FLT_MAX;
  bool previous_negative = false, bracketed = false;
  double lo = 0, hi = 0;
  for (int i = 0; i <= coarse_steps; ++i) {
    const double zero = first + (last - first) * i / coarse_steps;
    const float error = mass_error(x, w, n, static_cast<float>(zero), scale, last_code);
    if (std::fabs(error) < best_error) best = zero, best_error = std::fabs(error);
    if (previous_negative && error >= 0 && !bracketed) lo = below, hi = zero, bracketed = true;
    previous_negative = error < 0;
    below = zero;
  }
  for (int i = 0; bracketed && i < fine_steps; ++i) {
    const double zero = 0.5 * (lo + hi);
    const float error = mass_error(x, w, n, static_cast<float>(zero), scale, last_code);
    if (std::fabs(error) < best_error) best = zero, best_error = std::fabs(error);
    (error < 0 ? lo : hi) = zero;
  }
  return static_cast<float>(best);
}

// Allows for logits near 30 rounded to bfloat16, but not for an lse of another temperature or row.
constexpr double kMassTolerance = 0.1;

bool is_affine(Codec codec) { return codec == Codec::kAffine8 || codec == Codec::kAffine6; }

int last_code(Codec codec) { return codec == Codec::kAffine6 ? 63 : 255; }

// A scale is 0 or a normal number with 16 significant bits. Its product with a code of at most 8 bits is then exact in
// float32, so that decoders with and without fused multiply-add agree bit for bit.
constexpr uint32_t kScaleMask = 0xFF;

bool affine_is_valid(float scale, float zero, int last_code) {
  const uint32_t bits = float_bits(scale);
  if ((bits & kScaleMask) != 0 || (bits >> 31) != 0 || !is_finite(scale) || !is_finite(zero)) return false;
  if (bits != 0 && scale < FLT_MIN) return false;
  const float span = static_cast<float>(last_code) * scale;
  return is_finite(span) && is_finite(zero + span);
}

// Room for the entries of the longest row.
struct Scratch {
  std::vector<float> weight, heavy_logit, heavy_weight;
  std::vector<uint8_t> codes;
  explicit Scratch(int64_t width)
      : weight(static_cast<size_t>(width)),
        heavy_logit(static_cast<size_t>(width)),
        heavy_weight(static_cast<size_t>(width)),
        codes(static_cast<size_t>(width)) {}
};

// Finds the smallest and largest of n finite numbers. Works in lanes, because the compiler may not reorder comparisons.
void min_max(const float* x, int64_t n, float* smallest, float* largest) {
  constexpr int lanes = 8;
  float lo[lanes], hi[lanes];
  std::fill(lo, lo + lanes, x[0]);
  std::fill(hi, hi + lanes, x[0]);
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    for (int i = 0; i < lanes; ++i) {
      lo[i] = x[j + i] < lo[i] ? x[j + i] : lo[i];
      hi[i] = x[j + i] > hi[i] ? x[j + i] : hi[i];
    }
  }
  *smallest = *std::min_element(lo, lo + lanes);
  *largest = *std::max_element(hi, hi + lanes);
  for (; j < n; ++j) {
    *smallest = std::min(*smallest, x[j]);
    *largest = std::max(*largest, x[j]);
  }
}

RowFault encode_affine(const float* x, int64_t n, double lo, double hi, float total, int last_code, Scratch& s,
                       uint8_t* codes, float* affine) {
  float scale = 0.0f, zero = static_cast<float>(lo);
  if (hi - lo > FLT_MAX) return RowFault::kMagnitude;
  if (hi > lo) {
    const uint32_t rounded = float_bits(static_cast<float>((hi - lo) / last_code)) + 0x80u;
    scale = std::max(bits_float(rounded & ~kScaleMask), FLT_MIN);
    // Only the entries with most of the mass matter; the errors of the many small ones cancel.
    const float *weight = s.weight.data(), least = total / 4096.0f;
    float *heavy_logit = s.heavy_logit.data(), *heavy_weight = s.heavy_weight.data();
    int64_t heavy = 0;
    for (int64_t j = 0; j < n; ++j) {
      heavy_logit[heavy] = x[j];
      heavy_weight[heavy] = weight[j];
      heavy += weight[j] >= least;
    }
    zero = choose_zero(heavy_logit, heavy_weight, heavy, hi - (last_code + 0.5) * scale, lo + 0.5 * scale, scale,
                       static_cast<float>(last_code));
  }
  if (!affine_is_valid(scale, zero, last_code)) return RowFault::kMagnitude;
  affine[0] = scale;
  affine[1] = zero;
  const double step = scale > 0 ? scale : 1.0;
  for (int64_t j = 0; j < n; ++j) {
    const double code = (static_cast<double>(x[j]) - zero) / step + 0.5;
    codes[j] = static_cast<uint8_t>(static_cast<int>(std::min<double>(std::max(code, 0.0), last_code)));
  }
  return RowFault::kNone;
}

// Packs codes of six bits: code j is bits [6 j, 6 j + 6) of the bytes, counted from the least significant bit of each.
void pack_six(const uint8_t* codes, int64_t n, uint8_t* bytes) {
  uint32_t pending = 0;
  int filled = 0;
  for (int64_t j = 0; j < n; ++j) {
    pending |= static_cast<uint32_t>(codes[j]) << filled;
    for (filled += 6; filled >= 8; filled -= 8, pending >>= 8) *bytes++ = static_cast<uint8_t>(pending);
  }
  if (filled > 0) *bytes = static_cast<uint8_t>(pending);
}

// Computes logits[j] = zero + scale * code j. Four codes are three bytes; the last few codes are read one by one.
void unpack_six(const uint8_t* bytes, int64_t n, float scale, float zero, float* logits) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4, bytes += 3) {
    const uint32_t w = static_cast<uint32_t>(bytes[0] | bytes[1] << 8 | bytes[2] << 16);
    for (int i = 0; i < 4; ++i) logits[j + i] = zero + scale * static_cast<float>((w >> (6 * i)) & 63u);
  }
  for (int bit = 0; j < n; ++j, bit += 6) {
    const uint32_t low = bytes[bit >> 3], high = (bit & 7) > 2 ? bytes[(bit >> 3) + 1] : 0;
    logits[j] = zero + scale * static_cast<float>((low | high << 8) >> (bit & 7) & 63u);
  }
}

RowFault encode_logits(const float* x, int64_t n, float lse, Codec codec, Scratch& s, uint8_t* values, float* affine) {
  uint32_t infinite = 0;
  for (int64_t j = 0; j < n; ++j) infinite |= (float_bits(x[j]) & 0x7F800000u) == 0x7F800000u;
  if (infinite) return RowFault::kNotFinite;
  float lo, hi;
  min_max(x, n, &lo, &hi);
  float* weight = s.weight.data();
  for (int64_t j = 0; j < n; ++j) weight[j] = exp_below_zero(x[j] - hi);
  double total = 0;
  for (int64_t j = 0; j < n; ++j) total += weight[j];
  if (std::log(total) + hi - lse > kMassTolerance) return RowFault::kMass;
  if (is_affine(codec)) {
    uint8_t* codes = codec == Codec::kAffine6 ? s.codes.data() : values;
    const RowFault fault = encode_affine(x, n, lo, hi, static_cast<float>(total), last_code(codec), s, codes, affine);
    if (codec == Codec::kAffine6 && fault == RowFault::kNone) pack_six(codes, n, values);
    return fault;
  }
  if (codec == Codec::kFloat32) {
    std::memcpy(values, x, static_cast<size_t>(n) * sizeof(float));
    return RowFault::kNone;
  }
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t bits = float_bits(x[j]);
    const uint16_t half = static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
    if ((half & 0x7F80u) == 0x7F80u) return RowFault::kMagnitude;
    std::memcpy(values + 2 * j, &half, sizeof half);
  }
  return RowFault::kNone;
}

RowFault decode_logits(const uint8_t* values, const float* affine, int64_t n, Codec codec, float* out) {
  if (is_affine(codec)) {
    const float scale = affine[0], zero = affine[1];
    if (!affine_is_valid(scale, zero, last_code(codec))) return RowFault::kAffine;
    if (codec == Codec::kAffine6) {
      const int tail = static_cast<int>(6 * n & 7);
      if (tail != 0 && values[row_value_bytes(codec, n) - 1] >> tail != 0) return RowFault::kValueBits;
      unpack_six(values, n, scale, zero, out);
      return RowFault::kNone;
    }
    for (int64_t j = 0; j < n; ++j) out[j] = zero + scale * static_cast<float>(values[j]);
    return RowFault::kNone;
  }
  if (codec == Codec::kFloat32) {
    std::memcpy(out, values, static_cast<size_t>(n) * sizeof(float));
  } else {
    for (int64_t j = 0; j < n; ++j) {
      uint16_t half;
      std::memcpy(&half, values + 2 * j, sizeof half);
      out[j] = bits_float(static_cast<uint32_t>(half) << 16);
    }
  }
  uint32_t infinite = 0;
  for (int64_t j = 0; j < n; ++j) infinite |= (float_bits(out[j]) & 0x7F800000u) == 0x7F800000u;
  return infinite ? RowFault::kNotFinite : RowFault::kNone;
}

constexpr uint32_t kInfinityBits = 0x7F800000u;

// `rest_lse` may be null.
RowFault check_scalars(const float* lse, const float* rest_lse, int64_t num_temperatures, float target_logit) {
  for (int64_t m = 0; m < num_temperatures; ++m) {
    if (!is_finite(lse[m])) return RowFault::kLse;
    if (rest_lse != nullptr && float_bits(rest_lse[m]) == kInfinityBits) return RowFault::kRest;
  }
  return float_bits(target_logit) == kInfinityBits ? RowFault::kTarget : RowFault::kNone;
}

uint64_t row_checksum(int64_t row, const float* lse, int64_t num_temperatures, const float* target_logit,
                      const float* affine, const uint32_t* words, int64_t num_words, const uint8_t* values,
                      int64_t num_value_bytes) {
  uint64_t h = xxh64(lse, static_cast<uint64_t>(num_temperatures) * sizeof(float), static_cast<uint64_t>(row));
  h = xxh64(target_logit, sizeof(float), h);
  if (affine != nullptr) h = xxh64(affine, 2 * sizeof(float), h);
  h = xxh64(words, static_cast<uint64_t>(num_words) * sizeof(uint32_t), h);
  return xxh64(values, static_cast<uint64_t>(num_value_bytes), h);
}

// Returns the checksum of a row with `rest_lse` from that of the row without it.
uint64_t checksum_with_rest(uint64_t checksum, const float* rest_lse, int64_t num_temperatures) {
  return xxh64(rest_lse, static_cast<uint64_t>(num_temperatures) * sizeof(float), checksum);
}

RowFault decode_row(const ShardRows& s, Codec codec, int64_t vocab_size, int64_t row, int64_t width, int32_t* ids,
                    float* logits) {
  int64_t n, word, num_words, value, value_end;
  if (s.top_k > 0) {
    n = s.top_k;
    num_words = row_layout(vocab_size, n).words();
    word = row * num_words;
    value = row * row_value_bytes(codec, n);
    value_end = value + row_value_bytes(codec, n);
  } else {
    const int64_t entry = s.entry_offsets[row], entry_end = s.entry_offsets[row + 1];
    word = s.id_word_offsets[row];
    const int64_t word_end = s.id_word_offsets[row + 1];
    // No codec takes less than half a byte per entry. Checked first, so that a malicious offset cannot overflow below.
    if (entry < 0 || entry_end <= entry || entry_end / 2 > s.num_value_bytes) return RowFault::kOffsets;
    if (word < 0 || word_end <= word || word_end > s.num_id_words) return RowFault::kOffsets;
    n = entry_end - entry;
    num_words = word_end - word;
    if (n > vocab_size || row_layout(vocab_size, n).words() != num_words) return RowFault::kOffsets;
    value = ragged_value_offset(codec, row, entry);
    value_end = ragged_value_offset(codec, row + 1, entry_end);
  }
  if (n > width || value_end > s.num_value_bytes || word + num_words > s.num_id_words) return RowFault::kOffsets;
  const int64_t bytes = row_value_bytes(codec, n);
  const float* affine = is_affine(codec) ? s.affine + 2 * row : nullptr;
  const float* lse = s.lse + row * s.num_temperatures;
  const uint32_t* words = s.id_words + word;
  const uint8_t* values = s.values + value;
  const float* rest_lse = s.rest_lse == nullptr ? nullptr : s.rest_lse + row * s.num_temperatures;
  uint64_t checksum =
      row_checksum(row, lse, s.num_temperatures, s.target_logit + row, affine, words, num_words, values, bytes);
  if (rest_lse != nullptr) checksum = checksum_with_rest(checksum, rest_lse, s.num_temperatures);
  if (checksum != s.checksums[row]) return RowFault::kChecksum;
  RowFault fault = check_scalars(lse, rest_lse, s.num_temperatures, s.target_logit[row]);
  if (fault == RowFault::kNone) fault = decode_ids(words, row_layout(vocab_size, n), vocab_size, n, ids);
  if (fault == RowFault::kNone) fault = decode_logits(values, affine, n, codec, logits);
  for (int64_t i = value + bytes; i < value_end; ++i) {
    if (s.values[i] != 0 && fault == RowFault::kNone) fault = RowFault::kValueBits;
  }
  std::fill(ids + n, ids + width, -1);
  std::fill(logits + n, logits + width, 0.0f);
  return fault;
}

}  // namespace

int64_t row_value_bytes(Codec codec, int64_t n) {
  switch (codec) {
    case Codec::kAffine6:
      return (6 * n + 7) / 8;
    case Codec::kAffine8:
      return n;
    case Codec::kBfloat16:
      return 2 * n;
    default:
      return 4 * n;
  }
}

int64_t ragged_value_offset(Codec codec, int64_t row, int64_t entry) {
  // Every row begins at a whole byte, so each row before it can add at most one byte to those that its bits fill.
  return codec == Codec::kAffine6 ? 6 * entry / 8 + row : row_value_bytes(codec, entry);
}

int64_t decode_rows(const ShardRows& shard, Codec codec, int64_t vocab_size, int64_t first, int64_t count,
                    int64_t width, int32_t* ids, float* logits, RowFault* fault) {
  for (int64_t r = 0; r < count; ++r) {
    *fault = decode_row(shard, codec, vocab_size, first + r, width, ids + r * width, logits + r * width);
    if (*fault != RowFault::kNone) return r;
  }
  *fault = RowFault::kNone;
  return -1;
}

int64_t encode_rows(const int32_t* ids, const float* logits, const float* lse, const float* rest_lse,
                    const float* target_logit, int64_t first, int64_t count, int64_t width, int64_t num_temperatures,
                    Codec codec, int64_t vocab_size, const EncodedRows& out, RowFault* fault) {
  Scratch scratch(width);
  int64_t value = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int32_t* row_ids = ids + r * width;
    const float* row_lse = lse + r * num_temperatures;
    int64_t n = width;
    while (n > 0 && row_ids[n - 1] == -1) --n;
    const float* row_rest = rest_lse == nullptr ? nullptr : rest_lse + r * num_temperatures;
    *fault = n == 0 ? RowFault::kEmpty : check_scalars(row_lse, row_rest, num_temperatures, target_logit[r]);
    for (int64_t j = 0; j < n; ++j) {
      if (row_ids[j] == -1) *fault = RowFault::kPadding;
    }
    if (*fault == RowFault::kNone && n > vocab_size) *fault = RowFault::kIdOrder;
    if (*fault != RowFault::kNone) return r;
    const RowLayout layout = row_layout(vocab_size, n);
    const int64_t bytes = row_value_bytes(codec, n), entry = out.entry_offsets[r], word = out.id_word_offsets[r];
    if (entry < 0 || word < 0 || out.entry_offsets[r + 1] - entry != n ||
        out.id_word_offsets[r + 1] - word != layout.words() || value + bytes > out.num_value_bytes ||
        word > out.num_id_words - layout.words()) {
      *fault = RowFault::kOffsets;
      return r;
    }
    uint32_t* words = out.id_words + word;
    uint8_t* values = out.values + value;
    float* affine = is_affine(codec) ? out.affine + 2 * r : nullptr;
    *fault = encode_ids(row_ids, n, vocab_size, layout, words);
    if (*fault == RowFault::kNone) {
      *fault = encode_logits(logits + r * width, n, row_lse[0], codec, scratch, values, affine);
    }
    for (int64_t m = 0; *fault == RowFault::kNone && row_rest != nullptr && m < num_temperatures; ++m) {
      if (row_rest[m] > row_lse[m] + kMassTolerance) *fault = RowFault::kRestMass;
    }
    if (*fault != RowFault::kNone) return r;
    out.checksums[r] = row_checksum(first + r, row_lse, num_temperatures, target_logit + r, affine, words,
                                    layout.words(), values, bytes);
    value += bytes;
  }
  *fault = RowFault::kNone;
  return -1;
}

namespace {

namespace py = pybind11;

// Arguments are never converted (noconvert below), so arrays are not copied silently.
template <typename T>
using Array = py::array_t<T, py::array::c_style>;

Codec parse_codec(const std::string& name) {
  if (name == "affine8") return Codec::kAffine8;
  if (name == "affine6") return Codec::kAffine6;
  if (name == "bfloat16") return Codec::kBfloat16;
  if (name == "float32") return Codec::kFloat32;
  throw std::invalid_argument("codec must be 'affine8', 'affine6', 'bfloat16' or 'float32', got '" + name + "'");
}

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("store codec: ") + what);
}

void require_vocab(int64_t vocab_size) {
  require(vocab_size >= 1 && vocab_size < (int64_t{1} << 31), "vocab_size must lie in [1, 2^31)");
}

py::tuple store_decode_rows(int64_t vocab_size, const std::string& codec_name, int64_t top_k, int64_t first,
                            const Array<int64_t>& entry_offsets, const Array<int64_t>& id_word_offsets,
                            const Array<uint32_t>& id_words, const Array<uint8_t>& values, const Array<float>& affine,
                            const Array<float>& lse, const Array<float>& rest_lse, const Array<float>& target_logit,
                            const Array<uint64_t>& checksums, Array<int32_t>& out_ids, Array<float>& out_logits) {
  const Codec codec = parse_codec(codec_name);
  require_vocab(vocab_size);
  require(top_k >= 0 && top_k <= vocab_size, "top_k must lie in [0, vocab_size]");
  require(lse.ndim() == 2 && out_ids.ndim() == 2 && out_logits.ndim() == 2, "lse and outputs must be 2-D");
  ShardRows s{};
  s.rows = checksums.size();
  s.top_k = top_k;
  s.num_temperatures = lse.shape(1);
  const int64_t count = out_ids.shape(0), width = out_ids.shape(1);
  require(first >= 0 && count >= 0 && first <= s.rows - count, "rows must lie within the shard");
  require(out_logits.shape(0) == count && out_logits.shape(1) == width, "outputs must share a shape");
  require(lse.shape(0) == s.rows && target_logit.size() == s.rows, "lse and target_logit must have a value per row");
  require(rest_lse.size() == 0 || rest_lse.size() == lse.size(), "rest_lse must be empty or have the shape of lse");
  require(!is_affine(codec) || affine.size() == 2 * s.rows, "affine must have shape (rows, 2)");
  const int64_t num_offsets = top_k > 0 ? 0 : s.rows + 1;
  require(top_k > 0 || (entry_offsets.size() == num_offsets && id_word_offsets.size() == num_offsets),
          "offsets must have shape (rows + 1,)");
  s.entry_offsets = entry_offsets.data();
  s.id_word_offsets = id_word_offsets.data();
  s.id_words = id_words.data();
  s.num_id_words = id_words.size();
  s.values = values.data();
  s.num_value_bytes = values.size();
  s.affine = affine.data();
  s.lse = lse.data();
  s.rest_lse = rest_lse.size() == 0 ? nullptr : rest_lse.data();
  s.target_logit = target_logit.data();
  s.checksums = checksums.data();
  int32_t* ids = out_ids.mutable_data();
  float* logits = out_logits.mutable_data();
  RowFault fault = RowFault::kNone;
  int64_t bad;
  {
    py::gil_scoped_release release;
    bad = decode_rows(s, codec, vocab_size, first, count, width, ids, logits, &fault);
  }
  return py::make_tuple(bad, static_cast<int>(fault));
}

py::tuple store_encode_rows(int64_t vocab_size, const std::string& codec_name, int64_t first, const Array<int32_t>& ids,
                            const Array<float>& logits, const Array<float>& lse, const Array<float>& rest_lse,
                            const Array<float>& target_logit, const Array<int64_t>& entry_offsets,
                            const Array<int64_t>& id_word_offsets, Array<uint32_t>& id_words, Array<uint8_t>& values,
                            Array<float>& affine, Array<uint64_t>& checksums) {
  const Codec codec = parse_codec(codec_name);
  require_vocab(vocab_size);
  require(ids.ndim() == 2 && logits.ndim() == 2 && lse.ndim() == 2, "ids, logits and lse must be 2-D");
  const int64_t count = ids.shape(0), width = ids.shape(1);
  require(first >= 0, "first must not be negative");
  require(logits.shape(0) == count && logits.shape(1) == width, "ids and logits must share a shape");
  require(lse.shape(0) == count && lse.shape(1) >= 1, "lse must have shape (rows, temperatures)");
  require(rest_lse.size() == 0 || rest_lse.size() == lse.size(), "rest_lse must be empty or have the shape of lse");
  require(target_logit.size() == count, "target_logit must have shape (rows,)");
  require(checksums.size() == count, "checksums must have shape (rows,)");
  require(!is_affine(codec) || affine.size() == 2 * count, "affine must have shape (rows, 2)");
  require(entry_offsets.size() == count + 1 && id_word_offsets.size() == count + 1,
          "offsets must have shape (rows + 1,)");
  EncodedRows out{entry_offsets.data(),  id_word_offsets.data(), id_words.mutable_data(), id_words.size(),
                  values.mutable_data(), values.size(),          affine.mutable_data(),   checksums.mutable_data()};
  const int32_t* ids_data = ids.data();
  const float *logits_data = logits.data(), *lse_data = lse.data(), *target_data = target_logit.data();
  const float* rest_data = rest_lse.size() == 0 ? nullptr : rest_lse.data();
  const int64_t num_temperatures = lse.shape(1);
  RowFault fault = RowFault::kNone;
  int64_t bad;
  {
    py::gil_scoped_release release;
    bad = encode_rows(ids_data, logits_data, lse_data, rest_data, target_data, first, count, width, num_temperatures,
                      codec, vocab_size, out, &fault);
  }
  return py::make_tuple(bad, static_cast<int>(fault));
}

void store_checksums_with_rest(Array<uint64_t>& checksums, const Array<float>& rest_lse) {
  require(rest_lse.ndim() == 2 && rest_lse.shape(0) == checksums.size(),
          "rest_lse must have shape (rows, temperatures)");
  uint64_t* hashes = checksums.mutable_data();
  for (int64_t r = 0; r < checksums.size(); ++r) {
    hashes[r] = checksum_with_rest(hashes[r], rest_lse.data() + r * rest_lse.shape(1), rest_lse.shape(1));
  }
}

}  // namespace

void bind_store_codec(py::module_& m) {
  const auto array = [](const char* name) { return py::arg(name).noconvert(); };
  m.def("store_decode_rows", &store_decode_rows, py::kw_only(), py::arg("vocab_size"), py::arg("codec"),
        py::arg("top_k"), py::arg("first"), array("entry_offsets"), array("id_word_offsets"), array("id_words"),
        array("values"), array("affine"), array("lse"), array("rest_lse"), array("target_logit"), array("checksums"),
        array("out_ids"), array("out_logits"),
        "Decodes a shard's rows into the outputs; returns (first bad row or -1, fault number).");
  m.def("store_encode_rows", &store_encode_rows, py::kw_only(), py::arg("vocab_size"), py::arg("codec"),
        py::arg("first"), array("ids"), array("logits"), array("lse"), array("rest_lse"), array("target_logit"),
        array("entry_offsets"), array("id_word_offsets"), array("id_words"), array("values"), array("affine"),
        array("checksums"), "Encodes rows into the output arrays; returns (first bad row or -1, fault number).");
  m.def("store_checksums_with_rest", &store_checksums_with_rest, array("checksums"), array("rest_lse"),
        "Turns the checksums of rows without rest_lse into those of the rows with it, in place.");
}

}  // namespace slimkernels::store
