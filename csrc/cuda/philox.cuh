// Dropout of the vectors of special tokens: Philox4x32-10 with the counters of peft_kernels/ops/vector_dropout.py. No
// torch.

#pragma once

#include <cstdint>

namespace peft_kernels {

struct Dropout {
  const int64_t* seed;  // null: nothing is dropped
  unsigned threshold;   // an element is kept if its draw is at least this
  float scale;          // factor of a kept element

  __device__ bool keeps(unsigned column, unsigned slot, unsigned row) const {
    unsigned c0 = column, c1 = slot, c2 = row, c3 = 0;
    const auto key = static_cast<uint64_t>(*seed);
    auto k0 = static_cast<unsigned>(key), k1 = static_cast<unsigned>(key >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<unsigned>(b >> 32) ^ c1 ^ k0;
      c1 = static_cast<unsigned>(b);
      c2 = static_cast<unsigned>(a >> 32) ^ c3 ^ k1;
      c3 = static_cast<unsigned>(a);
      k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    return c0 >= threshold;
  }
};

}  // namespace peft_kernels
