// Vectors added to special tokens, as the operators pass them to their kernels.

#pragma once

#include <cstdint>

struct Injection {
  const float* vectors;     // (adapters, count, width)
  const int64_t* slots;     // (batch, slots_per_row): positions, -1: none
  const int64_t* adapters;  // (batch), -1: none
  int64_t slots_per_row, count, width;
  float keep_factor;   // 1 / (1 - p)
  uint32_t threshold;  // a draw below it drops an element; 0: no dropout
  uint64_t seed;

  int64_t vector_of(int64_t slot) const { return slot < count ? slot : count - 1; }
};
