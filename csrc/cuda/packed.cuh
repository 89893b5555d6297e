// Loads and stores of row elements, 16 bytes per thread, with arithmetic in float32; and vectors of integers. No torch.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace peft_kernels {

constexpr int kLanes = 32;
constexpr unsigned kWarpMask = ~0u;  // all lanes

template <class To, class From>
__device__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// A vector of int32, or of the low words of int64, which hold -1 and every index. Null: all elements are 0.
struct Integers {
  const int* data;
  int64_t stride;  // in 32-bit words

  __device__ int get(int64_t i) const { return data ? __ldg(data + i * stride) : 0; }
};

// Returns an index, or -1 if it is not in [0, end).
__device__ inline int checked(int index, int end) {
  return static_cast<unsigned>(index) < static_cast<unsigned>(end) ? index : -1;
}

// The adapter of every row. -1: none, which is also the meaning of values out of range.
struct AdapterIds {
  Integers ids;
  int adapters;

  __device__ int get(int64_t row) const { return checked(ids.get(row), adapters); }
};

// V elements in their storage format: 16 bytes, or one element if the row is not aligned.
template <class T, int V>
struct Packed;

template <class T>
struct Packed<T, 1> {
  using Type = T;
  static __device__ void unpack(T x, float (&into)[1]) { into[0] = static_cast<float>(x); }
  static __device__ T pack(const float (&x)[1]) { return static_cast<T>(x[0]); }
};

template <>
struct Packed<float, 4> {
  using Type = float4;
  static __device__ void unpack(const float4& x, float (&into)[4]) {
    into[0] = x.x, into[1] = x.y, into[2] = x.z, into[3] = x.w;
  }
  static __device__ float4 pack(const float (&x)[4]) { return make_float4(x[0], x[1], x[2], x[3]); }
};

template <class Two, class Widen, class Narrow>
struct PackedPairs {
  using Type = uint4;
  static __device__ void unpack(const uint4& x, float (&into)[8]) {
    const unsigned words[] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = Widen()(bit_cast<Two>(words[i]));
      into[2 * i] = two.x, into[2 * i + 1] = two.y;
    }
  }
  static __device__ uint4 pack(const float (&x)[8]) {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = bit_cast<unsigned, Two>(Narrow()(x[2 * i], x[2 * i + 1]));
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

struct HalfToFloat {
  __device__ float2 operator()(__half2 x) const { return __half22float2(x); }
};
struct FloatToHalf {
  __device__ __half2 operator()(float x, float y) const { return __floats2half2_rn(x, y); }
};
struct BFloat16ToFloat {
  __device__ float2 operator()(__nv_bfloat162 x) const { return __bfloat1622float2(x); }
};
struct FloatToBFloat16 {
  __device__ __nv_bfloat162 operator()(float x, float y) const { return __floats2bfloat162_rn(x, y); }
};
template <>
struct Packed<__half, 8> : PackedPairs<__half2, HalfToFloat, FloatToHalf> {};
template <>
struct Packed<__nv_bfloat16, 8> : PackedPairs<__nv_bfloat162, BFloat16ToFloat, FloatToBFloat16> {};

template <class T, int V>
__device__ typename Packed<T, V>::Type load(const T* from) {
  return __ldg(reinterpret_cast<const typename Packed<T, V>::Type*>(from));
}

// Loads data that is read once without an allocation in L1, which stays free for data that is read again.
template <class T, int V>
__device__ typename Packed<T, V>::Type load_once(const T* from) {
#ifdef __CUDA_ARCH__
  if constexpr (V > 1) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return bit_cast<typename Packed<T, V>::Type>(x);
  }
#endif
  return load<T, V>(from);
}

template <class T, int V>
__device__ void store(T* to, const float (&x)[V]) {
  const auto packed = Packed<T, V>::pack(x);
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(packed) == 16) {  // an assignment compiles to four stores
    const auto words = bit_cast<uint4>(packed);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<typename Packed<T, V>::Type*>(to) = packed;
}

// Prefetches to L2.
__device__ inline void prefetch(const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

template <int V>
__device__ void load_floats(float (&into)[V], const float* from) {
  if constexpr (V == 1) {
    into[0] = __ldg(from);
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(from + v));
      into[v] = x.x, into[v + 1] = x.y, into[v + 2] = x.z, into[v + 3] = x.w;
    }
  }
}

template <int V>
__device__ void store_floats(float* to, const float (&x)[V]) {
  if constexpr (V == 1) {
    to[0] = x[0];
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 4) store<float, 4>(to + v, {x[v], x[v + 1], x[v + 2], x[v + 3]});
  }
}

}  // namespace peft_kernels
