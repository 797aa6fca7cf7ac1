// Arguments of slim_loss_kernel and the layout of its shared memory, for the kernel and its launcher.
#pragma once

#include "../slim_loss/args.h"
#include "parts.cuh"
#include "row_math.cuh"

namespace slimkernels {
namespace cuda {
namespace {

constexpr int kTile = 1024;  // elements whose sums a warp takes in float32
// Marks and sums of a row of this length fit into the shared memory of a block of any supported device.
constexpr int64_t kMaxVocabSize = 3 << 17;
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
  bool two_temperatures;       // T is not 1
  bool general, marks, plain;  // what is_general, needs_marks and is_plain say
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
  float on_scale;            // of exp(z - on_level) in the gradient on S
  float q_scale;             // q = exp((x - teacher_level) / T) * q_scale
  float p_factor, q_factor;  // of the same exponentials in the divergence's gradient, where that is plain
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
  double off_entropy;   // of the student off S
  float label_logit;    // the teacher's logit of the label, -inf if it is not in S
  int32_t first, last;  // the slice's entries of S: the first, and the first that follows them
  int32_t label_in_s;   // nonzero if S has the label
  uint32_t bad;         // number of ids that are out of order or range
  uint32_t best_key[kThreads / 32], best_index[kThreads / 32];
  uint32_t kth, ties_kept, argmax;
  int32_t last_tie;
  uint32_t shared;  // entries of S among the K largest
};

// A block's shared memory: the state, and where each array begins, in bytes.
struct SlimLossLayout {
  int32_t tiles, firsts, marks, histogram, staged, kept;
  int64_t bytes;
};

struct SlimLossLaunch {
  SlimLossArgs args;
  ElementOptions options;
  int32_t slice;     // elements of a row per block, a multiple of kTile
  int32_t capacity;  // the most entries of S in a slice
  SlimLossLayout layout;
};

// Whether the loss needs more of a logit off S than its exponential, or another than exp(z).
inline bool is_general(const SlimLossArgs& args) {
  return args.temperature != 1 || args.logit_scale != 1 || args.softcap > 0 || args.label_smoothing > 0 ||
         args.rest == kZeroLogit;
}

// Whether marks tell the elements on S from the others in a row in shared memory, where they are not hidden.
inline bool needs_marks(const SlimLossArgs& args) { return is_general(args) || args.statistics != kNone; }

// Whether the slopes of the divergence are -q and its shares q (log q - log p) or -q log p, so that it follows from
// sums of the first walk over S, and its gradient is a sum of two exponentials and a constant.
inline bool is_plain(const SlimLossArgs& args) {
  const bool forward = args.divergence == kForwardKl && args.rest != kGhost && args.rest != kRenormBoth;
  return (forward || args.divergence == kSoftCe) && !is_general(args) && args.teacher_blend == 1;
}

// Returns the most entries of S that a slice can have.
inline int64_t capacity_of(const SlimLossArgs& args, int64_t slice) { return args.top_k < slice ? args.top_k : slice; }

// Places the arrays for a slice. Those that are not needed take no room.
template <class X, bool kStaged, int kThreads>
SlimLossLayout layout_of(const SlimLossArgs& args, int64_t slice) {
  SlimLossLayout layout;
  Parts parts;
  const auto take = [&](int64_t size) { return int32_t(parts.add(size)); };
  take(sizeof(SlimLossState<kThreads>));
  layout.tiles = take(slice / kTile * sizeof(TileSums));
  layout.firsts = take((slice / kTile + 1) * 4);
  layout.marks = take(!kStaged || needs_marks(args) ? slice / 8 + 4 : 0);
  layout.histogram = take(args.statistics == kAll ? kMaxRounds * kDigits * 4 : 0);
  layout.staged = take(kStaged ? slice * sizeof(typename X::Bits) : 0);
  layout.kept = take(kStaged ? capacity_of(args, slice) * sizeof(typename X::Bits) : 0);
  layout.bytes = parts.bytes;
  return layout;
}

}  // namespace
}  // namespace cuda
}  // namespace slimkernels
