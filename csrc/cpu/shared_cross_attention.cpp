// shared_cross_attention on the CPU, forward and backward: checks and division into tasks.

#include "shared_cross_attention.h"

#include <tuple>

#include "host.h"

namespace {

thread_local Buffer task_scratch;    // used by every thread
thread_local Buffer split_partials;  // the calling thread's buffer, written by all

// Streams first[i] to first[i + 1] belong to input i.
std::vector<int64_t> first_streams(const std::optional<Tensor>& encoder_index, int64_t streams, int64_t inputs) {
  std::vector<int64_t> first(inputs + 1, streams);
  if (!encoder_index) {
    STD_TORCH_CHECK(inputs ? streams % inputs == 0 : streams == 0, streams, " streams do not divide among ", inputs,
                    " inputs");
    for (int64_t i = 0; i < inputs; ++i) first[i] = i * (streams / inputs);
    return first;
  }
  const auto index = to_vector(*encoder_index, streams, "encoder_index");
  int64_t input = 0;
  for (int64_t stream = 0; stream < streams; ++stream) {
    const int64_t least = stream ? index[stream - 1] : 0;
    STD_TORCH_CHECK(least <= index[stream] && index[stream] < inputs, "encoder_index must not decrease and lie in [0, ",
                    inputs, ")");
    while (input <= index[stream]) first[input++] = stream;
  }
  return first;
}

// The sizes of a call, and the streams and keys of each input.
struct Problem {
  int64_t streams, heads, tokens, head_dim, inputs, keys;
  ScalarType dtype;
  std::vector<int64_t> first_stream, lengths;
};

Problem check(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& key_lengths,
              const std::optional<Tensor>& encoder_index) {
  const ScalarType dtype = query.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "query must be float32 or bfloat16");
  for (const Tensor* x : {&query, &key, &value}) {
    const bool fits = x->is_cpu() && x->dim() == 4 && x->scalar_type() == dtype;
    STD_TORCH_CHECK(fits, "query, key and value must be CPU tensors of 4 dimensions and one dtype");
  }
  Problem p{query.size(0), query.size(1), query.size(2), query.size(3), key.size(0), key.size(2), dtype, {}, {}};
  for (const Tensor* x : {&key, &value}) {
    const bool fits =
        x->size(0) == p.inputs && x->size(1) == p.heads && x->size(2) == p.keys && x->size(3) == p.head_dim;
    STD_TORCH_CHECK(fits, "key and value must be (inputs, heads, keys, D) with query's heads and D");
  }
  STD_TORCH_CHECK(1 <= p.head_dim && p.head_dim <= kMaxHeadDim, "D must be between 1 and ", kMaxHeadDim, ", got ",
                  p.head_dim);
  p.first_stream = first_streams(encoder_index, p.streams, p.inputs);
  p.lengths = key_lengths ? to_vector(*key_lengths, p.inputs, "key_lengths") : std::vector<int64_t>(p.inputs, p.keys);
  for (const int64_t length : p.lengths)
    STD_TORCH_CHECK(0 <= length && length <= p.keys, "key_lengths must lie in [0, ", p.keys, "], got ", length);
  return p;
}

// Describes a call; the caller adds out and lse.
Attention describe(const Problem& p, const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  Attention a{};
  a.query = query.const_data_ptr();
  a.key = key.const_data_ptr();
  a.value = value.const_data_ptr();
  copy_strides(query, a.query_stride);
  copy_strides(key, a.key_stride);
  copy_strides(value, a.value_stride);
  a.tokens = p.tokens;
  a.head_dim = p.head_dim;
  a.scale = static_cast<float>(scale);
  a.storage = p.dtype == ScalarType::Float ? Storage::float32 : Storage::bfloat16;
  return a;
}

// The tasks of a call. Rows of one head are split before keys, because a task packs its keys once for all its rows.
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

Plan make_plan(const Problem& p) {
  const auto& [streams, heads, tokens, head_dim, inputs, keys, dtype, first_stream, lengths] = p;
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
    shape.rows = (first_stream[input + 1] - first_stream[input]) * tokens;
    shape.row_parts = std::max(ceil_div(shape.rows, kMaxTaskRows), parts_of(shape.rows, kMinTaskRows, inputs * heads));
    shape.splits = parts_of(lengths[input], kMinSplitKeys, inputs * heads * shape.row_parts);
    return shape;
  };

  int64_t partial_floats = 0;
  for (int64_t input = 0; input < inputs; ++input) {
    const Shape shape = shape_of(input);
    if (shape.splits > 1) partial_floats += heads * shape.rows * shape.splits * (head_dim + 2);
  }
  float* partial = split_partials.at_least(partial_floats);

  for (int64_t input = 0; input < inputs; ++input) {
    const auto [rows, row_parts, splits] = shape_of(input);
    if (rows == 0) continue;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t part = 0; part < row_parts; ++part) {
        const int64_t begin = part * rows / row_parts, end = (part + 1) * rows / row_parts;
        const int64_t stride = (end - begin) * (head_dim + 2);
        for (int64_t split = 0; split < splits; ++split) {
          const int64_t key_begin = split * lengths[input] / splits, key_end = (split + 1) * lengths[input] / splits;
          const Task task{input,
                          head,
                          first_stream[input],
                          begin,
                          end,
                          key_begin,
                          key_end,
                          splits > 1 ? partial + split * stride : nullptr};
          plan.tasks.push_back(task);
          if (splits > 1 && split == 0) plan.merges.push_back({task, splits, stride});
        }
        if (splits > 1) partial += splits * stride;
      }
    }
  }
  return plan;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::optional<Tensor>& key_lengths, const std::optional<Tensor>& encoder_index,
                                   double scale) {
  const Problem p = check(query, key, value, key_lengths, encoder_index);
  const Tensor out = token_major({p.streams, p.heads, p.tokens, p.head_dim}, p.dtype);
  const Tensor lse = token_major({p.streams, p.heads, p.tokens}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  Attention a = describe(p, query, key, value, scale);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  copy_strides(out, a.out_stride);
  copy_strides(lse, a.lse_stride);

  const Kernels& kernel = KERNELS_FOR_THIS_CPU(kKernels);
  const int64_t scratch_floats = kernel.scratch_floats(a);
  const Plan plan = make_plan(p);
  for_each_task(plan.tasks, [&](const Task& task, const Task* following) {
    kernel.attend(a, task, following, task_scratch.at_least(scratch_floats));
  });
  for_each_task(plan.merges, [&](const Plan::Merge& merge, const Plan::Merge*) {
    const auto& [task, splits, stride] = merge;
    for (int64_t row = task.row_begin; row < task.row_end; ++row) {
      const Partials partials{task.partial + (row - task.row_begin) * (p.head_dim + 2), splits, stride};
      kernel.merge(a, partials, task.first_stream + row / p.tokens, task.head, row % p.tokens);
    }
  });
  return {out, lse};
}

// A gradient that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                            const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& out, const Tensor& lse,
                                            const std::optional<Tensor>& key_lengths,
                                            const std::optional<Tensor>& encoder_index, double scale, bool need_query,
                                            bool need_key, bool need_value) {
  const Problem p = check(query, key, value, key_lengths, encoder_index);
  for (const Tensor* x : {&grad_out, &out}) {
    const bool fits = x->is_cpu() && x->dim() == 4 && x->scalar_type() == p.dtype && x->numel() == query.numel();
    STD_TORCH_CHECK(fits, "grad_out and out must be as query");
  }
  for (const Tensor* x : {&lse, grad_lse ? &*grad_lse : &lse}) {
    const bool fits = x->is_cpu() && x->dim() == 3 && x->scalar_type() == ScalarType::Float &&
                      x->numel() == p.streams * p.heads * p.tokens;
    STD_TORCH_CHECK(fits, "lse and grad_lse must be (streams, heads, tokens) in float32");
  }
  const auto gradient = [&](bool wanted, int64_t batch, int64_t tokens) {
    return token_major({wanted ? batch : 0, p.heads, tokens, p.head_dim}, p.dtype);
  };
  const Tensor grad_query = gradient(need_query, p.streams, p.tokens);
  const Tensor grad_key = gradient(need_key, p.inputs, p.keys), grad_value = gradient(need_value, p.inputs, p.keys);

  AttentionGradients g{};
  g.attention = describe(p, query, key, value, scale);
  g.attention.out = const_cast<void*>(out.const_data_ptr());
  g.attention.lse = static_cast<float*>(const_cast<void*>(lse.const_data_ptr()));
  copy_strides(out, g.attention.out_stride);
  copy_strides(lse, g.attention.lse_stride);
  g.grad_out = grad_out.const_data_ptr();
  copy_strides(grad_out, g.grad_out_stride);
  if (grad_lse) {
    g.grad_lse = static_cast<const float*>(grad_lse->const_data_ptr());
    copy_strides(*grad_lse, g.grad_lse_stride);
  }
  const auto give = [](const Tensor& x, void*& data, int64_t* strides) {
    if (x.numel() == 0) return;
    data = x.mutable_data_ptr();
    copy_strides(x, strides);
  };
  g.keys = p.keys;
  give(grad_query, g.grad_query, g.grad_query_stride);
  give(grad_key, g.grad_key, g.grad_key_stride);
  give(grad_value, g.grad_value, g.grad_value_stride);

  std::vector<Task> tasks;
  tasks.reserve(p.inputs * p.heads);
  int64_t scratch_floats = 0;
  const BackwardKernels& kernel = KERNELS_FOR_THIS_CPU(kBackwardKernels);
  for (int64_t input = 0; input < p.inputs; ++input) {
    const int64_t rows = (p.first_stream[input + 1] - p.first_stream[input]) * p.tokens;
    for (int64_t head = 0; head < p.heads; ++head)
      tasks.push_back({input, head, p.first_stream[input], 0, rows, 0, p.lengths[input], nullptr});
    scratch_floats = std::max(scratch_floats, kernel.scratch_floats(g, rows, p.lengths[input]));
  }
  for_each_task(tasks, [&](const Task& task, const Task* following) {
    kernel.attend(g, task, following, task_scratch.at_least(scratch_floats));
  });
  return {grad_query, grad_key, grad_value};
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("shared_cross_attention_cpu", TORCH_BOX(&forward));
  m.impl("shared_cross_attention_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace
