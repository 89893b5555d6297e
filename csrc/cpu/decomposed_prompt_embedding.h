// Interface between the operator and its kernels: no torch header here or in the kernels, which are compiled once per
// instruction set.

#pragma once

#include <cstdint>

#include "storage.h"

// One forward call. Everything is contiguous except the table, whose rows may be apart.
struct Embedding {
  const int64_t* ids;  // (batch, length)
  const void* weight;  // rows weight_stride elements apart
  int64_t weight_stride;
  const float* prompt;     // (adapters, virtual_tokens, width)
  const float* a;          // (adapters, positions, rank), or null
  const float* b;          // (adapters, rank, columns), width padded with 0 to a multiple of kColumnMultiple
  const float* delta;      // (adapters, positions, width), or null
  const int64_t* offsets;  // (batch)
  void* out;               // (batch, virtual_tokens + length, width)
  int64_t length, virtual_tokens, width, columns, positions, rank;
  int64_t first;  // tokens before the prompt
  float scale, embed_scale;
  Storage storage;
};

constexpr int64_t kColumnMultiple = 16;
constexpr int64_t kMaxRank = 512;

// Positions [begin, end) of one adapter in all its rows; or, with adapter -1, tokens [begin, end) of the rows, without
// an update.
struct EmbeddingTask {
  int64_t adapter;
  const int64_t* rows;
  int64_t row_count, begin, end;
};

// One backward call: sums of gradient rows over the batch.
struct GradientRows {
  const void* grad;  // rows of width elements, strides in elements
  int64_t batch_stride, column_stride;
  const int64_t* offsets;  // (batch)
  int64_t length, virtual_tokens, width, first;
  float *grad_prompt, *grad_delta;  // (adapters, virtual_tokens, width) and (adapters, positions, width), or null
  int64_t positions;
  Storage storage;
};

// The sums for [begin, end) of the prompt or of the positions of one adapter, over all its rows.
struct GradientTask {
  bool prompt;
  int64_t adapter;
  const int64_t* rows;
  int64_t row_count, begin, end;
};

// The low-rank part of a backward call: gradients of a and b without the gradient of the update in memory.
struct LowRank {
  const float* a;  // (adapters, positions, rank), or null if b gets no gradient
  const float* b;  // (adapters, width, lanes), transposed, rank padded with 0 to a multiple of kColumnMultiple; or null
                   // if a gets no gradient
  float* grad_a;   // (adapters, positions, rank)
  int64_t rank, lanes;
  int64_t columns;  // width, padded likewise
  float scale;
};

// Positions [begin, end) of one adapter over all its rows: their contribution to b's gradient goes to `partial`, (rank,
// columns), unscaled.
struct LowRankTask {
  int64_t adapter;
  const int64_t* rows;
  int64_t row_count, begin, end;
  float* partial;
};

struct EmbeddingKernels {
  int64_t scratch_floats, low_rank_scratch_floats;
  void (*tokens)(const Embedding&, const EmbeddingTask&, float* scratch);
  void (*prompt)(const Embedding&, int64_t row, int64_t adapter);
  void (*sum)(const GradientRows&, const GradientTask&);
  void (*low_rank)(const GradientRows&, const LowRank&, const LowRankTask&, float* scratch);
  // to[r][d] = scale * sum over parts of partials[part][r][d]
  void (*reduce)(const float* partials, int64_t parts, const LowRank&, int64_t width, float* to);
};

constexpr int64_t kTaskPositions = 12;
constexpr int64_t kLowRankPositions = 24;  // positions summed at a time

extern const EmbeddingKernels kEmbeddingKernelsDefault;
extern const EmbeddingKernels kEmbeddingKernelsAVX2;
extern const EmbeddingKernels kEmbeddingKernelsAVX512;
extern const EmbeddingKernels kEmbeddingKernelsAVX512BF16;
