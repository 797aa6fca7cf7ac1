// Runs one row of topk_logits on the emulated GPU as the launcher plans it for an H200, and prints what was executed.
#include "trace.h"
// The emulator's copies, which must be included before the kernel.
#include "staging.h"

// The kernel.
#include "cuda/topk_logits.cuh"
#include "cuda/topk_logits_plan.h"
#include "row.h"

using namespace slimkernels;
using namespace slimkernels::cuda;

// Arguments: N, V and K. The standard input lists the blocks that are counted.
UNTRACED int main(int, char** arguments) {
  trace::begin();
  const int64_t num_rows = atoll(arguments[1]), vocab_size = atoll(arguments[2]), top_k = atoll(arguments[3]);
  const Machine h200 = {true, 227 << 10, 228 << 10, 132};
  const TopkLogitsPlan plan = make_plan<BFloat16>(h200, num_rows, vocab_size, top_k);
  Row logits(vocab_size);
  std::vector<uint16_t> values(top_k);
  std::vector<int32_t> ids(top_k);
  float lse, rest_lse;
  TopkLogitsArgs args = {};
  args.logits = logits.data();
  args.row_stride = vocab_size;
  args.vocab_size = int32_t(vocab_size);
  args.top_k = int32_t(top_k);
  args.slice = int32_t(plan.slice);
  args.list_capacity = int32_t(plan.list_capacity);
  args.ids = ids.data();
  args.values = values.data();
  args.lse = &lse;
  args.rest_lse = &rest_lse;
  set_sample(args);
  const double temperature = 1;
  set_temperatures(args, &temperature, 1);

  return trace::run_row(kLaunchedThreads, plan.num_blocks, plan.bytes, plan.staged,
                        [&] { topk_logits_kernel<BFloat16, true, kLaunchedThreads>(args); });
}
