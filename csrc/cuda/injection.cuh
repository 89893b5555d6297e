// Addition of vectors to special tokens: the slots and the adapter of a row, and the dropout of its vectors. No torch.

#pragma once

#include "packed.cuh"
#include "philox.cuh"

namespace peft_kernels {

struct Slots {
  const int* data;             // (B, each), int32 or the low words of int64; -1: none
  int64_t row_stride, stride;  // in 32-bit words
  int each;

  __device__ int get(int64_t row, int slot) const { return __ldg(data + row * row_stride + slot * stride); }

  // Returns the slot of the row's token at a position, or -1. The whole warp calls it with the same arguments.
  __device__ int find(int64_t row, int position) const {
    for (int start = 0; start < each; start += kLanes) {
      const int slot = start + static_cast<int>(threadIdx.x % kLanes);
      const unsigned found = __ballot_sync(kWarpMask, slot < each && get(row, slot) == position);
      if (found) return start + __ffs(static_cast<int>(found)) - 1;
    }
    return -1;
  }
};

struct Injection {
  const float* vectors;  // (K, each, width), or null
  Slots slots;
  Integers adapters;
  Dropout dropout;
  int each, width;

  // x[i] += V elements, from column(i) on, of the vector for a slot of a row.
  template <int N, int V, class Column>
  __device__ void add(float (&x)[N][V], int row, int slot, int adapter, const Column& column) const {
    const float* vector = vectors + (int64_t(adapter) * each + min(slot, each - 1)) * width;
    unsigned kept = ~0u;
    if (dropout.seed) {
      static_assert(N * V <= 32);
      kept = 0;
#pragma unroll 1  // keeps one copy of the generator in the code instead of N * V
      for (int i = 0; i < N * V; ++i) kept |= unsigned{dropout.keeps(column(i / V) + i % V, slot, row)} << i;
    }
    const float scale = dropout.seed ? dropout.scale : 1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column(i) >= width) continue;
      float added[V];
      load_floats<V>(added, vector + column(i));
#pragma unroll
      for (int v = 0; v < V; ++v) x[i][v] += kept >> (i * V + v) & 1 ? scale * added[v] : 0;
    }
  }
};

}  // namespace peft_kernels
