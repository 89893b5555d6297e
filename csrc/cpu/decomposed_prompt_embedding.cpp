// decomposed_prompt_embedding on the CPU, forward and backward: checks and division into tasks.

#include "decomposed_prompt_embedding.h"

#include <tuple>

#include "host.h"

namespace {

thread_local Buffer update_scratch;
thread_local Buffer low_rank_partials;  // the calling thread's buffer, written by all

// The rows of the batch grouped by adapter; rows without one (-1) come first.
struct Groups {
  std::vector<int64_t> rows, first;

  const int64_t* begin(int64_t adapter) const { return rows.data() + first[adapter + 1]; }
  int64_t count(int64_t adapter) const { return first[adapter + 2] - first[adapter + 1]; }
};

Groups group(const std::optional<Tensor>& adapter_ids, int64_t batch, int64_t adapters) {
  const auto ids = adapter_ids ? to_vector(*adapter_ids, batch, "adapter_ids") : std::vector<int64_t>(batch, 0);
  Groups groups{{}, std::vector<int64_t>(adapters + 2, 0)};
  for (int64_t adapter = -1; adapter < adapters; ++adapter) {
    for (int64_t row = 0; row < batch; ++row) {
      if (ids[row] == adapter) groups.rows.push_back(row);
    }
    groups.first[adapter + 2] = groups.rows.size();
  }
  STD_TORCH_CHECK(groups.rows.size() == static_cast<size_t>(batch), "adapter_ids must lie in [-1, ", adapters, ")");
  return groups;
}

std::vector<int64_t> offsets_of(const std::optional<Tensor>& offsets, int64_t batch, int64_t length) {
  const auto values = offsets ? to_vector(*offsets, batch, "offsets") : std::vector<int64_t>(batch, 0);
  for (const int64_t offset : values)
    STD_TORCH_CHECK(0 <= offset && offset <= length, "offsets must lie in [0, ", length, "], got ", offset);
  return values;
}

template <class Id>
void read_ids(const Tensor& input_ids, int64_t rows, std::vector<int64_t>& ids) {
  const auto data = static_cast<const Id*>(input_ids.const_data_ptr());
  const int64_t batch = input_ids.size(0), length = input_ids.size(1), row_stride = input_ids.stride(0),
                stride = input_ids.stride(1);
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t token = 0; token < length; ++token) {
      const int64_t id = data[row * row_stride + token * stride];
      STD_TORCH_CHECK(0 <= id && id < rows, "input_ids must lie in [0, ", rows, "), got ", id);
      ids[row * length + token] = id;
    }
  }
}

Storage storage_of(const Tensor& x, const char* name) {
  const bool fits = x.is_cpu() && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(fits, name, " must be float32 or bfloat16, on the CPU");
  return x.scalar_type() == ScalarType::Float ? Storage::float32 : Storage::bfloat16;
}

const float* parameter(const Tensor& x, std::initializer_list<int64_t> shape, const char* name) {
  bool fits = x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == static_cast<int64_t>(shape.size()) &&
              x.is_contiguous();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = x.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, name, " must be a contiguous float32 CPU tensor that fits prompt");
  return static_cast<const float*>(x.const_data_ptr());
}

template <class F>
void for_parts(int64_t begin, int64_t end, const F& f) {
  for (int64_t p = begin; p < end; p += kTaskPositions) f(p, std::min(p + kTaskPositions, end));
}

Tensor forward(const Tensor& input_ids, const Tensor& weight, const Tensor& prompt, const std::optional<Tensor>& a,
               const std::optional<Tensor>& b, const std::optional<Tensor>& delta, double scale, double embed_scale,
               const std::optional<Tensor>& offsets, bool insert_after_first,
               const std::optional<Tensor>& adapter_ids) {
  STD_TORCH_CHECK(weight.dim() == 2 && (weight.stride(1) == 1 || weight.size(1) <= 1),
                  "weight must be (V, d) with dense rows");
  STD_TORCH_CHECK(input_ids.is_cpu() && input_ids.dim() == 2, "input_ids must be a (B, L) CPU tensor");
  STD_TORCH_CHECK(prompt.dim() == 3 && a.has_value() != delta.has_value() && a.has_value() == b.has_value(),
                  "prompt must be (K, m, d), with a and b or delta");
  const int64_t batch = input_ids.size(0), adapters = prompt.size(0);
  Embedding e{};
  e.storage = storage_of(weight, "weight");
  e.length = input_ids.size(1);
  e.virtual_tokens = prompt.size(1);
  e.width = weight.size(1);
  e.columns = (e.width + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple;
  e.positions = (a ? *a : *delta).size(1);
  e.first = insert_after_first;
  e.scale = static_cast<float>(scale);
  e.embed_scale = static_cast<float>(embed_scale);
  e.weight = weight.const_data_ptr();
  e.weight_stride = weight.stride(0);
  e.prompt = parameter(prompt, {adapters, e.virtual_tokens, e.width}, "prompt");
  if (a) {
    e.rank = a->size(2);
    e.a = parameter(*a, {adapters, e.positions, e.rank}, "a");
    e.b = parameter(*b, {adapters, e.rank, e.columns}, "b");
  } else {
    e.delta = parameter(*delta, {adapters, e.positions, e.width}, "delta");
  }
  STD_TORCH_CHECK(e.length <= e.positions && e.first <= e.length,
                  "more tokens than positions, or none to insert the prompt after");
  std::vector<int64_t> ids(batch * e.length);
  if (input_ids.scalar_type() == ScalarType::Int) {
    read_ids<int32_t>(input_ids, weight.size(0), ids);
  } else {
    STD_TORCH_CHECK(input_ids.scalar_type() == ScalarType::Long, "input_ids must be int32 or int64");
    read_ids<int64_t>(input_ids, weight.size(0), ids);
  }
  e.ids = ids.data();
  const auto shifts = offsets_of(offsets, batch, e.length);
  e.offsets = shifts.data();
  const Groups groups = group(adapter_ids, batch, adapters);

  Tensor out = torch::stable::new_empty(weight, {batch, e.virtual_tokens + e.length, e.width});
  if (out.numel() == 0) return out;
  e.out = out.mutable_data_ptr();
  struct Task {
    EmbeddingTask tokens;
    int64_t row;  // the row whose prompt the task writes, or -1
  };
  std::vector<Task> tasks;
  for (int64_t adapter = -1; adapter < adapters; ++adapter) {
    const int64_t* rows = groups.begin(adapter);
    const int64_t count = groups.count(adapter);
    if (count == 0) continue;
    for_parts(0, e.length,
              [&](int64_t begin, int64_t end) { tasks.push_back({{adapter, rows, count, begin, end}, -1}); });
    for (const int64_t* row = rows; row != rows + count; ++row) {
      tasks.push_back({{adapter, row, 1, 0, 0}, *row});
      if (adapter >= 0) {  // the tokens before the offset
        for_parts(0, shifts[*row],
                  [&](int64_t begin, int64_t end) { tasks.push_back({{-1, row, 1, begin, end}, -1}); });
      }
    }
  }
  const EmbeddingKernels& kernel = KERNELS_FOR_THIS_CPU(kEmbeddingKernels);
  for_each_task(tasks, [&](const Task& task, const Task*) {
    if (task.row >= 0) {
      kernel.prompt(e, task.row, task.tokens.adapter);
    } else {
      kernel.tokens(e, task.tokens, update_scratch.at_least(kernel.scratch_floats));
    }
  });
  return out;
}

void low_rank_backward(const GradientRows& g, const Groups& groups, int64_t adapters, int64_t rank,
                       const std::optional<Tensor>& a, const std::optional<Tensor>& b, double scale, Tensor& grad_a,
                       Tensor& grad_b) {
  const auto filled_up = [](int64_t n) { return (n + kColumnMultiple - 1) / kColumnMultiple * kColumnMultiple; };
  LowRank l{};
  l.rank = rank;
  l.lanes = filled_up(rank);
  l.columns = filled_up(g.width);
  l.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(l.lanes <= kMaxRank, "rank must be at most ", kMaxRank, ", got ", rank);
  if (a) l.a = parameter(*a, {adapters, g.positions, rank}, "a");
  if (b) {
    l.b = parameter(*b, {adapters, g.width, l.lanes}, "b");
    l.grad_a = static_cast<float*>(grad_a.mutable_data_ptr());
  }
  // Positions are split only if there are too few adapters for the threads.
  int64_t used = 0;
  for (int64_t adapter = 0; adapter < adapters; ++adapter) used += groups.count(adapter) > 0;
  const int64_t wanted = (2 * torch::stable::get_num_threads() + used) / std::max<int64_t>(used, 1);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, g.positions / kLowRankPositions));
  const int64_t partial = rank * l.columns;
  float* const partials = a ? low_rank_partials.at_least(adapters * parts * partial) : nullptr;
  std::vector<LowRankTask> tasks;
  for (int64_t adapter = 0; adapter < adapters; ++adapter) {
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * g.positions / parts, end = (part + 1) * g.positions / parts;
      float* to = a ? partials + (adapter * parts + part) * partial : nullptr;
      tasks.push_back({adapter, groups.begin(adapter), groups.count(adapter), begin, end, to});
    }
  }
  const EmbeddingKernels& kernel = KERNELS_FOR_THIS_CPU(kEmbeddingKernels);
  for_each_task(tasks, [&](const LowRankTask& task, const LowRankTask*) {
    kernel.low_rank(g, l, task, update_scratch.at_least(kernel.low_rank_scratch_floats));
  });
  if (grad_b.numel() == 0) return;
  std::vector<int64_t> sums(adapters);
  for (int64_t adapter = 0; adapter < adapters; ++adapter) sums[adapter] = adapter;
  const auto to = static_cast<float*>(grad_b.mutable_data_ptr());
  for_each_task(sums, [&](int64_t adapter, const int64_t*) {
    kernel.reduce(partials + adapter * parts * partial, parts, l, g.width, to + adapter * rank * g.width);
  });
}

// A gradient that is not needed is empty. b's gradient needs a, (K, s, r); a's gradient needs b, transposed as (K, d, r
// padded).
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, int64_t adapters, int64_t virtual_tokens,
                                                    int64_t positions, int64_t rank, const std::optional<Tensor>& a,
                                                    const std::optional<Tensor>& b, double scale,
                                                    const std::optional<Tensor>& offsets, bool insert_after_first,
                                                    const std::optional<Tensor>& adapter_ids, bool need_prompt,
                                                    bool need_delta) {
  STD_TORCH_CHECK(grad.dim() == 3 && (grad.stride(2) == 1 || grad.size(2) <= 1),
                  "grad must be (B, m + L, d) with dense rows");
  const int64_t batch = grad.size(0);
  GradientRows g{};
  g.storage = storage_of(grad, "grad");
  g.grad = grad.const_data_ptr();
  g.batch_stride = grad.stride(0);
  g.column_stride = grad.stride(1);
  g.length = grad.size(1) - virtual_tokens;
  g.virtual_tokens = virtual_tokens;
  g.width = grad.size(2);
  g.first = insert_after_first;
  g.positions = positions;
  STD_TORCH_CHECK(0 <= g.length && g.length <= positions, "grad must have m + L columns, L at most ", positions);
  const auto shifts = offsets_of(offsets, batch, g.length);
  g.offsets = shifts.data();
  const Groups groups = group(adapter_ids, batch, adapters);

  const auto gradient = [&](bool wanted, int64_t rows, int64_t columns) {
    return torch::stable::new_empty(grad, {wanted ? adapters : 0, rows, columns}, ScalarType::Float);
  };
  Tensor grad_prompt = gradient(need_prompt, virtual_tokens, g.width),
         grad_delta = gradient(need_delta, positions, g.width);
  Tensor grad_a = gradient(b.has_value(), positions, rank), grad_b = gradient(a.has_value(), rank, g.width);
  std::vector<GradientTask> tasks;
  const auto add = [&](Tensor& x, bool is_prompt, int64_t rows, float*& data) {
    if (x.numel() == 0) return;
    data = static_cast<float*>(x.mutable_data_ptr());
    for (int64_t adapter = 0; adapter < adapters; ++adapter) {
      for_parts(0, rows, [&](int64_t begin, int64_t end) {
        tasks.push_back({is_prompt, adapter, groups.begin(adapter), groups.count(adapter), begin, end});
      });
    }
  };
  add(grad_prompt, true, virtual_tokens, g.grad_prompt);
  add(grad_delta, false, positions, g.grad_delta);
  const EmbeddingKernels& kernel = KERNELS_FOR_THIS_CPU(kEmbeddingKernels);
  for_each_task(tasks, [&](const GradientTask& task, const GradientTask*) { kernel.sum(g, task); });
  if (a || b) low_rank_backward(g, groups, adapters, rank, a, b, scale, grad_a, grad_b);
  return {grad_prompt, grad_a, grad_b, grad_delta};
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("decomposed_prompt_embedding_cpu", TORCH_BOX(&forward));
  m.impl("decomposed_prompt_embedding_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace
