// CPU implementations of the row operators that slimkernels/ops/*.py define. They fill outputs that the Python side
// allocates, and return 0 or the first fault of the data as row * kFaults + fault. The Python side checks user input
// and raises informative errors; the checks here keep direct calls of torch.ops.slimkernels.* memory-safe.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "slim_loss/operator.h"
#include "store/packed_rows.h"

// Namespace of the operators: slimkernels/ops/_extension.py.
#ifndef SK_OPERATORS
#define SK_OPERATORS slimkernels
#endif

namespace slimkernels {
namespace {

constexpr OnDevice kCpu = {-1};

const void* data_of(const OptionalTensor& t, ScalarType type, int64_t numel, const char* name) {
  return kCpu.data_of(t, type, numel, name);
}

void* out_of(const OptionalTensor& t, ScalarType type, int64_t numel, const char* name) {
  return kCpu.out_of(t, type, numel, name);
}

void check_rows(const Tensor& t, const char* name) { kCpu.check_rows(t, name); }

const KernelTable& checked_kernels() {
  STD_TORCH_CHECK(kernels_error() == nullptr, kernels_error());
  return kernels();
}

// Runs a kernel over the rows on torch's threads; returns the fault of the first row that has one, or 0.
template <class Args>
int64_t run(int64_t (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t num_rows) {
  std::atomic<int64_t> fault{kOk};
  torch::stable::parallel_for(0, num_rows, 1, [&](int64_t begin, int64_t end) {
    const int64_t found = kernel(args, begin, end);
    int64_t known = fault;
    while (found != kOk && (known == kOk || found < known) && !fault.compare_exchange_weak(known, found)) {
    }
  });
  return fault;
}

void run_tasks(int64_t tasks, void* context, void (*task)(void*, int64_t)) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

// A gradient this large leaves the caches before anybody reads it.
constexpr int64_t kStreamedBytes = 4 << 20;
// A row this long is worth several threads where there are fewer rows than those.
constexpr int64_t kSplitVocabulary = 16384;

int64_t topk_logits_rows_cpu(Tensor logits, int64_t top_k, OptionalTensor target, std::vector<double> temperatures,
                             Tensor values, Tensor ids, Tensor lse, Tensor rest_lse, OptionalTensor target_logit) {
  check_rows(logits, "logits");
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  if (num_rows == 0) return kOk;
  const int64_t num_temperatures = static_cast<int64_t>(temperatures.size());
  STD_TORCH_CHECK(top_k >= 1 && top_k <= vocab_size && vocab_size <= INT32_MAX, "top_k must be in [1, V]");
  STD_TORCH_CHECK(target.has_value() == target_logit.has_value(), "target and target_logit must be given together");
  TopkLogitsArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(static_cast<Dtype>(args.dtype));
  args.logits = logits.const_data_ptr();
  args.row_stride = logits.stride(0);
  args.vocab_size = vocab_size;
  args.top_k = top_k;
  args.target = static_cast<const int64_t*>(data_of(target, ScalarType::Long, num_rows, "target"));
  args.temperatures = temperatures.data();
  args.num_temperatures = num_temperatures;
  args.values = out_of(values, logits.scalar_type(), num_rows * top_k, "values");
  args.ids = static_cast<int32_t*>(out_of(ids, ScalarType::Int, num_rows * top_k, "ids"));
  args.lse = out_of(lse, acc, num_rows * num_temperatures, "lse");
  args.rest_lse = out_of(rest_lse, acc, num_rows * num_temperatures, "rest_lse");
  args.target_logit = out_of(target_logit, acc, num_rows, "target_logit");
  return run(checked_kernels().topk_logits, args, num_rows);
}

int64_t gather_logits_rows_cpu(Tensor logits, Tensor ids, OptionalTensor target, std::vector<double> temperatures,
                               Tensor values, Tensor lse, Tensor rest_lse, OptionalTensor target_logit) {
  check_rows(logits, "logits");
  check_rows(ids, "ids");
  const int64_t num_rows = logits.size(0), top_k = ids.size(1);
  if (num_rows == 0) return kOk;
  const int64_t num_temperatures = static_cast<int64_t>(temperatures.size());
  STD_TORCH_CHECK(logits.size(1) <= INT32_MAX, "V must be below 2^31");
  STD_TORCH_CHECK(target.has_value() == target_logit.has_value(), "target and target_logit must be given together");
  GatherArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(static_cast<Dtype>(args.dtype));
  args.logits = logits.const_data_ptr();
  args.row_stride = logits.stride(0);
  args.vocab_size = logits.size(1);
  args.ids = static_cast<const int32_t*>(data_of(ids, ScalarType::Int, num_rows * top_k, "ids"));
  args.top_k = top_k;
  args.target = static_cast<const int64_t*>(data_of(target, ScalarType::Long, num_rows, "target"));
  args.temperatures = temperatures.data();
  args.num_temperatures = num_temperatures;
  args.values = out_of(values, logits.scalar_type(), num_rows * top_k, "values");
  args.lse = out_of(lse, acc, num_rows * num_temperatures, "lse");
  args.rest_lse = out_of(rest_lse, acc, num_rows * num_temperatures, "rest_lse");
  args.target_logit = out_of(target_logit, acc, num_rows, "target_logit");
  return run(checked_kernels().gather_logits, args, num_rows);
}

int64_t sparse_softmax_rows_cpu(Tensor ids, Tensor logits, OptionalTensor lse, OptionalTensor rest_lse,
                                double temperature, std::string rest, int64_t vocab_size, Tensor logprobs,
                                Tensor tail_logprob) {
  check_rows(logits, "logits");
  const int64_t num_rows = logits.size(0), top_k = logits.size(1);
  if (num_rows == 0) return kOk;
  SparseSoftmaxArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(static_cast<Dtype>(args.dtype));
  args.ids = static_cast<const int32_t*>(data_of(ids, ScalarType::Int, num_rows * top_k, "ids"));
  args.logits = data_of(logits, logits.scalar_type(), num_rows * top_k, "logits");
  args.lse = data_of(lse, acc, num_rows, "lse");
  args.rest_lse = data_of(rest_lse, acc, num_rows, "rest_lse");
  args.top_k = top_k;
  args.vocab_size = vocab_size;
  args.temperature = temperature;
  args.rest = rest_of(rest);
  STD_TORCH_CHECK(args.lse != nullptr || (args.rest != kZero && args.rest != kGhost), "rest '", rest, "' needs lse");
  args.logprobs = out_of(logprobs, acc, num_rows * top_k, "logprobs");
  args.tail_logprob = out_of(tail_logprob, acc, num_rows, "tail_logprob");
  return run(checked_kernels().sparse_softmax, args, num_rows);
}

int64_t run_slim_loss(SlimLossArgs& args) {
  const int64_t bytes = args.num_rows * args.vocab_size * size_of(static_cast<Dtype>(args.dtype));
  args.streams = args.dlogits != nullptr && args.dlogits != args.logits && bytes >= kStreamedBytes;
  const KernelTable& table = checked_kernels();
  const int64_t num_threads = torch::stable::get_num_threads();
  if (args.num_rows >= num_threads || args.vocab_size < kSplitVocabulary) {
    return run(table.slim_loss, args, args.num_rows);
  }
  for (int64_t n = 0; n < args.num_rows; ++n) {
    const int64_t fault = table.slim_loss_split(args, n, num_threads, run_tasks);
    if (fault != kOk) return fault;
  }
  return kOk;
}

struct CpuSlimLoss {
  static OnDevice device_of(const Tensor&) { return kCpu; }
  static int64_t run(SlimLossArgs& args, const Tensor&) { return run_slim_loss(args); }
};

void softmax_gradient_rows_cpu(Tensor logits, Tensor gradient, Tensor numbers, double temperature, double softcap,
                               double logit_scale) {
  check_rows(logits, "logits");
  check_rows(gradient, "gradient");
  SoftmaxGradientArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  args.num_rows = logits.size(0);
  args.vocab_size = logits.size(1);
  STD_TORCH_CHECK(gradient.scalar_type() == logits.scalar_type() && gradient.size(0) == args.num_rows &&
                      gradient.size(1) == args.vocab_size,
                  "gradient must have the shape and dtype of logits");
  if (args.num_rows == 0) return;
  args.logits = logits.const_data_ptr();
  args.logits_stride = logits.stride(0);
  args.gradient = gradient.mutable_data_ptr();
  args.gradient_stride = gradient.stride(0);
  args.numbers = data_of(numbers, acc_type(static_cast<Dtype>(args.dtype)), 5 * args.num_rows, "numbers");
  args.temperature = temperature;
  args.softcap = softcap;
  args.logit_scale = logit_scale;
  run(checked_kernels().softmax_gradient, args, args.num_rows);
}

// Returns an option of the rows: the tensor (N,) if it is given, else the one value for all rows.
RowInts option_of(const OptionalTensor& values, const int64_t& value, int64_t num_rows, const char* name) {
  if (!values.has_value()) return {&value, 0};
  return {static_cast<const int64_t*>(data_of(values, ScalarType::Long, num_rows, name)), 1};
}

RowFloats option_of(const OptionalTensor& values, const double& value, int64_t num_rows, const char* name) {
  if (!values.has_value()) return {&value, 0};
  return {static_cast<const double*>(data_of(values, ScalarType::Double, num_rows, name)), 1};
}

// Returns the seeds of the rows: the tensor (N,) if it is given, else one value, also as a tensor (), for a kernel to
// spread.
RowInts seed_of(const OptionalTensor& seeds, const int64_t& seed, int64_t num_rows) {
  if (!seeds.has_value() || seeds.value().dim() > 0) return option_of(seeds, seed, num_rows, "seed");
  return {static_cast<const int64_t*>(data_of(seeds, ScalarType::Long, 1, "seed")), 0};
}

int64_t sample_logits_rows_cpu(Tensor logits, int64_t num_distinct, int64_t seed, OptionalTensor seeds,
                               int64_t position, OptionalTensor positions, double temperature,
                               OptionalTensor temperatures, int64_t top_k, OptionalTensor top_ks, double top_p,
                               OptionalTensor top_ps, double min_p, OptionalTensor min_ps, Tensor token, Tensor logprob,
                               Tensor truncated_logprob, Tensor entropy) {
  check_rows(logits, "logits");
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  if (num_rows == 0) return kOk;
  STD_TORCH_CHECK(num_distinct >= 1 && vocab_size >= 1 && vocab_size <= INT32_MAX, "m and V must be at least 1");
  SampleLogitsArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(static_cast<Dtype>(args.dtype));
  args.logits = logits.const_data_ptr();
  args.row_stride = logits.stride(0);
  args.vocab_size = vocab_size;
  args.num_distinct = num_distinct;
  args.seed = seed_of(seeds, seed, num_rows);
  args.position = option_of(positions, position, num_rows, "position");
  args.temperature = option_of(temperatures, temperature, num_rows, "temperature");
  args.top_k = option_of(top_ks, top_k, num_rows, "top_k");
  args.top_p = option_of(top_ps, top_p, num_rows, "top_p");
  args.min_p = option_of(min_ps, min_p, num_rows, "min_p");
  args.token = static_cast<int64_t*>(out_of(token, ScalarType::Long, num_rows * num_distinct, "token"));
  args.logprob = out_of(logprob, acc, num_rows * num_distinct, "logprob");
  args.truncated_logprob = out_of(truncated_logprob, acc, num_rows * num_distinct, "truncated_logprob");
  args.entropy = out_of(entropy, acc, num_rows, "entropy");
  return run(checked_kernels().sample_logits, args, num_rows);
}

int64_t sample_targets_rows_cpu(Tensor logits, int64_t rounds, int64_t seed, OptionalTensor seeds, int64_t position,
                                OptionalTensor positions, double temperature, OptionalTensor target, Tensor ids,
                                Tensor log_shares, OptionalTensor target_logit) {
  check_rows(logits, "logits");
  const int64_t num_rows = logits.size(0), vocab_size = logits.size(1);
  if (num_rows == 0) return kOk;
  STD_TORCH_CHECK(rounds >= 1 && rounds <= INT32_MAX && vocab_size >= 1 && vocab_size <= INT32_MAX,
                  "rounds and V must be at least 1");
  STD_TORCH_CHECK(target.has_value() == target_logit.has_value(), "target and target_logit must be given together");
  SampleTargetsArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(static_cast<Dtype>(args.dtype));
  const int64_t top_k = rounds < vocab_size ? rounds : vocab_size;
  args.logits = logits.const_data_ptr();
  args.row_stride = logits.stride(0);
  args.vocab_size = vocab_size;
  args.rounds = rounds;
  args.seed = seed_of(seeds, seed, num_rows);
  args.position = option_of(positions, position, num_rows, "position");
  args.temperature = temperature;
  args.target = static_cast<const int64_t*>(data_of(target, ScalarType::Long, num_rows, "target"));
  args.ids = static_cast<int32_t*>(out_of(ids, ScalarType::Int, num_rows * top_k, "ids"));
  args.log_shares = out_of(log_shares, acc, num_rows * top_k, "log_shares");
  args.target_logit = out_of(target_logit, acc, num_rows, "target_logit");
  return run(checked_kernels().sample_targets, args, num_rows);
}

int64_t decode_logits_rows_cpu(Tensor id_words, Tensor values, OptionalTensor affine, OptionalTensor counts,
                               int64_t vocab_size, Tensor ids, Tensor logits) {
  STD_TORCH_CHECK(id_words.dim() == 2 && values.dim() == 2, "id_words and values must have two dimensions");
  const int64_t num_rows = values.size(0), top_k = values.size(1);
  if (num_rows == 0) return kOk;
  STD_TORCH_CHECK(top_k >= 1 && top_k <= vocab_size && vocab_size <= INT32_MAX, "K must be in [1, V]");
  DecodeLogitsArgs args = {};
  args.num_words = id_words.size(1);
  args.id_words =
      static_cast<const uint32_t*>(data_of(id_words, ScalarType::Int, num_rows * args.num_words, "id_words"));
  args.values = data_of(values, values.scalar_type(), num_rows * top_k, "values");
  args.affine = static_cast<const float*>(data_of(affine, ScalarType::Float, 2 * num_rows, "affine"));
  STD_TORCH_CHECK((values.scalar_type() == ScalarType::Byte) == affine.has_value(),
                  "affine must be given if values are uint8, and only then");
  switch (values.scalar_type()) {
    case ScalarType::Byte:
      args.decode = decode_values<uint8_t>;
      break;
    case ScalarType::BFloat16:
      args.decode = decode_values<uint16_t>;
      break;
    case ScalarType::Float:
      args.decode = decode_values<float>;
      break;
    default:
      STD_TORCH_CHECK(false, "values must be uint8, bfloat16 or float32");
  }
  args.counts = static_cast<const int32_t*>(data_of(counts, ScalarType::Int, num_rows, "counts"));
  args.vocab_size = vocab_size;
  args.top_k = top_k;
  args.ids = static_cast<int32_t*>(out_of(ids, ScalarType::Int, num_rows * top_k, "ids"));
  args.logits = static_cast<float*>(out_of(logits, ScalarType::Float, num_rows * top_k, "logits"));
  return run(decode_packed_rows, args, num_rows);
}

}  // namespace
}  // namespace slimkernels

STABLE_TORCH_LIBRARY_IMPL(SK_OPERATORS, CPU, m) {
  m.impl("topk_logits_rows", TORCH_BOX(&slimkernels::topk_logits_rows_cpu));
  m.impl("gather_logits_rows", TORCH_BOX(&slimkernels::gather_logits_rows_cpu));
  m.impl("decode_logits_rows", TORCH_BOX(&slimkernels::decode_logits_rows_cpu));
  m.impl("sparse_softmax_rows", TORCH_BOX(&slimkernels::sparse_softmax_rows_cpu));
  m.impl("sample_logits_rows", TORCH_BOX(&slimkernels::sample_logits_rows_cpu));
  m.impl("sample_targets_rows", TORCH_BOX(&slimkernels::sample_targets_rows_cpu));
  m.impl("slim_loss_rows", TORCH_BOX(&slimkernels::slim_loss_rows<slimkernels::CpuSlimLoss>));
  m.impl("softmax_gradient_rows", TORCH_BOX(&slimkernels::softmax_gradient_rows_cpu));
}
