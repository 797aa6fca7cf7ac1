// slim_loss of a row and its gradient, which read the logits once and write the gradient once.
//
// A row is processed by a cluster of blocks. Each keeps its slice of the row in shared memory, or reads it again
// through L2 if it does not fit. A tile of 1024 elements belongs to one warp, from the sums to the gradient, and the
// stages are those of every backend (slimkernels/ops/README.md):
//
//   1, 2  sum_tiles, sum_scalars      sums of a row and of S (slim_loss_sums.cuh, slim_loss_scalars.cuh)
//   3     diverge_tiles, measure      divergence, loss and statistics (slim_loss_support.cuh, slim_loss_scalars.cuh)
//   4     write_gradient              the gradient replaces a tile's logits, then that on S replaces it there, then
//                                     the tile is written in vectors (slim_loss_gradient.cuh)
//
// The logits on S are copied to an array of their own. In the row -inf takes their place, so that the sums over the
// others need not tell them apart. Where an option uses more of a logit than its exponential, or where the row is not
// in shared memory, marks of one bit per element tell them apart instead.
//
// Between the stages every block adds up the tiles of the whole row in the same order, so none waits for the numbers of
// another. Only this arithmetic, of one warp, is in float64. A tile's sums depend on nothing but its elements: the
// results are the same bits for any number of blocks and any alignment.
//
// The kernel has run on an emulated GPU only (tests/support/cuda_emulator).
#pragma once

#include "slim_loss_elements.cuh"

namespace slimkernels {
namespace cuda {
namespace {

// The level of exponentials whose largest argument is x.
__device__ inline float level_of(float x) { return x == -infinity<float>() ? 0.0f : x; }

// exp2((x - level) * factor) for many x in one multiplication and addition each: it is 2 ** (x * factor - offset) times
// `correction`, which makes up for the rounding of `offset`. Larger levels are not exact.
struct Exponent {
  static constexpr float kMaxLevel = 1 << 20;
  float factor, offset, correction;

  __device__ Exponent(float level, float factor)
      : factor(factor), offset(level * factor), correction(exp2_approx(-fmaf(level, factor, -offset))) {}
  __device__ float uncorrected(float x) const { return exp2_approx(fmaf(x, factor, -offset)); }
  // Whether the level can be used, which NaN cannot.
  __device__ static bool is_exact(float level) { return level < kMaxLevel && level > -kMaxLevel; }
};

// The arguments of the divergence: an effective logit on S, and the log-probabilities of student and teacher.
struct Outcome {
  float z, log_p, log_q;
};

struct RowSum;

// The state and the steps of one block working on its slice of one row.
template <class X, bool kStaged, int kThreads>
struct SlimRow {
  using Bits = typename X::Bits;
  using State = SlimLossState<kThreads>;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kCount = kPerVector<X>;

  const SlimLossArgs& args;
  const ElementOptions& options;
  const int32_t slice, capacity;
  const int32_t n;
  const uint32_t num_blocks, rank;
  const int thread, lane, warp;
  const int32_t begin, length;  // position of the slice in the row, and its number of elements
  const Bits* const row;        // the slice in device memory
  const int32_t* const ids;     // the row's, null without a teacher
  int32_t label = -1;           // set by run
  const SlimLossLayout& layout;
  State& state;

  __device__ explicit SlimRow(const SlimLossLaunch& launch)
      : args(launch.args),
        options(launch.options),
        slice(launch.slice),
        capacity(launch.capacity),
        n(cluster_index()),
        num_blocks(cluster_size()),
        rank(cluster_rank()),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        begin(begin_of(rank)),
        length(args.vocab_size - begin < slice ? int32_t(args.vocab_size) - begin : slice),
        row(static_cast<const Bits*>(args.logits) + n * args.logits_stride + begin),
        ids(args.ids == nullptr ? nullptr : args.ids + n * args.top_k),
        layout(launch.layout),
        state(*reinterpret_cast<State*>(shared_memory())) {}

  // ---- Shared memory

  template <class T>
  __device__ T* array(int32_t place) const {
    return reinterpret_cast<T*>(shared_memory() + place);
  }
  __device__ TileSums* tiles() const { return array<TileSums>(layout.tiles); }  // (slice / kTile)
  // (slice / kTile + 1) the first entry of S in every tile or after it.
  __device__ int32_t* firsts() const { return array<int32_t>(layout.firsts); }
  // (slice / 32 + 1) one bit per element, set for those in S, only where they are not hidden.
  __device__ uint32_t* marks() const { return array<uint32_t>(layout.marks); }
  // (kMaxRounds, kDigits), only with all statistics.
  __device__ uint32_t* histogram() const { return array<uint32_t>(layout.histogram); }
  __device__ Bits* staged() const { return array<Bits>(layout.staged); }  // (slice) the logits, then their gradient
  __device__ Bits* kept() const { return array<Bits>(layout.kept); }      // (capacity) the logits on S

  // ---- Options

  __device__ bool transform() const { return options.logit_scale != 1 || options.softcap > 0; }
  __device__ bool two_temperatures() const { return options.two_temperatures; }
  __device__ bool sums_logits() const { return args.label_smoothing > 0 || options.rest == kZeroLogit; }
  __device__ bool blends() const { return options.teacher_blend != 1; }

  // ---- Blocks and tiles

  __device__ State& state_of(uint32_t block) { return *in_block(&state, block); }
  __device__ int32_t begin_of(uint32_t block) const {
    return block * slice < args.vocab_size ? int32_t(block * slice) : int32_t(args.vocab_size);
  }

  // The sums of a tile of the whole row.
  __device__ TileSums& tile_of(int32_t tile) {
    const int32_t per_block = slice / kTile;
    return *in_block(tiles() + tile % per_block, tile / per_block);
  }
  __device__ int32_t num_tiles() const { return (int32_t(args.vocab_size) + kTile - 1) / kTile; }

  // ---- Elements

  __device__ Bits element(int32_t i) const { return kStaged ? staged()[i] : row[i]; }

  __device__ float effective(float x) const { return transform() ? transformed(x, options) : x; }

  // The slice of the gradient in device memory.
  __device__ Bits* gradient() const { return static_cast<Bits*>(args.dlogits) + n * args.dlogits_stride + begin; }

  // Returns the vector of element i and those that follow, which have -inf past the end of the slice.
  __device__ uint4 vector_of(int32_t i) const {
    if (kStaged) return *reinterpret_cast<const uint4*>(staged() + i);
    const uintptr_t address = reinterpret_cast<uintptr_t>(row + i);
    const uint4* const from = reinterpret_cast<const uint4*>(address / 16 * 16);
    if (address % 16 == 0 && i + kCount <= length) return load_vector(from);
    // Both aligned vectors are within the slice.
    if (i >= kCount && i + 2 * kCount <= length) {
      return shifted(load_vector(from), load_vector(from + 1), uint32_t(address % 16));
    }
    Bits elements[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) elements[j] = i + j < length ? row[i + j] : kMinusInfinity<X>;
    return pack<X>(elements);
  }

  // Calls visit(i, vector) for the vectors of a tile that belong to this lane. A visit that takes many instructions, or
  // reads a vector through L2, would spill registers if the loop was unrolled.
  template <bool kUnrolled, class Visit>
  __device__ void for_each_vector(int32_t start, Visit visit) const {
#pragma unroll(kStaged&& kUnrolled ? 4 : 1)
    for (int step = 0; step < kTile / 32 / kCount; ++step) {
      const int32_t i = start + (step * 32 + lane) * kCount;
      visit(i, vector_of(i));
    }
  }

  // The marks from element i on, of which those of a vector are used.
  __device__ uint32_t marks_from(int32_t i) const {
    return __funnelshift_r(marks()[i / 32], marks()[i / 32 + 1], i % 32);
  }

  // ---- An entry of S, of this slice

  __device__ Bits bits_on(int32_t k) const {
    if (kStaged) return kept()[k - state.first];
    // An id is of another slice only in a row with bad ids.
    const uint32_t i = uint32_t(ids[k]) - uint32_t(begin);
    return i < uint32_t(length) ? row[i] : kMinusInfinity<X>;
  }
  __device__ float logit_on(int32_t k) const { return effective(X::widen(bits_on(k))); }
  template <class T>
  __device__ const T* teacher_row() const {
    return static_cast<const T*>(args.teacher_logits) + n * args.top_k;
  }
  __device__ float teacher_logit(int32_t k) const {
    switch (args.teacher_dtype) {
      case kFloat32:
        return teacher_row<float>()[k];
      case kBFloat16:
        return BFloat16::widen(teacher_row<uint16_t>()[k]);
      case kFloat16:
        return Float16::widen(teacher_row<uint16_t>()[k]);
      default:
        return float(teacher_row<double>()[k]);
    }
  }
  // Calls use(teacher), where teacher(k) is the teacher's logit of an entry.
  template <class Use>
  __device__ void with_teacher(Use use) const {
    // A walk for each type would spill registers where a row is read through L2.
    if (kStaged && args.teacher_dtype == kBFloat16) {
      use([logits = kept_pointer(teacher_row<uint16_t>())](int32_t k) { return BFloat16::widen(logits[k]); });
    } else {
      use([this](int32_t k) { return teacher_logit(k); });
    }
  }
  __device__ Outcome outcome_of(int32_t k) const;

  // ---- Steps, in the files named above

  // Stages 1 and 2.
  __device__ int32_t lower_bound(uint32_t id) const;
  __device__ void start();
  __device__ void find_entries();
  template <bool kMarks, class Teacher>
  __device__ void separate(int32_t start, TileSums& sums, const Teacher& teacher);
  template <bool kMarked>
  __device__ void sum_off(int32_t start, TileSums& sums) const;
  __device__ void sum_unmarked(int32_t start, TileSums& sums) const;
  __device__ void sum_on(TileSums& sums) const;
  template <class Teacher>
  __device__ void sum_on_plain(TileSums& sums, const Teacher& teacher) const;
  __device__ void sum_tiles();

  // Scalars.
  template <class Tile>
  __device__ RowSum sum_of_tiles(float TileSums::* level_of_tile, float exponent, float scale, Tile read);
  __device__ void sum_student_off();
  __device__ void sum_student_on();
  __device__ void sum_student_logits();
  __device__ void sum_teacher();
  __device__ void sum_scalars();
  __device__ void blend();
  __device__ void add_plain(const TileSums& tile, double& share, double& slope) const;
  __device__ void measure();

  // Statistics.
  __device__ int num_stats() const { return args.statistics == kNone ? 7 : args.statistics == kAll ? 13 : 12; }
  __device__ void find_argmax();
  __device__ void count_shared();
  __device__ void watch();
  __device__ void store_stats() const;

  // Stage 3.
  __device__ void blend_tiles();
  __device__ void diverge_tiles();

  // Stage 4.
  __device__ float slope_at(float z) const;
  __device__ float dense_gradient(float z) const;
  __device__ float gradient_on(int32_t k) const;
  template <class GradientOn>
  __device__ void write_on(int32_t start, const TileSums& tile, GradientOn gradient_on);
  __device__ void write_on_plain(int32_t start, const TileSums& tile);
  __device__ bool is_off_plain() const;
  template <bool kOneExponential, class GradientOf>
  __device__ void write_off(int32_t start, GradientOf gradient_of);
  template <class GradientOf>
  __device__ void write_unmarked(int32_t start, GradientOf gradient_of);
  __device__ void write_gradient();
  __device__ void fill(float value);

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
    if (kStaged) start_copy<X, kThreads>(row, staged(), length, thread);
    start();
    __syncthreads();
    if (ids != nullptr) find_entries();
    if (kStaged) wait_for_copies();
    __syncthreads();

    sum_tiles();
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
      if (!options.plain) diverge_tiles();
      if (!options.plain || args.statistics == kAll) sync_cluster();
    }
    if (warp == 0) measure();
    sync_cluster();  // the numbers are visible, and no block reads the sums of another any more
    if (args.dlogits != nullptr) write_gradient();
  }
};

}  // namespace
}  // namespace cuda
}  // namespace slimkernels

#include "slim_loss_gradient.cuh"
#include "slim_loss_scalars.cuh"
#include "slim_loss_statistics.cuh"
#include "slim_loss_sums.cuh"
#include "slim_loss_support.cuh"

namespace slimkernels {
namespace cuda {
namespace {

// Shared memory has room for three blocks of 256 threads at most.
template <class X, bool kStaged, int kThreads>
__global__ void __launch_bounds__(kThreads, 768 / kThreads)
    slim_loss_kernel(const __grid_constant__ SlimLossLaunch launch) {
  SlimRow<X, kStaged, kThreads>(launch).run();
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
