// Dot products with a few rows of a table and their gradient, compiled once per instruction set with
// -DCPU_CAPABILITY=<its name>.

#include <limits>

#include "label_logits.h"
#include "tiles.h"

namespace {

constexpr int kWords = kRegisters == 32 ? 4 : 2;  // words that share the loads of a text
constexpr int kSums = 4;                          // independent sums, which hide the latency of an FMA

template <class Element>
const Element* word_row(const WordRows& words, int64_t word) {
  return static_cast<const Element*>(words.table) + words.ids[word] * words.row_stride;
}

template <int W>
float total_of(Float<W> lanes) {
  if constexpr (W == 1) {
    return lanes[0];
  } else {
    Float<W / 2> halves[2];
    std::memcpy(halves, &lanes, sizeof lanes);
    return total_of<W / 2>(halves[0] + halves[1]);
  }
}

// to[i] = hidden . rows[i]; the order of a sum does not depend on COUNT.
template <int COUNT, class Element>
void dots(const Element* hidden, const Element* const* rows, int64_t width, float* to) {
  Float<kWidth> sums[COUNT][kSums];
  const auto add = [&](int word, int sum, int64_t d) {
    sums[word][sum] += load_elements<kWidth>(hidden + d) * load_elements<kWidth>(rows[word] + d);
  };
  unrolled<COUNT, kSums>([&](int word, int sum) { sums[word][sum] = Float<kWidth>{}; });
  int64_t d = 0;
  for (; d + kSums * kWidth <= width; d += kSums * kWidth) {
    unrolled<kSums, COUNT>([&](int sum, int word) { add(word, sum, d + sum * kWidth); });
  }
  for (; d + kWidth <= width; d += kWidth) unrolled<COUNT, 1>([&](int word, int) { add(word, 0, d); });
  unrolled<COUNT, 1>([&](int word, int) {
    to[word] = total_of<kWidth>((sums[word][0] + sums[word][1]) + (sums[word][2] + sums[word][3]));
  });
  for (; d < width; ++d) {
    for (int word = 0; word < COUNT; ++word) to[word] += widen(hidden[d]) * widen(rows[word][d]);
  }
}

// Words are the outer loop and texts the inner one: a few rows of the table stay in L1, while all of them might not
// fit.
template <class Element>
void logits_of(const WordRows& words, const void* const* hidden, int64_t texts, const float* bias, float* to) {
  for (int64_t first = 0; first < words.words; first += kWords) {
    const int64_t count = least(kWords, words.words - first);
    for (int64_t text = 0; text < texts; ++text) {
      const auto from = static_cast<const Element*>(hidden[text]);
      float* const of_text = to + text * words.words + first;
      const Element* rows[kWords];
      for (int64_t i = 0; i < count; ++i)
        rows[i] = words.ids[first + i] < 0 ? from : word_row<Element>(words, first + i);  // no word: any valid row
      if (count == kWords) {
        dots<kWords>(from, rows, words.width, of_text);
      } else {
        for (int64_t i = 0; i < count; ++i) dots<1>(from, rows + i, words.width, of_text + i);
      }
      for (int64_t i = 0; i < count; ++i) {
        of_text[i] = words.ids[first + i] < 0 ? -std::numeric_limits<float>::infinity()
                                              : of_text[i] + (bias ? bias[first + i] : 0);
      }
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
    for (; d + kWidth <= words.width; d += kWidth)
      store<kWidth>(to + d, load<kWidth>(to + d) + grads[word] * load_elements<kWidth>(row + d));
    for (; d < words.width; ++d) to[d] += grads[word] * widen(row[d]);
  }
}

void logits(const WordRows& words, const void* const* hidden, int64_t texts, const float* bias, float* to) {
  (words.storage == Storage::float32 ? logits_of<float> : logits_of<uint16_t>)(words, hidden, texts, bias, to);
}

void backward(const WordRows& words, const float* grads, float* to) {
  words.storage == Storage::float32 ? backward_of<float>(words, grads, to) : backward_of<uint16_t>(words, grads, to);
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kLabelLogitKernels, capability)
extern const LabelLogitKernels KERNELS(CPU_CAPABILITY) = {logits, backward};
