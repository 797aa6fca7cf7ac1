// Draws from the truncated softmax of a row, without sorting the row.
//
// Top-k, top-p and min-p each keep or cut ids with equal logits together, so a truncation keeps exactly the logits at
// or above some threshold.
//
// 1. A first read of the row sums its exponentials and collects candidates that may lie above the threshold.
// 2. The threshold is found among the candidates.
// 3. A second read runs the Gumbel race over the logits at or above the threshold.
#pragma once

#include <stdlib.h>

#include "dispatch.h"
#include "exponentials.h"
#include "gumbel.h"
#include "select.h"
#include "topk_logits.inl"

namespace slimkernels {
namespace SK_ISA {
namespace {

struct RowOptions {
  double temperature;
  int64_t top_k;  // 0 keeps every id
  double top_p;
  double min_p;
};

// Sums over a row relative to a level: of e = exp(z - level), of (z - level) e, and of exp((z - level) / T).
struct RowSums {
  double level = 0;
  double exps = 0;
  double moments = 0;
  double tempered = 0;

  void move_level(double new_level, double inv_temperature) {
    const double shift = level - new_level;
    const double factor = __builtin_exp(shift);
    moments = factor > 0 ? factor * (moments + shift * exps) : 0;  // avoids 0 * infinity
    exps *= factor;
    tempered *= __builtin_exp(shift * inv_temperature);
    level = new_level;
  }
};

// softmax(z) of a row, and the truncated distribution that is drawn from. Sums are relative to the largest logit,
// `scoring.max`.
template <class A>
struct RowSoftmax {
  bool exists;    // false if the row has a NaN, or -inf only
  bool infinite;  // the row has logits of +inf, which share the mass equally: the limit of ever larger ones
  double log_sum;
  double entropy;
  double log_kept;  // log of the sum of exp((z - max) / T) over the kept ids
  Scoring<A> scoring;

  double logprob(double z) const {
    if (infinite) return z == infinity<double>() ? -log_sum : -infinity<double>();
    return z - double(scoring.max) - log_sum;
  }
  double truncated_logprob(double z) const { return scoring.score(z) - log_kept; }
};

template <class A>
struct SampleScratch {
  using Key = typename Lanes<A>::Key;
  A* values;  // (V + width) candidates, later the kept logits
  A* masses;  // (V + width) exp((value - max) / T)
  Key* keys;  // (V + width)
};

SK_INLINE VecD widened_sum(VecD v) { return v; }
SK_INLINE VecD widened_sum(VecF v) {
  const Halves<HalfF> halves = halves_of<HalfF>(v);
  return convert<VecD>(halves.low) + convert<VecD>(halves.high);
}

// Returns whether any lane is above the bound; NaN is not.
#if defined(__AVX512F__)
SK_INLINE bool any_above(VecF v, float bound) {
  return _mm512_cmp_ps_mask(bitcast<__m512>(v), _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
}
#else
SK_INLINE bool any_above(VecF v, float bound) { return count(bitcast<VecI>(v > bound)) != 0; }
#endif
SK_INLINE bool any_above(VecD v, double bound) { return count(bitcast<VecL>(v > bound)) != 0; }

// Returns a lower bound of the logits that top-p and min-p keep, given a level that the largest logit reaches and a
// partial sum of exp((z - level) / T) over the row.
template <class A>
A least_candidate(const RowOptions& options, int64_t vocab_size, double level, double partial_sum) {
  partial_sum = partial_sum < 1 ? 1 : partial_sum;  // the level itself is in the row
  double share = options.min_p;
  if (options.top_p < 1) {
    // All logits with weights of at most w have at most V w together. Top-p cuts them if that is 1 - p of the sum.
    const double weight = 0.999 * (1 - options.top_p) * partial_sum / double(vocab_size);
    share = weight > share ? weight : share;
  }
  // Exponentials of scores that differ by less than this may round to the same number.
  constexpr double kSameScore = 4 * __DBL_EPSILON__;
  const double offset = options.temperature * (__builtin_log(share) - kSameScore);
  const double magnitude = (level < 0 ? -level : level) - offset;
  const double least = level + offset - 4 * (sizeof(A) == 4 ? __FLT_EPSILON__ : __DBL_EPSILON__) * magnitude;
  return least > -double(largest_finite<A>()) ? A(least) : -largest_finite<A>();
}

enum Collecting { kNothing, kSampledThreshold, kRisingThreshold };

// Reads the row once, sums it relative to its largest logit, and collects candidates. Returns the number of candidates.
template <bool kTempered, class X, class A>
int64_t read_row(const X* row, int64_t vocab_size, const RowOptions& options, RowGuess<A> guess, Collecting collecting,
                 const SampleScratch<A>& scratch, RowSums* sums) {
  constexpr int kWidth = Lanes<A>::kWidth;
  using Vec = typename Lanes<A>::Vec;
  constexpr A kLowest = -largest_finite<A>();
  constexpr A kNoMass = sizeof(A) == 4 ? -104 : -750;  // its exponential is 0
  const double inverse = 1 / options.temperature;
  const A inv_temperature = kTempered ? A(inverse > 1e30 ? 1e30 : inverse < 1e-30 ? 1e-30 : inverse) : A(1);
  // A block is summed again at a higher level if it exceeds the level by more than this, so that exp cannot overflow.
  const A slack = 4 / (inv_temperature > 1 ? inv_temperature : A(1));
  A threshold = guess.threshold > kLowest ? guess.threshold : kLowest;
  A level = kLowest > guess.level ? kLowest : guess.level > -kLowest ? -kLowest : guess.level;
  Vec best = {};
  best += level;
  VecD exps = {}, moments = {}, tempered = {};
  int64_t found = 0;
  *sums = RowSums();
  sums->level = level;
  const auto flush = [&] {
    sums->exps += sum_lanes(exps);
    sums->moments += sum_lanes(moments);
    sums->tempered += sum_lanes(kTempered ? tempered : exps);
    exps = moments = tempered = VecD{};
  };
  for (int64_t begin = 0, block = 0; begin < vocab_size; begin += kBlock, ++block) {
    if (collecting == kRisingThreshold && (block & (block - 1)) == 0) {
      flush();
      const A least = least_candidate<A>(options, vocab_size, level, sums->tempered);
      threshold = least > threshold ? least : threshold;
    }
    const int64_t length = vocab_size - begin < kBlock ? vocab_size - begin : kBlock;
    const int64_t found_before = found;
    for (;;) {
      Vec block_exps = {}, block_moments = {}, block_tempered = {};
      found = found_before;
      const auto visit = [&](Vec z) {
        if (collecting != kNothing) {
          const auto mask = not_below(z, threshold);
          append(mask, z, scratch.values + found);
          found += count(mask);
        }
        best = max(best, z);
        const Vec difference = z - level;
        const Vec d = max(Vec{} + kNoMass, difference);  // NaN is kept
        const Vec e = exp(d);
        block_exps += e;
        block_moments += d * e;
        if (kTempered) block_tempered += exp(difference * inv_temperature);
      };
      int64_t i = 0;
      for (; i + kWidth <= length; i += kWidth) {
        prefetch_ahead(row + begin + i);
        visit(load(row + begin + i));
      }
      if (i < length) visit(load_part(row + begin + i, length - i, -infinity<A>()));
      if (level < -kLowest && any_above(best, level + slack)) {
        flush();
        const A highest = max_lanes(best);
        level = highest > -kLowest ? -kLowest : highest;
        sums->move_level(level, inv_temperature);
        continue;
      }
      exps += widened_sum(block_exps);
      moments += widened_sum(block_moments);
      if (kTempered) tempered += widened_sum(block_tempered);
      break;
    }
  }
  flush();
  const A highest = max_lanes(best);
  if (highest < infinity<A>()) sums->move_level(highest, inv_temperature);
  return found;
}

struct Above {
  double mass;
  int64_t entries;
};

// Returns the mass and the number of the keys above the pivot; both arrays are padded to whole vectors.
template <class A, class Key>
Above sum_above(const Key* keys, const A* masses, int64_t length, Key pivot) {
  constexpr int kWidth = Lanes<A>::kWidth;
  using KeyVector = typename KeyVec<Key>::type;
  using Vec = typename Lanes<A>::Vec;
  VecD mass = {};
  KeyVector entries = {};
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t end = length - begin < kBlock ? length : begin + kBlock;
    Vec sum = {};
    for (int64_t i = begin; i < end; i += kWidth) {
      const KeyVector mask = load_raw<KeyVector>(keys + i) > pivot;
      sum += bitcast<Vec>(bitcast<KeyVector>(load(masses + i)) & mask);
      entries -= mask;
    }
    mass += widened_sum(sum);
  }
  return {sum_lanes(mass), int64_t(sum_lanes(entries))};
}

// Returns the lowest key above which the mass is less than `target`, and stores the mass at or above it. Overwrites the
// arrays: like select_key, it bisects, and drops entries outside the range once they are half of the arrays.
template <class A, class Key>
Key lowest_key_of_nucleus(Key* keys, A* masses, int64_t length, double target, double* mass) {
  using KeyVector = typename KeyVec<Key>::type;
  using Bits = typename UnsignedOf<Key>::type;
  constexpr int kWidth = Lanes<A>::kWidth;
  constexpr Key kLowest = lowest_key<Key>();
  KeyVector low_lanes = KeyVector{} + ~kLowest, high_lanes = KeyVector{} + kLowest;
  const auto pad = [&] {
    for (int64_t i = length; i % kWidth != 0; ++i) {
      keys[i] = kLowest;
      masses[i] = 0;
    }
  };
  pad();
  for (int64_t i = 0; i < length; i += kWidth) {
    const KeyVector key = load_raw<KeyVector>(keys + i);
    const KeyVector real = select(key == kLowest, low_lanes, key);
    low_lanes = select(real < low_lanes, real, low_lanes);
    high_lanes = select(key > high_lanes, key, high_lanes);
  }
  Key high = max_lanes(high_lanes), low = ~max_lanes(~low_lanes);
  Above over_high = {0, 0};  // entries in the arrays above `high`
  double dropped = 0;        // mass of entries above `high` that were dropped from the arrays
  Above from_low = sum_above(keys, masses, length, kLowest);
  *mass = from_low.mass;
  while (low < high) {
    const Key middle = Key(Bits(low) + (Bits(high) - Bits(low)) / 2);
    const Above over = sum_above(keys, masses, length, middle);
    if (dropped + over.mass < target) {
      high = middle;
      over_high = over;
    } else {
      low = middle + 1;
      from_low = over;
      *mass = dropped + over.mass;
    }
    if (2 * (from_low.entries - over_high.entries) > length || length <= kWidth) continue;
    int64_t kept = 0;
    for (int64_t i = 0; i < length; i += kWidth) {
      const KeyVector key = load_raw<KeyVector>(keys + i);
      const auto in_range = above(key, Key(low - 1)) & ~above(key, high);
      const auto mass_vector = load(masses + i);
      append(in_range, key, keys + kept);
      append(in_range, mass_vector, masses + kept);
      kept += count(in_range);
    }
    length = kept;
    dropped += over_high.mass;
    over_high = {0, 0};
    from_low.entries = kept;
    pad();
  }
  return low;
}

// Compacts values, and masses if they are given, to the entries not below the threshold. Returns their number.
template <class A>
int64_t keep_reaching(A threshold, int64_t length, A* values, A* masses) {
  constexpr int kWidth = Lanes<A>::kWidth;
  for (int64_t i = length; i % kWidth != 0; ++i) values[i] = -infinity<A>();
  int64_t kept = 0;
  for (int64_t i = 0; i < length; i += kWidth) {
    const auto v = load(values + i);
    const auto mask = not_below(v, threshold);
    append(mask, v, values + kept);
    if (masses != nullptr) {
      const auto mass = load(masses + i);
      append(mask, mass, masses + kept);
    }
    kept += count(mask);
  }
  return kept;
}

// Returns the lowest number z whose exp((z - max) / T), computed in float64, is at least min_p.
template <class A>
A min_p_threshold(const Scoring<A>& scoring, double min_p) {
  using Key = typename Lanes<A>::Key;
  using Bits = typename UnsignedOf<Key>::type;
  const auto reaches = [&](Key key) { return __builtin_exp(scoring.score(double(value_of_key<A>(key)))) >= min_p; };
  Key low = order_key(-largest_finite<A>()), high = order_key(scoring.max);
  if (reaches(low)) return -largest_finite<A>();
  const double estimate = double(scoring.max) + scoring.temperature * __builtin_log(min_p);
  if (estimate > -double(largest_finite<A>())) {
    const Key key = order_key(A(estimate));
    if (key - 4 > low && !reaches(key - 4)) low = key - 4;
    if (key + 4 < high && reaches(key + 4)) high = key + 4;
  }
  while (Bits(high) - Bits(low) > 1) {
    const Key middle = Key(Bits(low) + (Bits(high) - Bits(low)) / 2);
    (reaches(middle) ? high : low) = middle;
  }
  return value_of_key<A>(high);
}

template <class A>
void keys_of(const A* values, int64_t length, typename Lanes<A>::Key* keys) {
  for (int64_t i = 0; i < length; i += Lanes<A>::kWidth) {
    store_raw(keys + i, order_keys(load(values + i)));
  }
}

// Finds the threshold and the sum over the kept ids. `total` is the sum over the whole row at T.
template <class A>
void truncate(const RowOptions& options, int64_t found, double total, const SampleScratch<A>& scratch,
              RowSoftmax<A>* softmax) {
  constexpr int kWidth = Lanes<A>::kWidth;
  Scoring<A>& scoring = softmax->scoring;
  if (options.top_k > 0 && found > options.top_k) {
    keys_of(scratch.values, found, scratch.keys);
    scoring.threshold = value_of_key<A>(select_key(scratch.keys, found, options.top_k));
    found = keep_reaching<A>(scoring.threshold, found, scratch.values, nullptr);
  }
  for (int64_t i = found; i % kWidth != 0; ++i) scratch.values[i] = -infinity<A>();
  const A inv_temperature = scoring.inv_temperature();
  VecD sum = {};
  for (int64_t i = 0; i < found; i += kWidth) {
    const auto mass = exp((load(scratch.values + i) - scoring.max) * inv_temperature);
    store(scratch.masses + i, mass);
    sum += widened_sum(mass);
  }
  double kept = sum_lanes(sum);
  if (options.top_k > 0) total = kept;
  if (options.min_p > 0) {
    const A threshold = min_p_threshold(scoring, options.min_p);
    scoring.threshold = threshold > scoring.threshold ? threshold : scoring.threshold;
    found = keep_reaching(scoring.threshold, found, scratch.values, scratch.masses);
    kept = 0;
    for (int64_t i = 0; i < found; ++i) kept += double(scratch.masses[i]);
  }
  if (options.top_p < 1) {
    keys_of(scratch.values, found, scratch.keys);
    const auto key = lowest_key_of_nucleus(scratch.keys, scratch.masses, found, options.top_p * total, &kept);
    scoring.threshold = value_of_key<A>(key);
  }
  softmax->log_kept = __builtin_log(kept);
}

// Returns the softmax of a row with a NaN, with +inf, or with -inf only, whose sums are useless.
template <class X, class A>
RowSoftmax<A> softmax_without_sums(const X* row, int64_t vocab_size, bool greedy) {
  int64_t infinite = 0;
  for (int64_t v = 0; v < vocab_size; ++v) {
    const A z = load_one(row + v);
    if (z != z) return {};
    infinite += z == infinity<A>();
  }
  RowSoftmax<A> softmax = {};
  softmax.exists = softmax.infinite = infinite > 0;
  softmax.log_sum = softmax.entropy = __builtin_log(double(infinite));
  softmax.log_kept = greedy ? 0 : softmax.log_sum;
  softmax.scoring = {largest_finite<A>(), infinity<A>(), 1};
  return softmax;
}

// Returns the softmax of a row and truncates it. Temperature 0 means the argmax: the threshold is the largest logit.
template <class X, class A>
RowSoftmax<A> softmax_of_row(const X* row, int64_t vocab_size, RowOptions options, const SampleScratch<A>& scratch) {
  const bool greedy = options.temperature == 0;
  if (greedy) options = {1, 0, 1, 0};
  if (options.top_k < 0 || options.top_k >= vocab_size) options.top_k = 0;
  const bool truncates = options.top_k > 0 || options.top_p < 1 || options.min_p > 0;

  RowGuess<A> guess;
  if (options.top_k > 0) {
    TopkLogitsArgs sampling = {};
    sampling.vocab_size = vocab_size;
    sampling.top_k = options.top_k;
    guess = guess_row<X, A>(row, sampling, {scratch.values, nullptr, scratch.keys, nullptr, nullptr});
  } else {
    guess = {-infinity<A>(), sampled_max(row, vocab_size)};
  }
  const Collecting collecting = !truncates ? kNothing : options.top_k > 0 ? kSampledThreshold : kRisingThreshold;
  RowSums sums;
  int64_t found = options.temperature == 1 || options.top_k > 0
                      ? read_row<false>(row, vocab_size, options, guess, collecting, scratch, &sums)
                      : read_row<true>(row, vocab_size, options, guess, collecting, scratch, &sums);
  if (!(sums.exps > 0.5 && sums.exps < 1e300)) return softmax_without_sums<X, A>(row, vocab_size, greedy);
  if (found < options.top_k && guess.threshold > -largest_finite<A>()) {
    found = 0;
    for (int64_t v = 0; v < vocab_size; ++v) {
      scratch.values[found] = load_one(row + v);
      found += scratch.values[found] > -infinity<A>();
    }
  }

  RowSoftmax<A> softmax = {};
  softmax.exists = true;
  softmax.log_sum = __builtin_log(sums.exps);
  softmax.entropy = softmax.log_sum - sums.moments / sums.exps;
  softmax.entropy = softmax.entropy > 0 ? softmax.entropy : 0;
  softmax.log_kept = __builtin_log(sums.tempered);
  softmax.scoring = {A(sums.level), -largest_finite<A>(), options.temperature};
  if (truncates) truncate(options, found, sums.tempered, scratch, &softmax);
  if (greedy) {
    softmax.scoring.threshold = softmax.scoring.max;
    softmax.log_kept = 0;
  }
  return softmax;
}

template <class X, class A>
int64_t first_reaching(const X* row, int64_t vocab_size, A threshold) {
  constexpr int kWidth = Lanes<A>::kWidth;
  int64_t v = 0;
  while (v + kWidth <= vocab_size && count(not_below(load(row + v), threshold)) == 0) v += kWidth;
  while (load_one(row + v) < threshold) ++v;
  return v;
}

template <class X>
int64_t sample_logits_rows(const SampleLogitsArgs& args, int64_t begin, int64_t end) {
  using A = typename Acc<X>::type;
  const int64_t capacity = padded<A>(args.vocab_size) + kMaxWidth;
  const int64_t num_distinct = args.num_distinct;
  const int64_t room = num_distinct < args.vocab_size ? num_distinct : args.vocab_size;
  char* memory = static_cast<char*>(malloc(room * sizeof(Runner) + 3 * capacity * sizeof(A)));
  if (memory == nullptr) return kNoMemory;
  Leaders leaders;
  leaders.runners = reinterpret_cast<Runner*>(memory);
  leaders.room = room;
  SampleScratch<A> scratch;
  scratch.values = reinterpret_cast<A*>(leaders.runners + room);
  scratch.masses = scratch.values + capacity;
  scratch.keys = reinterpret_cast<typename Lanes<A>::Key*>(scratch.masses + capacity);

  for (int64_t n = begin; n < end; ++n) {
    const X* row = static_cast<const X*>(args.logits) + n * args.row_stride;
    const RowOptions options = {args.temperature.values[n * args.temperature.step],
                                args.top_k.values[n * args.top_k.step], args.top_p.values[n * args.top_p.step],
                                args.min_p.values[n * args.min_p.step]};
    const RowSoftmax<A> softmax = softmax_of_row<X, A>(row, args.vocab_size, options, scratch);
    leaders.clear();
    if (softmax.exists && options.temperature == 0) {
      leaders.enter({0, first_reaching(row, args.vocab_size, softmax.scoring.threshold)});
    } else if (softmax.exists) {
      const NoiseKey key = noise_key(seed_of_row(args.seed, n), args.position.values[n * args.position.step]);
      race(row, args.vocab_size, softmax.scoring, key, leaders);
      leaders.sort();
    }
    const A absent = softmax.exists ? -infinity<A>() : A(__builtin_nan(""));
    int64_t* token = args.token + n * num_distinct;
    A* logprob = static_cast<A*>(args.logprob) + n * num_distinct;
    A* truncated_logprob = static_cast<A*>(args.truncated_logprob) + n * num_distinct;
    for (int64_t i = 0; i < num_distinct; ++i) {
      token[i] = i < leaders.size ? leaders.runners[i].id : -1;
      const double z = token[i] >= 0 ? double(load_one(row + token[i])) : 0;
      logprob[i] = token[i] >= 0 ? A(softmax.logprob(z)) : absent;
      truncated_logprob[i] = token[i] >= 0 ? A(softmax.truncated_logprob(z)) : absent;
    }
    static_cast<A*>(args.entropy)[n] = softmax.exists ? A(softmax.entropy) : absent;
  }
  free(memory);
  return kOk;
}

int64_t sample_logits(const SampleLogitsArgs& args, int64_t begin, int64_t end) {
  return with_element_type(args.dtype,
                           [&](auto element) { return sample_logits_rows<decltype(element)>(args, begin, end); });
}

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
