// shared_cross_attention on the CPU: checks, division into tasks, and the choice of the kernel for this processor.

#include "shared_cross_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// PEFT_KERNELS_CPU_CAPABILITY=default, avx2, avx512 or avx512bf16 takes a lesser one, for tests.
const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const char* wanted = std::getenv("PEFT_KERNELS_CPU_CAPABILITY");
    [[maybe_unused]] const auto may = [&](std::string_view name) { return !wanted || name == wanted; };
#ifdef HAVE_X86_KERNELS
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq");
    if (may("avx512bf16") && avx512 && __builtin_cpu_supports("avx512bf16")) return &kKernelsAVX512BF16;
    if (may("avx512") && avx512) return &kKernelsAVX512;
    if (may("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kKernelsAVX2;
#endif
    return &kKernelsDefault;
  }();
  return *chosen;
}

// Memory kept between calls: pages fresh from the system would cost a decode step a tenth of its time.
class Buffer {
 public:
  float* at_least(int64_t floats) {
    if (capacity_ < floats) {
      memory_.reset(static_cast<float*>(::operator new[](floats * sizeof(float), kLine)));
      capacity_ = floats;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, kLine); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t capacity_ = 0;
};

thread_local Buffer task_scratch;    // of every thread
thread_local Buffer split_partials;  // of the calling thread, written by all

std::vector<int64_t> to_vector(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 1 && x.size(0) == count, name, " must be a CPU tensor of ", count, " elements");
  std::vector<int64_t> values(count);
  const int64_t stride = x.stride(0);
  if (x.scalar_type() == ScalarType::Int) {
    const auto data = static_cast<const int32_t*>(x.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[i] = data[i * stride];
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, name, " must be int32 or int64");
    const auto data = static_cast<const int64_t*>(x.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[i] = data[i * stride];
  }
  return values;
}

// first[i] .. first[i + 1]: the streams of input i.
std::vector<int64_t> first_streams(const std::optional<Tensor>& encoder_index, int64_t streams, int64_t inputs) {
  std::vector<int64_t> first(inputs + 1, streams);
  if (!encoder_index) {
    STD_TORCH_CHECK(inputs ? streams % inputs == 0 : streams == 0, streams, " streams do not divide among ", inputs, " inputs");
    for (int64_t i = 0; i < inputs; ++i) first[i] = i * (streams / inputs);
    return first;
  }
  const auto index = to_vector(*encoder_index, streams, "encoder_index");
  int64_t input = 0;
  for (int64_t stream = 0; stream < streams; ++stream) {
    const int64_t least = stream ? index[stream - 1] : 0;
    STD_TORCH_CHECK(least <= index[stream] && index[stream] < inputs, "encoder_index must not decrease and lie in [0, ", inputs, ")");
    while (input <= index[stream]) first[input++] = stream;
  }
  return first;
}

// An uninitialised tensor in memory (batch, tokens, heads, ...).
Tensor token_major(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const int64_t width = sizes.size() == 4 ? sizes[3] : 1;
  const int64_t strides[] = {sizes[1] * sizes[2] * width, width, sizes[1] * width, 1};
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, shim_dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void copy_strides(const Tensor& x, int64_t* strides) {
  const auto from = x.strides();
  std::copy(from.begin(), from.end(), strides);
}

// The work of a call. Rows of one head are divided before keys are: a task packs its keys once for all its rows.
struct Plan {
  struct Merge {
    Task task;  // its first split
    int64_t splits, stride;
  };
  std::vector<Task> tasks;
  std::vector<Merge> merges;
};

constexpr int64_t kMinTaskRows = 64;
constexpr int64_t kMinSplitKeys = 128;

int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

Plan make_plan(const Attention& a, int64_t inputs, int64_t heads, const std::vector<int64_t>& first_stream, const std::vector<int64_t>& lengths) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = threads > 1 ? 2 * threads : 1;
  Plan plan;
  plan.tasks.reserve(inputs * heads);
  const auto parts_of = [&](int64_t total, int64_t least, int64_t tasks) {
    return std::clamp<int64_t>(total / least, 1, ceil_div(wanted, tasks));
  };
  struct Shape {
    int64_t rows, row_parts, splits;
  };
  const auto shape_of = [&](int64_t input) {
    Shape shape;
    shape.rows = (first_stream[input + 1] - first_stream[input]) * a.tokens;
    shape.row_parts = std::max(ceil_div(shape.rows, kMaxTaskRows), parts_of(shape.rows, kMinTaskRows, inputs * heads));
    shape.splits = parts_of(lengths[input], kMinSplitKeys, inputs * heads * shape.row_parts);
    return shape;
  };

  int64_t partial_floats = 0;
  for (int64_t input = 0; input < inputs; ++input) {
    const Shape shape = shape_of(input);
    if (shape.splits > 1) partial_floats += heads * shape.rows * shape.splits * (a.head_dim + 2);
  }
  float* partial = split_partials.at_least(partial_floats);

  for (int64_t input = 0; input < inputs; ++input) {
    const auto [rows, row_parts, splits] = shape_of(input);
    if (rows == 0) continue;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t part = 0; part < row_parts; ++part) {
        const int64_t begin = part * rows / row_parts, end = (part + 1) * rows / row_parts;
        const int64_t stride = (end - begin) * (a.head_dim + 2);
        for (int64_t split = 0; split < splits; ++split) {
          const int64_t key_begin = split * lengths[input] / splits, key_end = (split + 1) * lengths[input] / splits;
          const Task task{input, head, first_stream[input], begin, end, key_begin, key_end, splits > 1 ? partial + split * stride : nullptr};
          plan.tasks.push_back(task);
          if (splits > 1 && split == 0) plan.merges.push_back({task, splits, stride});
        }
        if (splits > 1) partial += splits * stride;
      }
    }
  }
  return plan;
}

// Every thread takes the next task when it is done with one: inputs differ in length. Who computes a task does not change it.
template <class F>
void for_each_task(int64_t count, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  });
}

std::tuple<Tensor, Tensor> shared_cross_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& key_lengths,
    const std::optional<Tensor>& encoder_index, double scale) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "query must be float32 or bfloat16");
  for (const Tensor* x : {&query, &key, &value}) {
    const bool fits = x->is_cpu() && x->dim() == 4 && x->scalar_type() == dtype;
    STD_TORCH_CHECK(fits, "query, key and value must be CPU tensors of 4 dimensions and one dtype");
  }
  const int64_t streams = query.size(0), heads = query.size(1), tokens = query.size(2), head_dim = query.size(3);
  const int64_t inputs = key.size(0), keys = key.size(2);
  for (const Tensor* x : {&key, &value}) {
    const bool fits = x->size(0) == inputs && x->size(1) == heads && x->size(2) == keys && x->size(3) == head_dim;
    STD_TORCH_CHECK(fits, "key and value must be (inputs, heads, keys, D) with query's heads and D");
  }
  STD_TORCH_CHECK(1 <= head_dim && head_dim <= kMaxHeadDim, "D must be between 1 and ", kMaxHeadDim, ", got ", head_dim);
  const auto first_stream = first_streams(encoder_index, streams, inputs);
  const auto lengths = key_lengths ? to_vector(*key_lengths, inputs, "key_lengths") : std::vector<int64_t>(inputs, keys);
  for (const int64_t length : lengths) STD_TORCH_CHECK(0 <= length && length <= keys, "key_lengths must lie in [0, ", keys, "], got ", length);

  const Tensor out = token_major({streams, heads, tokens, head_dim}, dtype);
  const Tensor lse = token_major({streams, heads, tokens}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  Attention a{};
  a.query = query.const_data_ptr();
  a.key = key.const_data_ptr();
  a.value = value.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  copy_strides(query, a.query_stride);
  copy_strides(key, a.key_stride);
  copy_strides(value, a.value_stride);
  copy_strides(out, a.out_stride);
  copy_strides(lse, a.lse_stride);
  a.tokens = tokens;
  a.head_dim = head_dim;
  a.scale = static_cast<float>(scale);
  a.storage = dtype == ScalarType::Float ? Storage::float32 : Storage::bfloat16;

  const Kernels& kernel = kernels();
  const int64_t scratch_floats = kernel.scratch_floats(a);
  const Plan plan = make_plan(a, inputs, heads, first_stream, lengths);
  const int64_t tasks = plan.tasks.size(), threads = torch::stable::get_num_threads();
  for_each_task(tasks, [&](int64_t i) {
    const Task* following = i + threads < tasks ? &plan.tasks[i + threads] : nullptr;
    kernel.attend(a, plan.tasks[i], following, task_scratch.at_least(scratch_floats));
  });
  for_each_task(plan.merges.size(), [&](int64_t i) {
    const auto& [task, splits, stride] = plan.merges[i];
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      const Partials partials{task.partial + (row - task.row_begin) * (head_dim + 2), splits, stride};
      kernel.merge(a, partials, task.first_stream + row / tokens, task.head, row % tokens);
    }
  });
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("shared_cross_attention_cpu", TORCH_BOX(&shared_cross_attention));
}

}  // namespace
