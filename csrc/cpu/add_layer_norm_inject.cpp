// add_layer_norm_inject on the CPU, forward and backward: checks and division into tasks.

#include "add_layer_norm_inject.h"

#include <tuple>

#include "injection_host.h"

namespace {

thread_local Buffer norm_scratch;

Storage check(const Tensor& x, const char* name) {
  const bool fits = x.is_cpu() && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(fits, name, " must be float32 or bfloat16, on the CPU");
  STD_TORCH_CHECK(x.dim() == 3 && (x.stride(2) == 1 || x.size(2) <= 1), name, " must be (B, S, d) with dense rows");
  return x.scalar_type() == ScalarType::Float ? Storage::float32 : Storage::bfloat16;
}

NormRows rows_of(const Tensor& x, const Tensor& like, const char* name) {
  bool fits = check(x, name) == check(like, "the first tensor");
  for (int64_t i = 0; i < 3; ++i) fits = fits && x.size(i) == like.size(i);
  STD_TORCH_CHECK(fits, name, " must have the shape and the dtype of the first tensor");
  return {x.const_data_ptr(), x.stride(0), x.stride(1)};
}

const float* floats(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.numel() == count && x.is_contiguous(), name,
                  " must be ", count, " contiguous float32 on the CPU");
  return static_cast<const float*>(x.const_data_ptr());
}

std::vector<int32_t> slots_by_token(const Injection& injection, int64_t batch, int64_t length) {
  std::vector<int32_t> slot_of(batch * length, -1);
  for (int64_t i = 0; i < batch * injection.slots_per_row; ++i) {
    const int64_t row = i / injection.slots_per_row, position = injection.slots[i];
    if (position >= 0 && injection.adapters[row] >= 0)
      slot_of[row * length + position] = static_cast<int32_t>(i % injection.slots_per_row);
  }
  return slot_of;
}

template <class F>
void for_tokens(int64_t tokens, int64_t scratch, const F& f) {
  std::vector<int64_t> tasks;
  for (int64_t begin = 0; begin < tokens; begin += kNormTokens) tasks.push_back(begin);
  for_each_task(tasks, [&](int64_t begin, const int64_t*) {
    f(begin, std::min(begin + kNormTokens, tokens), norm_scratch.at_least(scratch));
  });
}

// Returns the result, sum, mean and rstd; one that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& vectors, const std::optional<Tensor>& slots, const std::optional<Tensor>& adapter_ids,
    double eps, bool rms, bool pre, double dropout_p, const std::optional<Tensor>& seed, bool keep) {
  NormForward f{};
  f.storage = check(x, "x");
  const int64_t batch = x.size(0), width = x.size(2);
  f.x = rows_of(x, x, "x");
  f.residual = rows_of(residual, x, "residual");
  f.length = x.size(1);
  f.width = width;
  f.weight = floats(weight, width, "weight");
  f.bias = bias ? floats(*bias, width, "bias") : nullptr;
  f.eps = static_cast<float>(eps);
  f.rms = rms;
  f.pre = pre;
  STD_TORCH_CHECK(vectors.has_value() == slots.has_value(), "vectors and slots come together");
  Injection injection{};
  Slots storage;
  std::vector<int32_t> slot_of;
  if (vectors) {
    const float* data = vectors_of(*vectors, width);
    injection = make_injection(*slots, adapter_ids, dropout_p, seed, batch, f.length, vectors->size(0),
                               vectors->size(1), width, storage);
    injection.vectors = data;
    slot_of = slots_by_token(injection, batch, f.length);
    f.injection = &injection;
    f.slot_of = slot_of.data();
  }
  const auto result = [&](bool wanted, auto sizes, ScalarType dtype) {
    return wanted ? torch::stable::new_empty(x, sizes, dtype) : torch::stable::new_empty(x, {0}, dtype);
  };
  using Sizes = std::vector<int64_t>;
  const int64_t tokens = batch * f.length;
  Tensor out = result(true, Sizes{batch, f.length, width}, x.scalar_type());
  Tensor sum = result(keep || pre, Sizes{batch, f.length, width}, x.scalar_type());
  Tensor mean = result(keep && !rms, Sizes{batch, f.length}, ScalarType::Float),
         rstd = result(keep, Sizes{batch, f.length}, ScalarType::Float);
  f.out = out.mutable_data_ptr();
  f.sum = keep || pre ? sum.mutable_data_ptr() : nullptr;
  f.mean = keep && !rms ? static_cast<float*>(mean.mutable_data_ptr()) : nullptr;
  f.rstd = keep ? static_cast<float*>(rstd.mutable_data_ptr()) : nullptr;
  const NormKernels& kernel = KERNELS_FOR_THIS_CPU(kNormKernels);
  for_tokens(tokens, kernel.scratch_floats(width),
             [&](int64_t begin, int64_t end, float* scratch) { kernel.forward(f, begin, end, scratch); });
  return {out, sum, mean, rstd};
}

// Returns the gradient of x and, with slots, the gradient of the vectors injected before the norm: (B, k, d), 0 for
// unused slots.
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& sum,
                                    const std::optional<Tensor>& mean, const Tensor& rstd, const Tensor& weight,
                                    const std::optional<Tensor>& slots, const std::optional<Tensor>& adapter_ids,
                                    int64_t adapters) {
  NormBackward b{};
  b.storage = check(grad, "grad");
  const int64_t batch = grad.size(0), width = grad.size(2);
  b.length = grad.size(1);
  b.width = width;
  const int64_t tokens = batch * b.length;
  b.grad = rows_of(grad, grad, "grad");
  if (grad_sum) b.grad_sum = rows_of(*grad_sum, grad, "grad_sum");
  STD_TORCH_CHECK(sum.is_contiguous(), "sum must be contiguous");
  b.sum = rows_of(sum, grad, "sum").data;
  b.mean = mean ? floats(*mean, tokens, "mean") : nullptr;
  b.rstd = floats(rstd, tokens, "rstd");
  b.weight = floats(weight, width, "weight");
  Tensor injected =
      torch::stable::new_zeros(grad, {slots ? batch : 0, slots ? slots->size(1) : 0, width}, ScalarType::Float);
  Slots storage;
  std::vector<int32_t> slot_of;
  if (slots) {
    const Injection injection =
        make_injection(*slots, adapter_ids, 0, std::nullopt, batch, b.length, adapters, 1, width, storage);
    slot_of = slots_by_token(injection, batch, b.length);
    b.slot_of = slot_of.data();
    b.slots_per_row = injection.slots_per_row;
    b.injected = static_cast<float*>(injected.mutable_data_ptr());
  }
  Tensor grad_x = torch::stable::new_empty(grad, {batch, b.length, width});
  b.grad_x = grad_x.mutable_data_ptr();
  const NormKernels& kernel = KERNELS_FOR_THIS_CPU(kNormKernels);
  for_tokens(tokens, kernel.scratch_floats(width),
             [&](int64_t begin, int64_t end, float* scratch) { kernel.backward(b, begin, end, scratch); });
  return {grad_x, injected};
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("add_layer_norm_inject_cpu", TORCH_BOX(&forward));
  m.impl("add_layer_norm_inject_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace
