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
#include "store/packed_rows.h"

namespace slimkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64");
  }
}

ScalarType acc_type(Dtype dtype) { return dtype == kFloat64 ? ScalarType::Double : ScalarType::Float; }

template <class Enum>
struct Choice {
  const char* name;
  Enum value;
};

template <class Enum>
Enum value_of(const std::string& name, const char* argument, std::initializer_list<Choice<Enum>> choices) {
  for (const Choice<Enum>& choice : choices) {
    if (name == choice.name) return choice.value;
  }
  STD_TORCH_CHECK(false, argument, " is unknown: '", name, "'");
}

Rest rest_of(const std::string& name) {
  return value_of<Rest>(name, "rest",
                        {{"renorm", kRenorm},
                         {"zero", kZero},
                         {"ghost", kGhost},
                         {"zero_logit", kZeroLogit},
                         {"renorm_both", kRenormBoth}});
}

Divergence divergence_of(const std::string& name) {
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

Weighting weighting_of(const std::string& name) {
  return value_of<Weighting>(name, "weighting",
                             {{"teacher_over_student", kTeacherOverStudent},
                              {"student_over_teacher", kStudentOverTeacher},
                              {"none", kWeightOne},
                              {"tensor", kWeightTensor}});
}

Statistics statistics_of(const std::string& name) {
  return value_of<Statistics>(name, "statistics",
                              {{"none", kNone}, {"without_overlap", kWithoutOverlap}, {"all", kAll}});
}

// Returns the data of a contiguous CPU tensor of the given type and number of elements; null for an absent one.
const void* data_of(const OptionalTensor& t, ScalarType type, int64_t numel, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && t->scalar_type() == type && t->numel() == numel, name,
                  " must be a contiguous CPU tensor of the documented type with ", numel, " elements, got ",
                  t->numel());
  return t->const_data_ptr();
}

void* out_of(const OptionalTensor& t, ScalarType type, int64_t numel, const char* name) {
  return const_cast<void*>(data_of(t, type, numel, name));
}

void check_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), name,
                  " must be a two-dimensional CPU tensor whose last dimension is dense");
}

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

// Writes the statistics (M, N) and, where dlogits is given, the gradient, which may overwrite the logits.
int64_t slim_loss_rows_cpu(Tensor logits, OptionalTensor dlogits, Tensor stats, Tensor target, OptionalTensor row_scale,
                           OptionalTensor ids, OptionalTensor teacher_logits, OptionalTensor teacher_lse,
                           OptionalTensor teacher_lse_one, OptionalTensor teacher_rest_lse, OptionalTensor target_logit,
                           OptionalTensor token_weight, double temperature, std::string rest, std::string divergence,
                           std::string weighting, bool detach_weight, double beta, double alpha, double forward_weight,
                           double entropy_threshold, double teacher_blend, double tail_weight, double ce_weight,
                           double kd_weight, double label_smoothing, double z_loss_weight, double softcap,
                           double logit_scale, int64_t ignore_index, std::string statistics) {
  check_rows(logits, "logits");
  const int64_t num_rows = logits.size(0);
  if (num_rows == 0) return kOk;
  SlimLossArgs args = {};
  args.dtype = dtype_of(logits, "logits");
  const ScalarType acc = acc_type(static_cast<Dtype>(args.dtype));
  args.logits = logits.const_data_ptr();
  args.logits_stride = logits.stride(0);
  args.vocab_size = logits.size(1);
  if (dlogits.has_value()) {
    check_rows(*dlogits, "dlogits");
    STD_TORCH_CHECK(dlogits->scalar_type() == logits.scalar_type() && dlogits->size(0) == num_rows &&
                        dlogits->size(1) == args.vocab_size,
                    "dlogits must have the shape and dtype of logits");
    args.dlogits = dlogits->mutable_data_ptr();
    args.dlogits_stride = dlogits->stride(0);
  }
  args.statistics = statistics_of(statistics);
  args.stats = out_of(stats, acc, kNumStats[args.statistics] * num_rows, "stats");
  args.num_rows = num_rows;
  args.target = static_cast<const int64_t*>(data_of(target, ScalarType::Long, num_rows, "target"));
  args.row_scale = data_of(row_scale, acc, num_rows, "row_scale");
  args.rest = rest_of(rest);
  args.divergence = divergence_of(divergence);
  args.weighting = weighting_of(weighting);
  if (ids.has_value()) {
    STD_TORCH_CHECK(ids->dim() == 2 && teacher_logits.has_value(), "ids must have shape (N, K) and come with logits");
    args.top_k = ids->size(1);
    args.ids = static_cast<const int32_t*>(data_of(ids, ScalarType::Int, num_rows * args.top_k, "ids"));
    args.teacher_dtype = dtype_of(*teacher_logits, "teacher_logits");
    args.teacher_logits =
        data_of(teacher_logits, teacher_logits->scalar_type(), num_rows * args.top_k, "teacher_logits");
    args.teacher_lse = data_of(teacher_lse, acc, num_rows, "teacher_lse");
    args.teacher_lse_one = data_of(teacher_lse_one, acc, num_rows, "teacher_lse_one");
    args.teacher_rest_lse = data_of(teacher_rest_lse, acc, num_rows, "teacher_rest_lse");
    args.target_logit = data_of(target_logit, acc, num_rows, "target_logit");
    args.token_weight = data_of(token_weight, acc, num_rows, "token_weight");
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
  args.streams = args.dlogits != nullptr && args.dlogits != args.logits &&
                 num_rows * args.vocab_size * static_cast<int64_t>(logits.element_size()) >= kStreamedBytes;
  const KernelTable& table = checked_kernels();
  const int64_t num_threads = torch::stable::get_num_threads();
  if (num_rows >= num_threads || args.vocab_size < kSplitVocabulary) return run(table.slim_loss, args, num_rows);
  for (int64_t n = 0; n < num_rows; ++n) {
    const int64_t fault = table.slim_loss_split(args, n, num_threads, run_tasks);
    if (fault != kOk) return fault;
  }
  return kOk;
}

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

STABLE_TORCH_LIBRARY_IMPL(slimkernels, CPU, m) {
  m.impl("topk_logits_rows", TORCH_BOX(&slimkernels::topk_logits_rows_cpu));
  m.impl("gather_logits_rows", TORCH_BOX(&slimkernels::gather_logits_rows_cpu));
  m.impl("decode_logits_rows", TORCH_BOX(&slimkernels::decode_logits_rows_cpu));
  m.impl("sparse_softmax_rows", TORCH_BOX(&slimkernels::sparse_softmax_rows_cpu));
  m.impl("sample_logits_rows", TORCH_BOX(&slimkernels::sample_logits_rows_cpu));
  m.impl("sample_targets_rows", TORCH_BOX(&slimkernels::sample_targets_rows_cpu));
  m.impl("slim_loss_rows", TORCH_BOX(&slimkernels::slim_loss_rows_cpu));
  m.impl("softmax_gradient_rows", TORCH_BOX(&slimkernels::softmax_gradient_rows_cpu));
}
