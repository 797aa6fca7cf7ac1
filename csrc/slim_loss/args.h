// Arguments of slim_loss for its CPU and its CUDA kernels: pointers, numbers and enumerators, without code.
#pragma once

#include <stdint.h>

namespace slimkernels {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

enum Rest : int { kRenorm, kZero, kGhost, kZeroLogit, kRenormBoth };
enum Divergence : int { kForwardKl, kSoftCe, kReverseKl, kJsd, kSkewKl, kSkewReverseKl, kTvd, kAb, kGated };
enum Weighting : int { kTeacherOverStudent, kStudentOverTeacher, kWeightOne, kWeightTensor };
enum Statistics : int { kNone, kWithoutOverlap, kAll };

// The statistics of a row of slim_loss, named in SlimLossArgs: how many each value of the option asks for, the first
// of them in their order.
constexpr int kNumStats[] = {7, 12, 13};

// Arrays marked "acc" hold float32, or float64 if `dtype` is kFloat64.
// From `temperature` on, the fields are the options of slim_loss under their names.
struct SlimLossArgs {
  const void* logits;  // (N, V) of dtype
  int64_t logits_stride;
  int dtype;
  int64_t vocab_size;
  void* dlogits;  // (N, V) of dtype, may be `logits` itself, or null: no gradient
  int64_t dlogits_stride;
  // (M, N) acc: loss, ce, kd, weight, teacher_mass, student_mass, lse, entropy, teacher_entropy, argmax_kept,
  // argmax_correct, teacher_surer, overlap; M is kNumStats[statistics].
  void* stats;
  int64_t num_rows;
  const int64_t* target;       // (N,)
  const int32_t* ids;          // (N, K) or null: no teacher
  const void* teacher_logits;  // (N, K) of teacher_dtype
  int teacher_dtype;
  int64_t top_k;
  const void* teacher_lse;       // (N,) acc at `temperature`, or null
  const void* teacher_lse_one;   // (N,) acc at temperature 1
  const void* teacher_rest_lse;  // (N,) acc at `temperature`, NaN where unknown; or null
  const void* target_logit;      // (N,) acc or null
  const void* token_weight;      // (N,) acc or null
  const void* row_scale;         // (N,) acc or null: the gradient of row n is multiplied by row_scale[n]
  double temperature;
  int rest;
  int divergence;
  int weighting;
  bool detach_weight;
  double beta;
  double alpha;
  double forward_weight;
  double entropy_threshold;
  double teacher_blend;
  double tail_weight;
  double ce_weight;
  double kd_weight;
  double label_smoothing;
  double z_loss_weight;
  double softcap;  // 0: none
  double logit_scale;
  int64_t ignore_index;
  int statistics;
  bool streams;  // write the gradient past the caches, which excludes writing it over the logits
};

}  // namespace slimkernels
