// Distances of normalised rows to prototypes and their gradients, compiled once per instruction set with
// -DCPU_CAPABILITY=<its name>.

#include <cmath>

#include "prototype_scores.h"
#include "simd.h"

namespace {

// Sum over d of lanes(d), kWidth terms at a time, and of one(d) for the rest; two independent sums hide the latency of
// an addition.
template <class Lanes, class One>
float sum_over(int64_t width, const Lanes& lanes, const One& one) {
  Float<kWidth> sums[2]{};
  int64_t d = 0;
  for (; d + 2 * kWidth <= width; d += 2 * kWidth) {
    sums[0] += lanes(d);
    sums[1] += lanes(d + kWidth);
  }
  for (; d + kWidth <= width; d += kWidth) sums[0] += lanes(d);
  float values[kWidth];
  store<kWidth>(values, sums[0] + sums[1]);
  float sum = 0;
  for (const float value : values) sum += value;
  for (; d < width; ++d) sum += one(d);
  return sum;
}

float dot(const float* a, const float* b, int64_t width) {
  return sum_over(
      width, [=](int64_t d) { return load<kWidth>(a + d) * load<kWidth>(b + d); },
      [=](int64_t d) { return a[d] * b[d]; });
}

float distance(const float* a, const float* b, int64_t width) {
  const auto lanes = [=](int64_t d) {
    const Float<kWidth> away = load<kWidth>(a + d) - load<kWidth>(b + d);
    return away * away;
  };
  const auto one = [=](int64_t d) {
    const float away = a[d] - b[d];
    return away * away;
  };
  return std::sqrt(sum_over(width, lanes, one));
}

// to += factor * (a - b)
void add_difference(float factor, const float* a, const float* b, int64_t width, float* to) {
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) {
    store<kWidth>(to + d, load<kWidth>(to + d) + factor * (load<kWidth>(a + d) - load<kWidth>(b + d)));
  }
  for (; d < width; ++d) to[d] += factor * (a[d] - b[d]);
}

float measure(const Prototypes& prototypes, const float* projected, float* normal, float* distances) {
  const int64_t width = prototypes.width;
  const float length = std::sqrt(dot(projected, projected, width));
  const bool is_zero = length < kShortestLength;  // NaN stays NaN
  for (int64_t d = 0; d < width; ++d) normal[d] = is_zero ? 0 : projected[d] / length;
  for (int64_t k = 0; k < prototypes.count; ++k) distances[k] = distance(normal, prototypes.data + k * width, width);
  return is_zero ? 0 : 1 / length;
}

void backward(const Prototypes& prototypes, const float* normal, const float* pulls, float inverse_length,
              float* grad) {
  const int64_t width = prototypes.width;
  for (int64_t d = 0; d < width; ++d) grad[d] = 0;
  for (int64_t k = 0; k < prototypes.count; ++k)
    add_difference(pulls[k], prototypes.data + k * width, normal, width, grad);
  const float along = dot(grad, normal, width);
  for (int64_t d = 0; d < width; ++d) grad[d] = (grad[d] - along * normal[d]) * inverse_length;
}

// Sum over i of pulls[i * stride] * away(i), in parts of kPart, so that rounding errors grow only with the number of
// parts.
template <class Sum, class Away>
Sum sum_of_pulls(const float* pulls, int64_t texts, int64_t stride, const Away& away) {
  constexpr int64_t kPart = 32;
  Sum sum{};
  for (int64_t begin = 0; begin < texts; begin += kPart) {
    Sum part{};
    for (int64_t i = begin; i < begin + kPart && i < texts; ++i) part += pulls[i * stride] * away(i);
    sum += part;
  }
  return sum;
}

void prototype_backward(const float* prototype, const float* normals, const float* pulls, int64_t texts, int64_t stride,
                        int64_t width, float* grad) {
  int64_t d = 0;
  for (; d + kWidth <= width; d += kWidth) {
    const auto away = [=](int64_t i) { return load<kWidth>(normals + i * width + d) - load<kWidth>(prototype + d); };
    store<kWidth>(grad + d, sum_of_pulls<Float<kWidth>>(pulls, texts, stride, away));
  }
  for (; d < width; ++d) {
    grad[d] =
        sum_of_pulls<float>(pulls, texts, stride, [=](int64_t i) { return normals[i * width + d] - prototype[d]; });
  }
}

// sqrt(x) for x >= 0, within some units in the last place: a first guess from the exponent and Newton's iteration for 1
// / sqrt(x), since the square root instruction takes longer than the rest of Adam.
Float<kWidth> square_root(Float<kWidth> x) {
  Float<kWidth> inverse = (Float<kWidth>)(0x5f3759df - ((Bits<kWidth>)x >> 1));
  for (int i = 0; i < 3; ++i) inverse *= 1.5f - 0.5f * x * inverse * inverse;
  return x * inverse;
}

void adam(const AdamStep& s) {
  int64_t i = 0;
  for (; i + kWidth <= s.count; i += kWidth) {
    const Float<kWidth> grad = load<kWidth>(s.grad + i);
    const Float<kWidth> mean = s.beta1 * load<kWidth>(s.mean + i) + s.rest1 * grad;
    const Float<kWidth> square = s.beta2 * load<kWidth>(s.square + i) + s.rest2 * grad * grad;
    store<kWidth>(s.mean + i, mean);
    store<kWidth>(s.square + i, square);
    const Float<kWidth> step = s.rate * mean / (square_root(square) * s.root_factor + s.epsilon);
    store<kWidth>(s.parameter + i, load<kWidth>(s.parameter + i) - step);
  }
  for (; i < s.count; ++i) {
    s.mean[i] = s.beta1 * s.mean[i] + s.rest1 * s.grad[i];
    s.square[i] = s.beta2 * s.square[i] + s.rest2 * s.grad[i] * s.grad[i];
    s.parameter[i] -= s.rate * s.mean[i] / (std::sqrt(s.square[i]) * s.root_factor + s.epsilon);
  }
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kPrototypeKernels, capability)
extern const PrototypeKernels KERNELS(CPU_CAPABILITY) = {measure, backward, prototype_backward, adam};
