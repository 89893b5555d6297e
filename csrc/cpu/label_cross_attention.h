// Interface between the operator and its kernels: no torch header here or in the kernels, which are compiled once per
// instruction set.

#pragma once

#include <cstdint>

#include "storage.h"

// The sizes of a call. A row of the batch has heads * slots queries: query q is slot q % slots of head q / slots.
// Queries, pooled features and the gradients of both are laid out with the heads first: (heads, batch, slots, width),
// contiguous.
struct LabelAttention {
  int64_t heads, slots, batch, width;
  float scale;
  Storage features;
  Storage queries;  // also of the pooled features; float32 or the type of the features
  bool amx;         // use AMX: for sums of bfloat16, over a width of whole tiles
};

// A row of the batch.
struct LabelRow {
  int64_t row;           // its index
  const void* features;  // (length, width), rows dense and token_stride elements apart
  int64_t token_stride, length;
};

struct LabelKernels {
  int64_t (*packed_floats)(const LabelAttention&);
  int64_t (*scratch_floats)(const LabelAttention&, int64_t longest);
  // Packs the queries of row `row` of (heads, batch, slots, width) for the kernels.
  void (*pack)(const LabelAttention&, const void* queries, int64_t batch, int64_t row, float* packed);
  // weights: (length, heads * slots), or null.
  void (*forward)(const LabelAttention&, const LabelRow&, const float* packed, void* pooled, float* weights,
                  float* scratch);
  // packed: the gradients of the pooled features. Adds to sums, (heads * slots, width).
  void (*backward)(const LabelAttention&, const LabelRow&, const float* packed, const float* weights, float* sums,
                   float* scratch);
};

extern const LabelKernels kLabelKernelsDefault;
extern const LabelKernels kLabelKernelsAVX2;
extern const LabelKernels kLabelKernelsAVX512;
extern const LabelKernels kLabelKernelsAVX512BF16;
