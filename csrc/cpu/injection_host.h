// Conversion of tensors to an Injection.

#pragma once

#include <cmath>

#include "host.h"
#include "injection.h"

namespace {

// The memory that an Injection points into.
struct Slots {
  std::vector<int64_t> positions, adapters;
};

// Returns a (batch, columns) matrix of int32 or int64 as int64.
inline std::vector<int64_t> to_matrix(const Tensor& x, int64_t batch, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 2 && x.size(0) == batch, name, " must be a CPU tensor of ", batch, " rows");
  const bool is_long = x.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_long || x.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  const int64_t columns = x.size(1), row_stride = x.stride(0), stride = x.stride(1);
  std::vector<int64_t> values(batch * columns);
  for (int64_t i = 0; i < batch * columns; ++i) {
    const int64_t at = i / columns * row_stride + i % columns * stride;
    values[i] = is_long ? static_cast<const int64_t*>(x.const_data_ptr())[at]
                        : static_cast<const int32_t*>(x.const_data_ptr())[at];
  }
  return values;
}

// `adapters`, `count` and `width` are the sizes of the vectors.
inline Injection make_injection(const Tensor& slots, const std::optional<Tensor>& adapter_ids, double dropout_p,
                                const std::optional<Tensor>& seed, int64_t batch, int64_t length, int64_t adapters,
                                int64_t count, int64_t width, Slots& storage) {
  storage.positions = to_matrix(slots, batch, "slots");
  for (const int64_t position : storage.positions)
    STD_TORCH_CHECK(-1 <= position && position < length, "slots must lie in [-1, ", length, "), got ", position);
  storage.adapters = adapter_ids ? to_vector(*adapter_ids, batch, "adapter_ids") : std::vector<int64_t>(batch, 0);
  for (const int64_t id : storage.adapters)
    STD_TORCH_CHECK(-1 <= id && id < adapters, "adapter_ids must lie in [-1, ", adapters, "), got ", id);
  STD_TORCH_CHECK(count > 0, "vectors must have at least one row");
  Injection injection{};
  injection.slots = storage.positions.data();
  injection.adapters = storage.adapters.data();
  injection.slots_per_row = slots.size(1);
  injection.count = count;
  injection.width = width;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed && seed->is_cpu() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "seed must be one int64 on the CPU");
    injection.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
    injection.threshold = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
    injection.keep_factor = static_cast<float>(1 / (1 - dropout_p));
  }
  return injection;
}

inline const float* vectors_of(const Tensor& vectors, int64_t width) {
  STD_TORCH_CHECK(vectors.is_cpu() && vectors.dim() == 3 && vectors.size(2) == width &&
                      vectors.scalar_type() == ScalarType::Float && vectors.is_contiguous(),
                  "vectors must be a contiguous float32 CPU tensor (K, P, ", width, ")");
  return static_cast<const float*>(vectors.const_data_ptr());
}

}  // namespace
