// Checks and conversion of the arguments for the vectors of special tokens.

#pragma once

#include <cmath>

#include "host.cuh"
#include "injection.cuh"

namespace peft_kernels {

inline Slots slots_of(const Tensor& slots, const Tensor& like, int64_t batch, int64_t length) {
  STD_TORCH_CHECK(slots.dim() == 2 && slots.size(0) == batch, "slots must be (B, k)");
  const Integers last = integers(slots, like, "slots");
  return {last.data, slots.stride(0) * (slots.scalar_type() == ScalarType::Long ? 2 : 1), last.stride,
          to_int(slots.size(1), "k"), to_int(length, "S")};
}

inline Dropout dropout_of(double p, const std::optional<Tensor>& seed, const Tensor& like) {
  if (p == 0) return {};
  const bool fits = 0 < p && p < 1 && seed && same_device(*seed, like) && seed->scalar_type() == ScalarType::Long &&
                    seed->numel() == 1;
  STD_TORCH_CHECK(fits, "dropout_p must lie in [0, 1), with one int64 for a seed");
  const double threshold =
      std::min(std::nearbyint(std::ldexp(p, 32)), 4294967295.0);  // rounds halves to even, as Python does
  return {static_cast<const int64_t*>(seed->const_data_ptr()), static_cast<unsigned>(threshold),
          static_cast<float>(1 / (1 - p))};
}

inline Injection injection_of(const Tensor& vectors, const std::optional<Tensor>& slots,
                              const std::optional<Tensor>& adapter_ids, double dropout_p,
                              const std::optional<Tensor>& seed, const Tensor& like) {
  STD_TORCH_CHECK(vectors.dim() == 3 && vectors.size(1) > 0 && slots, "vectors must be (K, P, d), with slots");
  STD_TORCH_CHECK(vectors.size(0) == 1 || adapter_ids, "adapter_ids must choose among the adapters");
  Injection i{};
  i.vectors_per_adapter = to_int(vectors.size(1), "P");
  i.width = to_int(like.size(2), "d");
  i.vectors = parameter(vectors, like, {vectors.size(0), i.vectors_per_adapter, i.width}, "vectors");
  i.slots = slots_of(*slots, like, like.size(0), like.size(1));
  i.adapter_ids = adapters_of(adapter_ids, like, like.size(0), vectors.size(0));
  i.dropout = dropout_of(dropout_p, seed, like);
  return i;
}

}  // namespace peft_kernels
