// Interface between the operator and its kernels: no torch header here or in the kernels, which are compiled once per
// instruction set.

#pragma once

#include "injection.h"
#include "storage.h"

// Dense rows of (batch, length, width), strides in elements.
struct NormRows {
  const void* data;
  int64_t batch_stride, token_stride;
};

// One forward call. Results are contiguous.
struct NormForward {
  NormRows x, residual;
  const float *weight, *bias;  // (width); bias or null
  const Injection* injection;  // or null
  const int32_t* slot_of;      // (batch * length): the slot of every token, -1: none
  void *out, *sum;             // sum or null
  float *mean, *rstd;          // (batch * length), or null
  int64_t length, width;
  float eps;
  bool rms, pre;
  Storage storage;
};

// One backward call.
struct NormBackward {
  NormRows grad, grad_sum;            // grad_sum.data may be null
  const void* sum;                    // contiguous
  const float *mean, *rstd, *weight;  // mean or null
  void* grad_x;                       // contiguous
  const int32_t* slot_of;             // as above, or null
  float* injected;  // (batch, slots_per_row, width): the gradient of the vectors injected before the norm; or null
  int64_t slots_per_row, length, width;
  Storage storage;
};

struct NormKernels {
  int64_t (*scratch_floats)(int64_t width);
  void (*forward)(const NormForward&, int64_t begin, int64_t end,
                  float* scratch);  // range of tokens, counted over the batch
  void (*backward)(const NormBackward&, int64_t begin, int64_t end, float* scratch);
};

constexpr int64_t kNormTokens = 16;  // per task

extern const NormKernels kNormKernelsDefault;
extern const NormKernels kNormKernelsAVX2;
extern const NormKernels kNormKernelsAVX512;
extern const NormKernels kNormKernelsAVX512BF16;
