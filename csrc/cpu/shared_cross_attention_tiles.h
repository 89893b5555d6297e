// The loops of shared_cross_attention_kernel.cpp that do the arithmetic, on one tile of query rows and one block of keys.

#pragma once

#include <math.h>  // not <cmath>: its inline functions would be shared between instruction sets

#include "simd.h"

namespace {

constexpr int kTileKeys = kRegisters == 32 ? 12 : 6;    // by 2 row vectors: the sums of a score tile, in registers
constexpr int kTileRows = 6;                            // by kTileVectors: those of an output tile
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;
constexpr int64_t kKeyBlock = 96;  // a multiple of kTileKeys; at D = 64, V and the scores of a block are in the nearest cache
constexpr int64_t kSumLanes = 64;
constexpr int kMaxTileWidth = 2 * kWidth;
constexpr int kNarrowWidth = kWidth > 8 ? kWidth / 2 : kWidth;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <int N>
struct Constant {
  static constexpr int value = N;
};

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_bfloat16(x); }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) { *to = to_bfloat16(x); }

// elements[0], elements[stride], ... in lanes of Lanes, the last one filled up with 0, lane i to to[i * to_stride].
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

// Row `first` of V, or its neighbour `second` paired with it (null after the last), as to[d]. Columns from head_dim on are 0.
template <class Lanes, class Element>
void pack_value(const Element* first, const Element* second, int64_t stride, int64_t head_dim, int64_t columns, float* to) {
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

// scores[key][row] = factor * sum over lanes of keys[key][lane] * queries[lane][row]; `largest` follows them. Long sums are taken
// in parts of kSumLanes, added up in `scores`: the rounding errors of one long chain would be larger than PyTorch's.
// Not inlined: its sums need all registers.
template <class Lanes, int W, int VECTORS, int KEYS>
__attribute__((noinline)) void score_tile(
    const float* queries, const float* keys, int64_t key_stride, int64_t lanes, float factor, float* scores, Float<W>* largest) {
  for (int64_t begin = 0; begin < lanes; begin += kSumLanes) {
    const int64_t end = least(begin + kSumLanes, lanes);
    Float<W> sums[KEYS][VECTORS] = {};
    for (int64_t lane = begin; lane < end; ++lane) {
      Float<W> q[VECTORS];
      for (int v = 0; v < VECTORS; ++v) q[v] = load<W>(queries + (lane * VECTORS + v) * W);
      for (int k = 0; k < KEYS; ++k) {
        const Float<W> element = broadcast<W>(keys + k * key_stride + lane);
        for (int v = 0; v < VECTORS; ++v) sums[k][v] = Lanes::template multiply_add<W>(sums[k][v], q[v], element);
      }
    }
    for (int k = 0; k < KEYS; ++k) {
      for (int v = 0; v < VECTORS; ++v) {
        float* score = scores + (k * VECTORS + v) * W;
        store<W>(score, begin ? load<W>(score) + sums[k][v] : sums[k][v]);
      }
    }
  }
  for (int k = 0; k < KEYS; ++k) {
    for (int v = 0; v < VECTORS; ++v) {
      float* score = scores + (k * VECTORS + v) * W;
      const Float<W> scaled = load<W>(score) * factor;
      store<W>(score, scaled);
      largest[v] = maximum<W>(scaled, largest[v]);
    }
  }
}

// out[row][d] = rescale[row] * out[row][d] + sum over lanes of weights[lane][row] * values[lane][d]
template <class Lanes, int ROWS, int VECTORS>
void output_tile(
    const float* weights, int64_t width, const float* values, int64_t value_stride, int64_t lanes, const float* rescale, float* out,
    int64_t out_stride) {
  Float<kWidth> sums[ROWS][VECTORS] = {};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    Float<kWidth> value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = load<kWidth>(values + lane * value_stride + v * kWidth);
    for (int r = 0; r < ROWS; ++r) {
      const Float<kWidth> weight = broadcast<kWidth>(weights + lane * width + r);
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = Lanes::template multiply_add<kWidth>(sums[r][v], weight, value[v]);
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      float* to = out + r * out_stride + v * kWidth;
      store<kWidth>(to, load<kWidth>(to) * rescale[r] + sums[r][v]);
    }
  }
}

using OutputTile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*, float*, int64_t);

template <class Lanes, int VECTORS>
constexpr OutputTile kOutputTiles[kTileRows] = {
    output_tile<Lanes, 1, VECTORS>, output_tile<Lanes, 2, VECTORS>, output_tile<Lanes, 3, VECTORS>,
    output_tile<Lanes, 4, VECTORS>, output_tile<Lanes, 5, VECTORS>, output_tile<Lanes, 6, VECTORS>,
};

template <class Lanes>
OutputTile choose_output_tile(int64_t rows, int64_t vectors) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return kOutputTiles<Lanes, 4>[rows - 1];
    if (vectors == 3) return kOutputTiles<Lanes, 3>[rows - 1];
  }
  return vectors == 2 ? kOutputTiles<Lanes, 2>[rows - 1] : kOutputTiles<Lanes, 1>[rows - 1];
}

// Rows that one score tile takes, and the running state of their softmax.
struct RowTile {
  int64_t row, rows, width;
  float* queries;  // [lanes][width]
  float* largest;  // [width]
  float* total;    // [width]
  float* sums;     // [rows][columns]
};

// Narrow tiles where wide ones would be mostly empty.
int64_t tile_width(int64_t rows) {
  if (rows > 3 * kWidth / 2) return 2 * kWidth;
  return rows <= kNarrowWidth ? kNarrowWidth : kWidth;
}

// The rows of K and V that come next, as they lie in memory. Fetched a few at a time between score tiles: a head's rows lie
// apart, which the hardware does not follow, and all at once they would stall on the memory.
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

struct KeyBlock {
  const float* keys;
  const float* values;
  int64_t key_stride, value_stride, count;
};

// Online softmax of one block of scores: scores become weights, in lanes of Lanes; returns through `rescale` the factor of older sums.
template <class Lanes, int W, int VECTORS>
void softmax(const RowTile& tile, float* scores, int64_t count, const Float<W>* block_largest, float* rescale) {
  constexpr int width = W * VECTORS;
  for (int v = 0; v < VECTORS; ++v) {
    const Float<W> before = load<W>(tile.largest + v * W);
    const Float<W> largest = maximum<W>(block_largest[v], before);
    const Float<W> shift = largest == -INFINITY ? Float<W>{} : largest;  // -inf - -inf would be NaN
    const Float<W> factor = exp<W>(before - shift);
    store<W>(tile.largest + v * W, largest);
    store<W>(rescale + v * W, factor);
    Float<W> total = {};
    float* column = scores + v * W;
    if constexpr (Lanes::kElements == 1) {
      for (int64_t k = 0; k < count; ++k) {
        const Float<W> weight = exp<W>(load<W>(column + k * width) - shift);
        store<W>(column + k * width, weight);
        total += weight;
      }
    } else {
      for (int64_t k = 0; k < count; k += 2) {
        const Float<W> first = exp<W>(load<W>(column + k * width) - shift);
        const Float<W> second = k + 1 < count ? exp<W>(load<W>(column + (k + 1) * width) - shift) : Float<W>{};
        store<W>(column + k / 2 * width, Lanes::template pair<W>(first, second));
        total += first + second;
      }
    }
    store<W>(tile.total + v * W, load<W>(tile.total + v * W) * factor + total);
  }
}

template <class Lanes, int W, int VECTORS>
void attend_tile(const RowTile& tile, const KeyBlock& block, const Ahead& ahead, int64_t lanes, int64_t columns, float factor, float* scores) {
  constexpr int width = W * VECTORS;
  Float<W> largest[VECTORS];
  for (int v = 0; v < VECTORS; ++v) largest[v] = Float<W>{} - INFINITY;
  const auto score = [&](auto tile_keys, int64_t k) {
    ahead.fetch(k, k + tile_keys.value);
    score_tile<Lanes, W, VECTORS, decltype(tile_keys)::value>(
        tile.queries, block.keys + k * block.key_stride, block.key_stride, lanes, factor, scores + k * width, largest);
  };
  int64_t k = 0;
  for (; k + kTileKeys <= block.count; k += kTileKeys) score(Constant<kTileKeys>{}, k);
  for (; k + 4 <= block.count; k += 4) score(Constant<4>{}, k);
  for (; k < block.count; ++k) score(Constant<1>{}, k);

  float rescale[kMaxTileWidth];
  softmax<Lanes, W, VECTORS>(tile, scores, block.count, largest, rescale);

  const int64_t weight_lanes = (block.count + Lanes::kElements - 1) / Lanes::kElements;
  const int64_t vectors = columns / kWidth;
  const int64_t column_parts = (vectors + kTileVectors - 1) / kTileVectors;
  const int64_t row_parts = (tile.rows + kTileRows - 1) / kTileRows;
  for (int64_t c = 0; c < column_parts; ++c) {
    const int64_t v = c * vectors / column_parts, v_end = (c + 1) * vectors / column_parts;
    for (int64_t p = 0; p < row_parts; ++p) {
      const int64_t r = p * tile.rows / row_parts, r_end = (p + 1) * tile.rows / row_parts;
      float* sums = tile.sums + r * columns + v * kWidth;
      choose_output_tile<Lanes>(r_end - r, v_end - v)(
          scores + r, width, block.values + v * kWidth, block.value_stride, weight_lanes, rescale + r, sums, columns);
    }
  }
}

}  // namespace
