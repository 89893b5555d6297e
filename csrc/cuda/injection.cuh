// Addition of vectors to special tokens: the slots and the adapter of a row, and the dropout of its vectors. No torch.

#pragma once

#include "packed.cuh"
#include "philox.cuh"

namespace peft_kernels {

// Positions of the special tokens of every row. -1: none, which is also the meaning of values out of range.
struct Slots {
  const int* data;             // (B, slots_per_row), int32 or the low words of int64
  int64_t row_stride, stride;  // in 32-bit words
  int slots_per_row;
  int length;  // S

  __device__ int get(int64_t row, int slot) const {
    return checked(__ldg(data + row * row_stride + slot * stride), length);
  }

  // Returns the slot of the row's token at a position, or -1. The whole warp calls it with the same arguments.
  __device__ int find(int64_t row, int position) const {
    for (int start = 0; start < slots_per_row; start += kLanes) {
      const int slot = start + static_cast<int>(threadIdx.x % kLanes);
      const unsigned matches = __ballot_sync(kWarpMask, slot < slots_per_row && get(row, slot) == position);
      if (matches) return start + __ffs(static_cast<int>(matches)) - 1;
    }
    return -1;
  }
};

struct Injection {
  const float* vectors;  // (K, vectors_per_adapter, width), or null
  Slots slots;
  AdapterIds adapter_ids;
  Dropout dropout;
  int vectors_per_adapter, width;

  // x[i] += V elements, from column(i) on, of the vector for a slot of a row.
  template <int N, int V, class Column>
  __device__ void add(float (&x)[N][V], int row, int slot, int adapter, const Column& column) const {
    const float* vector =
        vectors + (int64_t(adapter) * vectors_per_adapter + min(slot, vectors_per_adapter - 1)) * width;
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
