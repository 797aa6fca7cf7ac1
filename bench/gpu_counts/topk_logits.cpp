// Runs one row of topk_logits on the emulated GPU as the launcher plans it for an H200, and prints what was executed.
#include "trace.h"
// The kernel must be included after the emulator.
#include "cuda/topk_logits.cuh"
#include "cuda/topk_logits_plan.h"

using namespace slimkernels;

// Arguments: N, V and K. Row 0 of bfloat16 logits, 10 + 4 times a normal variable, is processed. The standard input
// lists the blocks that are counted.
UNTRACED int main(int, char** arguments) {
  trace::begin();
  const int64_t num_rows = atoll(arguments[1]), vocab_size = atoll(arguments[2]), top_k = atoll(arguments[3]);
  const Machine h200 = {true, 227 << 10, 228 << 10, 132};
  const Plan plan = make_plan<BFloat16>(h200, num_rows, vocab_size, top_k);
  if (!plan.staged) {
    fprintf(stderr, "the row is not kept in shared memory\n");
    return 1;
  }

  std::vector<uint4> memory(vocab_size / 8 + 1);  // aligned
  uint16_t* const logits = reinterpret_cast<uint16_t*>(memory.data());
  std::mt19937 random(1);
  for (int64_t i = 0; i < vocab_size; ++i) {
    // The sum of twelve uniform variables is nearly normal, and the same with every library.
    double x = 10 - 4 * 6.0;
    for (int j = 0; j < 12; ++j) x += 4 * (random() / 4294967296.0);
    const float rounded = float(x);
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    logits[i] = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  std::vector<uint16_t> values(top_k);
  std::vector<int32_t> ids(top_k);
  float lse, rest_lse;
  TopkLogitsArgs args = {};
  args.logits = logits;
  args.row_stride = vocab_size;
  args.vocab_size = int32_t(vocab_size);
  args.top_k = int32_t(top_k);
  args.slice = int32_t(plan.slice);
  args.list_capacity = int32_t(plan.list_capacity);
  args.ids = ids.data();
  args.values = values.data();
  args.lse = &lse;
  args.rest_lse = &rest_lse;
  const double temperature = 1;
  set_temperatures(args, &temperature, 1);

  emulator::Machine& machine = emulator::machine;
  machine.num_threads = kLaunchedThreads;
  machine.num_blocks = unsigned(plan.num_blocks);
  machine.skipped_barrier = -1;
  machine.memory_size = plan.bytes;
  machine.kernel = [&] {
    trace::is_on = true;
    topk_logits_kernel<BFloat16, true, kLaunchedThreads>(args);
  };
  machine.fault = nullptr;
  if (!emulator::run_cluster()) {
    fprintf(stderr, "%s\n", machine.fault);
    return 1;
  }
  trace::is_on = false;
  printf("plan %d %lld\n", plan.num_blocks, static_cast<long long>(plan.bytes));
  trace::print();
  return 0;
}
