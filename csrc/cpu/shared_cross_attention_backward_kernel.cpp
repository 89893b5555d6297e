// The gradients of one head of one input, compiled once per instruction set with -DCPU_CAPABILITY=<its name>
// (setup.py).
//
// For a tile of query rows and a block of keys, P = exp(S - lse) is recomputed and dS = P (dP - delta) is computed
// beside it. Both are laid out as [key][row]: read along the keys they weight K for dQ, read along the rows they weight
// Q and dO for dK and dV, so nothing is transposed. One task owns a head of an input: it sums dK and dV over all
// streams in a fixed order, without a buffer per stream.

#include "shared_cross_attention_tiles.h"

namespace {

constexpr int64_t kMaxPaddedRows = kMaxTaskRows + 32;

// The query rows of one score tile, and their gradients.
struct RowTile {
  int64_t row, rows, width;
  bool first;                           // the first tile in the keys' sums
  float *queries, *grads;               // [lanes][width]
  float *query_columns, *grad_columns;  // [lanes of rows][columns]
  float *lse, *delta;                   // [width]
  float* grad_query;                    // [rows][columns]
};

struct KeyBlock {
  Packed keys, values, key_columns;
  int64_t count;
  bool first;                    // the first block in the rows' sums
  float *grad_key, *grad_value;  // [count][columns]
};

struct Scratch {
  float *queries, *grads, *query_columns, *grad_columns, *lse, *delta, *grad_query;  // for a chunk of rows
  float *keys, *values, *key_columns, *scores, *grad_scores, *pairs;                 // for a block of keys
  float *grad_key, *grad_value;                                                      // for a block, or for all keys

  Scratch(float* memory, int64_t lanes, int64_t columns, int64_t keys_kept)
      : queries(memory),
        grads(queries + kMaxPaddedRows * lanes),
        query_columns(grads + kMaxPaddedRows * lanes),
        grad_columns(query_columns + kMaxPaddedRows * columns),
        lse(grad_columns + kMaxPaddedRows * columns),
        delta(lse + kMaxPaddedRows),
        grad_query(delta + kMaxPaddedRows),
        keys(grad_query + kMaxPaddedRows * columns),
        values(keys + kKeyBlock * lanes),
        key_columns(values + kKeyBlock * lanes),
        scores(key_columns + kKeyBlock * columns),
        grad_scores(scores + kKeyBlock * kMaxTileWidth),
        pairs(grad_scores + kKeyBlock * kMaxTileWidth),
        grad_key(pairs + kKeyBlock * kMaxTileWidth),
        grad_value(grad_key + keys_kept * columns) {}

  static int64_t floats(int64_t lanes, int64_t columns, int64_t keys_kept) {
    return kMaxPaddedRows * (2 * lanes + 3 * columns + 2) + kKeyBlock * (2 * lanes + columns + 3 * kMaxTileWidth) +
           2 * keys_kept * columns;
  }
};

struct Ones {
  float values[kKeyBlock];
  constexpr Ones() : values() {
    for (float& value : values) value = 1;
  }
};
constexpr Ones kOnes;
static_assert(kKeyBlock >= kMaxTileWidth);

// scores: S becomes P; grad_scores: dP becomes dS = scale * P (dP - delta); lanes along the rows. pairs: dS with lanes
// along the keys.
template <class Lanes, int W, int VECTORS>
void softmax_backward(const RowTile& tile, float* scores, float* grad_scores, float* pairs, int64_t count,
                      float scale) {
  constexpr int width = W * VECTORS, elements = Lanes::kElements;
  for (int64_t k = 0; k < count; k += elements) {
    Float<W> ds[elements][VECTORS] = {};
    for (int64_t e = 0; e < least(elements, count - k); ++e) {
      for (int v = 0; v < VECTORS; ++v) {
        const int64_t from = (k + e) * width + v * W,
                      to = from / elements;  // in place: the overwritten values have been read
        const Float<W> p = exp<W>(load<W>(scores + from) - load<W>(tile.lse + v * W));
        ds[e][v] = p * (load<W>(grad_scores + from) - load<W>(tile.delta + v * W)) * scale;
        Lanes::template store_elements<W>(scores + to, p);
        Lanes::template store_elements<W>(grad_scores + to, ds[e][v]);
      }
    }
    if constexpr (elements == 2) {
      for (int v = 0; v < VECTORS; ++v)
        store<W>(pairs + k / 2 * width + v * W, Lanes::template pair<W>(ds[0][v], ds[1][v]));
    }
  }
}

template <class Element, class Lanes>
class AttendBackward {
 public:
  explicit AttendBackward(const AttentionGradients& gradients) : g(gradients) {}

  int64_t scratch_floats(int64_t rows, int64_t keys) const {
    return Scratch::floats(lanes, columns, keys_kept(rows, keys));
  }

  void operator()(const Task& task, const Task* following, float* memory) const {
    const bool chunked = task.row_end > kMaxTaskRows;
    const Scratch scratch(memory, lanes, columns, keys_kept(task.row_end, task.key_end));
    for (int64_t begin = 0; begin < task.row_end; begin += kMaxTaskRows) {
      const int64_t rows = least(kMaxTaskRows, task.row_end - begin);
      for_tiles(scratch, begin, rows, [&](const RowTile& tile) { start(task, tile); });
      for (int64_t key = 0; key < task.key_end; key += kKeyBlock) {
        const int64_t next = key + least(kKeyBlock, task.key_end - key);
        const KeyBlock block = read(task, key, next - key, scratch, chunked ? key * columns : 0);
        Ahead ahead = next < task.key_end ? ahead_of<Element>(a, task, next)
                      : following         ? ahead_of<Element>(a, *following, 0)
                                          : Ahead{};
        Ahead results = begin + rows == task.row_end ? results_of(task, key, block.count) : Ahead{};
        for_tiles(scratch, begin, rows, [&](const RowTile& tile) {
          if (tile.width == 2 * kWidth) {
            backward_tile<kWidth, 2>(tile, block, ahead, results, scratch);
          } else if (tile.width == kWidth) {
            backward_tile<kWidth, 1>(tile, block, ahead, results, scratch);
          } else {
            backward_tile<kNarrowWidth, 1>(tile, block, ahead, results, scratch);
          }
          ahead.count = results.count = 0;
        });
        if (begin + rows == task.row_end) finish(task, key, block);
      }
      if (g.grad_query) for_tiles(scratch, begin, rows, [&](const RowTile& tile) { finish(task, tile); });
    }
    const int64_t unused = task.row_end ? task.key_end : 0;  // the first key that no row attends to
    if (g.grad_key) clear(task, unused, g.grad_key, g.grad_key_stride);
    if (g.grad_value) clear(task, unused, g.grad_value, g.grad_value_stride);
  }

 private:
  // Number of keys whose gradients are kept in float32: all keys if rows come in several chunks.
  static int64_t keys_kept(int64_t rows, int64_t keys) { return rows > kMaxTaskRows ? keys : kKeyBlock; }

  template <class F>
  void for_tiles(const Scratch& s, int64_t begin, int64_t rows, const F& f) const {
    for_each_tile(rows, [&](int64_t row, int64_t count, int64_t width, int64_t padded) {
      const int64_t column = row / Lanes::kElements * columns;
      f(RowTile{begin + row, count, width, begin + row == 0, s.queries + padded * lanes, s.grads + padded * lanes,
                s.query_columns + column, s.grad_columns + column, s.lse + padded, s.delta + padded,
                s.grad_query + row * columns});
    });
  }

  struct Row {
    int64_t stream, head, token;
  };

  Row row_of(const Task& task, int64_t row) const {
    return {task.first_stream + row / a.tokens, task.head, row % a.tokens};
  }

  static const Element* at(const void* data, const int64_t* stride, const Row& row) {
    return ::at<Element>(data, stride, row.stream, row.head, row.token);
  }

  static float at(const float* data, const int64_t* stride, const Row& row) {
    return data[row.stream * stride[0] + row.head * stride[1] + row.token * stride[2]];
  }

  void start(const Task& task, const RowTile& tile) const {
    for (int64_t i = 0; i < tile.width; ++i) {
      if (i < tile.rows) {
        const Row row = row_of(task, tile.row + i);
        const Element* query = at(a.query, a.query_stride, row);
        const Element* grad = at(g.grad_out, g.grad_out_stride, row);
        pack<Lanes>(query, a.query_stride[3], a.head_dim, tile.queries + i, tile.width);
        pack<Lanes>(grad, g.grad_out_stride[3], a.head_dim, tile.grads + i, tile.width);
        tile.lse[i] = at(a.lse, a.lse_stride, row);
        tile.delta[i] = dot(grad, g.grad_out_stride[3], at(a.out, a.out_stride, row), a.out_stride[3]);
        if (g.grad_lse) tile.delta[i] -= at(g.grad_lse, g.grad_lse_stride, row);
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane)
          tile.queries[lane * tile.width + i] = tile.grads[lane * tile.width + i] = 0;
        tile.lse[i] = INFINITY;  // P is 0
        tile.delta[i] = 0;
      }
    }
    for (int64_t i = 0; i < tile.rows; i += Lanes::kElements) {
      const Row row = row_of(task, tile.row + i), next = row_of(task, tile.row + i + 1);
      const bool paired = i + 1 < tile.rows;
      const auto columns_of = [&](const void* data, const int64_t* stride, float* to) {
        pack_value<Lanes>(at(data, stride, row), paired ? at(data, stride, next) : nullptr, stride[3], a.head_dim,
                          columns, to);
      };
      columns_of(a.query, a.query_stride, tile.query_columns + i / Lanes::kElements * columns);
      columns_of(g.grad_out, g.grad_out_stride, tile.grad_columns + i / Lanes::kElements * columns);
    }
    if (task.key_end == 0) std::memset(tile.grad_query, 0, tile.rows * columns * sizeof(float));
  }

  float dot(const Element* x, int64_t x_stride, const Element* y, int64_t y_stride) const {
    float sums[kWidth] = {};  // each adds every kWidth-th product: several chains hide the latency of the additions
    for (int64_t begin = 0; begin < a.head_dim; begin += kWidth) {
      const int64_t count = least(kWidth, a.head_dim - begin);
      for (int64_t d = 0; d < count; ++d)
        sums[d] += widen(x[(begin + d) * x_stride]) * widen(y[(begin + d) * y_stride]);
    }
    float sum = 0;
    for (const float part : sums) sum += part;
    return sum;
  }

  KeyBlock read(const Task& task, int64_t first, int64_t count, const Scratch& s, int64_t kept) const {
    const auto key = ::at<Element>(a.key, a.key_stride, task.input, task.head, first);
    const auto value = ::at<Element>(a.value, a.value_stride, task.input, task.head, first);
    KeyBlock block{{}, {}, {}, count, first == 0, s.grad_key + kept, s.grad_value + kept};
    block.keys = pack_rows<Lanes>(key, a.key_stride, count, a.head_dim, s.keys);
    if (g.grad_query || g.grad_key) block.values = pack_rows<Lanes>(value, a.value_stride, count, a.head_dim, s.values);
    if (g.grad_query)
      block.key_columns = pack_columns<Lanes>(key, a.key_stride, count, a.head_dim, columns, s.key_columns);
    return block;
  }

  // The rows that the gradients of a block will be written to, for prefetching.
  Ahead results_of(const Task& task, int64_t key, int64_t count) const {
    if (!g.grad_key || !g.grad_value) return {};
    constexpr int64_t bytes = sizeof(Element);
    return {
        reinterpret_cast<const char*>(::at<Element>(g.grad_key, g.grad_key_stride, task.input, task.head, key)),
        reinterpret_cast<const char*>(::at<Element>(g.grad_value, g.grad_value_stride, task.input, task.head, key)),
        g.grad_key_stride[2] * bytes,
        g.grad_value_stride[2] * bytes,
        a.head_dim * bytes,
        count,
    };
  }

  template <int W, int VECTORS>
  void backward_tile(const RowTile& tile, const KeyBlock& block, const Ahead& ahead, const Ahead& results,
                     const Scratch& s) const {
    constexpr int width = W * VECTORS;
    Float<W> largest[VECTORS] = {};
    score_block<Lanes, W, VECTORS>(tile.queries, block.keys, block.count, ahead, lanes, a.scale, s.scores, largest);
    const bool need_grad_scores = g.grad_query || g.grad_key;
    if (need_grad_scores)
      score_block<Lanes, W, VECTORS>(tile.grads, block.values, block.count, results, lanes, 1, s.grad_scores, largest);
    softmax_backward<Lanes, W, VECTORS>(tile, s.scores, s.grad_scores, s.pairs, block.count, a.scale);

    const auto to_keys = [&](const float* weights, const float* values, float* sums) {
      const float* rescale = tile.first ? nullptr : kOnes.values;
      accumulate<Lanes>(Weights<true>{weights, width / Lanes::kElements}, {values, columns}, lanes_of<Lanes>(tile.rows),
                        rescale, sums, block.count, columns);
    };
    if (g.grad_value) to_keys(s.scores, tile.grad_columns, block.grad_value);
    if (g.grad_key) to_keys(s.grad_scores, tile.query_columns, block.grad_key);
    if (g.grad_query) {
      const Weights<false> weights{Lanes::kElements == 1 ? s.grad_scores : s.pairs, width};
      const float* rescale = block.first ? nullptr : kOnes.values;
      accumulate<Lanes>(weights, block.key_columns, lanes_of<Lanes>(block.count), rescale, tile.grad_query, tile.rows,
                        columns);
    }
  }

  void finish(const Task& task, const RowTile& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const Row row = row_of(task, tile.row + i);
      narrow<Lanes>(tile.grad_query + i * columns, a.head_dim,
                    const_cast<Element*>(at(g.grad_query, g.grad_query_stride, row)));
    }
  }

  void finish(const Task& task, int64_t key, const KeyBlock& block) const {
    const auto rows = [&](const float* sums, void* grads, const int64_t* stride) {
      for (int64_t k = 0; k < block.count; ++k) {
        narrow<Lanes>(sums + k * columns, a.head_dim,
                      const_cast<Element*>(::at<Element>(grads, stride, task.input, task.head, key + k)));
      }
    };
    if (g.grad_key) rows(block.grad_key, g.grad_key, g.grad_key_stride);
    if (g.grad_value) rows(block.grad_value, g.grad_value, g.grad_value_stride);
  }

  void clear(const Task& task, int64_t first, void* grads, const int64_t* stride) const {
    for (int64_t k = first; k < g.keys; ++k) {
      std::memset(const_cast<Element*>(::at<Element>(grads, stride, task.input, task.head, k)), 0,
                  a.head_dim * sizeof(Element));
    }
  }

  const AttentionGradients& g;
  const Attention& a = g.attention;
  const int64_t lanes = lanes_of<Lanes>(a.head_dim);
  const int64_t columns = round_up(a.head_dim, kWidth);
};

int64_t scratch_floats(const AttentionGradients& g, int64_t rows, int64_t keys) {
  int64_t floats = 0;
  with_storage(g.attention, [&](auto element, auto lanes) {
    floats = AttendBackward<decltype(element), decltype(lanes)>{g}.scratch_floats(rows, keys);
  });
  return floats;
}

void attend_backward(const AttentionGradients& g, const Task& task, const Task* following, float* scratch) {
  with_storage(g.attention, [&](auto element, auto lanes) {
    AttendBackward<decltype(element), decltype(lanes)>{g}(task, following, scratch);
  });
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kBackwardKernels, capability)
extern const BackwardKernels KERNELS(CPU_CAPABILITY) = {scratch_floats, attend_backward};
