// special_tokens on CUDA: checks, kernel, grid, stream. No synchronization.

#include <tuple>

#include "injection_host.cuh"
#include "special_tokens.cuh"

namespace {

using namespace peft_kernels;

constexpr int64_t kBlocks =
    512;  // backward splits the batch into more parts, which cost a second sum, up to this many blocks
constexpr int64_t kAddends = 32;  // minimum addends per part

Ids ids(const Tensor& x, const Tensor& like, const char* name) {
  integers(x, like, name);
  return {x.const_data_ptr(), x.dim() == 2 ? x.stride(0) : 0, x.stride(-1), x.scalar_type() == ScalarType::Long};
}

Mask mask_of(const Tensor& x, const Tensor& like) {
  const bool fits = same_device(x, like) && x.dim() == 2 && x.size(0) == like.size(0) && x.size(1) == like.size(1);
  STD_TORCH_CHECK(fits, "attention_mask must be (B, S), on the device of input_ids");
  const int bytes = static_cast<int>(x.element_size());
  const auto type = x.scalar_type();
  const bool floating = type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                        type == ScalarType::BFloat16;
  STD_TORCH_CHECK(bytes <= 8, "attention_mask must be integer, bool or float");
  const uint64_t all = ~uint64_t{0} >> (64 - 8 * bytes);
  return {x.const_data_ptr(), x.stride(0), x.stride(1), bytes, floating ? all >> 1 : all};
}

std::tuple<Tensor, Tensor> slots(const Tensor& input_ids, const Tensor& special_ids,
                                 const std::optional<Tensor>& attention_mask, int64_t max_slots) {
  STD_TORCH_CHECK(on_device(input_ids) && input_ids.dim() == 2 && special_ids.dim() == 1,
                  "input_ids must be (B, S) and special_ids (n,)");
  SlotsParams s{};
  s.batch = to_int(input_ids.size(0), "B");
  s.length = to_int(input_ids.size(1), "S");
  s.specials = to_int(special_ids.size(0), "n");
  s.max_slots = to_int(max_slots, "max_slots");
  s.ids = ids(input_ids, input_ids, "input_ids");
  s.special = ids(special_ids, input_ids, "special_ids");
  if (attention_mask) s.mask = mask_of(*attention_mask, input_ids);
  Tensor positions = torch::stable::new_empty(input_ids, {s.batch, s.max_slots}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(input_ids, {s.batch}, ScalarType::Int);
  if (s.batch == 0) return {positions, counts};
  s.slots = static_cast<int*>(positions.mutable_data_ptr());
  s.counts = static_cast<int*>(counts.mutable_data_ptr());
  const int device = input_ids.get_device_index();
  const DeviceGuard guard(device);
  launch(special_token_slots_kernel, divide_up(s.batch, kSlotWarps), kSlotWarps * kLanes, device, s);
  return {positions, counts};
}

template <class T, int V>
void launch_add(AddParams& a, int64_t items, int device) {
  a.column_tiles = divide_up(a.injection.width, kAddThreads * V);
  launch(special_token_add_kernel<T, V>, items * a.column_tiles, kAddThreads, device, a);
}

void add(Tensor hidden, const Tensor& vectors, const Tensor& slots, double dropout_p, const std::optional<Tensor>& seed,
         const std::optional<Tensor>& adapter_ids) {
  STD_TORCH_CHECK(on_device(hidden) && hidden.dim() == 3, "hidden must be (B, S, d)");
  AddParams a{};
  a.injection = injection_of(vectors, slots, adapter_ids, dropout_p, seed, hidden);
  a.batch_stride = hidden.stride(0);
  a.token_stride = hidden.stride(1);
  a.stride = hidden.stride(2);
  const int64_t items = hidden.size(0) * a.injection.slots.slots_per_row;
  if (items == 0 || hidden.numel() == 0) return;
  a.hidden = hidden.mutable_data_ptr();
  dispatch(hidden, "hidden", [&](auto element) {
    using T = decltype(element);
    constexpr int64_t size = sizeof(T);
    const bool wide =
        a.stride == 1 && aligned({a.hidden, a.injection.vectors},
                                 {a.injection.width * size, a.batch_stride * size, a.token_stride * size});
    (wide ? launch_add<T, 16 / size> : launch_add<T, 1>)(a, items, hidden.get_device_index());
  });
}

template <class T, int V>
void launch_backward(AddBackwardParams& g, int device) {
  g.column_tiles = divide_up(g.width, kLanes * V);
  const int64_t blocks =
      int64_t(g.column_tiles) * divide_up(int64_t(g.parts) * g.adapters * g.vectors_per_adapter, kSumWarps);
  launch(special_token_add_bwd_kernel<T, V>, blocks, kSumWarps * kLanes, device, g);
}

// `length`: S, if grad has a row for every slot; otherwise it has one for every token. Returns partial sums, (parts, K,
// P, d). The number of parts depends on sizes alone, and so does the order of the sum.
Tensor backward(const Tensor& grad, const Tensor& slots, int64_t adapters, int64_t vectors,
                std::optional<int64_t> length, double dropout_p, const std::optional<Tensor>& seed,
                const std::optional<Tensor>& adapter_ids) {
  STD_TORCH_CHECK(on_device(grad) && grad.dim() == 3 && (grad.stride(2) == 1 || grad.size(2) <= 1),
                  "grad must be (B, S, d) with dense rows");
  STD_TORCH_CHECK(vectors > 0 && (adapters == 1 || adapter_ids),
                  "adapter_ids must choose among the adapters, of at least one vector");
  AddBackwardParams g{};
  g.grad = grad.const_data_ptr();
  g.batch_stride = grad.stride(0);
  g.token_stride = grad.stride(1);
  g.batch = to_int(grad.size(0), "B");
  g.width = to_int(grad.size(2), "d");
  g.adapters = to_int(adapters, "K");
  g.vectors_per_adapter = to_int(vectors, "P");
  g.slots = slots_of(slots, grad, g.batch, length.value_or(grad.size(1)));
  g.by_slot = length.has_value();
  STD_TORCH_CHECK(!g.by_slot || grad.size(1) == g.slots.slots_per_row, "grad must have a row for every slot");
  g.adapter_ids = integers(adapter_ids, grad, g.batch, "adapter_ids");
  g.dropout = dropout_of(dropout_p, seed, grad);
  const int64_t addends = int64_t(g.batch) * std::max(1, g.slots.slots_per_row - g.vectors_per_adapter + 1);
  const int64_t blocks =
      adapters * vectors * divide_up(g.width, kLanes * 16 / static_cast<int64_t>(grad.element_size()));
  const int64_t target_parts = std::clamp<int64_t>(std::min(addends / kAddends, kBlocks / std::max<int64_t>(blocks, 1)),
                                                   1, std::max(g.batch, 1));
  g.rows = std::max(1, divide_up(g.batch, target_parts));
  g.parts = std::max(1, divide_up(g.batch, g.rows));
  to_int(int64_t(g.parts) * adapters * vectors, "K * P");
  Tensor partial = torch::stable::new_empty(grad, {g.parts, adapters, vectors, g.width}, ScalarType::Float);
  if (partial.numel() == 0) return partial;
  g.partial = static_cast<float*>(partial.mutable_data_ptr());
  dispatch(grad, "grad", [&](auto element) {
    using T = decltype(element);
    constexpr int64_t size = sizeof(T);
    const bool wide = aligned({g.grad, g.partial}, {g.width * size, g.batch_stride * size, g.token_stride * size});
    (wide ? launch_backward<T, 16 / size> : launch_backward<T, 1>)(g, grad.get_device_index());
  });
  return partial;
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, DISPATCH_KEY, m) {
  m.impl("special_token_add_backward_cuda", TORCH_BOX(&backward));
  m.impl("special_token_add_cuda", TORCH_BOX(&add));
  m.impl("special_token_slots_cuda", TORCH_BOX(&slots));
}

}  // namespace
