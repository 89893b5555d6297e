// The kernels of add_layer_norm_inject on CUDA: plain CUDA, no torch.
//
// A group of warps owns a token: it reads the row of d columns once, keeps it in registers for the statistics, and
// writes it. Up to 1024 columns it is one warp, with four rows per block; above that, a power of two of warps.

#pragma once

#include "injection.cuh"

namespace peft_kernels {

constexpr int kElements = 32;  // of a row, per thread
constexpr int kBlockWarps = 4;
constexpr int kMaxWarps = 16;  // which leaves 128 registers per thread
constexpr int kMaxWidth = kMaxWarps * kLanes * kElements;

struct NormParams {
  void* out;  // (B, length, width)
  void* sum;  // null if it is not needed; so are mean and rstd
  float* mean;
  float* rstd;  // (B, length)
  const void* x;
  const void* residual;
  int64_t x_batch_stride, x_token_stride, residual_batch_stride, residual_token_stride;
  const float* weight;
  const float* bias;  // or null
  Injection injection;
  int tokens, length, width;
  int log_warps;  // log2 of the warps per row
  float eps;
  bool rms, pre;
};

struct NormBackwardParams {
  void* grad_x;       // (B, length, width), or null
  float* grad_slots;  // (B, slots_per_row, width): the gradient of special tokens before rounding; or null
  const void* grad;
  const void* grad_sum;  // or null
  int64_t grad_batch_stride, grad_token_stride, sum_batch_stride, sum_token_stride;
  const void* sum;    // contiguous
  const float* mean;  // null: RMS norm
  const float* rstd;
  const float* weight;
  Slots slots;
  int tokens, length, width;
  int log_warps;  // log2 of the warps per row
  bool listed;    // tokens are (B, slots_per_row): only those in slots are read
};

// A thread's share of a row: `count` vectors of V elements. The number of threads per row is a power of two, which
// avoids divisions.
template <int V>
struct Share {
  int token, thread, bits;

  __device__ explicit Share(int log_warps) : bits(5 + log_warps) {
    static_assert(kLanes == 1 << 5);
    token = blockIdx.x * (blockDim.x >> bits) + (threadIdx.x >> bits);
    thread = threadIdx.x & ((1 << bits) - 1);
  }
  __device__ int column(int i) const { return ((i << bits) + thread) * V; }
  __device__ int count(int width) const {
    return (max(0, width / V - thread) + (1 << bits) - 1) >> bits;
  }  // V divides width
};

// Sums over the threads of a row, bit-equal in all of them. All threads of the block call it; `shared` serves one call.
template <int C>
__device__ void sum_over_row(float (&x)[C], int warps, float (&shared)[kMaxWarps][C]) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int offset = kLanes / 2; offset; offset /= 2) x[c] += __shfl_xor_sync(kWarpMask, x[c], offset);
  }
  if (warps == 1) return;
  const int warp = threadIdx.x / kLanes;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    if (threadIdx.x % kLanes == 0) shared[warp][c] = x[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < C; ++c) {
    x[c] = 0;
    for (int i = 0; i < warps; ++i) x[c] += shared[(warp & ~(warps - 1)) + i][c];
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    add_layer_norm_inject_fwd_kernel(const __grid_constant__ NormParams n) {
  constexpr int N = kElements / V;
  using Row = Packed<T, V>;
  __shared__ float shared_sum[kMaxWarps][1], shared_squares[kMaxWarps][1];
  const Share<V> share(n.log_warps);
  const int token = share.token, row = token / n.length, position = token % n.length;
  const int count = token < n.tokens ? share.count(n.width) : 0;
  const auto column = [&](int i) { return share.column(i); };

  typename Row::Type x[N], residual[N];
  const T* x_row = static_cast<const T*>(n.x) + row * n.x_batch_stride + position * n.x_token_stride;
  const T* residual_row =
      static_cast<const T*>(n.residual) + row * n.residual_batch_stride + position * n.residual_token_stride;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    x[i] = load_once<T, V>(x_row + column(i));
    residual[i] = load_once<T, V>(residual_row + column(i));
  }
  int slot = -1, adapter = -1;
  if (n.injection.vectors && token < n.tokens) {
    adapter = n.injection.adapter_ids.get(row);
    if (adapter >= 0) slot = n.injection.slots.find(row, position);
  }

  float y[N][V] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    float addend[V];
    Row::unpack(x[i], y[i]);
    Row::unpack(residual[i], addend);
#pragma unroll
    for (int v = 0; v < V; ++v) y[i][v] += addend[v];
  }
  if (n.pre && slot >= 0) n.injection.add(y, row, slot, adapter, column);
  float sum[1] = {}, squares[1] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    Row::unpack(Row::pack(y[i]), y[i]);  // rounded as in two operations
    if (n.sum) store<T, V>(static_cast<T*>(n.sum) + int64_t(token) * n.width + column(i), y[i]);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[0] += y[i][v];
  }
  if (!n.rms) sum_over_row(sum, 1 << n.log_warps, shared_sum);
  const float mean = n.rms ? 0 : sum[0] / n.width;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      y[i][v] -= mean;
      squares[0] = fmaf(y[i][v], y[i][v], squares[0]);
    }
  }
  sum_over_row(squares, 1 << n.log_warps, shared_squares);
  const float rstd = rsqrtf(squares[0] / n.width + n.eps);
  if (token < n.tokens && share.thread == 0) {
    if (n.mean) n.mean[token] = mean;
    if (n.rstd) n.rstd[token] = rstd;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    float weight[V], bias[V] = {};
    load_floats<V>(weight, n.weight + column(i));
    if (n.bias) load_floats<V>(bias, n.bias + column(i));
#pragma unroll
    for (int v = 0; v < V; ++v) y[i][v] = fmaf(y[i][v] * rstd, weight[v], bias[v]);
  }
  if (!n.pre && slot >= 0) n.injection.add(y, row, slot, adapter, column);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) store<T, V>(static_cast<T*>(n.out) + int64_t(token) * n.width + column(i), y[i]);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    add_layer_norm_inject_bwd_kernel(const __grid_constant__ NormBackwardParams n) {
  constexpr int N = kElements / V;
  using Row = Packed<T, V>;
  __shared__ float shared[kMaxWarps][2];
  const Share<V> share(n.log_warps);
  int row = 0, position = -1, slot = -1;
  if (share.token < n.tokens && n.listed) {
    row = share.token / n.slots.slots_per_row;
    slot = share.token % n.slots.slots_per_row;
    position = n.slots.get(row, slot);
  } else if (share.token < n.tokens) {
    row = share.token / n.length;
    position = share.token % n.length;
  }
  const int count = position < 0 ? 0 : share.count(n.width);
  const int64_t token = position < 0 ? 0 : int64_t(row) * n.length + position;
  const auto column = [&](int i) { return share.column(i); };

  typename Row::Type x[N], grad[N], grad_sum[N];
  const T* grad_row = static_cast<const T*>(n.grad) + row * n.grad_batch_stride + position * n.grad_token_stride;
  const T* sum_row = static_cast<const T*>(n.grad_sum) + row * n.sum_batch_stride + position * n.sum_token_stride;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    x[i] = load_once<T, V>(static_cast<const T*>(n.sum) + token * n.width + column(i));
    grad[i] = load_once<T, V>(grad_row + column(i));
    if (n.grad_sum) grad_sum[i] = load_once<T, V>(sum_row + column(i));
  }
  if (n.grad_slots && !n.listed && position >= 0) slot = n.slots.find(row, position);
  const float mean = n.mean && count ? __ldg(n.mean + token) : 0, rstd = count ? __ldg(n.rstd + token) : 0;
  // The normalised row and its gradient.
  const auto unpack = [&](int i, float (&normal)[V], float (&scaled)[V]) {
    float weight[V];
    load_floats<V>(weight, n.weight + column(i));
    Row::unpack(x[i], normal);
    Row::unpack(grad[i], scaled);
#pragma unroll
    for (int v = 0; v < V; ++v) normal[v] = (normal[v] - mean) * rstd, scaled[v] *= weight[v];
  };
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    float normal[V], scaled[V];
    unpack(i, normal, scaled);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[0] = fmaf(scaled[v], normal[v], sums[0]), sums[1] += scaled[v];
  }
  sum_over_row(sums, 1 << n.log_warps, shared);
  const float along = sums[0] / n.width, level = n.mean ? sums[1] / n.width : 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) continue;
    float normal[V], dx[V], addend[V] = {};
    unpack(i, normal, dx);
    if (n.grad_sum) Row::unpack(grad_sum[i], addend);
#pragma unroll
    for (int v = 0; v < V; ++v) dx[v] = fmaf(dx[v] - fmaf(normal[v], along, level), rstd, addend[v]);
    if (n.grad_x) store<T, V>(static_cast<T*>(n.grad_x) + token * n.width + column(i), dx);
    if (slot >= 0)
      store_floats<V>(n.grad_slots + (int64_t(row) * n.slots.slots_per_row + slot) * n.width + column(i), dx);
  }
}

}  // namespace peft_kernels
