#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  torch::headeronly::BFloat16 value;

  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) : value(x) {}
  explicit operator float() const { return value; }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __bfloat1622float2(__nv_bfloat162 two) { return {float(two.x), float(two.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
