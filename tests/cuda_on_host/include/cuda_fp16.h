#pragma once

#include <torch/headeronly/util/Half.h>

#include "cuda_runtime.h"

struct __half {
  torch::headeronly::Half value;

  __half() = default;
  explicit __half(float x) : value(x) {}
  explicit operator float() const { return value; }
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float2 __half22float2(__half2 two) { return {float(two.x), float(two.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
