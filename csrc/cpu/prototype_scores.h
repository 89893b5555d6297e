// Interface between the operators and their kernels: no torch header here or in the kernels, which are compiled once
// per instruction set.

#pragma once

#include <cstdint>

constexpr float kShortestLength = 1e-12f;  // a projected row shorter than this counts as 0

struct Prototypes {
  const float* data;  // [count][width]
  int64_t count, width;
};

// One step of Adam on `count` elements: updates the moments, then parameter -= rate * mean / (sqrt(square) *
// root_factor + epsilon).
struct AdamStep {
  float *parameter, *mean, *square;
  const float* grad;
  int64_t count;
  float beta1, rest1, beta2, rest2;  // a rest is 1 - beta, which would lose half of its digits if computed in float32
  float rate, root_factor, epsilon;
};

struct PrototypeKernels {
  // One text: computes normal[column] and distances[class]; returns 1 / length of the projected row, or 0 if that is 0
  float (*measure)(const Prototypes&, const float* projected, float* normal, float* distances);
  // One text: grad[column] of the projected row; pulls[class] = gradient of the score / distance
  void (*backward)(const Prototypes&, const float* normal, const float* pulls, float inverse_length, float* grad);
  // One class: grad[column] of the prototype, from normals[text][column] and pulls[text * stride]
  void (*prototype_backward)(const float* prototype, const float* normals, const float* pulls, int64_t texts,
                             int64_t stride, int64_t width, float* grad);
  void (*adam)(const AdamStep&);
};

extern const PrototypeKernels kPrototypeKernelsDefault;
extern const PrototypeKernels kPrototypeKernelsAVX2;
extern const PrototypeKernels kPrototypeKernelsAVX512;
extern const PrototypeKernels kPrototypeKernelsAVX512BF16;
