// What the operator hands to a kernel: no torch header here or in the kernels, which are compiled once per instruction set.

#pragma once

#include <cstdint>

#include "storage.h"

// The sizes of a call. A row of the batch has heads * slots queries: query q is slot q % slots of head q / slots. Queries, what they pool
// and the gradients of both lie with the heads first: (heads, batch, slots, width), contiguous.
struct LabelAttention {
  int64_t heads, slots, batch, width;
  float scale;
  Storage features;
  Storage queries;  // and what they pool; float32 or as the features
  bool amx;         // for sums of bfloat16, over a width of whole tiles
};

// A row of the batch.
struct LabelRow {
  int64_t row;           // of the batch
  const void* features;  // (length, width), rows dense and token_stride elements apart
  int64_t token_stride, length;
};

struct LabelKernels {
  int64_t (*packed_floats)(const LabelAttention&);
  int64_t (*scratch_floats)(const LabelAttention&, int64_t longest);
  // Queries of row `row` of (heads, batch, slots, width), as the kernels read them.
  void (*pack)(const LabelAttention&, const void* queries, int64_t batch, int64_t row, float* packed);
  // weights: (length, heads * slots), or null.
  void (*forward)(const LabelAttention&, const LabelRow&, const float* packed, void* pooled, float* weights, float* scratch);
  // packed: the gradients of what was pooled. Adds to sums, (heads * slots, width).
  void (*backward)(const LabelAttention&, const LabelRow&, const float* packed, const float* weights, float* sums, float* scratch);
};

extern const LabelKernels kLabelKernelsDefault;
extern const LabelKernels kLabelKernelsAVX2;
extern const LabelKernels kLabelKernelsAVX512;
extern const LabelKernels kLabelKernelsAVX512BF16;
