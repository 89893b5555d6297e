// special_token_slots, special_token_add and its backward on the CPU: checks and division into tasks.

#include "special_tokens.h"

#include <tuple>

#include "injection_host.h"

namespace {

thread_local Buffer row_scratch;

HiddenRows hidden_rows(const Tensor& x, void* data, const char* name) {
  const bool fits = x.is_cpu() && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(fits, name, " must be float32 or bfloat16, on the CPU");
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1), name, " must be (B, S, d) with dense rows");
  return {data, x.stride(0), x.stride(1), x.scalar_type() == ScalarType::Float ? Storage::float32 : Storage::bfloat16};
}

// Runs tasks in parallel, but a few rows on one thread: they are done before other threads wake up. With dropout, most
// work is its draws.
template <class Task, class F>
void for_each(const std::vector<Task>& tasks, int64_t elements, const Injection& injection, const F& f) {
  constexpr int64_t kAlone = 1 << 17, kDraw = 8;
  if (elements * (injection.threshold ? kDraw : 1) > kAlone) return for_each_task(tasks, f);
  for (const Task& task : tasks) f(task, nullptr);
}

// Calls f for every special token that gets a vector, row by row.
template <class F>
void for_each_occurrence(const Injection& injection, int64_t batch, const F& f) {
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t slot = 0; slot < injection.slots_per_row && injection.adapters[row] >= 0; ++slot) {
      if (injection.slots[row * injection.slots_per_row + slot] >= 0) f(Occurrence{row, slot});
    }
  }
}

template <class Id>
void find(const Tensor& input_ids, const std::vector<int64_t>& special_ids, const std::optional<Tensor>& mask,
          Tensor& slots, Tensor& counts) {
  const auto ids = static_cast<const Id*>(input_ids.const_data_ptr());
  const auto seen = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  const int64_t batch = input_ids.size(0), length = input_ids.size(1), most = slots.size(1);
  const auto positions = static_cast<int32_t*>(slots.mutable_data_ptr());
  const auto found = static_cast<int64_t*>(counts.mutable_data_ptr());
  for (int64_t row = 0; row < batch; ++row) {
    int64_t count = 0;
    for (int64_t s = 0; s < length; ++s) {
      if (seen && !seen[row * mask->stride(0) + s * mask->stride(1)]) continue;
      const int64_t id = ids[row * input_ids.stride(0) + s * input_ids.stride(1)];
      if (std::find(special_ids.begin(), special_ids.end(), id) == special_ids.end()) continue;
      if (count < most) positions[row * most + count] = static_cast<int32_t>(s);
      ++count;
    }
    found[row] = count;
    for (int64_t slot = count; slot < most; ++slot) positions[row * most + slot] = -1;
  }
}

std::tuple<Tensor, Tensor> slots(const Tensor& input_ids, const Tensor& special_ids, const std::optional<Tensor>& mask,
                                 int64_t max_slots) {
  STD_TORCH_CHECK(input_ids.is_cpu() && input_ids.dim() == 2, "input_ids must be a (B, S) CPU tensor");
  if (mask) {
    const bool fits =
        mask->is_cpu() && mask->dim() == 2 && mask->size(0) == input_ids.size(0) && mask->size(1) == input_ids.size(1);
    STD_TORCH_CHECK(fits && mask->scalar_type() == ScalarType::Bool,
                    "the mask must be a bool CPU tensor of input_ids' shape");
  }
  const auto ids = to_vector(special_ids, special_ids.numel(), "special_ids");
  const int64_t batch = input_ids.size(0);
  Tensor slots = torch::stable::new_empty(input_ids, {batch, max_slots}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(input_ids, {batch}, ScalarType::Long);
  if (input_ids.scalar_type() == ScalarType::Int) {
    find<int32_t>(input_ids, ids, mask, slots, counts);
  } else {
    STD_TORCH_CHECK(input_ids.scalar_type() == ScalarType::Long, "input_ids must be int32 or int64");
    find<int64_t>(input_ids, ids, mask, slots, counts);
  }
  return {slots, counts};
}

void add(Tensor hidden, const Tensor& vectors, const Tensor& slots, double dropout_p, const std::optional<Tensor>& seed,
         const std::optional<Tensor>& adapter_ids) {
  const HiddenRows rows = hidden_rows(hidden, hidden.mutable_data_ptr(), "hidden");
  const int64_t batch = hidden.size(0), width = hidden.size(2);
  const float* data = vectors_of(vectors, width);
  Slots storage;
  Injection injection = make_injection(slots, adapter_ids, dropout_p, seed, batch, hidden.size(1), vectors.size(0),
                                       vectors.size(1), width, storage);
  injection.vectors = data;
  std::vector<Occurrence> occurrences;
  for_each_occurrence(injection, batch, [&](const Occurrence& at) { occurrences.push_back(at); });
  const SpecialTokenKernels& kernel = KERNELS_FOR_THIS_CPU(kSpecialTokenKernels);
  const int64_t elements = occurrences.size() * width;
  for_each(occurrences, elements, injection, [&](const Occurrence& at, const Occurrence*) {
    kernel.add(rows, injection, at, row_scratch.at_least(width));
  });
}

Tensor backward(const Tensor& grad, const Tensor& slots, int64_t adapters, int64_t count, double dropout_p,
                const std::optional<Tensor>& seed, const std::optional<Tensor>& adapter_ids) {
  const HiddenRows rows = hidden_rows(grad, const_cast<void*>(grad.const_data_ptr()), "grad");
  const int64_t batch = grad.size(0), width = grad.size(2);
  Slots storage;
  const Injection injection =
      make_injection(slots, adapter_ids, dropout_p, seed, batch, grad.size(1), adapters, count, width, storage);
  Tensor sums = torch::stable::new_empty(grad, {adapters, count, width}, ScalarType::Float);
  if (sums.numel() == 0) return sums;
  std::vector<std::vector<Occurrence>> of(adapters * count);
  int64_t elements = 0;
  for_each_occurrence(injection, batch, [&](const Occurrence& at) {
    elements += width;
    of[injection.adapters[at.row] * count + injection.vector_of(at.slot)].push_back(at);
  });
  constexpr int64_t kColumns = 256;
  std::vector<VectorTask> tasks;
  for (int64_t i = 0; i < adapters * count; ++i) {
    float* to = static_cast<float*>(sums.mutable_data_ptr()) + i * width;
    for (int64_t d = 0; d < width; d += kColumns) {
      tasks.push_back({of[i].data(), static_cast<int64_t>(of[i].size()), d, std::min(d + kColumns, width), to});
    }
  }
  const SpecialTokenKernels& kernel = KERNELS_FOR_THIS_CPU(kSpecialTokenKernels);
  for_each(tasks, elements, injection,
           [&](const VectorTask& task, const VectorTask*) { kernel.sum(rows, injection, task); });
  return sums;
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("special_token_slots_cpu", TORCH_BOX(&slots));
  m.impl("special_token_add_cpu", TORCH_BOX(&add));
  m.impl("special_token_add_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace
