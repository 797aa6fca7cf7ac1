// Cross entropy plus the weighted divergence from a sparse teacher, and its gradient, in one visit to each row.
//
// The row is read once. What is kept of it is e = exp((z - level) / T), with the kept ids S taken out and set to 0:
// what is summed is the off-support mass itself, never 1 minus the rest. The gradient off S is then one scalar per row
// times e plus a constant, whatever the divergence; the K entries on S and the label are overwritten.
//
// Names: z student logits, s = softmax(z), p = softmax(z / T), q the teacher, w the token's weight; D the divergence.
#pragma once

#include "dispatch.h"
#include "slim_terms.h"
#include "sparse_softmax.inl"
#include "stream.h"
#include "vec.h"

namespace slimkernels {
namespace SK_ISA {
namespace {

// One row on its way through the kernel: read its blocks, measure it, write the blocks of its gradient. Blocks may be
// read and written by several threads; every sum is taken per block and added up in the order of the blocks, so that
// the result is the same bit for bit.
template <class X>
struct SlimRow {
  using A = typename Acc<X>::type;
  using Vec = typename Lanes<A>::Vec;
  static constexpr int kWidth = Lanes<A>::kWidth;

  const SlimLossArgs& args;
  const int64_t n;
  const X* const row;
  const int64_t target;
  const int32_t* const ids;
  int64_t kept = 0;

  // Whether z differs from the logits, T from 1, and whether z itself is needed after it was read.
  const bool transform, two_temperatures, keeps_z;
  const int64_t num_blocks;
  A level = 0;  // what the exponentials are relative to: at most the row's maximum

  double* off_sums;      // (blocks) of e
  double* off_one_sums;  // (blocks) of e_one
  double* z_sums;        // (blocks) of z off S
  A* e;                  // (padded V) exp((z - level) / T) off S, 0 on S
  A* e_one;              // (padded V) the same at temperature 1, where T is not 1
  A* z;                  // (padded V) effective logits, 0 on S, where keeps_z
  A* kept_z;             // (padded K) effective logits at S
  A* teacher;            // (padded K) teacher logits / T, later p * dD/dp
  A* q;                  // (padded K) teacher on S
  A* p;                  // (padded K) student on S, later the gradient
  X* kept_gradient;      // (padded K) the gradient on S

  // What the student's row sums to. `off` is outside S, `on` inside; `_one` is at temperature 1.
  double target_z = 0, off = 0, off_one = 0, lse = 0, lse_one = 0;
  ExpSum on;
  double off_total = 0;             // the sum of e
  double sum_off = 0, sum_all = 0;  // of z: only where keeps_z

  // What the gradient off S is made of: e * off_scale + e_one * one_scale + constant.
  A off_scale = 0, one_scale = 0, constant = 0;
  A label_change = 0;  // what a label off S adds to that

  static int64_t blocks_of(const SlimLossArgs& args) { return (args.vocab_size + kBlock - 1) / kBlock; }

  static bool transforms(const SlimLossArgs& args) { return args.logit_scale != 1 || args.softcap > 0; }

  static bool keeps_logits(const SlimLossArgs& args) {
    return transforms(args) || args.label_smoothing > 0 || args.rest == kZeroLogit;
  }

  static int64_t scratch_bytes(const SlimLossArgs& args) {
    const int64_t rows = 1 + (args.temperature != 1) + keeps_logits(args);
    return 3 * blocks_of(args) * sizeof(double) +
           (rows * padded<A>(args.vocab_size) + 5 * padded<A>(args.top_k)) * sizeof(A);
  }

  SlimRow(const SlimLossArgs& arguments, int64_t row_index, void* scratch)
      : args(arguments),
        n(row_index),
        row(static_cast<const X*>(args.logits) + n * args.logits_stride),
        target(args.target[n]),
        ids(args.ids == nullptr ? nullptr : args.ids + n * args.top_k),
        transform(transforms(args)),
        two_temperatures(args.temperature != 1),
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
    teacher = kept_z + entries;
    q = teacher + entries;
    p = q + entries;
    kept_gradient = reinterpret_cast<X*>(p + entries);
  }

  bool ignored() const { return target == args.ignore_index; }

  // Checks the row's label and ids, and guesses a level for its exponentials from a sample.
  Fault prepare() {
    if (ignored()) return kOk;
    if (target < 0 || target >= args.vocab_size) return kBadTarget;
    prefetch_teacher();
    kept = ids == nullptr ? 0 : count_kept(ids, args.top_k, args.vocab_size);
    if (kept < 0) return kBadIds;
    level = sampled_max(row, args.vocab_size);
    if (transform) level = transformed(Vec{} + level, args)[0];
    return kOk;
  }

  // The teacher's logits are needed after the student's row was read, the next row's ids at once when its turn comes.
  void prefetch_teacher() const {
    if (ids == nullptr) return;
    const int64_t size = args.teacher_dtype == kFloat64 ? 8 : args.teacher_dtype == kFloat32 ? 4 : 2;
    const char* logits = static_cast<const char*>(args.teacher_logits) + n * args.top_k * size;
    for (int64_t i = 0; i < args.top_k * size; i += 64) prefetch(logits + i);
    const char* next_ids = reinterpret_cast<const char*>(ids + args.top_k);
    for (int64_t i = 0; i < args.top_k * int64_t(sizeof(int32_t)); i += 64) prefetch(next_ids + i);
  }

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

  // Lanes past the row's end are -inf.
  Vec effective(int64_t i) const {
    const int64_t left = args.vocab_size - i;
    Vec x = left >= kWidth ? load(row + i) : load_part(row + i, left, -infinity<A>());
    if (!transform) return x;
    x = transformed(x, args);
    for (int64_t lane = left; lane < kWidth; ++lane) x[lane] = -infinity<A>();
    return x;
  }

  A effective_at(int64_t id) const {
    const A x = load_one(row + id);
    return transform ? transformed(Vec{} + x, args)[0] : x;
  }

  void read(int64_t first_block, int64_t last_block) {
    if (ignored()) return;
    // Local, or the compiler loads them again after every vector that is stored.
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
      // A block is summed after the next one was read: a vector load stalls on single elements stored just before it.
      if (block > first_block) sum_block(block - 1);
    }
    if (last_block > first_block) sum_block(last_block - 1);
  }

  int64_t end_of(int64_t block) const {
    const int64_t end = (block + 1) * kBlock;
    return end < args.vocab_size ? end : args.vocab_size;
  }

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

  // The largest effective logit off S.
  A exact_level() const {
    A best = -infinity<A>();
    int64_t k = 0;
    for (int64_t id = 0; id < args.vocab_size; ++id) {
      if (k < kept && ids[k] == id) {
        ++k;
        continue;
      }
      const A logit = effective_at(id);
      if (logit != logit) return logit;
      best = logit > best ? logit : best;
    }
    return best;
  }

  void total() {
    off_total = 0;
    double one = 0;
    sum_off = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
      off_total += off_sums[block];
      if (two_temperatures) one += off_one_sums[block];
      if (keeps_z) sum_off += z_sums[block];
    }
    off = level / args.temperature + __builtin_log(off_total);
    off_one = two_temperatures ? level + __builtin_log(one) : off;
  }

  bool sound() const {
    // Far from the level, exponentials overflow or lose digits to denormals.
    return off_total > 1e-20 && off_total < 1e20 && __builtin_fabs(off_one - level) < 46;
  }

  void sum_student() {
    total();
    if (!sound()) {
      level = exact_level();
      if (level == -infinity<A>()) {
        memset(e, 0, padded<A>(args.vocab_size) * sizeof(A) * (two_temperatures ? 2 : 1));
        off = off_one = -infinity<double>();
        off_total = 1;
      } else {
        read(0, num_blocks);
        total();
      }
    }
    for (int64_t k = kept; k < padded<A>(kept); ++k) kept_z[k] = -infinity<A>();
    lse_one = log_add_exp(off_one, exponentials(kept_z, padded<A>(kept), 1, p).log());
    on = exponentials(kept_z, padded<A>(kept), 1 / args.temperature, p);
    lse = log_add_exp(off, on.log());
    target_z = effective_at(target);
    sum_all = sum_off;
    if (keeps_z) {
      for (int64_t k = 0; k < kept; ++k) sum_all += kept_z[k];
    }
  }

  struct Divergence {
    double value = 0;            // D, without T^2
    double mean_slope = 0;       // sum of p * dD/dp over all outcomes
    double off_coefficient = 0;  // dD/d(z_v / T) off S is off_coefficient * exp(z_v / T - off) + off_constant
    double off_constant = 0;
    double teacher_mass = 0, student_mass = 0;
  };

  // D from the teacher's kept logits / T; leaves p * dD/dp in `teacher` and the student in `p`.
  Divergence diverge_from_teacher() {
    const ExpSum on_teacher = exponentials(teacher, padded<A>(kept), 1, q);
    const double log_kept = on_teacher.log();
    const bool has_lse = args.teacher_lse != nullptr;
    const double teacher_lse = has_lse ? double(static_cast<const A*>(args.teacher_lse)[n]) : __builtin_nan("");
    const double log_norm = teacher_log_norm(args.rest, log_kept, teacher_lse, kept, args.vocab_size);
    const double student_norm = args.rest == kRenormBoth ? on.log() : lse;
    const A inv_temperature = A(1 / args.temperature);
    const A q_scale = on_teacher.scale(log_norm), p_scale = on.scale(student_norm);

    Vec share_sum = {}, slope_sum = {};
    for (int64_t k = 0; k < kept; k += kWidth) {
      const Vec log_q = load(teacher + k) - A(log_norm);
      const Vec log_p = load(kept_z + k) * inv_temperature - A(student_norm);
      const Vec student = load(p + k) * p_scale;
      Vec share, slope;
      diverge(args.divergence, log_q, log_p, load(q + k) * q_scale, student, args.beta, args.alpha, &share, &slope);
      share_sum += share;
      slope_sum += slope;
      store(teacher + k, slope);
      store(p + k, student);
    }

    Divergence d;
    d.value = sum_lanes(share_sum);
    d.mean_slope = sum_lanes(slope_sum);
    d.teacher_mass = __builtin_exp(log_kept - teacher_lse);
    d.student_mass = __builtin_exp(on.log() - lse);
    const double log_tail = off - lse;
    const double tail = __builtin_exp(log_tail);
    const bool forward = args.divergence == kForwardKl || args.divergence == kSoftCe;
    if (args.rest == kGhost) {
      const double log_q = log_ghost(log_kept - teacher_lse, kept, args.vocab_size);
      double share, slope;
      diverge(args.divergence, log_q, log_tail, __builtin_exp(log_q), tail, args.beta, args.alpha, &share, &slope);
      d.value += share;
      // The forward slopes add up to exactly -1; rounding their sum would drown a small (1 - a) - (1 - P).
      d.mean_slope = forward ? -1 : d.mean_slope + slope;
      d.off_coefficient = slope - tail * d.mean_slope;
    } else if (args.rest == kZeroLogit) {
      const double unkept = double(args.vocab_size - kept);
      const double each = __builtin_exp(-log_norm);
      const double entropy = args.divergence == kForwardKl ? -unkept * log_norm : 0;
      if (unkept > 0) d.value += each * (entropy - (sum_off / args.temperature - unkept * lse));
      d.mean_slope = -1;
      d.off_coefficient = -tail * d.mean_slope;
      d.off_constant = -each;
    } else if (args.rest != kRenormBoth) {
      d.off_coefficient = -tail * d.mean_slope;
    }
    return d;
  }

  // Sums the row up, writes its statistics, and prepares what its gradient is made of.
  void measure() {
    A* stats = static_cast<A*>(args.stats) + n;
    if (ignored()) {
      for (int column = 0; column < 7; ++column) stats[column * args.num_rows] = 0;
      return;
    }
    sum_student();
    const double log_student = target_z - lse_one;
    const double smoothing = args.label_smoothing;
    double ce = -log_student;
    if (smoothing > 0) ce = (1 - smoothing) * ce + smoothing * (lse_one - sum_all / args.vocab_size);

    Divergence d;
    TokenWeight w;
    double kd = 0, kd_scale = 0;
    const int64_t entry = first_entry(target);
    const bool label_kept = entry < kept && ids[entry] == target;
    if (ids != nullptr) {
      load_teacher(args, n, kept, teacher);
      double label_logit = label_kept ? double(teacher[entry]) * args.temperature : -infinity<double>();
      if (args.target_logit != nullptr) {
        const double known = static_cast<const A*>(args.target_logit)[n];
        if (known == known) label_logit = known;
      }
      w = weigh<A>(n, log_student, label_logit, args);
      d = diverge_from_teacher();
      kd = d.value * args.temperature * args.temperature;
      kd_scale = args.kd_weight * w.value * args.temperature;
    }
    double loss = args.ce_weight == 0 ? 0 : args.ce_weight * ce;
    if (ids != nullptr && args.kd_weight != 0) loss += args.kd_weight * w.value * kd;
    if (args.z_loss_weight != 0) loss += args.z_loss_weight * lse_one * lse_one;
    const double columns[7] = {loss, ce, kd, ids != nullptr ? w.value : 0, d.teacher_mass, d.student_mass, lse_one};
    for (int column = 0; column < 7; ++column) stats[column * args.num_rows] = A(columns[column]);
    if (args.dlogits == nullptr) return;

    const double through_weight = w.slope == 0 ? 0 : args.kd_weight * kd * w.slope;
    const double softmax_scale = args.ce_weight + 2 * args.z_loss_weight * lse_one - through_weight;
    const double label_slope = -args.ce_weight * (1 - smoothing) + through_weight;
    const double row_scale = args.row_scale == nullptr ? 1 : double(static_cast<const A*>(args.row_scale)[n]);
    const double everywhere = -args.ce_weight * smoothing / args.vocab_size;
    scale_gradient(d, row_scale, kd_scale, softmax_scale, everywhere);

    double at_label = row_scale * label_slope;
    if (transform) at_label *= transform_slope(Vec{} + A(target_z), args)[0];
    if (label_kept) p[entry] += A(at_label);
    label_change = label_kept ? 0 : A(at_label);
    for (int64_t k = 0; k < kept; k += kWidth) store(kept_gradient + k, load(p + k));
  }

  // The gradient of a row is `softmax_scale` * s + `everywhere` + `kd_scale` * dD/d(z / T), but for the label.
  void scale_gradient(const Divergence& d, double row_scale, double kd_scale, double softmax_scale, double everywhere) {
    const bool empty_off = off == -infinity<double>();
    // At T = 1 both softmaxes are the same exponentials.
    double coefficient = kd_scale * d.off_coefficient;
    if (!two_temperatures) coefficient += softmax_scale * __builtin_exp(off - lse_one);
    off_scale = empty_off ? A(0) : A(row_scale * coefficient / off_total);
    one_scale = two_temperatures && !empty_off ? A(row_scale * softmax_scale * __builtin_exp(level - lse_one)) : A(0);
    constant = A(row_scale * (everywhere + kd_scale * d.off_constant));

    const A kd = A(row_scale * kd_scale), on_scale = A(row_scale * softmax_scale), mean_slope = A(d.mean_slope);
    // s on S is p at T = 1, but for the norm of p.
    const double student_norm = args.rest == kRenormBoth ? on.log() : lse;
    const A p_to_s = A(__builtin_exp(student_norm - lse_one));
    for (int64_t k = 0; k < kept; k += kWidth) {
      const Vec logit = load(kept_z + k), student = load(p + k);
      const Vec softmax = two_temperatures ? exp(logit - A(lse_one)) : student * p_to_s;
      Vec dz = softmax * on_scale + A(row_scale * everywhere);
      dz += (load(teacher + k) - student * mean_slope) * kd;
      store(p + k, transform ? dz * transform_slope(logit, args) : dz);
    }
  }

  Vec gradient_at(int64_t i) const {
    Vec dz = load(e + i) * off_scale + constant;
    if (two_temperatures) dz += load(e_one + i) * one_scale;
    return transform ? dz * transform_slope(load(z + i), args) : dz;
  }

  void write(int64_t first_block, int64_t last_block) const {
    if (args.dlogits == nullptr) return;
    X* const gradient = static_cast<X*>(args.dlogits) + n * args.dlogits_stride;
    const bool streams = args.streams;
    // A block is streamed after the next one was finished, for the reason given in `read`.
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
        const A scale = off_scale, shift = constant;
        for (; i + kWidth <= length; i += kWidth) store(out + i, load(power + i) * scale + shift);
      }
      for (; i + kWidth <= length; i += kWidth) store(out + i, gradient_at(begin + i));
      if (i < length) store_part(out + i, gradient_at(begin + i), length - i);
      for (; k < kept_here && id[k] < begin + length; ++k) out[id[k] - begin] = on_support[k];
      if (label_change != 0 && target >= begin && target < begin + length) {
        store_one(out + target - begin, gradient_at(target / kWidth * kWidth)[target % kWidth] + label_change);
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
