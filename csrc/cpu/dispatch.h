// The table of CPU kernels, one per instruction set, and their arguments: plain pointers, numbers and enumerators.
//
// The files that are compiled once per instruction set include this header, so it holds declarations and POD only. The
// linker could keep the AVX-512 version of an inline function or a template with external linkage, which would crash an
// older machine.
#pragma once

#include <stdint.h>

#include "../slim_loss/args.h"

namespace slimkernels {

// The faults of a row. A kernel stops at the first fault and returns row * kFaults + fault; 0 means no fault.
enum Fault : int64_t { kOk = 0, kBadTarget = 1, kBadIds = 2, kNoMemory = 3 };
constexpr int64_t kFaults = 4;

// Arrays marked "acc" hold float32, or float64 if `dtype` is kFloat64.
struct TopkLogitsArgs {
  const void* logits;  // (N, V) of dtype, rows `row_stride` elements apart
  int64_t row_stride;
  int dtype;
  int64_t vocab_size;
  int64_t top_k;
  const int64_t* target;  // (N,) or null; a negative entry means no label
  const double* temperatures;
  int64_t num_temperatures;
  int32_t* ids;        // (N, K)
  void* values;        // (N, K) of dtype
  void* lse;           // (N, M) acc
  void* rest_lse;      // (N, M) acc, of the logits that are not kept
  void* target_logit;  // (N,) acc, written if target is not null
};

struct GatherArgs {
  const void* logits;  // (N, V) of dtype, rows `row_stride` elements apart
  int64_t row_stride;
  int dtype;
  int64_t vocab_size;
  const int32_t* ids;  // (N, K) ascending, padded with -1
  int64_t top_k;
  const int64_t* target;  // (N,) or null; a negative entry means no label
  const double* temperatures;
  int64_t num_temperatures;
  void* values;        // (N, K) of dtype, 0 at padding
  void* lse;           // (N, M) acc
  void* rest_lse;      // (N, M) acc, of the logits that are not at the ids
  void* target_logit;  // (N,) acc, written if target is not null
};

struct SparseSoftmaxArgs {
  const int32_t* ids;  // (N, K)
  const void* logits;  // (N, K) of dtype
  int dtype;
  const void* lse;       // (N,) acc, at the temperature; null where rest does not need it
  const void* rest_lse;  // (N,) acc, at the temperature, NaN where unknown; or null
  int64_t top_k;
  int64_t vocab_size;
  double temperature;
  int rest;
  void* logprobs;      // (N, K) acc
  void* tail_logprob;  // (N,) acc
};

struct SoftmaxGradientArgs {
  const void* logits;  // (N, V) of dtype
  int64_t logits_stride;
  int dtype;
  int64_t vocab_size;
  void* gradient;  // (N, V) of dtype, may be `logits` itself
  int64_t gradient_stride;
  const void* numbers;  // (5, N) acc: factor and level at `temperature`, factor and level at 1, constant
  int64_t num_rows;
  double temperature;
  double softcap;  // 0: none
  double logit_scale;
};

// Calls task(context, i) for every i in [0, tasks) on several threads.
typedef void (*RunTasks)(int64_t tasks, void* context, void (*task)(void* context, int64_t i));

// An option with one value for all rows (step 0) or one value per row (step 1).
struct RowInts {
  const int64_t* values;
  int64_t step;
};
struct RowFloats {
  const double* values;
  int64_t step;
};

struct SampleLogitsArgs {
  const void* logits;  // (N, V) of dtype, rows `row_stride` elements apart
  int64_t row_stride;
  int dtype;
  int64_t vocab_size;
  int64_t num_distinct;  // m
  RowInts seed;          // step 0: the seed of row 0, from which those of the others are drawn
  RowInts position;
  RowFloats temperature;
  RowInts top_k;
  RowFloats top_p;
  RowFloats min_p;
  int64_t* token;           // (N, m)
  void* logprob;            // (N, m) acc
  void* truncated_logprob;  // (N, m) acc
  void* entropy;            // (N,) acc
};

struct SampleTargetsArgs {
  const void* logits;  // (N, V) of dtype, rows `row_stride` elements apart
  int64_t row_stride;
  int dtype;
  int64_t vocab_size;
  int64_t rounds;
  RowInts seed;  // step 0: the seed of row 0, from which those of the others are drawn
  RowInts position;
  double temperature;
  const int64_t* target;  // (N,) or null; a negative entry means no label
  int32_t* ids;           // (N, min(rounds, V))
  void* log_shares;       // (N, min(rounds, V)) acc
  void* target_logit;     // (N,) acc, written if target is not null
};

// The kernels of one instruction set. Every kernel processes rows [begin, end) and is called from several threads.
struct KernelTable {
  const char* isa;
  int64_t (*topk_logits)(const TopkLogitsArgs&, int64_t begin, int64_t end);
  int64_t (*gather_logits)(const GatherArgs&, int64_t begin, int64_t end);
  int64_t (*sparse_softmax)(const SparseSoftmaxArgs&, int64_t begin, int64_t end);
  int64_t (*slim_loss)(const SlimLossArgs&, int64_t begin, int64_t end);
  int64_t (*slim_loss_split)(const SlimLossArgs&, int64_t n, int64_t parts, RunTasks);  // one row, in parts
  int64_t (*softmax_gradient)(const SoftmaxGradientArgs&, int64_t begin, int64_t end);
  int64_t (*sample_logits)(const SampleLogitsArgs&, int64_t begin, int64_t end);
  int64_t (*sample_targets)(const SampleTargetsArgs&, int64_t begin, int64_t end);
};

// Returns the best table that this machine supports, or the one that SLIMKERNELS_CPU_ISA names. Chosen once.
const KernelTable& kernels();

// Returns the reason why kernels() cannot be used (SLIMKERNELS_CPU_ISA is unknown or not supported here), or null.
const char* kernels_error();

// Returns the ISAs that this build contains and this machine supports, best first, separated by spaces.
const char* supported_isas();

}  // namespace slimkernels
