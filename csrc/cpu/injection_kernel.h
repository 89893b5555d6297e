// The vector of one special token, with its dropout: Philox4x32-10 (Salmon et al., SC 2011), see
// peft_kernels/ops/vector_dropout.py.

#pragma once

#include "injection.h"

namespace {

inline uint32_t philox(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32), c3 = 0;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

// sums[d] += x(d) after dropout
template <class X>
void add_kept(const Injection& injection, int64_t row, int64_t slot, int64_t begin, int64_t end, const X& x,
              float* __restrict sums) {
  if (injection.threshold == 0) {
    for (int64_t d = begin; d < end; ++d) sums[d] += x(d);
    return;
  }
  const uint64_t seed = injection.seed;
  const uint32_t threshold = injection.threshold, c1 = static_cast<uint32_t>(slot), c2 = static_cast<uint32_t>(row);
  const float factor = injection.keep_factor;
  for (int64_t d = begin; d < end; ++d) {
    const float kept = philox(seed, static_cast<uint32_t>(d), c1, c2) >= threshold ? factor : 0.0f;
    sums[d] += kept * x(d);
  }
}

inline void inject(const Injection& injection, int64_t row, int64_t slot, float* sums) {
  const float* vector =
      injection.vectors + (injection.adapters[row] * injection.count + injection.vector_of(slot)) * injection.width;
  add_kept(injection, row, slot, 0, injection.width, [=](int64_t d) { return vector[d]; }, sums);
}

}  // namespace
