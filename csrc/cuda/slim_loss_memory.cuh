// Arguments of slim_loss_kernel and the layout of its shared memory, for the kernel and its launcher.
#pragma once

#include "../slim_loss/args.h"
#include "row_math.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr int kTile = 1024;  // elements whose sums a warp takes in float32
constexpr int kGroup = 8;    // elements whose marks are one byte
// Marks and sums of a row of this length fit into the shared memory of a block of any supported device.
constexpr int64_t kMaxVocabulary = 3 << 17;
constexpr int kDigits = 256;  // values of a digit of an order key
constexpr int kMaxRounds = 4;

// The options that are used at elements, in float32.
struct ElementOptions {
  int rest, divergence;
  float alpha, beta;
  float softcap, logit_scale;
  float inverse;                 // 1 / T
  float exponent, exponent_one;  // exp(z / T) = exp2(z * exponent)
  float teacher_blend;
};

struct SlimLossLaunch {
  SlimLossArgs args;
  ElementOptions options;
  int32_t slice;  // elements of a row per block, a multiple of kTile
};

// Sums over a tile, those over exponentials relative to the largest of the tile.
struct TileSums {
  float off_level, off_e, off_one, off_z;
  float on_level, on_e, on_one, on_z;
  float teacher_level, teacher_e;
  float off_spread, on_spread, teacher_spread;  // sums of e * (level - x), for entropies
  float blend_level, blend_e;                   // of the blended teacher
  float share, slope;
  int32_t first, count;  // entries of S in the tile: the first, and how many
  int32_t tied;          // elements equal to the K-th largest
};

// The numbers that the threads of a block need of the row's scalars.
struct RowNumbers {
  float on_level, p_offset;       // log p = (z - on_level) / T + p_offset
  float teacher_level, q_offset;  // log q = (x - teacher_level) / T + q_offset
  float blend_norm;               // of the log-probabilities of a blended teacher
  float gate;
  float off_level;
  float at_label;
  float on_scale;  // of exp(z - on_level) in the gradient on S
  DenseGradient<float> dense;
  KeptGradient<float> kept;
  int32_t num_kept;
  bool faulty;
};

// The fixed part of a block's shared memory. The scalars are those of the block's first warp.
template <int kThreads>
struct SlimLossState {
  RowNumbers numbers;
  StudentSums student;
  TeacherSums teacher, blended;
  TailTerms tail;
  DivergenceSums divergence;
  Measures measures;
  Stats stats;
  double off_entropy;  // of the student off S
  float label_logit;   // the teacher's logit of the label, -inf if it is not in S
  uint32_t bad;        // number of ids that are out of order or range
  uint32_t best_key[kThreads / 32], best_index[kThreads / 32];
  uint32_t kth, ties_kept, argmax;
  int32_t last_tie;
  uint32_t shared;  // entries of S among the K largest
};

template <class X, bool kStaged, int kThreads>
struct SlimLossMemory {
  using Bits = typename X::Bits;

  SlimLossState<kThreads>* state;
  TileSums* tiles;      // (slice / kTile)
  uint32_t* marks;      // (slice / 32) one bit per element, set for those in S
  uint32_t* histogram;  // (kMaxRounds, kDigits), only with all statistics
  Bits* staged;         // (slice)

  // Returns the number of bytes that a block needs.
  __host__ __device__ static int64_t bytes(int64_t slice, bool selects) {
    return SlimLossMemory().assign(nullptr, slice, selects);
  }
  // Sets the pointers to parts of `memory` and returns the number of bytes used.
  __host__ __device__ int64_t assign(char* memory, int64_t slice, bool selects) {
    int64_t used = 0;
    const auto take = [&](int64_t size) {
      char* place = memory + used;
      used += (size + 15) / 16 * 16;
      return place;
    };
    state = reinterpret_cast<SlimLossState<kThreads>*>(take(sizeof(SlimLossState<kThreads>)));
    tiles = reinterpret_cast<TileSums*>(take(slice / kTile * sizeof(TileSums)));
    marks = reinterpret_cast<uint32_t*>(take(slice / 8));
    histogram = reinterpret_cast<uint32_t*>(take(selects ? kMaxRounds * kDigits * 4 : 0));
    staged = reinterpret_cast<Bits*>(take(kStaged ? slice * sizeof(Bits) : 0));
    return used;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
