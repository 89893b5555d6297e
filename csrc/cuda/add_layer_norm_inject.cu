// add_layer_norm_inject on CUDA, forward and backward: checks, kernel, grid, stream. No synchronization.

#include <bit>
#include <tuple>

#include "add_layer_norm_inject.cuh"
#include "injection_host.cuh"

namespace {

using namespace peft_kernels;

void check_rows(const Tensor& x, const Tensor& like, const char* name) {
  bool fits = same_device(x, like) && x.scalar_type() == like.scalar_type() && x.dim() == 3;
  for (int i = 0; fits && i < 3; ++i) fits = x.size(i) == like.size(i);
  STD_TORCH_CHECK(fits && (x.stride(2) == 1 || x.size(2) <= 1), name,
                  " must be (B, S, d) with dense rows, like the others");
  STD_TORCH_CHECK(x.size(2) <= kMaxWidth, "d must be at most ", kMaxWidth, " for these kernels, got ", x.size(2),
                  "; triton has no limit");
}

int log_warps_per_row(int width) {
  return std::bit_width(static_cast<unsigned>(std::max(1, divide_up(width, kLanes * kElements)) - 1));
}

template <class Params>
void launch_rows(void (*kernel)(Params), const Params& n, int device) {
  const int warps = std::max(kBlockWarps, 1 << n.log_warps);
  launch(kernel, divide_up(n.tokens, warps >> n.log_warps), warps * kLanes, device, n);
}

// Returns the result, sum, mean and rstd. Without `keep`, mean and rstd are empty, and so is sum unless pre; with rms,
// mean is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& vectors, const std::optional<Tensor>& slots, const std::optional<Tensor>& adapter_ids,
    double eps, bool rms, bool pre, double dropout_p, const std::optional<Tensor>& seed, bool keep) {
  check_rows(x, x, "x");
  check_rows(residual, x, "residual");
  NormParams n{};
  const int64_t batch = x.size(0), length = x.size(1), width = x.size(2);
  n.tokens = to_int(batch * length, "B * S");
  n.length = to_int(length, "S");
  n.width = to_int(width, "d");
  n.log_warps = log_warps_per_row(n.width);
  n.eps = static_cast<float>(eps);
  n.rms = rms;
  n.pre = pre;
  n.x = x.const_data_ptr();
  n.residual = residual.const_data_ptr();
  n.x_batch_stride = x.stride(0);
  n.x_token_stride = x.stride(1);
  n.residual_batch_stride = residual.stride(0);
  n.residual_token_stride = residual.stride(1);
  n.weight = parameter(weight, x, {width}, "weight");
  if (bias) n.bias = parameter(*bias, x, {width}, "bias");
  if (vectors) n.injection = injection_of(*vectors, slots, adapter_ids, dropout_p, seed, x);

  const auto rows = [&](bool needed) {
    return needed ? torch::stable::new_empty(x, {batch, length, width}) : torch::stable::new_empty(x, {0});
  };
  const auto numbers = [&](bool needed) {
    return needed ? torch::stable::new_empty(x, {batch, length}, ScalarType::Float)
                  : torch::stable::new_empty(x, {0}, ScalarType::Float);
  };
  Tensor out = rows(true), sum = rows(keep || pre), mean = numbers(keep && !rms), rstd = numbers(keep);
  if (n.tokens == 0) return {out, sum, mean, rstd};
  n.out = out.mutable_data_ptr();
  if (keep || pre) n.sum = sum.mutable_data_ptr();
  if (keep && !rms) n.mean = static_cast<float*>(mean.mutable_data_ptr());
  if (keep) n.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    constexpr int64_t size = sizeof(T);
    const bool wide = aligned({n.x, n.residual, n.out, n.sum, n.weight, n.bias, n.injection.vectors},
                              {width * size, n.x_batch_stride * size, n.x_token_stride * size,
                               n.residual_batch_stride * size, n.residual_token_stride * size});
    launch_rows(wide ? add_layer_norm_inject_fwd_kernel<T, 16 / size> : add_layer_norm_inject_fwd_kernel<T, 1>, n,
                x.get_device_index());
  });
  return {out, sum, mean, rstd};
}

// Returns the gradient of the sum, and its rows at special tokens, (B, k, d) float32; rows of unused slots are not
// written.
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& sum,
                                    const std::optional<Tensor>& mean, const Tensor& rstd, const Tensor& weight,
                                    const std::optional<Tensor>& slots, bool need_x, bool need_slots) {
  check_rows(grad, sum, "grad");
  check_rows(sum, sum, "sum");
  STD_TORCH_CHECK(sum.is_contiguous() && (slots || !need_slots),
                  "sum must be contiguous, and slots given where their gradient is needed");
  NormBackwardParams n{};
  const int64_t batch = sum.size(0), length = sum.size(1), width = sum.size(2);
  n.length = to_int(length, "S");
  n.width = to_int(width, "d");
  n.log_warps = log_warps_per_row(n.width);
  n.grad = grad.const_data_ptr();
  n.sum = sum.const_data_ptr();
  n.grad_batch_stride = grad.stride(0);
  n.grad_token_stride = grad.stride(1);
  if (grad_sum) {
    check_rows(*grad_sum, sum, "grad_sum");
    n.grad_sum = grad_sum->const_data_ptr();
    n.sum_batch_stride = grad_sum->stride(0);
    n.sum_token_stride = grad_sum->stride(1);
  }
  if (mean) n.mean = parameter(*mean, sum, {batch, length}, "mean");
  n.rstd = parameter(rstd, sum, {batch, length}, "rstd");
  n.weight = parameter(weight, sum, {width}, "weight");
  if (need_slots) n.slots = slots_of(*slots, sum, batch, length);
  n.listed = !need_x;
  n.tokens = to_int(batch * (need_x ? length : n.slots.slots_per_row), "B * S");

  Tensor grad_x = need_x ? torch::stable::new_empty(sum, {batch, length, width}) : torch::stable::new_empty(sum, {0});
  Tensor grad_slots = torch::stable::new_empty(sum, {batch, n.slots.slots_per_row, width}, ScalarType::Float);
  if (n.tokens == 0 || n.width == 0) return {grad_x, grad_slots};
  if (need_x) n.grad_x = grad_x.mutable_data_ptr();
  if (need_slots) n.grad_slots = static_cast<float*>(grad_slots.mutable_data_ptr());
  dispatch(sum, "sum", [&](auto element) {
    using T = decltype(element);
    constexpr int64_t size = sizeof(T);
    const bool wide = aligned({n.grad, n.grad_sum, n.sum, n.weight, n.grad_x, n.grad_slots},
                              {width * size, n.grad_batch_stride * size, n.grad_token_stride * size,
                               n.sum_batch_stride * size, n.sum_token_stride * size});
    launch_rows(wide ? add_layer_norm_inject_bwd_kernel<T, 16 / size> : add_layer_norm_inject_bwd_kernel<T, 1>, n,
                sum.get_device_index());
  });
  return {grad_x, grad_slots};
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, DISPATCH_KEY, m) {
  m.impl("add_layer_norm_inject_backward_cuda", TORCH_BOX(&backward));
  m.impl("add_layer_norm_inject_cuda", TORCH_BOX(&forward));
}

}  // namespace
