// Runs one kernel of the CPU kernel table on arrays from a file, without torch: for machines that have none.
//
// Usage: kernel_table INPUT OUTPUT. Both files are sequences of entries: the size of a name and of its bytes, two
// int64, and then the name and the bytes. The names are those of the fields of the kernel's arguments; numbers and
// enumerators are arrays of one int64 or float64. OUTPUT has all entries of INPUT, outputs filled in, and the entry
// "fault". The name of the instruction set is printed.
#include <stdint.h>
#include <stdio.h>

#include <fstream>
#include <map>
#include <string>

#include "cpu/dispatch.h"

namespace {

using slimkernels::kernels;

class Arrays {
 public:
  explicit Arrays(const char* path) {
    std::ifstream in(path, std::ios::binary);
    int64_t sizes[2];
    while (in.read(reinterpret_cast<char*>(sizes), sizeof(sizes))) {
      std::string name(sizes[0], ' '), bytes(sizes[1], ' ');
      in.read(&name[0], sizes[0]).read(&bytes[0], sizes[1]);
      entries_[name] = bytes;
    }
  }

  void write(const char* path) const {
    std::ofstream out(path, std::ios::binary);
    for (const auto& [name, bytes] : entries_) {
      const int64_t sizes[2] = {int64_t(name.size()), int64_t(bytes.size())};
      out.write(reinterpret_cast<const char*>(sizes), sizeof(sizes)) << name << bytes;
    }
  }

  const std::string& bytes(const char* name) const { return entries_.at(name); }
  void set(const char* name, int64_t value) { entries_[name] = {reinterpret_cast<char*>(&value), sizeof(value)}; }

  // Points a field to an array, null if there is none of the name.
  template <class T>
  void get(const char* name, T** field) {
    const auto found = entries_.find(name);
    *field = found == entries_.end() ? nullptr : static_cast<T*>(static_cast<void*>(&found->second[0]));
  }
  // Sets a field to a number; leaves it as it is if there is none of the name.
  template <class T>
  void get(const char* name, T* field) {
    using Stored = decltype(stored(T()));
    Stored* value;
    get(name, &value);
    if (value != nullptr) *field = T(*value);
  }
  template <class Option>
  void get_option(const char* name, Option* option) {
    get(name, &option->values);
    option->step = bytes(name).size() > sizeof(*option->values);
  }

 private:
  static double stored(double);
  static int64_t stored(int64_t);
  static int64_t stored(int);
  static int64_t stored(bool);

  std::map<std::string, std::string> entries_;
};

#define GET(field) arrays.get(#field, &args.field)

int64_t topk_logits(Arrays& arrays, int64_t num_rows) {
  slimkernels::TopkLogitsArgs args = {};
  GET(logits), GET(dtype), GET(vocab_size), GET(top_k), GET(target), GET(temperatures), GET(num_temperatures);
  GET(ids), GET(values), GET(lse), GET(rest_lse), GET(target_logit);
  args.row_stride = args.vocab_size;
  return kernels().topk_logits(args, 0, num_rows);
}

int64_t gather_logits(Arrays& arrays, int64_t num_rows) {
  slimkernels::GatherArgs args = {};
  GET(logits), GET(dtype), GET(vocab_size), GET(ids), GET(top_k), GET(target), GET(temperatures);
  GET(num_temperatures), GET(values), GET(lse), GET(rest_lse), GET(target_logit);
  args.row_stride = args.vocab_size;
  return kernels().gather_logits(args, 0, num_rows);
}

int64_t sparse_softmax(Arrays& arrays, int64_t num_rows) {
  slimkernels::SparseSoftmaxArgs args = {};
  GET(ids), GET(logits), GET(dtype), GET(lse), GET(rest_lse), GET(top_k), GET(vocab_size), GET(temperature);
  GET(rest), GET(logprobs), GET(tail_logprob);
  return kernels().sparse_softmax(args, 0, num_rows);
}

int64_t softmax_gradient(Arrays& arrays, int64_t num_rows) {
  slimkernels::SoftmaxGradientArgs args = {};
  GET(logits), GET(dtype), GET(vocab_size), GET(gradient), GET(numbers), GET(temperature), GET(softcap);
  GET(logit_scale);
  args.num_rows = num_rows;
  args.logits_stride = args.gradient_stride = args.vocab_size;
  return kernels().softmax_gradient(args, 0, num_rows);
}

int64_t sample_logits(Arrays& arrays, int64_t num_rows) {
  slimkernels::SampleLogitsArgs args = {};
  GET(logits), GET(dtype), GET(vocab_size), GET(num_distinct);
  arrays.get_option("seed", &args.seed);
  arrays.get_option("position", &args.position);
  arrays.get_option("temperature", &args.temperature);
  arrays.get_option("top_k", &args.top_k);
  arrays.get_option("top_p", &args.top_p);
  arrays.get_option("min_p", &args.min_p);
  GET(token), GET(logprob), GET(truncated_logprob), GET(entropy);
  args.row_stride = args.vocab_size;
  return kernels().sample_logits(args, 0, num_rows);
}

int64_t sample_targets(Arrays& arrays, int64_t num_rows) {
  slimkernels::SampleTargetsArgs args = {};
  GET(logits), GET(dtype), GET(vocab_size), GET(rounds), GET(temperature), GET(target), GET(ids);
  GET(log_shares), GET(target_logit);
  arrays.get_option("seed", &args.seed);
  arrays.get_option("position", &args.position);
  args.row_stride = args.vocab_size;
  return kernels().sample_targets(args, 0, num_rows);
}

int64_t slim_loss(Arrays& arrays, int64_t num_rows) {
  slimkernels::SlimLossArgs args = {};
  GET(logits), GET(dtype), GET(vocab_size), GET(dlogits), GET(stats), GET(target), GET(ids), GET(teacher_logits);
  GET(teacher_dtype), GET(top_k), GET(teacher_lse), GET(teacher_lse_one), GET(teacher_rest_lse), GET(target_logit);
  GET(temperature), GET(rest), GET(divergence), GET(beta), GET(alpha), GET(label_smoothing), GET(softcap);
  args.num_rows = num_rows;
  args.logits_stride = args.dlogits_stride = args.vocab_size;
  args.weighting = slimkernels::kTeacherOverStudent;
  args.detach_weight = true;
  args.forward_weight = args.teacher_blend = args.tail_weight = args.ce_weight = args.kd_weight = args.logit_scale = 1;
  args.entropy_threshold = 0.8;
  args.ignore_index = -100;
  args.statistics = slimkernels::kAll;
  const int64_t fault = kernels().slim_loss(args, 0, num_rows);
  if (fault != slimkernels::kOk) return fault;
  // Again, each row in parts and streamed, which must not change a bit.
  const std::string whole = arrays.bytes("dlogits") + arrays.bytes("stats");
  args.streams = true;
  for (int64_t n = 0; n < num_rows; ++n) {
    kernels().slim_loss_split(args, n, 3, [](int64_t tasks, void* context, void (*task)(void*, int64_t)) {
      for (int64_t i = tasks - 1; i >= 0; --i) task(context, i);
    });
  }
  return arrays.bytes("dlogits") + arrays.bytes("stats") == whole ? 0 : -1;
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, int64_t (*)(Arrays&, int64_t)> functions = {{"topk_logits", topk_logits},
                                                                          {"gather_logits", gather_logits},
                                                                          {"sparse_softmax", sparse_softmax},
                                                                          {"softmax_gradient", softmax_gradient},
                                                                          {"sample_logits", sample_logits},
                                                                          {"sample_targets", sample_targets},
                                                                          {"slim_loss", slim_loss}};
  Arrays arrays(arguments[1]);
  int64_t num_rows = 0;
  arrays.get("num_rows", &num_rows);
  arrays.set("fault", functions.at(arrays.bytes("kernel"))(arrays, num_rows));
  arrays.write(arguments[2]);
  printf("%s\n", kernels().isa);
}
