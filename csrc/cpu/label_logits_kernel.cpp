// Dot products with a few rows of a table and their gradient, compiled once per instruction set with -DCPU_CAPABILITY=<its name>.

#include "label_logits.h"
#include "tiles.h"

#include <limits>

namespace {

constexpr int kSums = 4;  // so that a multiplication need not wait for the one before

template <class Element>
const Element* word_row(const WordRows& words, int64_t word) {
  return static_cast<const Element*>(words.table) + words.ids[word] * words.row_stride;
}

template <class Element>
float dot(const Element* a, const Element* b, int64_t width) {
  Float<kWidth> sums[kSums]{};
  int64_t d = 0;
  for (; d + kSums * kWidth <= width; d += kSums * kWidth) {
    unrolled<kSums, 1>([&](int i, int) { sums[i] += load_elements<kWidth>(a + d + i * kWidth) * load_elements<kWidth>(b + d + i * kWidth); });
  }
  for (; d + kWidth <= width; d += kWidth) sums[0] += load_elements<kWidth>(a + d) * load_elements<kWidth>(b + d);
  float lanes[kWidth];
  store<kWidth>(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  for (; d < width; ++d) sum += widen(a[d]) * widen(b[d]);
  return sum;
}

template <class Element>
void logits_of(const WordRows& words, const Element* hidden, const float* bias, float* to) {
  for (int64_t word = 0; word < words.words; ++word) {
    if (words.ids[word] < 0) {
      to[word] = -std::numeric_limits<float>::infinity();
    } else {
      to[word] = dot(hidden, word_row<Element>(words, word), words.width) + (bias ? bias[word] : 0);
    }
  }
}

template <class Element>
void backward_of(const WordRows& words, const float* grads, float* to) {
  for (int64_t d = 0; d < words.width; ++d) to[d] = 0;
  for (int64_t word = 0; word < words.words; ++word) {
    if (words.ids[word] < 0 || grads[word] == 0) continue;
    const Element* row = word_row<Element>(words, word);
    int64_t d = 0;
    for (; d + kWidth <= words.width; d += kWidth) store<kWidth>(to + d, load<kWidth>(to + d) + grads[word] * load_elements<kWidth>(row + d));
    for (; d < words.width; ++d) to[d] += grads[word] * widen(row[d]);
  }
}

void logits(const WordRows& words, const void* hidden, const float* bias, float* to) {
  if (words.storage == Storage::float32) {
    logits_of(words, static_cast<const float*>(hidden), bias, to);
  } else {
    logits_of(words, static_cast<const uint16_t*>(hidden), bias, to);
  }
}

void backward(const WordRows& words, const float* grads, float* to) {
  words.storage == Storage::float32 ? backward_of<float>(words, grads, to) : backward_of<uint16_t>(words, grads, to);
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kLabelLogitKernels, capability)
extern const LabelLogitKernels KERNELS(CPU_CAPABILITY) = {logits, backward};
