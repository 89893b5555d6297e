// The kernels of special_tokens on CUDA: plain CUDA, no torch.
//
// Slots: a warp reads a row of ids and keeps a running count of special tokens. Add: a block owns columns of one slot
// of one row, and returns at once if the slot is unused. Backward: a warp owns columns of one vector for a part of the
// batch and adds its rows in order.

#pragma once

#include "injection.cuh"

namespace peft_kernels {

constexpr int kSlotWarps = 4;
constexpr int kAddThreads = 128;
constexpr int kSumWarps = 4;
constexpr int kIdsInFlight = 8;
constexpr int kAddendsInFlight = 4;

// int32 or int64, read at full width.
struct Ids {
  const void* data;
  int64_t row_stride, stride;
  bool wide;

  __device__ int64_t get(int64_t row, int64_t i) const {
    const int64_t at = row * row_stride + i * stride;
    return wide ? __ldg(static_cast<const long long*>(data) + at) : __ldg(static_cast<const int*>(data) + at);
  }
};

// An attention mask of any dtype. An element is 0 if no bit of `bits` is set; floats leave out the sign bit, so -0.0
// counts as padding.
struct Mask {
  const void* data;  // null: no padding
  int64_t row_stride, stride;
  int bytes;
  uint64_t bits;

  __device__ bool get(int64_t row, int64_t i) const {
    const int64_t at = row * row_stride + i * stride;
    uint64_t x;
    switch (bytes) {
      case 1:
        x = __ldg(static_cast<const unsigned char*>(data) + at);
        break;
      case 2:
        x = __ldg(static_cast<const unsigned short*>(data) + at);
        break;
      case 4:
        x = __ldg(static_cast<const unsigned*>(data) + at);
        break;
      default:
        x = __ldg(static_cast<const unsigned long long*>(data) + at);
    }
    return (x & bits) != 0;
  }
};

struct SlotsParams {
  int* slots;   // (batch, max_slots)
  int* counts;  // (batch,)
  Ids ids, special;
  Mask mask;
  int batch, length, specials, max_slots;
};

struct AddParams {
  void* hidden;
  int64_t batch_stride, token_stride, stride;
  Injection injection;
  int column_tiles;
};

struct AddBackwardParams {
  float* partial;    // (parts, adapters, vectors_per_adapter, width)
  const void* grad;  // (batch, S, width), or (batch, slots_per_row, width) by slot
  int64_t batch_stride, token_stride;
  Slots slots;
  Integers adapter_ids;
  Dropout dropout;
  int batch, rows, adapters, vectors_per_adapter, width;  // rows: per part
  int parts, column_tiles;
  bool by_slot;
};

__global__ void __launch_bounds__(kSlotWarps* kLanes)
    special_token_slots_kernel(const __grid_constant__ SlotsParams s) {
  const int lane = threadIdx.x % kLanes;
  const int row = blockIdx.x * kSlotWarps + threadIdx.x / kLanes;
  if (row >= s.batch) return;
  int* slots = s.slots + int64_t(row) * s.max_slots;
  int count = 0;
  for (int start = 0; start < s.length; start += kLanes * kIdsInFlight) {
    int64_t ids[kIdsInFlight];
    bool special[kIdsInFlight] = {};
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      const int position = start + i * kLanes + lane;
      ids[i] = position < s.length ? s.ids.get(row, position) : 0;
    }
    for (int i = 0; i < s.specials; ++i) {
      const int64_t id = s.special.get(0, i);
#pragma unroll
      for (int j = 0; j < kIdsInFlight; ++j) special[j] |= ids[j] == id;
    }
#pragma unroll
    for (int i = 0; i < kIdsInFlight; ++i) {
      const int position = start + i * kLanes + lane;
      const bool counts = special[i] && position < s.length && (!s.mask.data || s.mask.get(row, position));
      const unsigned ballot = __ballot_sync(kWarpMask, counts);
      const int slot = count + __popc(ballot & ((1u << lane) - 1));
      if (counts && slot < s.max_slots) slots[slot] = position;
      count += __popc(ballot);
    }
  }
  for (int slot = count + lane; slot < s.max_slots; slot += kLanes) slots[slot] = -1;
  if (lane == 0) s.counts[row] = count;
}

template <class T, int V>
__global__ void __launch_bounds__(kAddThreads) special_token_add_kernel(const __grid_constant__ AddParams a) {
  const Injection& injection = a.injection;
  const int item = blockIdx.x / a.column_tiles;
  const int row = item / injection.slots.slots_per_row, slot = item % injection.slots.slots_per_row;
  const int position = injection.slots.get(row, slot), adapter = injection.adapter_ids.get(row);
  const int column = (blockIdx.x % a.column_tiles * kAddThreads + threadIdx.x) * V;
  if (position < 0 || adapter < 0 || column >= injection.width) return;
  T* at = static_cast<T*>(a.hidden) + row * a.batch_stride + position * a.token_stride + column * a.stride;
  float x[1][V];
  Packed<T, V>::unpack(*reinterpret_cast<const typename Packed<T, V>::Type*>(at), x[0]);
  injection.add(x, row, slot, adapter, [&](int) { return column; });
  store<T, V>(at, x[0]);
}

template <class T, int V>
__global__ void __launch_bounds__(kSumWarps* kLanes)
    special_token_add_bwd_kernel(const __grid_constant__ AddBackwardParams g) {
  using Addend = typename Packed<T, V>::Type;
  const int lane = threadIdx.x % kLanes;
  const int item = blockIdx.x / g.column_tiles * kSumWarps +
                   threadIdx.x / kLanes;  // index into (parts, adapters, vectors_per_adapter)
  if (item >= g.parts * g.adapters * g.vectors_per_adapter) return;
  const int column = (blockIdx.x % g.column_tiles * kLanes + lane) * V;
  const bool inside = column < g.width;
  const int vector = item % g.vectors_per_adapter, adapter = item / g.vectors_per_adapter % g.adapters;
  const int begin = item / g.vectors_per_adapter / g.adapters * g.rows;
  // The last vector also serves all later slots.
  const int slots = vector >= g.slots.slots_per_row       ? 0
                    : vector == g.vectors_per_adapter - 1 ? g.slots.slots_per_row - vector
                                                          : 1;
  const int64_t addends = int64_t(min(begin + g.rows, g.batch) - begin) * slots;
  const T* grad = static_cast<const T*>(g.grad) + column;

  float sum[V] = {};
  for (int64_t start = 0; start < addends; start += kLanes) {
    int row = 0, slot = 0;
    int64_t source = -1;  // of this lane: offset of the addend of one row and slot
    if (start + lane < addends) {
      row = begin + static_cast<int>((start + lane) / slots);
      slot = vector + static_cast<int>((start + lane) % slots);
      const int position = g.slots.get(row, slot);
      if (position >= 0 && g.adapter_ids.get(row) == adapter)
        source = row * g.batch_stride + (g.by_slot ? slot : position) * g.token_stride;
    }
    for (unsigned left = __ballot_sync(kWarpMask, source >= 0); left;) {
      Addend addends_of[kAddendsInFlight];
      unsigned kept[kAddendsInFlight];
#pragma unroll
      for (int i = 0; i < kAddendsInFlight; ++i) {
        addends_of[i] = Addend{};
        kept[i] = ~0u;
        if (left) {
          const int from = __ffs(static_cast<int>(left)) - 1;
          left &= left - 1;
          const int64_t at = __shfl_sync(kWarpMask, source, from);
          if (inside) addends_of[i] = load<T, V>(grad + at);
          if (g.dropout.seed) {
            const int of_slot = __shfl_sync(kWarpMask, slot, from), of_row = __shfl_sync(kWarpMask, row, from);
            kept[i] = 0;
#pragma unroll 1
            for (int v = 0; v < V; ++v) kept[i] |= unsigned{g.dropout.keeps(column + v, of_slot, of_row)} << v;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kAddendsInFlight; ++i) {
        float x[V];
        Packed<T, V>::unpack(addends_of[i], x);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += kept[i] >> v & 1 ? x[v] : 0;
      }
    }
  }
  if (!inside) return;
  float* to = g.partial + int64_t(item) * g.width + column;
  const float scale = g.dropout.seed ? g.dropout.scale : 1;
#pragma unroll
  for (float& x : sum) x *= scale;
  store_floats<V>(to, sum);
}

}  // namespace peft_kernels
