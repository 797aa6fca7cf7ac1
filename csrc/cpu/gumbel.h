// The Gumbel race: finds the ids of a row with the largest score plus counter-based Gumbel noise.
//
// Every id has its own random bits (Philox-4x32-10, defined in reference_sampling.py). An upper bound of score plus
// noise takes a few instructions, because -log(u) bounds the noise and the bits of u, read as an integer, bound
// -log(u). The few ids whose bound reaches the last leader are evaluated in float64, so the outcome does not depend on
// the instruction set.
#pragma once

#include "select.h"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// Noise is computed for kGroup ids together. A vector of counters serves 64 ids; of vectors that are one register, two
// hide each other's latency.
#if defined(__AVX512F__)
constexpr int kStreams = 2;
#else
constexpr int kStreams = 1;
#endif
constexpr int kVectors = 4 * kStreams;
constexpr int kGroup = 16 * kVectors;

constexpr int kRounds = 10;
constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;

struct NoiseKey {
  uint32_t key[kRounds][2];  // key of every round, derived from the seed
  uint32_t position[2];      // upper half of the counter
};

SK_INLINE NoiseKey noise_key(int64_t seed, int64_t position) {
  NoiseKey noise;
  for (uint32_t round = 0; round < kRounds; ++round) {
    noise.key[round][0] = uint32_t(uint64_t(seed)) + round * 0x9E3779B9u;
    noise.key[round][1] = uint32_t(uint64_t(seed) >> 32) + round * 0xBB67AE85u;
  }
  noise.position[0] = uint32_t(uint64_t(position));
  noise.position[1] = uint32_t(uint64_t(position) >> 32);
  return noise;
}

// Replaces a counter of four words by Philox-4x32-10 of it.
SK_INLINE void philox(const NoiseKey& noise, uint32_t words[4]) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = uint64_t(words[0]) * kFactor0, product1 = uint64_t(words[2]) * kFactor1;
    words[0] = uint32_t(product1 >> 32) ^ words[1] ^ noise.key[round][0];
    words[1] = uint32_t(product1);
    words[2] = uint32_t(product0 >> 32) ^ words[3] ^ noise.key[round][1];
    words[3] = uint32_t(product0);
  }
}

// Returns the seed of row n: its own, or, if one seed is given for all rows, the first 64 bits of Philox with that seed
// as its key and the counter (n, 2^32 - 1, 0, 0), which no draw uses. Row 0 takes the one seed as it is.
SK_INLINE int64_t seed_of_row(const RowInts& seed, int64_t n) {
  if (seed.step != 0 || n == 0) return seed.values[n * seed.step];
  uint32_t words[4] = {uint32_t(n), 0xFFFFFFFFu, 0, 0};
  philox(noise_key(seed.values[0], 0), words);
  return int64_t(uint64_t(words[1]) << 32 | words[0]);
}

#if !defined(__AVX512F__)
// ---- Integers in one register, on machines with narrower vectors

using PartU = VecU::Part;

struct Products {
  PartU high, low;  // 32 bits each
};

SK_INLINE Products products_of(PartU a, PartU b) {
#if defined(__AVX2__)
  const __m256i x = bitcast<__m256i>(a), y = bitcast<__m256i>(b);
  const __m256i evens = _mm256_mul_epu32(x, y);
  const __m256i odds = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), _mm256_srli_epi64(y, 32));
  return {PartU(_mm256_blend_epi32(_mm256_srli_epi64(evens, 32), odds, 0xaa)),
          PartU(_mm256_blend_epi32(evens, _mm256_slli_epi64(odds, 32), 0xaa))};
#elif defined(__SSE4_1__)
  const __m128i x = bitcast<__m128i>(a), y = bitcast<__m128i>(b);
  const __m128i evens = _mm_mul_epu32(x, y);
  const __m128i odds = _mm_mul_epu32(_mm_srli_epi64(x, 32), _mm_srli_epi64(y, 32));
  return {PartU(_mm_blend_epi16(_mm_srli_epi64(evens, 32), odds, 0xcc)),
          PartU(_mm_blend_epi16(evens, _mm_slli_epi64(odds, 32), 0xcc))};
#elif defined(__aarch64__)
  const uint32x4_t x = bitcast<uint32x4_t>(a), y = bitcast<uint32x4_t>(b);
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(x), vget_low_u32(y)));
  const uint32x4_t last = vreinterpretq_u32_u64(vmull_high_u32(x, y));
  return {bitcast<PartU>(vuzp2q_u32(first, last)), bitcast<PartU>(vuzp1q_u32(first, last))};
#else
  Products products;
  for (int lane = 0; lane < kPartLanes; ++lane) {
    const uint64_t product = uint64_t(a[lane]) * b[lane];
    products.high[lane] = uint32_t(product >> 32);
    products.low[lane] = uint32_t(product);
  }
  return products;
#endif
}

struct Transposed {
  PartU part[4];
};

// Puts the words of the same lane side by side: part j has those of lane j and behind them, if there is one, lane j
// + 4.
SK_INLINE Transposed transpose(PartU w0, PartU w1, PartU w2, PartU w3) {
#if defined(__AVX2__)
  const __m256i a = bitcast<__m256i>(w0), b = bitcast<__m256i>(w1), c = bitcast<__m256i>(w2), d = bitcast<__m256i>(w3);
  const __m256i low_ab = _mm256_unpacklo_epi32(a, b), high_ab = _mm256_unpackhi_epi32(a, b);
  const __m256i low_cd = _mm256_unpacklo_epi32(c, d), high_cd = _mm256_unpackhi_epi32(c, d);
  return {{PartU(_mm256_unpacklo_epi64(low_ab, low_cd)), PartU(_mm256_unpackhi_epi64(low_ab, low_cd)),
           PartU(_mm256_unpacklo_epi64(high_ab, high_cd)), PartU(_mm256_unpackhi_epi64(high_ab, high_cd))}};
#elif defined(__SSE2__)
  const __m128i a = bitcast<__m128i>(w0), b = bitcast<__m128i>(w1), c = bitcast<__m128i>(w2), d = bitcast<__m128i>(w3);
  const __m128i low_ab = _mm_unpacklo_epi32(a, b), high_ab = _mm_unpackhi_epi32(a, b);
  const __m128i low_cd = _mm_unpacklo_epi32(c, d), high_cd = _mm_unpackhi_epi32(c, d);
  return {{PartU(_mm_unpacklo_epi64(low_ab, low_cd)), PartU(_mm_unpackhi_epi64(low_ab, low_cd)),
           PartU(_mm_unpacklo_epi64(high_ab, high_cd)), PartU(_mm_unpackhi_epi64(high_ab, high_cd))}};
#elif defined(__aarch64__)
  const uint32x4_t a = bitcast<uint32x4_t>(w0), b = bitcast<uint32x4_t>(w1);
  const uint32x4_t c = bitcast<uint32x4_t>(w2), d = bitcast<uint32x4_t>(w3);
  const uint64x2_t low_ab = vreinterpretq_u64_u32(vzip1q_u32(a, b)), high_ab = vreinterpretq_u64_u32(vzip2q_u32(a, b));
  const uint64x2_t low_cd = vreinterpretq_u64_u32(vzip1q_u32(c, d)), high_cd = vreinterpretq_u64_u32(vzip2q_u32(c, d));
  return {{bitcast<PartU>(vzip1q_u64(low_ab, low_cd)), bitcast<PartU>(vzip2q_u64(low_ab, low_cd)),
           bitcast<PartU>(vzip1q_u64(high_ab, high_cd)), bitcast<PartU>(vzip2q_u64(high_ab, high_cd))}};
#else
  return {{PartU{w0[0], w1[0], w2[0], w3[0]}, PartU{w0[1], w1[1], w2[1], w3[1]}, PartU{w0[2], w1[2], w2[2], w3[2]},
           PartU{w0[3], w1[3], w2[3], w3[3]}}};
#endif
}
#endif

#if defined(__AVX512F__)
SK_INLINE void multiply(VecU a, uint32_t factor, VecU* high, VecU* low) {
  const __m512i m = _mm512_set1_epi32(int32_t(factor));
  const __m512i even = _mm512_mul_epu32(bitcast<__m512i>(a), m);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(bitcast<__m512i>(a), 32), m);
  *high = bitcast<VecU>(_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB));
  *low = bitcast<VecU>(_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, _MM_PERM_CCAA));
}
#else
SK_INLINE void multiply(VecU a, uint32_t factor, VecU* high, VecU* low) {
  const PartU factors = PartU{} + factor;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const Products products = products_of(a.part[i], factors);
    high->part[i] = products.high;
    low->part[i] = products.low;
  }
}
#endif

// Reorders the words of 16 counters by the ids they belong to.
SK_INLINE void interleave(VecU c0, VecU c1, VecU c2, VecU c3, VecU bits[4]) {
#if defined(__AVX512F__)
  const __m512i w0 = bitcast<__m512i>(c0), w1 = bitcast<__m512i>(c1);
  const __m512i w2 = bitcast<__m512i>(c2), w3 = bitcast<__m512i>(c3);
  const __m512i low01 = _mm512_unpacklo_epi32(w0, w1), high01 = _mm512_unpackhi_epi32(w0, w1);
  const __m512i low23 = _mm512_unpacklo_epi32(w2, w3), high23 = _mm512_unpackhi_epi32(w2, w3);
  bits[0] = bitcast<VecU>(_mm512_unpacklo_epi64(low01, low23));
  bits[1] = bitcast<VecU>(_mm512_unpackhi_epi64(low01, low23));
  bits[2] = bitcast<VecU>(_mm512_unpacklo_epi64(high01, high23));
  bits[3] = bitcast<VecU>(_mm512_unpackhi_epi64(high01, high23));
#else
  const VecU words[4] = {c0, c1, c2, c3};
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const Transposed by_id = transpose(words[0].part[i], words[1].part[i], words[2].part[i], words[3].part[i]);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) bits[(4 * i + j) / kParts].part[(4 * i + j) % kParts] = by_id.part[j];
  }
#endif
}

// Computes the random bits of kGroup ids: lane l of bits[j] belongs to id first_id + 16 j + l. first_id is a multiple
// of kGroup.
SK_INLINE void random_bits(const NoiseKey& key, int64_t first_id, VecU bits[kVectors]) {
#if defined(__AVX512F__)
  const VecU order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};  // interleave() undoes this order
#elif defined(__AVX2__)
  const VecU order = by_part<VecU>([](int i) SK_INLINED { return PartU{0, 2, 4, 6, 1, 3, 5, 7} + uint32_t(8 * i); });
#else
  const VecU order = lanes_from<VecU>(0u);
#endif
  // In the first two rounds only the id differs between lanes, so half of the products are the same in all lanes.
  const uint64_t same1 = uint64_t(key.position[0]) * kFactor1;
  const uint32_t same = uint32_t(same1 >> 32) ^ key.key[0][0];
  const uint64_t same2 = uint64_t(same) * kFactor0;
  VecU c0[kStreams], c1[kStreams], c2[kStreams], c3[kStreams], high0, low0, high1, low1;
#pragma GCC unroll 2
  for (int s = 0; s < kStreams; ++s) {
    multiply(order + uint32_t(first_id / 4 + 16 * s), kFactor0, &high0, &low0);
    multiply(high0 ^ (key.position[1] ^ key.key[0][1]), kFactor1, &high1, &low1);
    c0[s] = high1 ^ (uint32_t(same1) ^ key.key[1][0]);
    c1[s] = low1;
    c2[s] = low0 ^ (uint32_t(same2 >> 32) ^ key.key[1][1]);
    c3[s] = VecU{} + uint32_t(same2);
  }
#pragma GCC unroll 8
  for (int round = 2; round < kRounds; ++round) {
#pragma GCC unroll 2
    for (int s = 0; s < kStreams; ++s) {
      multiply(c0[s], kFactor0, &high0, &low0);
      multiply(c2[s], kFactor1, &high1, &low1);
      c0[s] = high1 ^ c1[s] ^ key.key[round][0];
      c1[s] = low1;
      c2[s] = high0 ^ c3[s] ^ key.key[round][1];
      c3[s] = low0;
    }
  }
  for (int s = 0; s < kStreams; ++s) interleave(c0[s], c1[s], c2[s], c3[s], bits + 4 * s);
}

SK_INLINE double gumbel(uint32_t bits) {
  const double u = (double(bits) + 0.5) * 0x1p-32;
  return -__builtin_log(-__builtin_log1p(-u));
}

constexpr float kLargestNoise = 22.9f;  // noise of bits = 0, rounded up

// Returns an upper bound of gumbel(bits), because -log(1 - u) >= u, and log2 of a float is at least the number that its
// bits, read as an integer, stand for.
SK_INLINE VecF noise_bound(VecU bits) {
  const VecF u = convert<VecF>(bitcast<VecI>(bits >> 1)) + 0.25f;  // at most 2^31 u, within float32 rounding
  const VecF log2_u = convert<VecF>(bitcast<VecI>(u)) * 0x1p-23f;
  return (158.0f - log2_u) * 0.69314718f;
}

// Returns a mask with a bit for each lane that is not below the bound.
SK_INLINE uint32_t lanes_reaching(VecF v, float bound) {
#if defined(__AVX512F__)
  return not_below(v, bound);
#else
  return bits_of(not_below(v, bound));
#endif
}

template <class A>
constexpr A largest_finite() {
  return sizeof(A) == 4 ? A(__FLT_MAX__) : A(__DBL_MAX__);
}

// The scores of a row: a logit z >= threshold is eligible and has the score (z - max) / T.
template <class A>
struct Scoring {
  A max;        // finite; the largest finite number stands for +inf
  A threshold;  // at least -largest_finite, so that a logit of -inf is never eligible
  double temperature;

  // Returns 1 / T, limited so that float32 can hold it and multiply it with any difference.
  A inv_temperature() const {
    const double inverse = 1 / temperature;
    return A(inverse > 1e30 ? 1e30 : inverse < 1e-30 ? 1e-30 : inverse);
  }
  // Only a logit of +inf exceeds max; its score is 0.
  double score(double z) const { return (z < double(max) ? z - double(max) : 0) / temperature; }
};

template <class A, class V>
SK_INLINE V scores_of(V z, const Scoring<A>& scoring, A inv_temperature) {
  V score = (z - scoring.max) * inv_temperature;
  score = max(min(score, V{}), V{} - A(__FLT_MAX__));
  return select(z >= scoring.threshold, score, V{} - infinity<A>());
}

// Returns whether any of kGroup logits is eligible.
template <class X, class A>
SK_INLINE bool any_eligible(const X* z, const Scoring<A>& scoring) {
  constexpr int kWidth = Lanes<A>::kWidth;
  auto best = load(z);
  for (int i = kWidth; i < kGroup; i += kWidth) best = max(best, load(z + i));
  return count(not_below(best, scoring.threshold)) != 0;
}

template <class X>
SK_INLINE VecF scores_at(const X* z, const Scoring<float>& scoring, float inv_temperature) {
  return scores_of(load(z), scoring, inv_temperature);
}
SK_INLINE VecF scores_at(const double* z, const Scoring<double>& scoring, double inv_temperature) {
  HalfF halves[2];
  for (int i = 0; i < 2; ++i) halves[i] = convert<HalfF>(scores_of(load(z + 8 * i), scoring, inv_temperature));
  return load_raw<VecF>(halves);
}

struct Runner {
  double score;
  int64_t id;
};

SK_INLINE bool is_ahead(const Runner& a, const Runner& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// The best `room` runners so far: a heap whose root is the last of them.
struct Leaders {
  Runner* runners;
  int64_t room;
  int64_t size;
  float bound;  // a float32 bound must reach this to be evaluated: the last leader's score, less more than rounding

  void clear() {
    size = 0;
    bound = -__FLT_MAX__;
  }

  void sift_down(int64_t at) {
    const Runner moving = runners[at];
    for (int64_t child; (child = 2 * at + 1) < size; at = child) {
      if (child + 1 < size && is_ahead(runners[child], runners[child + 1])) ++child;
      if (!is_ahead(moving, runners[child])) break;
      runners[at] = runners[child];
    }
    runners[at] = moving;
  }

  void enter(Runner runner) {
    if (size < room) {
      int64_t at = size++;
      for (int64_t parent; at > 0 && is_ahead(runners[parent = (at - 1) / 2], runner); at = parent) {
        runners[at] = runners[parent];
      }
      runners[at] = runner;
    } else if (is_ahead(runner, runners[0])) {
      runners[0] = runner;
      sift_down(0);
    } else {
      return;
    }
    if (size < room) return;
    const double last = runners[0].score;
    const double reach = last - 1e-4 - 1e-6 * (last < 0 ? -last : last);
    bound = reach > -double(__FLT_MAX__) ? float(reach) : -__FLT_MAX__;
  }

  // Sorts the leaders, best first.
  void sort() {
    const int64_t all = size;
    while (size > 1) {
      const Runner last = runners[0];
      runners[0] = runners[--size];
      runners[size] = last;
      sift_down(0);
    }
    size = all;
  }
};

SK_INLINE VecF highest_of(const VecF scores[kVectors]) {
  VecF highest = scores[0];
  for (int j = 1; j < kVectors; ++j) highest = max(highest, scores[j]);
  return highest;
}

// Evaluates the ids of a group whose bounds reach the last leader. This is rare and therefore not inlined.
template <class X, class A>
__attribute__((noinline)) void enter_group(const X* z, int64_t first_id, const VecF bounds[kVectors],
                                           const VecU bits[kVectors], const Scoring<A>& scoring, Leaders& leading) {
  for (int j = 0; j < kVectors; ++j) {
    for (uint32_t lanes = lanes_reaching(bounds[j], leading.bound); lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      const double score = scoring.score(double(load_one(z + 16 * j + lane)));
      leading.enter({score + gumbel(bits[j][lane]), first_id + 16 * j + lane});
    }
  }
}

// Runs the race over one row; `leading` receives the outcome.
template <class X, class A>
void race(const X* row, int64_t vocab_size, const Scoring<A>& scoring, const NoiseKey& key, Leaders& leading) {
  const A inv_temperature = scoring.inv_temperature();
  X padded_group[kGroup];
  for (int64_t first = 0; first < vocab_size; first += kGroup) {
    const X* z = row + first;
    if (vocab_size - first < kGroup) {
      store_one(padded_group, -infinity<A>());
      for (int i = 1; i < kGroup; ++i) padded_group[i] = padded_group[0];
      memcpy(padded_group, z, (vocab_size - first) * sizeof(X));
      z = padded_group;
    }
    if (!any_eligible(z, scoring)) continue;
    VecF scores[kVectors];
    for (int j = 0; j < kVectors; ++j) scores[j] = scores_at(z + 16 * j, scoring, inv_temperature);
    if (!lanes_reaching(highest_of(scores) + kLargestNoise, leading.bound)) continue;
    VecU bits[kVectors];
    random_bits(key, first, bits);
    VecF bounds[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) bounds[j] = scores[j] + noise_bound(bits[j]);
    if (lanes_reaching(highest_of(bounds), leading.bound)) enter_group(z, first, bounds, bits, scoring, leading);
  }
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
