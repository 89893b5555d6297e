// What the operators hand to their kernels: no torch header here or in the kernels, which are compiled once per instruction set.

#pragma once

#include <cstdint>

constexpr float kShortestLength = 1e-12f;  // what is projected nearer to 0 counts as 0

struct Prototypes {
  const float* data;  // [count][width]
  int64_t count, width;
};

// One step of Adam on `count` elements: parameter -= rate * mean / (sqrt(square) * root_factor + epsilon), moments updated before.
struct AdamStep {
  float *parameter, *mean, *square;
  const float* grad;
  int64_t count;
  float beta1, rest1, beta2, rest2;  // a rest is 1 - beta, which in float32 would lose half of its digits
  float rate, root_factor, epsilon;
};

// Of one text, the third of one class, the last of a piece of a parameter.
struct PrototypeKernels {
  // normal[column], distances[class]; returns 1 / length of what was projected, 0 where it is 0
  float (*measure)(const Prototypes&, const float* projected, float* normal, float* distances);
  // grad[column] of what was projected; pulls[class] = gradient of the score / distance
  void (*backward)(const Prototypes&, const float* normal, const float* pulls, float inverse_length, float* grad);
  // grad[column] of one prototype, from normals[text][column] and pulls[text * stride]
  void (*prototype_backward)(const float* prototype, const float* normals, const float* pulls, int64_t texts, int64_t stride, int64_t width, float* grad);
  void (*adam)(const AdamStep&);
};

extern const PrototypeKernels kPrototypeKernelsDefault;
extern const PrototypeKernels kPrototypeKernelsAVX2;
extern const PrototypeKernels kPrototypeKernelsAVX512;
extern const PrototypeKernels kPrototypeKernelsAVX512BF16;
