// Matmuls on tiles that fit in registers, and the conversions around them.

#pragma once

#include "simd.h"

namespace {

constexpr int kTileRows = 6;  // times kTileVectors: the sums of an output tile, in registers
constexpr int kTileVectors = kRegisters == 32 ? 4 : 2;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Calls f(i, j) for all i < I and j < J, fully unrolled: arrays indexed by i and j stay in registers.
template <int I, int J, class F>
inline __attribute__((always_inline)) void unrolled(const F& f) {
#pragma GCC unroll 16
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) f(i, j);
  }
}

template <class Lanes>
int64_t lanes_of(int64_t elements) {
  return (elements + Lanes::kElements - 1) / Lanes::kElements;
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_bfloat16(x); }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, uint16_t* to) { *to = to_bfloat16(x); }

// Rows of a tensor as a tile reads them, `stride` floats apart.
struct Packed {
  const float* data;
  int64_t stride;
};

// Writes the first `count` sums to contiguous elements.
template <class Lanes, class Element>
void narrow(const float* sums, int64_t count, Element* to) {
  int64_t d = 0;
  if constexpr (sizeof(Element) * Lanes::kElements == sizeof(float)) {
    for (; d + kWidth <= count; d += kWidth) Lanes::template store_elements<kWidth>(to + d, load<kWidth>(sums + d));
  }
  for (; d < count; ++d) narrow(sums[d], to + d);
}

// The weights of an output tile: [lane][row], or [row][lane] with LANES_INNER.
template <bool LANES_INNER>
struct Weights {
  const float* data;
  int64_t stride;

  const float* at(int64_t row, int64_t lane) const {
    return data + (LANES_INNER ? row * stride + lane : lane * stride + row);
  }
};

// sums[row][d] = sum over lanes of weights(row, lane) * values[lane][d]
template <class Lanes, bool LANES_INNER, int ROWS, int VECTORS>
inline __attribute__((always_inline)) void tile_sums(Weights<LANES_INNER> weights, const Packed& values, int64_t lanes,
                                                     Float<kWidth> (&sums)[ROWS][VECTORS]) {
  unrolled<ROWS, VECTORS>([&](int r, int v) { sums[r][v] = Float<kWidth>{}; });
  for (int64_t lane = 0; lane < lanes; ++lane) {
    Float<kWidth> value[VECTORS];
    for (int v = 0; v < VECTORS; ++v) value[v] = load<kWidth>(values.data + lane * values.stride + v * kWidth);
    unrolled<ROWS, 1>([&](int r, int) {  // one weight at a time: all of them would not fit in registers beside the sums
      const Float<kWidth> weight = broadcast<kWidth>(weights.at(r, lane));
      unrolled<1, VECTORS>(
          [&](int, int v) { sums[r][v] = Lanes::template multiply_add<kWidth>(sums[r][v], weight, value[v]); });
    });
  }
}

// out[row][d] = rescale[row] * out[row][d] + sums[row][d]; without rescale, out = sums
template <class Lanes, bool LANES_INNER, int ROWS, int VECTORS>
void output_tile(Weights<LANES_INNER> weights, const Packed& values, int64_t lanes, const float* rescale, float* out,
                 int64_t out_stride) {
  Float<kWidth> sums[ROWS][VECTORS];
  tile_sums<Lanes>(weights, values, lanes, sums);
  const auto to = [&](int r, int v) { return out + r * out_stride + v * kWidth; };
  if (rescale) {
    unrolled<ROWS, VECTORS>(
        [&](int r, int v) { store<kWidth>(to(r, v), load<kWidth>(to(r, v)) * rescale[r] + sums[r][v]); });
  } else {
    unrolled<ROWS, VECTORS>([&](int r, int v) { store<kWidth>(to(r, v), sums[r][v]); });
  }
}

template <bool LANES_INNER>
using OutputTile = void (*)(Weights<LANES_INNER>, const Packed&, int64_t, const float*, float*, int64_t);

template <class Lanes, bool LANES_INNER, int VECTORS>
constexpr OutputTile<LANES_INNER> kOutputTiles[kTileRows] = {
    output_tile<Lanes, LANES_INNER, 1, VECTORS>, output_tile<Lanes, LANES_INNER, 2, VECTORS>,
    output_tile<Lanes, LANES_INNER, 3, VECTORS>, output_tile<Lanes, LANES_INNER, 4, VECTORS>,
    output_tile<Lanes, LANES_INNER, 5, VECTORS>, output_tile<Lanes, LANES_INNER, 6, VECTORS>,
};

template <class Lanes, bool LANES_INNER>
OutputTile<LANES_INNER> choose_output_tile(int64_t rows, int64_t vectors) {
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return kOutputTiles<Lanes, LANES_INNER, 4>[rows - 1];
    if (vectors == 3) return kOutputTiles<Lanes, LANES_INNER, 3>[rows - 1];
  }
  return vectors == 2 ? kOutputTiles<Lanes, LANES_INNER, 2>[rows - 1] : kOutputTiles<Lanes, LANES_INNER, 1>[rows - 1];
}

// output_tile for any number of rows and columns, in tiles of nearly equal size; the rows of out are `stride` floats
// apart.
template <class Lanes, bool LANES_INNER>
void accumulate(Weights<LANES_INNER> weights, Packed values, int64_t lanes, const float* rescale, float* out,
                int64_t rows, int64_t columns, int64_t stride) {
  const int64_t vectors = columns / kWidth;
  const int64_t column_parts = (vectors + kTileVectors - 1) / kTileVectors;
  const int64_t row_parts = (rows + kTileRows - 1) / kTileRows;
  for (int64_t c = 0; c < column_parts; ++c) {
    const int64_t v = c * vectors / column_parts, v_end = (c + 1) * vectors / column_parts;
    const Packed part{values.data + v * kWidth, values.stride};
    for (int64_t p = 0; p < row_parts; ++p) {
      const int64_t r = p * rows / row_parts, r_end = (p + 1) * rows / row_parts;
      const auto tile = choose_output_tile<Lanes, LANES_INNER>(r_end - r, v_end - v);
      tile({weights.at(r, 0), weights.stride}, part, lanes, rescale ? rescale + r : nullptr,
           out + r * stride + v * kWidth, stride);
    }
  }
}

template <class Lanes, bool LANES_INNER>
void accumulate(Weights<LANES_INNER> weights, Packed values, int64_t lanes, const float* rescale, float* out,
                int64_t rows, int64_t columns) {
  accumulate<Lanes>(weights, values, lanes, rescale, out, rows, columns, columns);
}

}  // namespace
