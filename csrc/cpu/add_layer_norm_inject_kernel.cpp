// Rows of the norm and of its gradient, compiled once per instruction set with -DCPU_CAPABILITY=<its name> (setup.py).
//
// A row is read from memory once and written once; in between it stays in L1, in float32, padded with zeros to whole
// vectors.

#include <algorithm>

#include "add_layer_norm_inject.h"
#include "injection_kernel.h"
#include "tiles.h"

namespace {

constexpr int kSums = 4;  // independent sums per reduction, which hide the latency of an addition
using Sums = Float<kWidth>[kSums];

inline float total_of(const Sums& sums) {
  float lanes[kWidth];
  store<kWidth>(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// The columns [at, at + kWidth) of a row, clipped at its end.
template <bool FULL>
struct Columns {
  int64_t at, width;
  int sum;  // index among kSums

  template <class Element>
  Float<kWidth> load(const Element* row) const {  // 0 past the end
    if constexpr (FULL) return load_elements<kWidth>(row + at);
    Element part[kWidth] = {};
    std::copy(row + at, row + width, part);
    return load_elements<kWidth>(part);
  }

  template <class Element>
  void store(Element* row, Float<kWidth> x) const {
    if constexpr (FULL) return store_elements<kWidth>(row + at, x);
    Element part[kWidth];
    store_elements<kWidth>(part, x);
    std::copy(part, part + (width - at), row + at);
  }
};

template <class F>
inline void for_columns(int64_t width, const F& f) {
  int64_t d = 0;
  for (; d + kSums * kWidth <= width; d += kSums * kWidth)
    unrolled<1, kSums>([&](int, int i) { f(Columns<true>{d + i * kWidth, width, i}); });
  for (; d + kWidth <= width; d += kWidth) f(Columns<true>{d, width, 0});
  if (d < width) f(Columns<false>{d, width, 0});
}

template <class Element>
inline Float<kWidth> rounded(Float<kWidth> x) {
  Element elements[kWidth];
  store_elements<kWidth>(elements, x);
  return load_elements<kWidth>(elements);
}

template <class Element>
const Element* row_of(const NormRows& rows, int64_t token, int64_t length) {
  return static_cast<const Element*>(rows.data) + token / length * rows.batch_stride +
         token % length * rows.token_stride;
}

// `total` has room for whole vectors. The next row is prefetched meanwhile, since one row is too short to hide the
// memory latency.
template <class Element>
void forward_row(const NormForward& f, int64_t token, int64_t next, float* total) {
  const int64_t width = f.width, slot = f.slot_of ? f.slot_of[token] : -1;
  const Element *x = row_of<Element>(f.x, token, f.length), *residual = row_of<Element>(f.residual, token, f.length);
  Element* const sum = f.sum ? static_cast<Element*>(f.sum) + token * width : nullptr;
  const Element *ahead_x = row_of<Element>(f.x, next, f.length),
                *ahead_residual = row_of<Element>(f.residual, next, f.length);
  Sums sums = {}, squares = {};
  const auto take = [&](const auto& columns, Float<kWidth> value) {
    value = rounded<Element>(value);
    store<kWidth>(total + columns.at, value);
    if (sum) columns.store(sum, value);
    sums[columns.sum] += value;
  };
  if (f.pre && slot >= 0) {
    for (int64_t d = 0; d < width; ++d) total[d] = widen(x[d]) + widen(residual[d]);
    inject(*f.injection, token / f.length, slot, total);
    for_columns(width, [&](const auto& columns) { take(columns, columns.load(total)); });
  } else {
    for_columns(width, [&](const auto& columns) { take(columns, columns.load(x) + columns.load(residual)); });
  }

  const float mean = f.rms ? 0 : total_of(sums) / width;
  for (int64_t d = width; d % kWidth; ++d) total[d] = mean;  // adds nothing to the squares
  for_columns(width, [&](const auto& columns) {
    const auto centred = load<kWidth>(total + columns.at) - mean;
    __builtin_prefetch(ahead_x + columns.at);
    __builtin_prefetch(ahead_residual + columns.at);
    squares[columns.sum] += centred * centred;
  });
  const float rstd = 1 / __builtin_sqrtf(total_of(squares) / width + f.eps);
  if (f.mean) f.mean[token] = mean;
  if (f.rstd) f.rstd[token] = rstd;

  Element* const out = static_cast<Element*>(f.out) + token * width;
  const auto normal = [&](const auto& columns) {
    const auto scaled = (load<kWidth>(total + columns.at) - mean) * rstd * columns.load(f.weight);
    return f.bias ? scaled + columns.load(f.bias) : scaled;
  };
  if (slot >= 0 && !f.pre) {
    for_columns(width, [&](const auto& columns) { columns.store(total, normal(columns)); });
    inject(*f.injection, token / f.length, slot, total);
    for (int64_t d = 0; d < width; ++d) narrow(total[d], out + d);
  } else {
    for_columns(width, [&](const auto& columns) { columns.store(out, normal(columns)); });
  }
}

template <class Element>
void backward_row(const NormBackward& b, int64_t token, float* scaled, float* normal) {
  const int64_t width = b.width, slot = b.slot_of ? b.slot_of[token] : -1;
  const Element *grad = row_of<Element>(b.grad, token, b.length),
                *sum = static_cast<const Element*>(b.sum) + token * width;
  const Element* const more = b.grad_sum.data ? row_of<Element>(b.grad_sum, token, b.length) : nullptr;
  const float mean = b.mean ? b.mean[token] : 0, rstd = b.rstd[token];
  Sums alongs = {}, shifts = {};
  for_columns(width, [&](const auto& columns) {
    const auto g = columns.load(grad) * columns.load(b.weight);  // 0 past the end
    const auto n = (columns.load(sum) - mean) * rstd;
    store<kWidth>(scaled + columns.at, g);
    store<kWidth>(normal + columns.at, n);
    alongs[columns.sum] += g * n;
    shifts[columns.sum] += g;
  });
  const float along = total_of(alongs) / width, shift = b.mean ? total_of(shifts) / width : 0;
  float* const injected = slot >= 0 ? b.injected + (token / b.length * b.slots_per_row + slot) * width : nullptr;
  Element* const to = static_cast<Element*>(b.grad_x) + token * width;
  for_columns(width, [&](const auto& columns) {
    auto gradient = (load<kWidth>(scaled + columns.at) - shift - load<kWidth>(normal + columns.at) * along) * rstd;
    if (more) gradient += columns.load(more);
    if (injected) columns.store(injected, gradient);
    columns.store(to, gradient);
  });
}

template <class F>
void with_element(Storage storage, const F& f) {
  storage == Storage::float32 ? f(float{}) : f(uint16_t{});
}

int64_t scratch_floats(int64_t width) { return 2 * round_up(width, kWidth); }

void forward(const NormForward& f, int64_t begin, int64_t end, float* scratch) {
  with_element(f.storage, [&](auto element) {
    for (int64_t token = begin; token < end; ++token)
      forward_row<decltype(element)>(f, token, least(token + 1, end - 1), scratch);
  });
}

void backward(const NormBackward& b, int64_t begin, int64_t end, float* scratch) {
  with_element(b.storage, [&](auto element) {
    for (int64_t token = begin; token < end; ++token)
      backward_row<decltype(element)>(b, token, scratch, scratch + round_up(b.width, kWidth));
  });
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kNormKernels, capability)
extern const NormKernels KERNELS(CPU_CAPABILITY) = {scratch_floats, forward, backward};
