// Interface between the operators and their kernels: no torch header here or in the kernels, which are compiled once
// per instruction set.

#pragma once

#include "injection.h"
#include "storage.h"

// Rows of hidden states, strides in elements; a row is dense.
struct HiddenRows {
  void* data;
  int64_t batch_stride, token_stride;
  Storage storage;
};

// One special token, by row of the batch and slot.
struct Occurrence {
  int64_t row, slot;
};

// The gradient of columns [begin, end) of one vector: a sum over its occurrences.
struct VectorTask {
  const Occurrence* occurrences;
  int64_t count, begin, end;
  float* sums;
};

struct SpecialTokenKernels {
  void (*add)(const HiddenRows&, const Injection&, const Occurrence&, float* scratch);
  void (*sum)(const HiddenRows&, const Injection&, const VectorTask&);
};

extern const SpecialTokenKernels kSpecialTokenKernelsDefault;
extern const SpecialTokenKernels kSpecialTokenKernelsAVX2;
extern const SpecialTokenKernels kSpecialTokenKernelsAVX512;
extern const SpecialTokenKernels kSpecialTokenKernelsAVX512BF16;
