// The operator slim_loss_rows of every device: checks its operands and options, and fills SlimLossArgs.
#pragma once

#include <string>

#include "../operands.h"
#include "args.h"

namespace slimkernels {

inline Divergence divergence_of(const std::string& name) {
  return value_of<Divergence>(name, "divergence",
                              {{"forward_kl", kForwardKl},
                               {"soft_ce", kSoftCe},
                               {"reverse_kl", kReverseKl},
                               {"jsd", kJsd},
                               {"skew_kl", kSkewKl},
                               {"skew_reverse_kl", kSkewReverseKl},
                               {"tvd", kTvd},
                               {"ab", kAb},
                               {"gated", kGated}});
}

inline Weighting weighting_of(const std::string& name) {
  return value_of<Weighting>(name, "weighting",
                             {{"teacher_over_student", kTeacherOverStudent},
                              {"student_over_teacher", kStudentOverTeacher},
                              {"none", kWeightOne},
                              {"tensor", kWeightTensor}});
}

inline Statistics statistics_of(const std::string& name) {
  return value_of<Statistics>(name, "statistics",
                              {{"none", kNone}, {"without_overlap", kWithoutOverlap}, {"all", kAll}});
}

// Writes the statistics (M, N) and, where dlogits is given, the gradient, which may overwrite the logits.
template <class Backend>
int64_t slim_loss_rows(Tensor logits, OptionalTensor dlogits, Tensor stats, Tensor target, OptionalTensor row_scale,
                       OptionalTensor ids, OptionalTensor teacher_logits, OptionalTensor teacher_lse,
                       OptionalTensor teacher_lse_one, OptionalTensor teacher_rest_lse, OptionalTensor target_logit,
                       OptionalTensor token_weight, double temperature, std::string rest, std::string divergence,
                       std::string weighting, bool detach_weight, double beta, double alpha, double forward_weight,
                       double entropy_threshold, double teacher_blend, double tail_weight, double ce_weight,
                       double kd_weight, double label_smoothing, double z_loss_weight, double softcap,
                       double logit_scale, int64_t ignore_index, std::string statistics) {
  const OnDevice device = Backend::device_of(logits);
  device.check_rows(logits, "logits");
  const int64_t num_rows = logits.size(0);
  if (num_rows == 0) return 0;
  SlimLossArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(static_cast<Dtype>(args.dtype));
  args.logits = logits.const_data_ptr();
  args.logits_stride = logits.stride(0);
  args.vocab_size = logits.size(1);
  if (dlogits.has_value()) {
    device.check_rows(*dlogits, "dlogits");
    STD_TORCH_CHECK(dlogits->scalar_type() == logits.scalar_type() && dlogits->size(0) == num_rows &&
                        dlogits->size(1) == args.vocab_size,
                    "dlogits must have the shape and dtype of logits");
    args.dlogits = dlogits->mutable_data_ptr();
    args.dlogits_stride = dlogits->stride(0);
  }
  args.statistics = statistics_of(statistics);
  args.stats = device.out_of(stats, acc, kNumStats[args.statistics] * num_rows, "stats");
  args.num_rows = num_rows;
  args.target = static_cast<const int64_t*>(device.data_of(target, ScalarType::Long, num_rows, "target"));
  args.row_scale = device.data_of(row_scale, acc, num_rows, "row_scale");
  args.rest = rest_of(rest);
  args.divergence = divergence_of(divergence);
  args.weighting = weighting_of(weighting);
  if (ids.has_value()) {
    STD_TORCH_CHECK(ids->dim() == 2 && teacher_logits.has_value(), "ids must have shape (N, K) and come with logits");
    args.top_k = ids->size(1);
    args.ids = static_cast<const int32_t*>(device.data_of(ids, ScalarType::Int, num_rows * args.top_k, "ids"));
    args.teacher_dtype = dtype_of(*teacher_logits, "teacher_logits");
    args.teacher_logits =
        device.data_of(teacher_logits, teacher_logits->scalar_type(), num_rows * args.top_k, "teacher_logits");
    args.teacher_lse = device.data_of(teacher_lse, acc, num_rows, "teacher_lse");
    args.teacher_lse_one = device.data_of(teacher_lse_one, acc, num_rows, "teacher_lse_one");
    args.teacher_rest_lse = device.data_of(teacher_rest_lse, acc, num_rows, "teacher_rest_lse");
    args.target_logit = device.data_of(target_logit, acc, num_rows, "target_logit");
    args.token_weight = device.data_of(token_weight, acc, num_rows, "token_weight");
    STD_TORCH_CHECK(args.teacher_lse != nullptr || (args.rest != kZero && args.rest != kGhost), "rest '", rest,
                    "' needs teacher_lse");
    STD_TORCH_CHECK(args.teacher_lse != nullptr || args.divergence != kGated, "divergence 'gated' needs teacher_lse");
    const bool compares = args.weighting == kTeacherOverStudent || args.weighting == kStudentOverTeacher;
    STD_TORCH_CHECK(args.teacher_lse_one != nullptr || !compares, "weighting '", weighting, "' needs teacher_lse_one");
    STD_TORCH_CHECK(args.token_weight != nullptr || args.weighting != kWeightTensor,
                    "weighting 'tensor' needs token_weight");
  }
  args.temperature = temperature;
  args.detach_weight = detach_weight;
  args.beta = beta;
  args.alpha = alpha;
  args.forward_weight = forward_weight;
  args.entropy_threshold = entropy_threshold;
  args.teacher_blend = teacher_blend;
  args.tail_weight = tail_weight;
  args.ce_weight = ce_weight;
  args.kd_weight = kd_weight;
  args.label_smoothing = label_smoothing;
  args.z_loss_weight = z_loss_weight;
  args.softcap = softcap;
  args.logit_scale = logit_scale;
  args.ignore_index = ignore_index;
  return Backend::run(args, logits);
}

}  // namespace slimkernels
