// Vectors of 32-bit lanes in the compilers' own vector types (gcc, clang): the same source compiles to SSE2, NEON, AVX2
// or AVX-512, depending on the flags of the file.
//
// A lane holds the input of one step of a sum: a float32, or two adjacent bfloat16. Lanes are moved as float32 and only
// multiply_add interprets them, so every loop around it is written once for both.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Internal linkage: functions compiled for one instruction set must never stand in for those compiled for another.
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
#else
constexpr int kWidth = 4;
constexpr int kRegisters = 16;
#endif

template <int W>
struct Vector {
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef uint32_t Bits __attribute__((vector_size(4 * W)));
};
template <int W>
using Float = typename Vector<W>::Float;
template <int W>
using Bits = typename Vector<W>::Bits;

template <int W>
inline Float<W> load(const float* from) {
  Float<W> lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

template <int W>
inline void store(float* to, Float<W> lanes) {
  std::memcpy(to, &lanes, sizeof lanes);
}

// Copies lanes as integers: a pair of bfloat16 may have the bits of a signalling NaN, which arithmetic would change.
template <int W>
inline Float<W> broadcast(const float* from) {
  uint32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Float<W>)(Bits<W>{} | bits);
}

template <int W>
inline Float<W> maximum(Float<W> a, Float<W> b) {
  return a > b ? a : b;
}

// e^x for x <= 0, within 1 unit in the last place; 0 where that would be subnormal, which is slow. NaN stays NaN.
template <int W>
inline Float<W> exp(Float<W> x) {
  constexpr float kRound =
      12582912.0f + 127.0f;  // 1.5 * 2^23 leaves n in the low bits, 127 makes it the exponent of 2^n
  const Float<W> rounded = x * 1.44269504f + kRound;
  const Float<W> f = x - (rounded - kRound) * 0.693147181f;  // x - n log 2, within log(2) / 2 of 0
  Float<W> p = f * 1.40612399e-03f + 8.37901113e-03f;        // minimax in relative error, 2.6e-9
  p = p * f + 4.16647773e-02f;
  p = p * f + 1.66663654e-01f;
  p = p * f + 5.00000043e-01f;
  p = p * f + 1.00000005e+00f;
  p = p * f + 1.0f;
  const Float<W> power = p * (Float<W>)((Bits<W>)rounded << 23);
  return x < -87.3f ? Float<W>{} : power;
}

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline uint16_t to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#ifdef __AVX512F__
inline __m512i widen_halves(__m256i x) {
  return _mm512_maskz_cvtepu16_epi32(0xffff, x);
}  // gcc 12 warns about the unmasked form
#endif

// W elements, as float32.
template <int W>
inline Float<W> load_elements(const float* from) {
  return load<W>(from);
}

template <int W>
inline Float<W> load_elements(const uint16_t* from) {
#ifdef __AVX512F__
  if constexpr (W == 16)
    return (Float<W>)((Bits<W>)widen_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))) << 16);
#endif
  typedef uint16_t Halves __attribute__((vector_size(2 * W)));
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return (Float<W>)(__builtin_convertvector(halves, Bits<W>) << 16);
}

template <int W>
inline void store_elements(float* to, Float<W> x) {
  store<W>(to, x);
}

template <int W>
inline void store_elements(uint16_t* to, Float<W> x) {
#ifdef __AVX512BF16__
  if constexpr (W == 16) {
    const auto elements = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &elements, sizeof elements);
    return;
  }
#endif
  typedef uint16_t Halves __attribute__((vector_size(2 * W)));
  const Bits<W> bits = (Bits<W>)x;
  const Bits<W> rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  const Halves halves =
      __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? Bits<W>{} + 0x7fc0 : rounded, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

struct Float32Lanes {
  static constexpr int kElements = 1;

  template <int W>
  static Float<W> multiply_add(Float<W> sum, Float<W> a, Float<W> b) {
    return sum + a * b;
  }

  template <int W>
  static void store_elements(void* to, Float<W> x) {
    std::memcpy(to, &x, sizeof x);
  }
};

#ifdef __AVX512BF16__
struct Bfloat16Lanes {
  static constexpr int kElements = 2;

  template <int W>
  static Float<W> multiply_add(Float<W> sum, Float<W> a, Float<W> b) {
    if constexpr (W == 16) {
      return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    } else {
      return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
    }
  }

  // Stores W elements, rounded to nearest, in W / 2 lanes.
  template <int W>
  static void store_elements(void* to, Float<W> x) {
    if constexpr (W == 16) {
      const auto elements = _mm512_cvtneps_pbh(x);
      std::memcpy(to, &elements, sizeof elements);
    } else {
      const auto elements = _mm256_cvtneps_pbh(x);
      std::memcpy(to, &elements, sizeof elements);
    }
  }

  // Lane r: (first[r], second[r]), rounded to nearest.
  template <int W>
  static Float<W> pair(Float<W> first, Float<W> second) {
    return (Float<W>)(round<W>(first) | round<W>(second) << 16);
  }

 private:
  template <int W>
  static Bits<W> round(Float<W> x) {
    if constexpr (W == 16) {
      return (Bits<W>)widen_halves((__m256i)_mm512_cvtneps_pbh(x));
    } else {
      return (Bits<W>)_mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(x));
    }
  }
};
#endif

}  // namespace
