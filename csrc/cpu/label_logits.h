// Interface between the operators and their kernels: no torch header here or in the kernels, which are compiled once
// per instruction set.

#pragma once

#include <cstdint>

#include "storage.h"

// Some rows of the output embedding, each dense; strides in elements.
struct WordRows {
  const void* table;
  int64_t row_stride;
  Storage storage;
  const int64_t* ids;  // [words], -1: no word
  int64_t words, width;
};

struct LabelLogitKernels {
  void (*logits)(const WordRows&, const void* const* hidden, int64_t texts, const float* bias,
                 float* to);                                         // to[text][word]; bias[word] or null
  void (*backward)(const WordRows&, const float* grads, float* to);  // to[column], for one text
};

extern const LabelLogitKernels kLabelLogitKernelsDefault;
extern const LabelLogitKernels kLabelLogitKernelsAVX2;
extern const LabelLogitKernels kLabelLogitKernelsAVX512;
extern const LabelLogitKernels kLabelLogitKernelsAVX512BF16;
