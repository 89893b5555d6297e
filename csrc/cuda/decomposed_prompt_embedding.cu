// decomposed_prompt_embedding on CUDA, forward and backward: checks, kernel, grid, stream. No synchronization.

#include <tuple>

#include "decomposed_prompt_embedding.cuh"
#include "host.cuh"

namespace {

using namespace peft_kernels;

constexpr int kBlocksPerMultiprocessor = 2;  // minimum per SM before a block takes several rows of the batch
constexpr int kMaxRowsPerBlock = 16;

template <class T, int V, int P>
void launch_forward(EmbeddingParams& e, int device) {
  e.column_tiles = divide_up(e.width, kLanes * V);
  e.prompt_tiles = divide_up(e.virtual_tokens, kWarps * P);
  e.tiles = e.prompt_tiles + divide_up(e.length, kWarps * P);
  const int64_t blocks_per_row = int64_t(e.column_tiles) * e.tiles;
  e.rows_per_block = static_cast<int>(std::clamp<int64_t>(
      e.batch * blocks_per_row / (kBlocksPerMultiprocessor * multiprocessors(device)), 1, kMaxRowsPerBlock));
  const int64_t blocks = blocks_per_row * divide_up(e.batch, e.rows_per_block);
  launch(decomposed_prompt_embedding_fwd_kernel<T, V, P>, blocks, kWarps * kLanes, device, e);
}

template <class T>
void forward_of(EmbeddingParams& e, bool wide, bool several_adapters, int device) {
  constexpr int V = 16 / sizeof(T);
  if (!wide) {
    launch_forward<T, 1, 4>(e, device);
  } else if (several_adapters) {  // the matmul is computed again whenever the adapter changes
    launch_forward<T, V, 8>(e, device);
  } else {
    launch_forward<T, V, 4>(e, device);
  }
}

template <class T, int V>
void launch_backward(EmbeddingBackwardParams& g, int device) {
  g.column_tiles = divide_up(g.width, kLanes * V);
  launch(decomposed_prompt_embedding_bwd_kernel<T, V>, int64_t(g.column_tiles) * divide_up(g.total_rows, kWarps),
         kWarps * kLanes, device, g);
}

template <class T>
void backward_of(EmbeddingBackwardParams& g, bool wide, int device) {
  wide ? launch_backward<T, 16 / sizeof(T)>(g, device) : launch_backward<T, 1>(g, device);
}

Tensor forward(const Tensor& input_ids, const Tensor& weight, const Tensor& prompt, const std::optional<Tensor>& a,
               const std::optional<Tensor>& b, const std::optional<Tensor>& delta, double scale, double embed_scale,
               const std::optional<Tensor>& offsets, bool insert_after_first,
               const std::optional<Tensor>& adapter_ids) {
  STD_TORCH_CHECK(on_device(weight) && weight.dim() == 2 && (weight.stride(1) == 1 || weight.size(1) <= 1),
                  "weight must be (V, d) with dense rows");
  STD_TORCH_CHECK(input_ids.dim() == 2, "input_ids must be (B, L)");
  const bool fits = prompt.dim() == 3 && a.has_value() != delta.has_value() && a.has_value() == b.has_value() &&
                    (a ? *a : *delta).dim() == 3;
  STD_TORCH_CHECK(fits, "prompt must be (K, m, d), with a and b or delta");
  const int64_t adapters = prompt.size(0);
  EmbeddingParams e{};
  e.batch = to_int(input_ids.size(0), "B");
  e.length = to_int(input_ids.size(1), "L");
  e.virtual_tokens = to_int(prompt.size(1), "m");
  e.last_id = to_int(weight.size(0), "V") - 1;
  e.width = to_int(weight.size(1), "d");
  e.positions = to_int((a ? *a : *delta).size(1), "s");
  e.first = insert_after_first;
  e.scale = static_cast<float>(scale);
  e.embed_scale = static_cast<float>(embed_scale);
  e.weight = weight.const_data_ptr();
  e.weight_stride = weight.stride(0);
  e.prompt = parameter(prompt, weight, {adapters, e.virtual_tokens, e.width}, "prompt");
  if (a) {
    e.rank = to_int(a->size(2), "r");
    e.a = parameter(*a, weight, {adapters, e.positions, e.rank}, "a");
    e.b = parameter(*b, weight, {adapters, e.rank, e.width}, "b");
  } else {
    e.delta = parameter(*delta, weight, {adapters, e.positions, e.width}, "delta");
  }
  STD_TORCH_CHECK(e.length <= e.positions && e.first <= e.length,
                  "more tokens than positions, or none to insert the prompt after");
  STD_TORCH_CHECK(adapters == 1 || adapter_ids, "adapter_ids must choose among the adapters");
  STD_TORCH_CHECK(e.last_id >= 0 || input_ids.numel() == 0, "weight must have a row for the ids");
  e.ids = integers(input_ids, weight, "input_ids");
  e.ids_row_stride = input_ids.stride(0) * (input_ids.scalar_type() == ScalarType::Long ? 2 : 1);
  e.offsets = integers(offsets, weight, e.batch, "offsets");
  e.adapter_ids = adapters_of(adapter_ids, weight, e.batch, adapters);

  Tensor out = torch::stable::new_empty(weight, {e.batch, e.virtual_tokens + e.length, e.width});
  if (out.numel() == 0) return out;
  e.out = out.mutable_data_ptr();
  dispatch(weight, "weight", [&](auto element) {
    constexpr int64_t size = sizeof(element);
    const bool wide = aligned({e.out, e.weight, e.prompt, e.b, e.delta}, {e.width * size, e.weight_stride * size});
    forward_of<decltype(element)>(e, wide, adapters > 1, weight.get_device_index());
  });
  return out;
}

// A gradient that is not needed is empty.
std::tuple<Tensor, Tensor> backward(const Tensor& grad, int64_t adapters, int64_t virtual_tokens, int64_t positions,
                                    const std::optional<Tensor>& offsets, bool insert_after_first,
                                    const std::optional<Tensor>& adapter_ids, bool need_prompt, bool need_delta) {
  STD_TORCH_CHECK(on_device(grad) && grad.dim() == 3 && (grad.stride(2) == 1 || grad.size(2) <= 1),
                  "grad must be (B, m + L, d) with dense rows");
  EmbeddingBackwardParams g{};
  g.grad = grad.const_data_ptr();
  g.batch_stride = grad.stride(0);
  g.column_stride = grad.stride(1);
  g.batch = to_int(grad.size(0), "B");
  g.length = to_int(grad.size(1) - virtual_tokens, "L");
  g.virtual_tokens = to_int(virtual_tokens, "m");
  g.width = to_int(grad.size(2), "d");
  g.first = insert_after_first;
  STD_TORCH_CHECK(g.length <= positions, "grad must have m + L columns, L at most ", positions);
  STD_TORCH_CHECK(adapters == 1 || adapter_ids, "adapter_ids must choose among the adapters");
  g.offsets = integers(offsets, grad, g.batch, "offsets");
  g.adapter_ids = adapters_of(adapter_ids, grad, g.batch, adapters);
  const auto sums = [&](bool needed, int64_t rows) {
    return torch::stable::new_empty(grad, {needed ? adapters : 0, rows, g.width}, ScalarType::Float);
  };
  Tensor grad_prompt = sums(need_prompt, virtual_tokens), grad_delta = sums(need_delta, positions);
  if (need_prompt) g.prompt_rows = g.virtual_tokens;
  if (need_delta) g.delta_rows = to_int(positions, "s");
  g.total_rows = to_int(adapters * (g.prompt_rows + int64_t(g.delta_rows)), "K * (m + s)");
  if (g.total_rows == 0 || g.width == 0) return {grad_prompt, grad_delta};
  g.prompt = static_cast<float*>(grad_prompt.mutable_data_ptr());
  g.delta = static_cast<float*>(grad_delta.mutable_data_ptr());
  dispatch(grad, "grad", [&](auto element) {
    constexpr int64_t size = sizeof(element);
    const bool wide =
        aligned({g.grad, g.prompt, g.delta}, {g.width * size, g.batch_stride * size, g.column_stride * size});
    backward_of<decltype(element)>(g, wide, grad.get_device_index());
  });
  return {grad_prompt, grad_delta};
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, DISPATCH_KEY, m) {
  m.impl("decomposed_prompt_embedding_cuda", TORCH_BOX(&forward));
  m.impl("decomposed_prompt_embedding_backward_cuda", TORCH_BOX(&backward));
}

}  // namespace
