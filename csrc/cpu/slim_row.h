// One row of slim_loss: cross entropy plus the weighted divergence from a sparse teacher, and its gradient.
//
// The four stages of every backend, whose names and equations slimkernels/ops/README.md lists:
//
//   1. student sums   read, sum_student: the log-sum-exps of the row, on the kept ids S and off them
//   2. teacher sums   sum_teacher: the normaliser of the teacher's kept logits, its label's probability
//   3. measure        measure: cross entropy, token weight, divergence, statistics
//   4. gradient       prepare_gradient, write
//
// The logits are read once. Stage 1 keeps e = exp((z - level) / T) of the whole row with S set to 0, so that it sums
// the mass off S itself, never 1 minus the mass on S. Whatever the divergence, the gradient off S is one scalar of the
// row times e plus a constant. Stage 4 writes that, and then overwrites the K entries of S and the label.
#pragma once

#include "denormals.h"
#include "dispatch.h"
#include "exponentials.h"
#include "slim_statistics.h"
#include "slim_terms.h"
#include "sparse_softmax.inl"
#include "stream.h"
// After the functions on vectors that it calls.
#include "../slim_loss/sums.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// One row on its way through the stages. Its blocks may be read and written by several threads: every sum is taken per
// block and added up in the order of the blocks, so that the result is the same bit for bit.
template <class X>
struct SlimRow {
  using A = typename Acc<X>::type;
  using Vec = typename Lanes<A>::Vec;
  using Key = typename Lanes<A>::Key;
  using DenseGradient = SK_ISA::DenseGradient<A>;
  static constexpr int kWidth = Lanes<A>::kWidth;

  const SlimLossArgs& args;
  const int64_t n;
  const X* const row;
  const int64_t target;
  const int32_t* const ids;

  // Whether z differs from the logits, whether T differs from 1, and whether z is needed after it was read.
  const bool transform, two_temperatures, keeps_z;
  const int64_t num_blocks;

  // Set by `prepare`. Stage 1 corrects a level that turns out to be too far from the row's maximum.
  int64_t kept = 0;          // size of S
  int64_t label_entry = -1;  // the label's entry in S, -1 if it is off S
  A level = 0;               // the exponentials are relative to it; at most the row's maximum

  // Buffers of stage 1, one number per block.
  double* off_sums;      // sum of e
  double* off_one_sums;  // sum of e_one
  double* z_sums;        // sum of z off S
  // Buffers of stage 1, one number per id, padded to whole vectors.
  A* e;      // exp((z - level) / T) off S, 0 on S
  A* e_one;  // the same at temperature 1, where T is not 1
  A* z;      // effective logits, 0 on S, where keeps_z
  // Buffers over S, padded to whole vectors. Those that share memory are never needed at the same time.
  A* kept_z;         // stage 1: effective logits
  A* kept_e;         // stage 1: exp(z / T - student.on.level)
  A* kept_p;         // stage 3, in the place of kept_e: p
  A* kept_dz;        // stage 4, in the place of kept_p: the gradient by the logits
  A* teacher_z;      // stage 2: teacher's logits / T
  A* kept_slope;     // stage 3, in the place of teacher_z: p * dD/dp
  A* teacher_e;      // stage 2: exp(teacher_z - teacher.on.level)
  X* kept_gradient;  // stage 4: kept_dz in the dtype of the logits
  Key* keys;         // order keys of the whole row, only with all statistics

  static int64_t blocks_of(const SlimLossArgs& args) { return (args.vocab_size + kBlock - 1) / kBlock; }

  static int64_t scratch_bytes(const SlimLossArgs& args) {
    const int64_t rows = 1 + has_two_temperatures(args) + keeps_logits(args);
    return 3 * blocks_of(args) * sizeof(double) +
           (rows * padded<A>(args.vocab_size) + 5 * padded<A>(args.top_k)) * sizeof(A) +
           (args.statistics == kAll ? padded<A>(args.vocab_size) + kMaxWidth : 0) * sizeof(A);
  }

  SlimRow(const SlimLossArgs& arguments, int64_t row_index, void* scratch)
      : args(arguments),
        n(row_index),
        row(static_cast<const X*>(args.logits) + n * args.logits_stride),
        target(args.target[n]),
        ids(args.ids == nullptr ? nullptr : args.ids + n * args.top_k),
        transform(transforms(args)),
        two_temperatures(has_two_temperatures(args)),
        keeps_z(keeps_logits(args)),
        num_blocks(blocks_of(args)) {
    const int64_t vocab = padded<A>(args.vocab_size), entries = padded<A>(args.top_k);
    off_sums = static_cast<double*>(scratch);
    off_one_sums = off_sums + num_blocks;
    z_sums = off_one_sums + num_blocks;
    e = reinterpret_cast<A*>(z_sums + num_blocks);
    e_one = e + vocab;
    z = e_one + (two_temperatures ? vocab : 0);
    kept_z = z + (keeps_z ? vocab : 0);
    teacher_z = kept_slope = kept_z + entries;
    teacher_e = teacher_z + entries;
    kept_e = kept_p = kept_dz = teacher_e + entries;
    kept_gradient = reinterpret_cast<X*>(kept_e + entries);
    keys = reinterpret_cast<Key*>(kept_e + 2 * entries);
  }

  bool ignored() const { return target == args.ignore_index; }

  // Checks the row's label and ids, and guesses a level for its exponentials from a sample.
  Fault prepare() {
    if (ignored()) return kOk;
    if (target < 0 || target >= args.vocab_size) return kBadTarget;
    prefetch_teacher();
    kept = ids == nullptr ? 0 : count_kept(ids, args.top_k, args.vocab_size);
    if (kept < 0) return kBadIds;
    const int64_t entry = first_entry(target);
    label_entry = entry < kept && ids[entry] == target ? entry : -1;
    level = sampled_max(row, args.vocab_size);
    if (transform) level = transformed(Vec{} + level, args)[0];
    return kOk;
  }

  // Runs the stages from the end of `read` up to the numbers that `write` takes.
  DenseGradient evaluate() {
    if (ignored()) {
      store_stats({});
      return {};
    }
    const StudentSums student = sum_student();
    const TeacherSums teacher = ids == nullptr ? TeacherSums() : sum_teacher();
    const Measures measures = measure(student, teacher);
    return args.dlogits == nullptr ? DenseGradient() : prepare_gradient(student, measures);
  }

  // Stage 1: student sums.

  // Prefetches the teacher's logits, which are needed after the student's row was read, and the next row's ids, which
  // are needed at the start of that row.
  void prefetch_teacher() const {
    if (ids == nullptr) return;
    const int64_t size = args.teacher_dtype == kFloat64 ? 8 : args.teacher_dtype == kFloat32 ? 4 : 2;
    const char* logits = static_cast<const char*>(args.teacher_logits) + n * args.top_k * size;
    for (int64_t i = 0; i < args.top_k * size; i += 64) prefetch(logits + i);
    const char* next_ids = reinterpret_cast<const char*>(ids + args.top_k);
    for (int64_t i = 0; i < args.top_k * int64_t(sizeof(int32_t)); i += 64) prefetch(next_ids + i);
  }

  // The first entry of S with an id of at least `id`.
  int64_t first_entry(int64_t id) const {
    int64_t low = 0, high = kept;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ids[middle] < id) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Effective logits of the ids from `i` on; lanes past the row's end are -inf.
  Vec effective(int64_t i) const {
    const int64_t left = args.vocab_size - i;
    Vec x = left >= kWidth ? load(row + i) : load_part(row + i, left, -infinity<A>());
    if (!transform) return x;
    x = transformed(x, args);
    return left >= kWidth ? x : first_lanes_of(x, left, -infinity<A>());
  }

  A effective_at(int64_t id) const {
    const A x = load_one(row + id);
    return transform ? transformed(Vec{} + x, args)[0] : x;
  }

  // Exponentiates and sums the blocks [first_block, last_block) of the student's row, and takes S out of them.
  void read(int64_t first_block, int64_t last_block) {
    if (ignored()) return;
    // Local copies, because the compiler would load the members again after every vector that is stored.
    const X* const from = row;
    const int32_t* const id = ids;
    A* const power = e;
    A* const out = kept_z;
    const int64_t kept_here = kept;
    int64_t k = first_entry(first_block * kBlock);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t begin = block * kBlock, end = end_of(block);
      exponentiate(begin, end);
      const int64_t first = k;
      for (; k < kept_here && id[k] < end; ++k) {
        out[k] = load_one(from + id[k]);
        power[id[k]] = 0;
      }
      for (int64_t j = first; two_temperatures && j < k; ++j) e_one[id[j]] = 0;
      for (int64_t j = first; keeps_z && j < k; ++j) {
        out[j] = z[id[j]];
        z[id[j]] = 0;
      }
      // A block is summed after the next one was read, because a vector load stalls on single elements that were
      // stored just before it.
      if (block > first_block) sum_block(block - 1);
    }
    if (last_block > first_block) sum_block(last_block - 1);
  }

  int64_t end_of(int64_t block) const {
    const int64_t end = (block + 1) * kBlock;
    return end < args.vocab_size ? end : args.vocab_size;
  }

  // Fills e, and e_one and z where they are needed, for the ids [begin, end).
  void exponentiate(int64_t begin, int64_t end) {
    const A inv_temperature = A(1 / args.temperature);
    int64_t i = begin;
    if (!two_temperatures && !keeps_z) {
      const X* const from = row;
      A* const to = e;
      const A shift = level;
      for (; i + kWidth <= end; i += kWidth) {
        prefetch_ahead(from + i);
        store(to + i, exp(load(from + i) - shift));
      }
    }
    for (; i < end; i += kWidth) {
      const Vec logit = effective(i);
      store(e + i, exp((logit - level) * inv_temperature));
      if (two_temperatures) store(e_one + i, exp(logit - level));
      if (keeps_z) store(z + i, logit);
    }
    if (keeps_z) {
      for (; i > end; --i) z[i - 1] = 0;
    }
  }

  void sum_block(int64_t block) {
    const int64_t begin = block * kBlock, length = padded<A>(end_of(block) - begin);
    off_sums[block] = sum_of(e + begin, length);
    if (two_temperatures) off_one_sums[block] = sum_of(e_one + begin, length);
    if (keeps_z) z_sums[block] = sum_of(z + begin, length);
  }

  // The largest effective logit off S, NaN if there is one.
  A exact_level() const {
    LargestOf<A> largest;
    A logits[kBlock];
    int64_t k = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const int64_t begin = block * kBlock, end = end_of(block);
      for (int64_t i = begin; i < end; i += kWidth) store(logits + i - begin, effective(i));
      for (; k < kept && ids[k] < end; ++k) logits[ids[k] - begin] = -infinity<A>();
      largest.add(logits, end - begin);
    }
    return largest.value();
  }

  OffSums sum_off() const {
    OffSums off;
    double one = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
      off.e += off_sums[block];
      if (two_temperatures) one += off_one_sums[block];
      if (keeps_z) off.z += z_sums[block];
    }
    off.lse = level / args.temperature + __builtin_log(off.e);
    off.lse_one = two_temperatures ? level + __builtin_log(one) : off.lse;
    return off;
  }

  // Far from the level, exponentials overflow or too many of them are 0.
  bool is_sound(const OffSums& off) const {
    return off.e > 1e-20 && off.e < 1e20 && __builtin_fabs(off.lse_one - level) < 46;
  }

  // Adds up the blocks, with the exact level if the guessed one is too far off, and sums S.
  StudentSums sum_student() {
    StudentSums student;
    OffSums& off = student.off;
    off = sum_off();
    if (!is_sound(off)) {
      level = exact_level();
      if (level == -infinity<A>()) {
        memset(e, 0, padded<A>(args.vocab_size) * sizeof(A) * (two_temperatures ? 2 : 1));
        off.lse = off.lse_one = -infinity<double>();
        off.e = 1;
      } else {
        read(0, num_blocks);
        off = sum_off();
      }
    }
    for (int64_t k = kept; k < padded<A>(kept); ++k) kept_z[k] = -infinity<A>();
    // The exponentials at temperature 1 are summed and dropped: those at T take their place.
    const ExpSum on_one = exponentials(kept_z, padded<A>(kept), 1, kept_e);
    student.lse_one = log_add_exp(off.lse_one, on_one.log());
    if (args.statistics != kNone) student.entropy = student_entropy(off, on_one, student.lse_one);
    student.on = exponentials(kept_z, padded<A>(kept), 1 / args.temperature, kept_e);
    student.lse = log_add_exp(off.lse, student.on.log());
    student.label_z = effective_at(target);
    student.log_s_y = student.label_z - student.lse_one;
    student.sum_z = off.z;
    if (keeps_z) {
      for (int64_t k = 0; k < kept; ++k) student.sum_z += kept_z[k];
    }
    return student;
  }

  // The entropy at temperature 1, while kept_e holds the exponentials at that temperature.
  SK_NOINLINE double student_entropy(const OffSums& off, ExpSum on_one, double lse_one) const {
    const ExpSum off_one = {double(level), __builtin_exp(off.lse_one - level)};
    const A* const powers = two_temperatures ? e_one : e;
    double inside = 0;
    if (off.lse_one != -infinity<double>()) {
      inside =
          keeps_z ? entropy_of(z, powers, args.vocab_size, off_one) : entropy_of(row, powers, args.vocab_size, off_one);
    }
    return at_least_zero(entropy_of_part(off.lse_one - lse_one, inside) +
                         entropy_of_part(on_one.log() - lse_one, entropy_of(kept_z, kept_e, padded<A>(kept), on_one)));
  }

  // Stage 2: teacher sums.

  TeacherSums sum_teacher() {
    load_teacher(args, n, kept, teacher_z);
    const ExpSum on = exponentials(teacher_z, padded<A>(kept), 1, teacher_e);
    const double label_logit =
        label_entry >= 0 ? double(teacher_z[label_entry]) * args.temperature : -infinity<double>();
    TeacherSums teacher = teacher_sums<A>(args, n, kept, on, label_logit);
    if (needs_teacher_entropy(args)) {
      set_teacher_entropy<A>(args, n, kept, entropy_of(teacher_z, teacher_e, padded<A>(kept), on), &teacher);
    }
    return teacher;
  }

  // Stage 3: measure.

  Measures measure(const StudentSums& student, const TeacherSums& teacher) {
    DivergenceSums d;
    if (ids != nullptr) {
      d = diverge_from_teacher(student, args.teacher_blend == 1 ? teacher : blended(student, teacher));
    }
    Stats stats;
    const Measures m = measures_of<A>(args, n, student, teacher, d, &stats);
    if (args.statistics != kNone) watch(student, teacher, &stats);
    store_stats(stats);
    // The divergence is dropped from the gradient.
    if (args.kd_weight == 0 && ids != nullptr) memset(kept_slope, 0, padded<A>(kept) * sizeof(A));
    return m;
  }

  // Fills the statistics that are computed only where they are asked for.
  SK_NOINLINE void watch(const StudentSums& student, const TeacherSums& teacher, Stats* stats) const {
    double* const out = stats->columns + kNumStats[kNone];
    const int64_t best = argmax(row, args.vocab_size), entry = first_entry(best);
    out[0] = student.entropy;
    out[3] = best == target;
    if (ids != nullptr) {
      out[1] = teacher.entropy;
      out[2] = entry < kept && ids[entry] == best;
      out[4] = teacher.log_t_y > student.log_s_y;
      if (args.statistics == kAll) {
        const KeepDenormals keep;  // order keys are made by an addition
        out[5] = overlap(row, args.vocab_size, ids, kept, keys);
      }
    }
    if (student.lse_one == student.lse_one) return;
    for (int i = 0; i < kNumStats[kAll] - kNumStats[kNone]; ++i) out[i] = student.lse_one;
  }

  void store_stats(const Stats& stats) const {
    A* const out = static_cast<A*>(args.stats) + n;
    for (int i = 0; i < kNumStats[args.statistics]; ++i) out[i * args.num_rows] = A(stats.columns[i]);
  }

  // Turns the teacher into softmax(t log q + (1 - t) log p) over the outcomes, and overwrites teacher_z and teacher_e.
  SK_NOINLINE TeacherSums blended(const StudentSums& student, TeacherSums teacher) const {
    const double t = args.teacher_blend, q_norm = teacher.norm.q_norm, p_norm = p_norm_of(args, student);
    const A from_student = A((1 - t) / args.temperature), offset = A(t * q_norm + (1 - t) * p_norm);
    for (int64_t k = 0; k < kept; k += kWidth) {
      store(teacher_z + k, load(teacher_z + k) * A(t) + load(kept_z + k) * from_student - offset);
    }
    set_blended(args, student, exponentials(teacher_z, padded<A>(kept), 1, teacher_e), &teacher);
    return teacher;
  }

  // Computes D, and fills kept_p and kept_slope.
  DivergenceSums diverge_from_teacher(const StudentSums& student, const TeacherSums& teacher) {
    const double p_norm = p_norm_of(args, student), q_norm = teacher.norm.q_norm;
    const A inv_temperature = A(1 / args.temperature);
    const A e_to_q = A(teacher.on.scale(q_norm)), e_to_p = A(student.on.scale(p_norm));
    const double gate = teacher.gate;

    // A copy, because the compiler would load the options again after every vector that is stored.
    const SlimLossArgs options = args;
    Vec share_sum = {}, slope_sum = {};
    for (int64_t k = 0; k < kept; k += kWidth) {
      const Vec log_q = load(teacher_z + k) - A(q_norm);
      const Vec log_p = load(kept_z + k) * inv_temperature - A(p_norm);
      const Vec q = load(teacher_e + k) * e_to_q, p = load(kept_e + k) * e_to_p;
      Vec share, slope;
      diverge(options, gate, log_q, log_p, q, p, &share, &slope);
      share_sum += share;
      slope_sum += slope;
      store(kept_slope + k, slope);
      store(kept_p + k, p);
    }

    const TailTerms tail = tail_terms(args, student, teacher);
    return divergence_sums(args, student, teacher, tail, kept, sum_lanes(share_sum), sum_lanes(slope_sum));
  }

  // Stage 4: gradient.

  // Fills kept_gradient, and returns the numbers of the gradient off S.
  DenseGradient prepare_gradient(const StudentSums& student, const Measures& m) {
    GradientNumbers<A> numbers = gradient_numbers<A>(args, n, student, m, level);
    DenseGradient dense = numbers.dense;
    const double lse_one = student.lse_one;
    const A on_scale = numbers.kept.scale, on_kd_scale = numbers.kept.kd_scale;
    const A on_constant = numbers.kept.constant, mean_slope = numbers.kept.mean_slope;
    // At T = 1, s on S is p up to the norm of p.
    const A p_to_s = A(__builtin_exp(p_norm_of(args, student) - lse_one));
    for (int64_t k = 0; k < kept; k += kWidth) {
      const Vec logit = load(kept_z + k), p = load(kept_p + k);
      const Vec s = two_temperatures ? exp(logit - A(lse_one)) : p * p_to_s;
      Vec dz = s * on_scale + on_constant;
      dz += (load(kept_slope + k) - p * mean_slope) * on_kd_scale;
      store(kept_dz + k, transform ? dz * transform_slope(logit, args) : dz);
    }

    double at_label = numbers.at_label;
    if (transform) at_label *= transform_slope(Vec{} + A(student.label_z), args)[0];
    if (label_entry >= 0) {
      kept_dz[label_entry] += A(at_label);
    } else {
      dense.label_change = A(at_label);
    }
    for (int64_t k = 0; k < kept; k += kWidth) store(kept_gradient + k, load(kept_dz + k));
    return dense;
  }

  Vec gradient_at(const DenseGradient dense, int64_t i) const {
    Vec dz = load(e + i) * dense.off_scale + dense.constant;
    if (two_temperatures) dz += load(e_one + i) * dense.one_scale;
    return transform ? dz * transform_slope(load(z + i), args) : dz;
  }

  // Writes the blocks [first_block, last_block) of the gradient by the logits.
  void write(const DenseGradient dense, int64_t first_block, int64_t last_block) const {
    if (args.dlogits == nullptr) return;
    X* const gradient = static_cast<X*>(args.dlogits) + n * args.dlogits_stride;
    const bool streams = args.streams;
    // A block is streamed after the next one was finished, because its vector loads would stall on the single elements
    // stored last.
    X finished[2][kBlock];
    const int32_t* const id = ids;
    const X* const on_support = kept_gradient;
    const int64_t kept_here = kept;
    int64_t k = first_entry(first_block * kBlock);
    for (int64_t block = first_block; block < last_block; ++block) {
      const int64_t begin = block * kBlock, length = end_of(block) - begin;
      if (ignored()) {
        memset(gradient + begin, 0, length * sizeof(X));
        continue;
      }
      X* const out = streams ? finished[block % 2] : gradient + begin;
      int64_t i = 0;
      if (!two_temperatures && !transform) {
        const A* const power = e + begin;
        const A scale = dense.off_scale, shift = dense.constant;
        for (; i + kWidth <= length; i += kWidth) store(out + i, load(power + i) * scale + shift);
      }
      for (; i + kWidth <= length; i += kWidth) store(out + i, gradient_at(dense, begin + i));
      if (i < length) store_part(out + i, gradient_at(dense, begin + i), length - i);
      for (; k < kept_here && id[k] < begin + length; ++k) out[id[k] - begin] = on_support[k];
      if (dense.label_change != 0 && target >= begin && target < begin + length) {
        store_one(out + target - begin,
                  gradient_at(dense, target / kWidth * kWidth)[target % kWidth] + dense.label_change);
      }
      if (streams && block > first_block) stream_block(gradient, block - 1, finished[(block - 1) % 2]);
    }
    if (streams && last_block > first_block && !ignored()) {
      stream_block(gradient, last_block - 1, finished[(last_block - 1) % 2]);
    }
  }

  void stream_block(X* gradient, int64_t block, const X* finished) const {
    const int64_t begin = block * kBlock;
    stream(gradient + begin, finished, (end_of(block) - begin) * sizeof(X));
  }
};

}  // namespace
}  // namespace SK_ISA
}  // namespace slimkernels
