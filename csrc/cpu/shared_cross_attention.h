// Interface between the operator and its kernels: no torch header here or in the kernels, which are compiled once per
// instruction set.

#pragma once

#include <cstdint>

#include "storage.h"

// One call. Strides are in elements; a query row is a (stream, token) pair, and a stream belongs to one input.
struct Attention {
  const void* query;  // (streams, heads, tokens, head_dim)
  const void* key;    // (inputs, heads, keys, head_dim)
  const void* value;
  void* out;   // (streams, heads, tokens, head_dim), head_dim dense
  float* lse;  // (streams, heads, tokens)
  int64_t query_stride[4], key_stride[4], value_stride[4], out_stride[4], lse_stride[3];
  int64_t tokens;
  int64_t head_dim;
  float scale;
  Storage storage;
};

// Attention of some rows over some keys of one head and input. Row r is token r % tokens of stream first_stream + r /
// tokens.
struct Task {
  int64_t input, head, first_stream;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  float* partial;  // if keys are split: (rows, head_dim + 2), sums, largest score, sum of weights; else null
};

// The results of one row's key splits, `stride` floats apart.
struct Partials {
  const float* first;
  int64_t splits, stride;
};

// A task has at most this many rows, whose sums stay in L2.
constexpr int64_t kMaxTaskRows = 256;
constexpr int64_t kMaxHeadDim = 256;

struct Kernels {
  int64_t (*scratch_floats)(const Attention&);
  // `following`, or null: the task that is likely to be next, whose first keys are prefetched. scratch: 64-byte
  // aligned.
  void (*attend)(const Attention&, const Task&, const Task* following, float* scratch);
  void (*merge)(const Attention&, const Partials&, int64_t stream, int64_t head, int64_t token);
};

// One backward call. A gradient that is not needed is null.
struct AttentionGradients {
  Attention attention;    // its out and lse are read
  const void* grad_out;   // (streams, heads, tokens, head_dim)
  const float* grad_lse;  // (streams, heads, tokens), or null
  void* grad_query;       // head_dim dense, also in the two below
  void* grad_key;
  void* grad_value;
  int64_t keys;  // per input, including those past its length
  int64_t grad_out_stride[4], grad_lse_stride[3], grad_query_stride[4], grad_key_stride[4], grad_value_stride[4];
};

struct BackwardKernels {
  int64_t (*scratch_floats)(const AttentionGradients&, int64_t rows, int64_t keys);
  // A task is a head of one input: all its rows, all its keys.
  void (*attend)(const AttentionGradients&, const Task&, const Task* following, float* scratch);
};

extern const Kernels kKernelsDefault;
extern const Kernels kKernelsAVX2;
extern const Kernels kKernelsAVX512;
extern const Kernels kKernelsAVX512BF16;

extern const BackwardKernels kBackwardKernelsDefault;
extern const BackwardKernels kBackwardKernelsAVX2;
extern const BackwardKernels kBackwardKernelsAVX512;
extern const BackwardKernels kBackwardKernelsAVX512BF16;
