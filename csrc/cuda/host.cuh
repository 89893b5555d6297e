// Checks and conversion of the launchers' arguments.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "device.cuh"
#include "packed.cuh"

namespace peft_kernels {

using torch::headeronly::ScalarType;

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Converts a size to int, the type of sizes in the kernels; products of sizes are 64-bit there.
inline int to_int(int64_t x, const char* name) {
  STD_TORCH_CHECK(0 <= x && x < (int64_t{1} << 30), name, " must be below 2^30, got ", x);
  return static_cast<int>(x);
}

inline bool same_device(const Tensor& x, const Tensor& like) {
  return on_device(x) && x.get_device_index() == like.get_device_index();
}

inline const float* parameter(const Tensor& x, const Tensor& like, std::initializer_list<int64_t> shape,
                              const char* name) {
  bool fits = same_device(x, like) && x.scalar_type() == ScalarType::Float &&
              x.dim() == static_cast<int64_t>(shape.size()) && x.is_contiguous();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = x.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, name, " must be a contiguous float32 tensor that fits the others, on their device");
  return static_cast<const float*>(x.const_data_ptr());
}

inline Integers integers(const Tensor& x, const Tensor& like, const char* name) {
  const bool wide = x.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || x.scalar_type() == ScalarType::Int, name, " must be int32 or int64");
  STD_TORCH_CHECK(same_device(x, like), name, " must be on the device of the other tensors");
  return {static_cast<const int*>(x.const_data_ptr()), x.stride(-1) * (wide ? 2 : 1)};
}

inline Integers integers(const std::optional<Tensor>& x, const Tensor& like, int64_t count, const char* name) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == count, name, " must have ", count, " elements");
  return integers(*x, like, name);
}

inline AdapterIds adapters_of(const std::optional<Tensor>& adapter_ids, const Tensor& like, int64_t batch,
                              int64_t adapters) {
  return {integers(adapter_ids, like, batch, "adapter_ids"), to_int(adapters, "K")};
}

inline bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }) &&
         std::all_of(strides.begin(), strides.end(), [](int64_t bytes) { return bytes % 16 == 0; });
}

// Calls f with a value of the storage type while x's device is current.
template <class F>
void dispatch(const Tensor& x, const char* name, const F& f) {
  const DeviceGuard guard(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Half:
      return f(__half{});
    case ScalarType::BFloat16:
      return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

}  // namespace peft_kernels
