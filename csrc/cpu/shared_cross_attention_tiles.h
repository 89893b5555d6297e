// Building blocks of the forward and backward kernels: packing, and matmuls of a tile of query rows with a block of
// keys.

#pragma once

#include <math.h>  // not <cmath>: its inline functions would be shared between instruction sets

#include "shared_cross_attention.h"
#include "tiles.h"

namespace {

constexpr int kTileKeys = kRegisters == 32 ? 12 : 6;  // times 2 row vectors: the sums of a score tile, in registers
constexpr int64_t kKeyBlock = 96;  // a multiple of kTileKeys; at D = 64, V and the scores of a block fit in L1

template <class Lanes>
constexpr int64_t kSumLanes = Lanes::kElements == 1 ? 16 : 64;  // lanes of float32, lanes of bfloat16 pairs
constexpr int kMaxTileWidth = 2 * kWidth;
constexpr int kNarrowWidth = kWidth > 8 ? kWidth / 2 : kWidth;

template <int N>
struct Constant {
  static constexpr int value = N;
};

template <class Element>
const Element* at(const void* data, const int64_t* stride, int64_t i, int64_t head, int64_t token) {
  return static_cast<const Element*>(data) + i * stride[0] + head * stride[1] + token * stride[2];
}

// Packs elements[0], elements[stride], ... into lanes, the last one padded with 0; lane i goes to to[i * to_stride].
template <class Lanes, class Element>
void pack(const Element* elements, int64_t stride, int64_t count, float* to, int64_t to_stride) {
  if constexpr (Lanes::kElements == 1) {
    if (stride == 1 && to_stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = widen(elements[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i * to_stride] = widen(elements[i * stride]);
    }
  } else {
    for (int64_t i = 0; i < count; i += 2) {
      const Element pair[2] = {elements[i * stride], i + 1 < count ? elements[(i + 1) * stride] : Element(0)};
      std::memcpy(to + i / 2 * to_stride, pair, sizeof pair);
    }
  }
}

// Packs row `first` of V, or its pairs with the next row `second` (null after the last), into to[d]. Columns from
// head_dim on are 0.
template <class Lanes, class Element>
void pack_value(const Element* first, const Element* second, int64_t stride, int64_t head_dim, int64_t columns,
                float* to) {
  if constexpr (Lanes::kElements == 1) {
    pack<Lanes>(first, stride, head_dim, to, 1);
  } else {
    const auto pair = [&](int64_t d, int64_t at, uint32_t other) {
      const uint32_t bits = first[at] | other << 16;
      std::memcpy(to + d, &bits, sizeof bits);
    };
    if (!second) {
      for (int64_t d = 0; d < head_dim; ++d) pair(d, d * stride, 0);
    } else if (stride == 1) {
      for (int64_t d = 0; d < head_dim; ++d) pair(d, d, second[d]);
    } else {
      for (int64_t d = 0; d < head_dim; ++d) pair(d, d * stride, second[d * stride]);
    }
  }
  for (int64_t d = head_dim; d < columns; ++d) to[d] = 0;
}

// `count` rows, each as lanes along its head_dim elements; not copied if memory already has that layout.
template <class Lanes, class Element>
Packed pack_rows(const Element* rows, const int64_t* stride, int64_t count, int64_t head_dim, float* to) {
  const int64_t row_stride = stride[2], element_stride = stride[3];
  constexpr bool same_lanes = sizeof(Element) * Lanes::kElements == sizeof(float);
  if (same_lanes && element_stride == 1 && head_dim % Lanes::kElements == 0 && row_stride % Lanes::kElements == 0) {
    return {reinterpret_cast<const float*>(rows), row_stride / Lanes::kElements};
  }
  const int64_t lanes = lanes_of<Lanes>(head_dim);
  for (int64_t i = 0; i < count; ++i) pack<Lanes>(rows + i * row_stride, element_stride, head_dim, to + i * lanes, 1);
  return {to, lanes};
}

// The same rows with lanes across them: a lane holds one column's element of one row, or of two rows. Padded with 0 to
// `columns`.
template <class Lanes, class Element>
Packed pack_columns(const Element* rows, const int64_t* stride, int64_t count, int64_t head_dim, int64_t columns,
                    float* to) {
  const int64_t row_stride = stride[2], element_stride = stride[3];
  if constexpr (sizeof(Element) == sizeof(float)) {
    if (element_stride == 1 && head_dim == columns) return {rows, row_stride};
  }
  for (int64_t i = 0; i < count; i += Lanes::kElements) {
    const Element* row = rows + i * row_stride;
    pack_value<Lanes>(row, i + 1 < count ? row + row_stride : nullptr, element_stride, head_dim, columns,
                      to + i / Lanes::kElements * columns);
  }
  return {to, columns};
}

// scores[key][row] = factor * sum over lanes of keys[key][lane] * queries[lane][row]; updates the maximum `largest`.
// Long sums are computed in parts of kSumLanes, added up in `scores`: the rounding errors of one long chain would be
// larger than PyTorch's. Not inlined: its sums need all registers.
template <class Lanes, int W, int VECTORS, int KEYS>
__attribute__((noinline)) void score_tile(const float* queries, const float* keys, int64_t key_stride, int64_t lanes,
                                          float factor, float* scores, Float<W>* largest) {
  for (int64_t begin = 0; begin < lanes; begin += kSumLanes<Lanes>) {
    const int64_t end = least(begin + kSumLanes<Lanes>, lanes);
    Float<W> sums[KEYS][VECTORS];
    unrolled<KEYS, VECTORS>([&](int k, int v) { sums[k][v] = Float<W>{}; });
    for (int64_t lane = begin; lane < end; ++lane) {
      Float<W> q[VECTORS], element[KEYS];
      for (int v = 0; v < VECTORS; ++v) q[v] = load<W>(queries + (lane * VECTORS + v) * W);
      for (int k = 0; k < KEYS; ++k) element[k] = broadcast<W>(keys + k * key_stride + lane);
      unrolled<KEYS, VECTORS>(
          [&](int k, int v) { sums[k][v] = Lanes::template multiply_add<W>(sums[k][v], q[v], element[k]); });
    }
    unrolled<KEYS, VECTORS>([&](int k, int v) {
      float* score = scores + (k * VECTORS + v) * W;
      store<W>(score, begin ? load<W>(score) + sums[k][v] : sums[k][v]);
    });
  }
  unrolled<KEYS, VECTORS>([&](int k, int v) {
    float* score = scores + (k * VECTORS + v) * W;
    const Float<W> scaled = load<W>(score) * factor;
    store<W>(score, scaled);
    largest[v] = maximum<W>(scaled, largest[v]);
  });
}

// Returns the tile width: narrow if a wide tile would be mostly empty.
int64_t tile_width(int64_t rows) {
  if (rows > 3 * kWidth / 2) return 2 * kWidth;
  return rows <= kNarrowWidth ? kNarrowWidth : kWidth;
}

// Calls f(row, count, width, offset of the tile among all padded rows) for each tile.
template <class F>
void for_each_tile(int64_t rows, const F& f) {
  int64_t padded = 0;
  for (int64_t row = 0; row < rows;) {
    const int64_t width = tile_width(rows - row);
    const int64_t count = least(width, rows - row);
    f(row, count, width, padded);
    row += count;
    padded += width;
  }
}

// The next rows of K and V, in their memory layout. They are prefetched a few at a time between score tiles: a head's
// rows are not adjacent, so the hardware prefetcher does not follow them, and fetching all at once would stall on
// memory.
struct Ahead {
  const char *keys, *values;
  int64_t key_stride, value_stride, row_bytes;
  int64_t count = 0;

  void fetch(int64_t first, int64_t end) const {
    for (int64_t k = first; k < least(end, count); ++k) {
      for (int64_t byte = 0; byte < row_bytes; byte += 64) {
        __builtin_prefetch(keys + k * key_stride + byte, 0, 2);
        __builtin_prefetch(values + k * value_stride + byte, 0, 2);
      }
    }
  }
};

template <class Element>
Ahead ahead_of(const Attention& a, const Task& task, int64_t first) {
  if (a.key_stride[3] != 1 || a.value_stride[3] != 1) return {};
  constexpr int64_t bytes = sizeof(Element);
  return {
      reinterpret_cast<const char*>(at<Element>(a.key, a.key_stride, task.input, task.head, first)),
      reinterpret_cast<const char*>(at<Element>(a.value, a.value_stride, task.input, task.head, first)),
      a.key_stride[2] * bytes,
      a.value_stride[2] * bytes,
      a.head_dim * bytes,
      least(kKeyBlock, task.key_end - first),
  };
}

// Computes the scores of a block of keys for W * VECTORS rows, and updates the maximum `largest`.
template <class Lanes, int W, int VECTORS>
void score_block(const float* queries, Packed keys, int64_t count, const Ahead& ahead, int64_t lanes, float factor,
                 float* scores, Float<W>* largest) {
  const auto score = [&](auto tile_keys, int64_t k) {
    ahead.fetch(k, k + tile_keys.value);
    score_tile<Lanes, W, VECTORS, decltype(tile_keys)::value>(queries, keys.data + k * keys.stride, keys.stride, lanes,
                                                              factor, scores + k * W * VECTORS, largest);
  };
  int64_t k = 0;
  for (; k + kTileKeys <= count; k += kTileKeys) score(Constant<kTileKeys>{}, k);
  for (; k + 4 <= count; k += 4) score(Constant<4>{}, k);
  for (; k < count; ++k) score(Constant<1>{}, k);
}

// Calls f with the tensors' element type and the Lanes in which sums over elements are computed.
template <class F>
void with_storage(const Attention& a, const F& f) {
#ifdef __AVX512BF16__
  using Bfloat16Sums = Bfloat16Lanes;
#else
  using Bfloat16Sums = Float32Lanes;
#endif
  if (a.storage == Storage::bfloat16) {
    f(uint16_t{}, Bfloat16Sums{});
  } else {
    f(float{}, Float32Lanes{});
  }
}

}  // namespace
