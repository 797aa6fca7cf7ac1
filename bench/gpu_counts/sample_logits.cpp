// Runs one row of sample_logits on the emulated GPU as the launcher plans it for an H200, and prints what was executed.
// It has top-k and top-p where K is given, and is not truncated where K is 0.
#include "trace.h"
// The emulator's copies, which must be included before the kernel.
#include "staging.h"

// The kernel.
#include "cuda/sample_logits.cuh"
#include "cuda/sample_logits_plan.h"
#include "row.h"

using namespace slimkernels;
using namespace slimkernels::cuda;

// Arguments: N, V and K. The standard input lists the blocks that are counted.
UNTRACED int main(int, char** arguments) {
  trace::begin();
  const int64_t num_rows = atoll(arguments[1]), vocab_size = atoll(arguments[2]), top_k = atoll(arguments[3]);
  const Machine h200 = {true, 227 << 10, 228 << 10, 132};
  const RowPlan plan = make_plan<BFloat16>(h200, num_rows, vocab_size);

  Row logits(vocab_size);
  int64_t token;
  float logprob, truncated_logprob, entropy;
  SampleArgs args = {};
  args.logits = logits.data();
  args.row_stride = vocab_size;
  args.vocab_size = int32_t(vocab_size);
  args.num_distinct = 1;
  args.slice = int32_t(plan.slice);
  args.list_capacity = kListCapacity;
  args.seed = 7;
  args.temperature.number = top_k > 0 ? 0.8 : 1;
  args.top_k.number = top_k;
  args.top_p.number = top_k > 0 ? 0.95 : 1;
  args.token = &token;
  args.logprob = &logprob;
  args.truncated_logprob = &truncated_logprob;
  args.entropy = &entropy;
  return trace::run_row(kLaunchedThreads, plan.num_blocks, plan.bytes, plan.staged,
                        [&] { sample_logits_kernel<BFloat16, true, kLaunchedThreads>(args); });
}
