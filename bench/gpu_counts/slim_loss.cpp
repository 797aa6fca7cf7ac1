// Runs one row of slim_loss, forward and backward with the default options, on the emulated GPU as the launcher plans
// it for an H200, and prints what was executed.
#include "trace.h"
// The emulator's copies, which must be included before the kernel.
#include "staging.h"

// The kernel.
#include "cuda/slim_loss.cuh"
#include "cuda/slim_loss_plan.h"
#include "row.h"

using namespace slimkernels;
using namespace slimkernels::cuda;

// Arguments: N, V and K. The standard input lists the blocks that are counted.
UNTRACED int main(int, char** arguments) {
  trace::begin();
  const int64_t num_rows = atoll(arguments[1]), vocab_size = atoll(arguments[2]), top_k = atoll(arguments[3]);
  const Machine h200 = {true, 227 << 10, 228 << 10, 132};

  Row logits(vocab_size), gradient(vocab_size), teacher_logits(top_k);
  std::vector<int32_t> ids(top_k);
  for (int64_t k = 0; k < top_k; ++k) ids[k] = int32_t(k * vocab_size / top_k);
  const float teacher_lse = 30, teacher_rest_lse = 20, target_logit = 12;
  const int64_t target = ids[top_k / 2];
  std::vector<float> stats(kNumStats[kNone] * num_rows);
  SlimLossArgs args = {};
  args.logits = logits.data();
  args.logits_stride = args.dlogits_stride = vocab_size;
  args.dtype = args.teacher_dtype = kBFloat16;
  args.vocab_size = vocab_size;
  args.dlogits = gradient.data();
  args.stats = stats.data();
  args.num_rows = num_rows;
  args.target = &target;
  args.ids = ids.data();
  args.teacher_logits = teacher_logits.data();
  args.top_k = top_k;
  args.teacher_lse = args.teacher_lse_one = &teacher_lse;
  args.teacher_rest_lse = &teacher_rest_lse;
  args.target_logit = &target_logit;
  args.temperature = 1;
  args.rest = kRenorm;
  args.divergence = kForwardKl;
  args.weighting = kTeacherOverStudent;
  args.detach_weight = true;
  args.beta = args.alpha = 0.5;
  args.teacher_blend = args.tail_weight = args.ce_weight = args.kd_weight = args.logit_scale = 1;
  args.ignore_index = -100;
  const RowPlan plan = make_plan<BFloat16>(h200, args);
  const SlimLossLaunch launch = launch_of<BFloat16, true, kLaunchedThreads>(args, plan.slice);
  return trace::run_row(kLaunchedThreads, plan.num_blocks, plan.bytes, plan.staged,
                        [&] { slim_loss_kernel<BFloat16, true, kLaunchedThreads>(launch); });
}
