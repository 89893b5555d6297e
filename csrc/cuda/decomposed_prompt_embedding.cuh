// The kernels of decomposed_prompt_embedding on CUDA: plain CUDA, no torch.
//
// Forward: a block owns a tile of positions and columns for a few rows of the batch. It keeps the tile of scale * a @ b
// (or of delta, or of the prompt) in registers while the rows' adapter stays the same, so the tile costs no memory
// traffic: a (K, s, d) buffer would move as many bytes as the output. Backward: a warp owns one row of a gradient and
// adds the rows of the batch in order.

#pragma once

#include "packed.cuh"

namespace peft_kernels {

constexpr int kWarps = 4;
constexpr int kRanks = 32;  // ranks of a that are staged in shared memory at a time
constexpr int kLoadsInFlight = 4;

struct EmbeddingParams {
  void* out;            // (batch, virtual_tokens + length, width)
  const void* weight;   // rows weight_stride apart
  const float* prompt;  // (K, virtual_tokens, width)
  const float* a;       // (K, positions, rank), with b; or delta
  const float* b;       // (K, rank, width)
  const float* delta;   // (K, positions, width)
  Integers ids, offsets;
  AdapterIds adapter_ids;
  int64_t ids_row_stride;  // in 32-bit words
  int64_t weight_stride;
  int batch, length, virtual_tokens, positions, width, rank;
  int last_id;  // V - 1
  int first;    // tokens before the prompt
  int column_tiles, prompt_tiles, tiles, rows_per_block;
  float scale, embed_scale;
};

struct EmbeddingBackwardParams {
  const void* grad;  // (batch, virtual_tokens + length, width)
  float* prompt;     // (K, prompt_rows, width)
  float* delta;      // (K, delta_rows, width)
  Integers offsets;
  AdapterIds adapter_ids;
  int64_t batch_stride, column_stride;
  int batch, length, virtual_tokens, width;
  int first;
  int prompt_rows, delta_rows;  // 0 if the gradient is not needed
  int total_rows;               // K * (prompt_rows + delta_rows)
  int column_tiles;
};

// update = scale * a[positions] @ b[:, columns]. Every thread of the block calls it; threads without a column compute
// nothing.
template <int V, int P>
__device__ void multiply(const EmbeddingParams& e, int adapter, int tile_position, int column, float (&update)[P][V]) {
  constexpr int kTile = kWarps * P;
  // a is transposed, so that a thread reads its positions at once; the padding of 4 reduces bank conflicts
  __shared__ alignas(16) float a_tile[kRanks][kTile + 4];
  const float* a = e.a + int64_t(adapter) * e.positions * e.rank;
  const float* b = e.b + int64_t(adapter) * e.rank * e.width + column;
  const int warp = threadIdx.x / kLanes;
#pragma unroll
  for (int p = 0; p < P; ++p) {
#pragma unroll
    for (int v = 0; v < V; ++v) update[p][v] = 0;
  }
  for (int start = 0; start < e.rank; start += kRanks) {
    const int ranks = min(kRanks, e.rank - start);
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kRanks; i += kWarps * kLanes) {
      const int position = tile_position + i / kRanks, r = i % kRanks;
      a_tile[r][i / kRanks] =
          r < ranks && position < e.length ? e.scale * __ldg(a + int64_t(position) * e.rank + start + r) : 0;
    }
    __syncthreads();
    if (column >= e.width) continue;
#pragma unroll P / 4
    for (int r = 0; r < ranks; ++r) {
      float b_row[V], a_row[P];
      load_floats<V>(b_row, b + int64_t(start + r) * e.width);
#pragma unroll
      for (int p = 0; p < P; p += 4) {
        const float4 x = *reinterpret_cast<const float4*>(&a_tile[r][warp * P + p]);
        a_row[p] = x.x, a_row[p + 1] = x.y, a_row[p + 2] = x.z, a_row[p + 3] = x.w;
      }
#pragma unroll
      for (int p = 0; p < P; ++p) {
#pragma unroll
        for (int v = 0; v < V; ++v) update[p][v] = fmaf(a_row[p], b_row[v], update[p][v]);
      }
    }
  }
}

// update = `rows` rows of delta or of the prompt.
template <int V, int P>
__device__ void load_update(const float* from, int width, int rows, float (&update)[P][V]) {
#pragma unroll
  for (int p = 0; p < P; ++p) {
    if (p < rows) load_floats<V>(update[p], from + int64_t(p) * width);
  }
}

// The number of a row's tokens before the first updated one; all of them if the value is out of range.
__device__ inline int offset_of(const Integers& offsets, int row, int length) {
  return static_cast<int>(min(static_cast<unsigned>(offsets.get(row)), static_cast<unsigned>(length)));
}

// Position p maps to token p + offset; positions past the end map to the tokens before the offset, which get no update.
__device__ inline int token_at(int position, int offset, int length) {
  const int token = position + offset;
  return token < length ? token : token - length;
}

// A thread has P positions: a larger P means fewer loads per matmul, and fewer threads.
template <class T, int V, int P>
__global__ void __launch_bounds__(kWarps* kLanes, P > 4 ? 3 : 5)
    decomposed_prompt_embedding_fwd_kernel(const __grid_constant__ EmbeddingParams e) {
  constexpr int kTile = kWarps * P;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int tile = blockIdx.x / e.column_tiles % e.tiles;
  const int column = (blockIdx.x % e.column_tiles * kLanes + lane) * V;
  const bool is_prompt = tile < e.prompt_tiles, inside = column < e.width;
  const int tile_position = (is_prompt ? tile : tile - e.prompt_tiles) * kTile;
  const int position = tile_position + warp * P;
  const int warp_rows = min(P, (is_prompt ? e.virtual_tokens : e.length) - position);
  const int thread_rows = inside ? warp_rows : 0;
  const int begin = blockIdx.x / e.column_tiles / e.tiles * e.rows_per_block;
  const int end = min(begin + e.rows_per_block, e.batch);

  // Each lane loads the id of one position of the warp, so the warp needs one load instead of P.
  const auto id_of = [&](int row) {
    if (is_prompt || lane >= warp_rows) return 0;
    const int token = token_at(position + lane, offset_of(e.offsets, row, e.length), e.length);
    const auto id = static_cast<unsigned>(__ldg(e.ids.data + row * e.ids_row_stride + token * e.ids.stride));
    return static_cast<int>(min(id, static_cast<unsigned>(e.last_id)));  // an id out of range is read as the last one
  };
  int id = id_of(begin);
  float update[P][V];
  int current = -1;  // the adapter of `update`
  for (int row = begin; row < end; ++row) {
    const int adapter = e.adapter_ids.get(row);
    T* out = static_cast<T*>(e.out) + int64_t(row) * (e.virtual_tokens + e.length) * e.width + column;
    if (is_prompt) {
      if (adapter != current && adapter >= 0) {
        load_update<V, P>(e.prompt + (int64_t(adapter) * e.virtual_tokens + position) * e.width + column, e.width,
                          thread_rows, update);
        current = adapter;
      }
      out += int64_t(e.first + position) * e.width;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (p >= thread_rows) continue;
        float result[V];
#pragma unroll
        for (int v = 0; v < V; ++v) result[v] = adapter < 0 ? 0 : update[p][v];
        store<T, V>(out + int64_t(p) * e.width, result);
      }
      continue;
    }

    const int offset = offset_of(e.offsets, row, e.length);
    const auto token_of = [&](int p) { return token_at(position + p, offset, e.length); };
    const int64_t source = id * e.weight_stride;
    if (row + 1 < end) id = id_of(row + 1);  // loaded while this row is written
    const auto embedding_of = [&](int p) {
      return static_cast<const T*>(e.weight) + __shfl_sync(kWarpMask, source, p) + column;
    };
    if (adapter != current && adapter >= 0) {  // uniform over the block
      current = adapter;
      if (e.delta) {
        load_update<V, P>(e.delta + (int64_t(adapter) * e.positions + position) * e.width + column, e.width,
                          thread_rows, update);
      } else {
#pragma unroll
        for (int p = 0; p < P; ++p) {  // to L2: the registers are full until the matmul is done
          const T* embedding = embedding_of(p);
          if (p < thread_rows) prefetch(embedding);
        }
        multiply<V, P>(e, adapter, tile_position, column, update);
      }
    }
    typename Packed<T, V>::Type embedding[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const T* from = embedding_of(p);
      if (p < thread_rows) embedding[p] = load<T, V>(from);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (p >= thread_rows) continue;
      const int token = token_of(p);
      const bool updated = adapter >= 0 && token >= offset;
      float x[V];
      Packed<T, V>::unpack(embedding[p], x);
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = updated ? fmaf(e.embed_scale, x[v], update[p][v]) : e.embed_scale * x[v];
      store<T, V>(out + int64_t(token < e.first ? token : token + e.virtual_tokens) * e.width, x);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kWarps* kLanes)
    decomposed_prompt_embedding_bwd_kernel(const __grid_constant__ EmbeddingBackwardParams g) {
  using Addend = typename Packed<T, V>::Type;
  const int lane = threadIdx.x % kLanes;
  const int column = (blockIdx.x % g.column_tiles * kLanes + lane) * V;
  const bool inside = column < g.width;
  const int row = blockIdx.x / g.column_tiles * kWarps + threadIdx.x / kLanes;
  if (row >= g.total_rows) return;
  const int rows = g.prompt_rows + g.delta_rows;
  const int adapter = row / rows;
  const int within = row % rows;
  const bool is_prompt = within < g.prompt_rows;
  const int position = is_prompt ? within : within - g.prompt_rows;
  const T* grad = static_cast<const T*>(g.grad) + column;

  float sum[V] = {};
  for (int start = 0; start < g.batch; start += kLanes) {
    int64_t source = -1;  // of this lane: offset of the addend of one row of the batch
    const int b = start + lane;
    if (b < g.batch && g.adapter_ids.get(b) == adapter) {
      if (is_prompt) {
        source = b * g.batch_stride + (g.first + position) * g.column_stride;
      } else {
        const int token = position + offset_of(g.offsets, b, g.length);
        if (token < g.length)
          source = b * g.batch_stride + (token < g.first ? token : token + g.virtual_tokens) * g.column_stride;
      }
    }
    for (unsigned left = __ballot_sync(kWarpMask, source >= 0); left;) {
      Addend addends[kLoadsInFlight];
#pragma unroll
      for (auto& addend : addends) {
        addend = Addend{};
        if (left) {
          const int64_t from = __shfl_sync(kWarpMask, source, __ffs(left) - 1);
          left &= left - 1;
          if (inside) addend = load<T, V>(grad + from);
        }
      }
#pragma unroll
      for (const auto& addend : addends) {
        float x[V];
        Packed<T, V>::unpack(addend, x);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += x[v];
      }
    }
  }
  if (!inside) return;
  float* to = is_prompt ? g.prompt + (int64_t(adapter) * g.prompt_rows + position) * g.width
                        : g.delta + (int64_t(adapter) * g.delta_rows + position) * g.width;
  store_floats<V>(to + column, sum);
}

}  // namespace peft_kernels
