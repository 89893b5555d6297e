// The part of CUDA that the kernels in csrc/cuda use, for g++. Every CUDA thread is a fiber: block.h runs them.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "block.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int min(int a, int b) { return std::min(a, b); }
inline unsigned min(unsigned a, unsigned b) { return std::min(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return std::popcount(x); }

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline void __syncthreads(Site site = Site::current()) { cuda_on_host::barrier(site); }

inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::current()) {
  const auto values = cuda_on_host::exchange("__ballot_sync", mask, predicate != 0, site);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= (mask >> lane & 1 ? unsigned(values[lane]) : 0) << lane;
  return ballot;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, Site site = Site::current()) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto values = cuda_on_host::exchange("__shfl_sync", mask, bits, site);
  cuda_on_host::check_source(mask, lane % 32, site);
  std::memcpy(&value, &values[lane % 32], sizeof(T));
  return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, Site site = Site::current()) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ lanes, site);
}
