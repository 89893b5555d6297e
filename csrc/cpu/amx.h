// bfloat16 matmuls with AMX, whose registers are tiles of 16 rows by 16 lanes; a lane holds two adjacent elements
// (simd.h).

#pragma once

#include "tiles.h"

namespace {

constexpr int64_t kAmxTile = 16;  // rows of a tile, and its lanes

#ifdef __AVX512BF16__

struct AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3 are sums, 4 and 5 rows of weights, 6 and 7 columns of values.
template <bool TWO_ROWS, bool TWO_COLUMNS>
__attribute__((target("amx-tile,amx-bf16"))) void amx_tile(Packed weights, Packed values, int64_t lanes, bool add,
                                                           float* out, int64_t out_stride) {
  const int64_t weight_bytes = weights.stride * 4, value_bytes = values.stride * 4, out_bytes = out_stride * 4;
  float *right = out + kAmxTile, *below = out + kAmxTile * out_stride, *corner = below + kAmxTile;
  if (add) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (TWO_COLUMNS) _tile_loadd(1, right, out_bytes);
    if constexpr (TWO_ROWS) _tile_loadd(2, below, out_bytes);
    if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_loadd(3, corner, out_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t lane = 0; lane < lanes; lane += kAmxTile) {
    const float *row = weights.data + lane, *column = values.data + lane * values.stride;
    _tile_loadd(6, column, value_bytes);
    if constexpr (TWO_COLUMNS) _tile_loadd(7, column + kAmxTile, value_bytes);
    _tile_loadd(4, row, weight_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TWO_COLUMNS) _tile_dpbf16ps(1, 4, 7);
    if constexpr (TWO_ROWS) {
      _tile_loadd(5, row + kAmxTile * weights.stride, weight_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (TWO_COLUMNS) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (TWO_COLUMNS) _tile_stored(1, right, out_bytes);
  if constexpr (TWO_ROWS) _tile_stored(2, below, out_bytes);
  if constexpr (TWO_ROWS && TWO_COLUMNS) _tile_stored(3, corner, out_bytes);
}

// out[row][d] = sum over lanes of weights[row][lane] * values[lane][d]; with `add`, the sum is added to out. Whole
// tiles are read and written: lanes, rows and columns are multiples of 16.
__attribute__((target("amx-tile,amx-bf16"), noinline)) void amx_products(Packed weights, Packed values, int64_t lanes,
                                                                         bool add, float* out, int64_t rows,
                                                                         int64_t columns, int64_t out_stride) {
  const AmxConfig config;
  _tile_loadconfig(&config);
  asm volatile("" ::: "memory");  // gcc does not know that a tile load reads memory
  for (int64_t c = 0; c < columns; c += 2 * kAmxTile) {
    const bool two_columns = columns - c > kAmxTile;
    const Packed part{values.data + c, values.stride};
    for (int64_t r = 0; r < rows; r += 2 * kAmxTile) {
      const bool two_rows = rows - r > kAmxTile;
      const auto wide = two_rows ? amx_tile<true, true> : amx_tile<false, true>,
                 narrow = two_rows ? amx_tile<true, false> : amx_tile<false, false>;
      const auto tile = two_columns ? wide : narrow;
      tile({weights.data + r * weights.stride, weights.stride}, part, lanes, add, out + r * out_stride + c, out_stride);
    }
  }
  _tile_release();
}
#endif

}  // namespace
