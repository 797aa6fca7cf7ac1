// slim_loss of a row and its gradient, which read the logits once and write the gradient once.
//
// A row is processed by a cluster of blocks. Each keeps its slice of the row in shared memory, or reads it again
// through L2 if it does not fit. The stages are those of every backend (slimkernels/ops/README.md):
//
//   1, 2  sum_tiles, sum_student, sum_teacher   sums of a row and of S, a tile of 1024 elements per warp
//   3     diverge_tiles, measure                divergence, loss and statistics
//   4     write_kept_gradient, write_gradient   the gradient on S replaces the logits in shared memory, then the
//                                               whole slice is written in vectors
//
// Marks, one bit per element, tell S from the others, so that each is summed by itself. Between the stages every block
// adds up the tiles of the whole row in the same order, so none waits for the numbers of another. Only this arithmetic,
// of one warp, is in float64. A tile's sums depend on nothing but its elements: the results are the same bits for any
// number of blocks and any alignment.
//
// The kernel has run on an emulated GPU only (tests/support/cuda_emulator).
#pragma once

#include <string.h>

#include "keys.cuh"
#include "slim_loss_memory.cuh"
#include "vectors.cuh"

namespace slimkernels {
namespace cuda {
namespace {

// Keys of float32 numbers that sort like them, for maxima over a warp.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float max_of_warp(float x) {
  const uint32_t key = __reduce_max_sync(kAllLanes, key_of(x));
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

__device__ inline double sum_of_warp(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    uint32_t halves[2];
    double other;
    memcpy(halves, &x, 8);
    halves[0] = __shfl_xor_sync(kAllLanes, halves[0], distance);
    halves[1] = __shfl_xor_sync(kAllLanes, halves[1], distance);
    memcpy(&other, halves, 8);
    x += other;
  }
  return x;
}

// The level of exponentials whose largest argument is x.
__device__ inline float level_of(float x) { return x == -infinity<float>() ? 0.0f : x; }

// The state and the steps of one block working on its slice of one row.
template <class X, bool kStaged, int kThreads>
struct SlimRow {
  using Bits = typename X::Bits;
  using State = SlimLossState<kThreads>;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kPerVector = 16 / sizeof(Bits);
  static constexpr Bits kMinusInfinity = Bits(X::kInfinity | ((Bits(~0u) >> 1) + 1));

  const SlimLossArgs& args;
  const ElementOptions& options;
  const int32_t slice;
  const int32_t n;
  const uint32_t num_blocks, rank;
  const int thread, lane, warp;
  const int32_t begin, length;  // position of the slice in the row, and its number of elements
  const Bits* const row;        // the slice in device memory
  Bits* const gradient;         // the same of the gradient, null if none is wanted
  const int32_t* const ids;     // the row's, null without a teacher
  int32_t label = -1;           // set by run
  SlimLossMemory<X, kStaged, kThreads> memory;
  State& state;

  __device__ explicit SlimRow(const SlimLossLaunch& launch)
      : args(launch.args),
        options(launch.options),
        slice(launch.slice),
        n(int32_t(blockIdx.x / cluster_size())),
        num_blocks(cluster_size()),
        rank(cluster_rank()),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        begin(rank * slice < args.vocab_size ? int32_t(rank * slice) : int32_t(args.vocab_size)),
        length(args.vocab_size - begin < slice ? int32_t(args.vocab_size) - begin : slice),
        row(static_cast<const Bits*>(args.logits) + n * args.logits_stride + begin),
        gradient(args.dlogits == nullptr ? nullptr
                                         : static_cast<Bits*>(args.dlogits) + n * args.dlogits_stride + begin),
        ids(args.ids == nullptr ? nullptr : args.ids + n * args.top_k),
        state(*reinterpret_cast<State*>(shared_memory())) {
    memory.assign(shared_memory(), slice, args.statistics == kAll);
  }

  __device__ bool smooths() const { return args.label_smoothing > 0; }
  __device__ bool transform() const { return options.logit_scale != 1 || options.softcap > 0; }
  __device__ bool two_temperatures() const { return options.inverse != 1; }
  __device__ bool sums_logits() const { return args.label_smoothing > 0 || options.rest == kZeroLogit; }
  __device__ bool blends() const { return options.teacher_blend != 1; }

  __device__ State& state_of(uint32_t block) { return *in_block(&state, block); }

  // The sums of a tile of the whole row.
  __device__ TileSums& tile_of(int32_t tile) {
    const int32_t per_block = slice / kTile;
    return *in_block(memory.tiles + tile % per_block, tile / per_block);
  }
  __device__ int32_t num_tiles() const { return (int32_t(args.vocab_size) + kTile - 1) / kTile; }

  // ---- Elements

  __device__ Bits element(int32_t i) const { return kStaged ? memory.staged[i] : row[i]; }

  __device__ float effective(Bits bits) const {
    const float x = X::widen(bits);
    return transform() ? transformed(x, options) : x;
  }

  __device__ static void unpack(const uint4& vector, Bits* elements) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int j = 0; j < kPerVector; ++j) {
      elements[j] = Bits(words[j * sizeof(Bits) / 4] >> (j * sizeof(Bits) % 4 * 8));
    }
  }

  __device__ static uint4 pack(const Bits* elements) {
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < kPerVector; ++j) {
      words[j * sizeof(Bits) / 4] |= uint32_t(elements[j]) << (j * sizeof(Bits) % 4 * 8);
    }
    return {words[0], words[1], words[2], words[3]};
  }

  __device__ static bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

  // Reads elements i to i + 7; -inf past the end of the slice.
  __device__ void read_group(int32_t i, Bits (&group)[kGroup]) const {
    if (kStaged || (is_aligned(row) && i + kGroup <= length)) {
      const uint4* from = reinterpret_cast<const uint4*>((kStaged ? memory.staged : row) + i);
#pragma unroll
      for (int part = 0; part < kGroup / kPerVector; ++part) unpack(from[part], group + part * kPerVector);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) group[j] = i + j < length ? row[i + j] : kMinusInfinity;
    }
  }

  __device__ bool is_marked(int32_t i) const { return memory.marks[i / 32] >> (i % 32) & 1; }

  // The marks of elements i to i + 7.
  __device__ uint32_t marks_of(int32_t i) const { return memory.marks[i / 32] >> (i % 32) & 0xffu; }

  // ---- Loading

  // Starts to copy the slice to shared memory. A row that is not aligned is shifted on the way, in registers.
  __device__ void start_staging() {
    uint4* const to = reinterpret_cast<uint4*>(memory.staged);
    const int32_t vectors = length / kPerVector;
    int32_t first = 0, last = 0;  // the vectors that are not copied element by element
    if (is_aligned(row)) {
      last = vectors;
      const uint4* from = reinterpret_cast<const uint4*>(row);
#pragma unroll 4
      for (int32_t i = thread; i < vectors; i += kThreads) copy_async(to + i, from + i);
    } else if (vectors > 2) {
      // Each is in two aligned vectors, which are within the row.
      first = 1;
      last = vectors - 1;
      const uintptr_t address = reinterpret_cast<uintptr_t>(row);
      const uint4* from = reinterpret_cast<const uint4*>(address / 16 * 16);
      const uint32_t offset = uint32_t(address % 16);
#pragma unroll 2
      for (int32_t i = first + thread; i < last; i += kThreads) to[i] = shifted(from[i], from[i + 1], offset);
    }
    for (int32_t i = thread; i < first * kPerVector; i += kThreads) memory.staged[i] = row[i];
    for (int32_t i = last * kPerVector + thread; i < length; i += kThreads) memory.staged[i] = row[i];
    if (thread < kGroup && length + thread < slice) memory.staged[length + thread] = kMinusInfinity;
  }

  // Returns the first entry of an id that is at least `id`, where padding is the largest id; any entry if the row's ids
  // do not ascend.
  __device__ int32_t lower_bound(uint32_t id) const {
    int32_t low = 0, high = int32_t(args.top_k);
    while (low < high) {
      const int32_t step = (high - low + 31) / 32;
      const int32_t probe = low + lane * step;
      const bool is_below = probe < high && uint32_t(ids[probe]) < id;
      const int32_t below = __popc(__ballot_sync(kAllLanes, is_below));
      if (below == 0) return low;
      const int32_t end = low + below * step;
      low = end - step + 1;
      if (end < high) high = end;
    }
    return low;
  }

  // Marks S and checks a share of the ids. Follows the clearing of the marks.
  __device__ int32_t mark() {
    const int32_t first = begin == 0 ? 0 : lower_bound(begin);
    for (int32_t k = first + thread; k < args.top_k; k += kThreads) {
      const uint32_t i = uint32_t(ids[k]) - uint32_t(begin);
      if (uint32_t(ids[k]) >= uint32_t(begin + length)) break;
      if (i < uint32_t(length)) atomicOr(&memory.marks[i / 32], 1u << (i % 32));
    }
    uint32_t bad = 0;
    const int32_t share = int32_t((args.top_k + num_blocks - 1) / num_blocks);
    const int32_t start = rank * share, end = args.top_k - start < share ? int32_t(args.top_k) : start + share;
    for (int32_t k = start + thread; k < end; k += kThreads) {
      const int32_t id = ids[k], before = k == 0 ? INT32_MIN : ids[k - 1];
      const bool ascends = k == 0 || (before >= 0 && id > before);
      bad += id != -1 && !(id >= 0 && id < args.vocab_size && ascends);
    }
    if (bad > 0) atomicAdd(&state.bad, bad);
    return first;
  }

  // ---- Stages 1 and 2: sums of tiles

  __device__ float teacher_logit(int32_t k) const {
    const int64_t i = n * args.top_k + k;
    switch (args.teacher_dtype) {
      case kFloat32:
        return static_cast<const float*>(args.teacher_logits)[i];
      case kBFloat16:
        return BFloat16::widen(static_cast<const uint16_t*>(args.teacher_logits)[i]);
      case kFloat16:
        return Float16::widen(static_cast<const uint16_t*>(args.teacher_logits)[i]);
      default:
        return float(static_cast<const double*>(args.teacher_logits)[i]);
    }
  }

  // Sums the elements of a tile off S. If not kGeneral, T is 1, z are the logits, and neither they nor the entropy are
  // summed.
  template <bool kGeneral>
  __device__ void sum_off(int32_t start, TileSums& sums) const {
    constexpr int kSteps = kTile / 32 / kGroup;
    // More would spill registers where a group is read through L2.
    constexpr int kUnrolled = kStaged ? 2 : 1;
    float level = -infinity<float>();
#pragma unroll kUnrolled
    for (int step = 0; step < kSteps; ++step) {
      const int32_t i = start + (step * 32 + lane) * kGroup;
      if (i >= length) break;
      Bits group[kGroup];
      read_group(i, group);
      const uint32_t marks = marks_of(i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const float z = kGeneral ? effective(group[j]) : X::widen(group[j]);
        // A softcap makes the elements past the end finite.
        const bool off = !(marks >> j & 1) && (!kGeneral || i + j < length);
        level = off ? fmaxf(level, z) : level;
      }
    }
    sums.off_level = max_of_warp(level);
    level = level_of(sums.off_level);
    float e_sum = 0, one_sum = 0, z_sum = 0, spread = 0;
#pragma unroll kUnrolled
    for (int step = 0; step < kSteps; ++step) {
      const int32_t i = start + (step * 32 + lane) * kGroup;
      if (i >= length) break;
      Bits group[kGroup];
      read_group(i, group);
      const uint32_t marks = marks_of(i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const bool off = !(marks >> j & 1);
        if (!kGeneral) {
          e_sum += off ? exp2_approx((X::widen(group[j]) - level) * options.exponent_one) : 0.0f;
        } else if (off && i + j < length) {
          const float z = effective(group[j]);
          const float e = exp2_approx((z - level) * options.exponent);
          const float e_one = two_temperatures() ? exp2_approx((z - level) * options.exponent_one) : e;
          e_sum += e;
          one_sum += e_one;
          z_sum += z;
          if (e_one > 0) spread += e_one * (level - z);
        }
      }
    }
    sums.off_e = sum_of_warp(e_sum);
    if (kGeneral) {
      sums.off_one = sum_of_warp(one_sum);
      sums.off_z = sum_of_warp(z_sum);
      sums.off_spread = sum_of_warp(spread);
    } else {
      sums.off_one = sums.off_e;
      sums.off_z = sums.off_spread = 0;
    }
  }

  // Sums the student's and the teacher's logits at the tile's entries of S.
  __device__ void sum_on(TileSums& sums) {
    float level = -infinity<float>(), teacher_level = level;
    for (int32_t k = sums.first + lane; k < sums.first + sums.count; k += 32) {
      level = fmaxf(level, effective(element(ids[k] - begin)));
      const float x = teacher_logit(k);
      teacher_level = fmaxf(teacher_level, x);
      if (ids[k] == label) state.label_logit = x;
    }
    sums.on_level = max_of_warp(level);
    sums.teacher_level = max_of_warp(teacher_level);
    level = level_of(sums.on_level);
    teacher_level = level_of(sums.teacher_level);
    float e_sum = 0, one_sum = 0, z_sum = 0, spread = 0, teacher_sum = 0, teacher_spread = 0;
    for (int32_t k = sums.first + lane; k < sums.first + sums.count; k += 32) {
      const float z = effective(element(ids[k] - begin)), x = teacher_logit(k);
      const float e = exp2_approx((z - level) * options.exponent);
      const float e_one = two_temperatures() ? exp2_approx((z - level) * options.exponent_one) : e;
      const float teacher_e = exp2_approx((x - teacher_level) * options.exponent);
      e_sum += e;
      one_sum += e_one;
      z_sum += z;
      if (e_one > 0) spread += e_one * (level - z);
      teacher_sum += teacher_e;
      if (teacher_e > 0) teacher_spread += teacher_e * (teacher_level - x) * options.inverse;
    }
    sums.on_e = sum_of_warp(e_sum);
    sums.on_one = sum_of_warp(one_sum);
    sums.on_z = sum_of_warp(z_sum);
    sums.on_spread = sum_of_warp(spread);
    sums.teacher_e = sum_of_warp(teacher_sum);
    sums.teacher_spread = sum_of_warp(teacher_spread);
  }

  // Sums all tiles of the slice, of whose entries of S `first` is the first.
  __device__ void sum_tiles(int32_t first) {
    const bool general = transform() || two_temperatures() || sums_logits() || args.statistics != kNone;
    int32_t counted = 0;
    for (int32_t tile = warp; tile * kTile < length; tile += kWarps) {
      TileSums sums = {};
      uint32_t before = 0;
      for (; counted < tile; ++counted) before += __popc(memory.marks[counted * 32 + lane]);
      first += int32_t(__reduce_add_sync(kAllLanes, before));
      sums.first = first;
      sums.count = int32_t(__reduce_add_sync(kAllLanes, __popc(memory.marks[tile * 32 + lane])));
      sums.on_level = sums.teacher_level = -infinity<float>();
      if (general) {
        sum_off<true>(tile * kTile, sums);
      } else {
        sum_off<false>(tile * kTile, sums);
      }
      if (sums.count > 0) sum_on(sums);
      if (lane == 0) memory.tiles[tile] = sums;
    }
  }

  // ---- The scalars, which the first warp of every block computes for itself

  // The sums of all tiles relative to one level: of exponentials, and of e * (level - x) times `scale`.
  struct RowSum {
    float level;
    double e, one, spread;
  };

  template <class Tile>
  __device__ RowSum sum_of_tiles(float TileSums::* level_of_tile, float exponent, float scale, Tile read) {
    float level = -infinity<float>();
    for (int32_t t = lane; t < num_tiles(); t += 32) level = fmaxf(level, tile_of(t).*level_of_tile);
    RowSum row = {max_of_warp(level), 0, 0, 0};
    level = level_of(row.level);
    for (int32_t t = lane; t < num_tiles(); t += 32) {
      const TileSums& tile = tile_of(t);
      const float below = level - tile.*level_of_tile;
      float e, one, spread;
      read(tile, e, one, spread);
      if (e == 0 && one == 0) continue;
      const float factor = exp2_approx(-below * exponent), factor_one = exp2_approx(-below * options.exponent_one);
      row.e += double(e * factor);
      row.one += double(one * factor_one);
      row.spread += double(scale == 1 ? (spread + one * below) * factor_one : (spread + e * below * scale) * factor);
    }
    row.e = sum_of_warp(row.e);
    row.one = sum_of_warp(row.one);
    row.spread = sum_of_warp(row.spread);
    return row;
  }

  // The entropy of the distribution of exponentials with a sum and a sum of e * (level - x).
  __device__ static double entropy_of(double sum, double spread) { return sum == 0 ? 0 : log(sum) + spread / sum; }

  // The sums are taken one after the other, and what they give is kept in shared memory, since few registers are left.
  // All lanes store the same numbers.

  __device__ void sum_student_off() {
    const RowSum off =
        sum_of_tiles(&TileSums::off_level, options.exponent, 1, [](auto& tile, float& e, float& one, float& spread) {
          e = tile.off_e, one = tile.off_one, spread = tile.off_spread;
        });
    const bool empty = off.level == -infinity<float>();
    OffSums& sums = state.student.off;
    sums.e = empty ? 1 : off.e;
    sums.lse = empty ? -infinity<double>() : off.level / args.temperature + log(off.e);
    sums.lse_one = empty || !two_temperatures() ? sums.lse : off.level + log(off.one);
    state.numbers.off_level = level_of(off.level);
    if (args.statistics != kNone) state.off_entropy = empty ? 0 : entropy_of(off.one, off.spread);
  }

  __device__ void sum_student_on() {
    const RowSum on =
        sum_of_tiles(&TileSums::on_level, options.exponent, 1, [](auto& tile, float& e, float& one, float& spread) {
          e = tile.on_e, one = tile.on_one, spread = tile.on_spread;
        });
    StudentSums& student = state.student;
    student.on = {level_of(on.level) / args.temperature, on.e};
    const double on_lse = student.on.log();
    student.lse = student.lse_one = log_add_exp(student.off.lse, on_lse);
    double on_lse_one = on_lse;
    if (two_temperatures()) {
      on_lse_one = ExpSum{level_of(on.level), on.one}.log();
      student.lse_one = log_add_exp(student.off.lse_one, on_lse_one);
    }
    state.numbers.on_level = level_of(on.level);
    if (args.statistics != kNone) {
      student.entropy = at_least_zero(entropy_of_part(student.off.lse_one - student.lse_one, state.off_entropy) +
                                      entropy_of_part(on_lse_one - student.lse_one, entropy_of(on.one, on.spread)));
    }
    student.label_z = effective(static_cast<const Bits*>(args.logits)[n * args.logits_stride + label]);
    student.log_s_y = student.label_z - student.lse_one;
  }

  __device__ void sum_student_logits() {
    double off_z = 0, on_z = 0;
    for (int32_t t = lane; t < num_tiles(); t += 32) {
      off_z += double(tile_of(t).off_z);
      on_z += double(tile_of(t).on_z);
    }
    off_z = sum_of_warp(off_z);
    state.student.off.z = off_z;
    state.student.sum_z = off_z + sum_of_warp(on_z);
  }

  __device__ void sum_teacher() {
    const RowSum on = sum_of_tiles(&TileSums::teacher_level, options.exponent, options.inverse,
                                   [](auto& tile, float& e, float& one, float& spread) {
                                     e = one = tile.teacher_e, spread = tile.teacher_spread;
                                   });
    const int32_t kept = state.numbers.num_kept;
    const float label_logit = state_of(uint32_t(label / slice)).label_logit;
    TeacherSums& teacher = state.teacher;
    teacher = teacher_sums<float>(args, n, kept, {level_of(on.level) / args.temperature, on.e}, label_logit);
    if (needs_teacher_entropy(args)) {
      set_teacher_entropy<float>(args, n, kept, entropy_of(on.e, on.spread), &teacher);
    }
    state.numbers.teacher_level = level_of(on.level);
  }

  // Computes what the walks over S need. Follows sum_tiles and a barrier.
  __device__ void sum_scalars() {
    RowNumbers& numbers = state.numbers;
    uint32_t kept = 0, bad = 0;
    for (int32_t t = lane; t < num_tiles(); t += 32) kept += uint32_t(tile_of(t).count);
    if (lane < int(num_blocks)) bad = state_of(lane).bad;
    numbers.num_kept = int32_t(__reduce_add_sync(kAllLanes, kept));
    numbers.faulty = __reduce_add_sync(kAllLanes, bad) > 0;
    sum_student_off();
    __syncwarp();
    sum_student_on();
    if (sums_logits()) sum_student_logits();
    if (ids == nullptr) return;
    __syncwarp();
    sum_teacher();
    __syncwarp();
    const double p_norm = p_norm_of(args, state.student);
    numbers.p_offset = float(state.student.on.level - p_norm);
    numbers.q_offset = float(state.teacher.on.level - state.teacher.norm.q_norm);
    numbers.gate = float(state.teacher.gate);
    numbers.blend_norm = 0;
  }

  // ---- Stage 3: the divergence

  struct Outcome {
    float z, log_p, log_q;
  };

  __device__ Outcome outcome_of(int32_t k) const {
    const RowNumbers& numbers = state.numbers;
    Outcome outcome;
    outcome.z = effective(element(ids[k] - begin));
    outcome.log_p = (outcome.z - numbers.on_level) * options.inverse + numbers.p_offset;
    outcome.log_q = (teacher_logit(k) - numbers.teacher_level) * options.inverse + numbers.q_offset;
    if (blends()) {
      const float t = options.teacher_blend;
      outcome.log_q = outcome.log_q * t + (outcome.log_p * (1 - t) - numbers.blend_norm);
    }
    return outcome;
  }

  __device__ void blend_tiles() {
    for (int32_t t = warp; t * kTile < length; t += kWarps) {
      TileSums& tile = memory.tiles[t];
      float level = -infinity<float>(), sum = 0;
      for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
        level = fmaxf(level, outcome_of(k).log_q);
      }
      level = max_of_warp(level);
      for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
        sum += exp2_approx((outcome_of(k).log_q - level_of(level)) * options.exponent_one);
      }
      sum = sum_of_warp(sum);
      if (lane == 0) {
        tile.blend_level = level;
        tile.blend_e = sum;
      }
    }
  }

  // Computes the teacher with which the student is compared. Follows blend_tiles and a barrier.
  __device__ void blend() {
    const RowSum sum =
        sum_of_tiles(&TileSums::blend_level, options.exponent_one, 1,
                     [](auto& tile, float& e, float& one, float& spread) { e = one = tile.blend_e, spread = 0; });
    state.blended = state.teacher;
    set_blended(args, state.student, {level_of(sum.level), sum.e}, &state.blended);
    if (lane == 0) state.numbers.blend_norm = float(state.blended.norm.q_norm);
  }

  __device__ void diverge_tiles() {
    const float gate = state.numbers.gate;
    for (int32_t t = warp; t * kTile < length; t += kWarps) {
      TileSums& tile = memory.tiles[t];
      float share_sum = 0, slope_sum = 0;
      for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
        const Outcome outcome = outcome_of(k);
        float share, slope;
        diverge(options, gate, outcome.log_q, outcome.log_p, exp(outcome.log_q), exp(outcome.log_p), &share, &slope);
        share_sum += share;
        slope_sum += slope;
      }
      share_sum = sum_of_warp(share_sum);
      slope_sum = sum_of_warp(slope_sum);
      if (lane == 0) {
        tile.share = share_sum;
        tile.slope = slope_sum;
      }
    }
  }

  // Computes the loss and the numbers of the gradient; the first block stores the statistics.
  __device__ void measure() {
    RowNumbers& numbers = state.numbers;
    state.divergence = DivergenceSums();
    if (ids != nullptr) {
      const TeacherSums& teacher = blends() ? state.blended : state.teacher;
      state.tail = tail_terms(args, state.student, teacher);
      __syncwarp();
      double share = 0, slope = 0;
      for (int32_t t = lane; t < num_tiles(); t += 32) {
        const TileSums& tile = tile_of(t);
        share += double(tile.share);
        slope += double(tile.slope);
      }
      share = sum_of_warp(share);
      slope = sum_of_warp(slope);
      state.divergence = divergence_sums(args, state.student, teacher, state.tail, numbers.num_kept, share, slope);
      __syncwarp();
    }
    state.measures = measures_of<float>(args, n, state.student, state.teacher, state.divergence, &state.stats);
    __syncwarp();
    if (args.statistics != kNone) watch();
    store_stats();
    if (gradient == nullptr) return;
    const GradientNumbers<float> found =
        gradient_numbers<float>(args, n, state.student, state.measures, numbers.off_level);
    numbers.dense = found.dense;
    numbers.kept = found.kept;
    numbers.on_scale = found.kept.scale * float(exp(double(numbers.on_level) - state.student.lse_one));
    numbers.at_label = float(found.at_label) * slope_at(float(state.student.label_z));
  }

  __device__ void watch() {
    double* const out = state.stats.columns + 7;
    const StudentSums& student = state.student;
    const TeacherSums& teacher = state.teacher;
    for (int i = 0; i < 6; ++i) out[i] = 0;
    out[0] = student.entropy;
    out[3] = state.argmax == uint32_t(label);
    if (ids != nullptr) {
      const int32_t entry = lower_bound(state.argmax);
      out[1] = teacher.entropy;
      out[2] = entry < state.numbers.num_kept && uint32_t(ids[entry]) == state.argmax;
      out[4] = teacher.log_t_y > student.log_s_y;
      if (args.statistics == kAll && state.numbers.num_kept > 0) {
        const uint32_t shared = __reduce_add_sync(kAllLanes, lane < int(num_blocks) ? state_of(lane).shared : 0u);
        out[5] = double(shared) / state.numbers.num_kept;
      }
    }
    if (student.lse_one == student.lse_one) return;
    for (int i = 0; i < 6; ++i) out[i] = student.lse_one;
  }

  __device__ int num_stats() const { return args.statistics == kNone ? 7 : args.statistics == kAll ? 13 : 12; }

  __device__ void store_stats() const {
    if (rank != 0 || lane >= num_stats()) return;
    static_cast<float*>(args.stats)[lane * args.num_rows + n] = float(state.stats.columns[lane]);
  }

  // ---- Stage 4: the gradient

  __device__ float slope_at(float z) const { return transform() ? transform_slope(z, options) : 1.0f; }

  // The gradient off S by a logit.
  __device__ float dense_gradient(float z) const {
    const DenseGradient<float>& dense = state.numbers.dense;
    const float below = z - state.numbers.off_level;
    float dz = exp2_approx(below * options.exponent) * dense.off_scale + dense.constant;
    if (two_temperatures()) dz += exp2_approx(below * options.exponent_one) * dense.one_scale;
    return transform() ? dz * transform_slope(z, options) : dz;
  }

  __device__ void store_kept(int32_t i, float dz) {
    if (kStaged) {
      memory.staged[i] = narrow(X(), dz);
    } else {
      gradient[i] = narrow(X(), dz);
    }
  }

  // Replaces the logits on S by their gradient, and that of a label off S, which is marked as well.
  __device__ void write_kept_gradient() {
    const RowNumbers& numbers = state.numbers;
    if (thread == 0 && label >= begin && label < begin + length) {
      const int32_t i = label - begin;
      if (!is_marked(i)) {
        store_kept(i, dense_gradient(float(state.student.label_z)) + numbers.at_label);
        atomicOr(&memory.marks[i / 32], 1u << (i % 32));
      }
    }
    if (ids == nullptr) return;
    for (int32_t t = warp; t * kTile < length; t += kWarps) {
      const TileSums& tile = memory.tiles[t];
      for (int32_t k = tile.first + lane; k < tile.first + tile.count; k += 32) {
        const Outcome outcome = outcome_of(k);
        const float p = exp(outcome.log_p);
        float dz = exp2_approx((outcome.z - numbers.on_level) * options.exponent_one) * numbers.on_scale;
        dz += numbers.kept.constant;
        // A weight of 0 drops the divergence, even where it is infinite.
        if (args.kd_weight != 0) {
          float share, slope;
          diverge(options, numbers.gate, outcome.log_q, outcome.log_p, exp(outcome.log_q), p, &share, &slope);
          dz += (slope - p * numbers.kept.mean_slope) * numbers.kept.kd_scale;
        }
        if (transform()) dz *= transform_slope(outcome.z, options);
        if (ids[k] == label) dz += numbers.at_label;
        store_kept(ids[k] - begin, dz);
      }
    }
  }

  __device__ Bits gradient_bits(Bits bits, bool marked) const {
    return marked ? bits : narrow(X(), dense_gradient(effective(bits)));
  }

  // Writes the gradient of the slice; what is marked has been computed.
  __device__ void write_gradient() {
    if (!kStaged) {
      write_off_gradient();
      return;
    }
    // The vectors of the output that are aligned start at `head`.
    const int32_t misplaced = int32_t(-reinterpret_cast<uintptr_t>(gradient) % 16 / sizeof(Bits));
    const int32_t head = misplaced < length ? misplaced : length;
    const int32_t vectors = (length - head) / kPerVector;
    uint4* const to = reinterpret_cast<uint4*>(gradient + head);
    if (head == 0) {
      const uint4* from = reinterpret_cast<const uint4*>(memory.staged);
#pragma unroll 2
      for (int32_t v = thread; v < vectors; v += kThreads) {
        Bits elements[kPerVector];
        unpack(from[v], elements);
        const uint32_t marks = memory.marks[v * kPerVector / 32] >> (v * kPerVector % 32);
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) elements[j] = gradient_bits(elements[j], marks >> j & 1);
        to[v] = pack(elements);
      }
    } else {
      for (int32_t v = thread; v < vectors; v += kThreads) {
        Bits elements[kPerVector];
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) {
          const int32_t i = head + v * kPerVector + j;
          elements[j] = gradient_bits(memory.staged[i], is_marked(i));
        }
        to[v] = pack(elements);
      }
    }
    for (int32_t i = thread; i < head; i += kThreads) gradient[i] = gradient_bits(memory.staged[i], is_marked(i));
    for (int32_t i = head + vectors * kPerVector + thread; i < length; i += kThreads) {
      gradient[i] = gradient_bits(memory.staged[i], is_marked(i));
    }
  }

  // Writes what is not marked. Each thread writes the elements that it reads, because both may be the same memory.
  __device__ void write_off_gradient() {
    int32_t done = 0;
    if (is_aligned(row) && is_aligned(gradient)) {
      const int32_t vectors = length / kPerVector;
      for (int32_t v = thread; v < vectors; v += kThreads) {
        const int32_t i = v * kPerVector;
        Bits elements[kPerVector];
        unpack(reinterpret_cast<const uint4*>(row)[v], elements);
        const uint32_t marks = memory.marks[i / 32] >> (i % 32) & ((1u << kPerVector) - 1);
#pragma unroll
        for (int j = 0; j < kPerVector; ++j) elements[j] = gradient_bits(elements[j], marks >> j & 1);
        if (marks == 0) {
          reinterpret_cast<uint4*>(gradient)[v] = pack(elements);
        } else {
#pragma unroll
          for (int j = 0; j < kPerVector; ++j) {
            if (!(marks >> j & 1)) gradient[i + j] = elements[j];
          }
        }
      }
      done = vectors * kPerVector;
    }
    for (int32_t i = done + thread; i < length; i += kThreads) {
      if (!is_marked(i)) gradient[i] = gradient_bits(row[i], false);
    }
  }

  // Fills the results of a row that is ignored or faulty. Raising would need a synchronisation with the host, so bad
  // rows become NaN.
  __device__ void fill(float value) {
    if (rank == 0 && thread < num_stats()) static_cast<float*>(args.stats)[thread * args.num_rows + n] = value;
    if (gradient == nullptr) return;
    const Bits bits = narrow(X(), value);
    int32_t done = 0;
    if (is_aligned(gradient)) {
      Bits elements[kPerVector];
#pragma unroll
      for (int j = 0; j < kPerVector; ++j) elements[j] = bits;
      const int32_t vectors = length / kPerVector;
      for (int32_t v = thread; v < vectors; v += kThreads) reinterpret_cast<uint4*>(gradient)[v] = pack(elements);
      done = vectors * kPerVector;
    }
    for (int32_t i = done + thread; i < length; i += kThreads) gradient[i] = bits;
  }

  // ---- The statistics, in slim_loss_statistics.cuh

  __device__ void find_argmax();
  __device__ void count_shared();

  __device__ void run() {
    const int64_t target = args.target[n];
    if (target == args.ignore_index) {
      fill(0);
      return;
    }
    if (target < 0 || target >= args.vocab_size) {
      fill(__uint_as_float(0x7fc00000));
      return;
    }
    label = int32_t(target);
    if (kStaged) start_staging();
    for (int32_t i = thread; i < slice / 32; i += kThreads) memory.marks[i] = 0;
    if (thread == 0) {
      state.bad = 0;
      state.label_logit = -infinity<float>();
    }
    int32_t first = 0;
    if (ids != nullptr) {
      __syncthreads();
      first = mark();
    }
    if (kStaged) wait_for_copies();
    __syncthreads();

    sum_tiles(first);
    sync_cluster();
    if (warp == 0) sum_scalars();
    __syncthreads();
    if (state.numbers.faulty) {
      sync_cluster();  // other blocks may still read this block's sums
      fill(__uint_as_float(0x7fc00000));
      return;
    }
    if (args.statistics != kNone) {
      find_argmax();
      if (args.statistics == kAll && ids != nullptr) count_shared();
    }
    if (ids != nullptr) {
      if (blends()) {
        blend_tiles();
        sync_cluster();
        if (warp == 0) blend();
        __syncthreads();
      }
      diverge_tiles();
      sync_cluster();
    }
    if (warp == 0) measure();
    sync_cluster();  // the numbers are visible, and no block reads the sums of another any more
    if (gradient == nullptr) return;
    write_kept_gradient();
    __syncthreads();
    write_gradient();
  }
};

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

#include "slim_loss_statistics.cuh"

namespace slimkernels {
namespace cuda {
namespace {

template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    slim_loss_kernel(const __grid_constant__ SlimLossLaunch launch) {
  SlimRow<X, kStaged, kThreads>(launch).run();
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
