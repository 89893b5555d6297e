// The attention of one task, compiled once per instruction set with -DCPU_CAPABILITY=<its name> (setup.py).
//
// Rows are the vector dimension of the scores: a tile of 8 to 32 query rows, transposed once, is multiplied by one key
// at a time, whose elements are broadcast, so K is read in its memory layout. The softmax is then elementwise, without
// a sum across lanes. The output has D as vector dimension and the weights are broadcast, so V is read in its memory
// layout too. Keys come in blocks that stay in L1, with a running maximum and sum per row (online softmax).

#include "shared_cross_attention_tiles.h"

namespace {

constexpr int64_t kMaxPaddedRows = kMaxTaskRows + 32;  // tiles are at most 32 wide, the last one partly empty

// The buffers of one task, each a whole number of cache lines.
struct Scratch {
  float *queries, *sums, *largest, *total, *keys, *values, *scores;

  Scratch(float* memory, int64_t lanes, int64_t columns)
      : queries(memory),
        sums(queries + kMaxPaddedRows * lanes),
        largest(sums + kMaxPaddedRows * columns),
        total(largest + kMaxPaddedRows),
        keys(total + kMaxPaddedRows),
        values(keys + kKeyBlock * lanes),
        scores(values + kKeyBlock * columns) {}

  static int64_t floats(int64_t lanes, int64_t columns) {
    return kMaxPaddedRows * (lanes + columns + 2) + kKeyBlock * (lanes + columns + kMaxTileWidth);
  }
};
static_assert(kMaxPaddedRows % 16 == 0 && kKeyBlock % 16 == 0 && kMaxTileWidth <= 32);

// The query rows of one score tile, and the running state of their softmax.
struct RowTile {
  int64_t row, rows, width;
  float* queries;  // [lanes][width]
  float* largest;  // [width]
  float* total;    // [width]
  float* sums;     // [rows][columns]
};

struct KeyBlock {
  Packed keys, values;
  int64_t count;
};

// Online softmax of one block: turns scores into weights, in lanes of Lanes, and writes the factor of the older sums to
// `rescale`.
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
void attend_tile(const RowTile& tile, const KeyBlock& block, const Ahead& ahead, int64_t lanes, int64_t columns,
                 float factor, float* scores) {
  Float<W> largest[VECTORS];
  for (int v = 0; v < VECTORS; ++v) largest[v] = Float<W>{} - INFINITY;
  score_block<Lanes, W, VECTORS>(tile.queries, block.keys, block.count, ahead, lanes, factor, scores, largest);
  float rescale[kMaxTileWidth];
  softmax<Lanes, W, VECTORS>(tile, scores, block.count, largest, rescale);
  const Weights<false> weights{scores, W * VECTORS};
  accumulate<Lanes>(weights, block.values, lanes_of<Lanes>(block.count), rescale, tile.sums, tile.rows, columns);
}

// Element: the tensors' element type. Lanes: how sums over elements are computed.
template <class Element, class Lanes>
class Attend {
 public:
  explicit Attend(const Attention& attention) : a(attention) {}

  int64_t scratch_floats() const { return Scratch::floats(lanes, columns); }

  void operator()(const Task& task, const Task* following, float* memory) const {
    const Scratch scratch(memory, lanes, columns);
    const int64_t rows = task.row_end - task.row_begin;
    for_tiles(scratch, rows, [&](const RowTile& tile) { start(task, tile); });
    for (int64_t key = task.key_begin; key < task.key_end; key += kKeyBlock) {
      const KeyBlock block = read(task, key, least(kKeyBlock, task.key_end - key), scratch);
      const int64_t next = key + block.count;
      Ahead ahead = next < task.key_end ? ahead_of<Element>(a, task, next)
                    : following         ? ahead_of<Element>(a, *following, following->key_begin)
                                        : Ahead{};
      for_tiles(scratch, rows, [&](const RowTile& tile) {
        const auto attend = tile.width == 2 * kWidth ? attend_tile<Lanes, kWidth, 2>
                            : tile.width == kWidth   ? attend_tile<Lanes, kWidth, 1>
                                                     : attend_tile<Lanes, kNarrowWidth, 1>;
        attend(tile, block, ahead, lanes, columns, a.scale, scratch.scores);
        ahead.count = 0;
      });
    }
    for_tiles(scratch, rows, [&](const RowTile& tile) { task.partial ? keep(task, tile) : finish(task, tile); });
  }

  // Computes one row from the sums of its key splits.
  void merge(const Partials& partials, int64_t stream, int64_t head, int64_t token) const {
    const auto split = [&](int64_t s) { return partials.first + s * partials.stride; };
    float largest = -INFINITY, total = 0, sums[kMaxHeadDim] = {};
    for (int64_t s = 0; s < partials.splits; ++s) largest = fmaxf(largest, split(s)[a.head_dim]);
    for (int64_t s = 0; s < partials.splits; ++s) {
      const float weight = largest == -INFINITY ? 0 : expf(split(s)[a.head_dim] - largest);
      for (int64_t d = 0; d < a.head_dim; ++d) sums[d] += weight * split(s)[d];
      total += weight * split(s)[a.head_dim + 1];
    }
    write(stream, head, token, sums, largest, total);
  }

 private:
  template <class F>
  void for_tiles(const Scratch& scratch, int64_t rows, const F& f) const {
    for_each_tile(rows, [&](int64_t row, int64_t count, int64_t width, int64_t padded) {
      f(RowTile{row, count, width, scratch.queries + padded * lanes, scratch.largest + padded, scratch.total + padded,
                scratch.sums + row * columns});
    });
  }

  void start(const Task& task, const RowTile& tile) const {
    for (int64_t i = 0; i < tile.width; ++i) {
      tile.largest[i] = -INFINITY;
      tile.total[i] = 0;
      if (i < tile.rows) {
        const int64_t row = task.row_begin + tile.row + i;
        const auto query =
            at<Element>(a.query, a.query_stride, task.first_stream + row / a.tokens, task.head, row % a.tokens);
        pack<Lanes>(query, a.query_stride[3], a.head_dim, tile.queries + i, tile.width);
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane) tile.queries[lane * tile.width + i] = 0;
      }
    }
    std::memset(tile.sums, 0, tile.rows * columns * sizeof(float));
  }

  KeyBlock read(const Task& task, int64_t first, int64_t count, const Scratch& scratch) const {
    const auto key = at<Element>(a.key, a.key_stride, task.input, task.head, first);
    const auto value = at<Element>(a.value, a.value_stride, task.input, task.head, first);
    return {pack_rows<Lanes>(key, a.key_stride, count, a.head_dim, scratch.keys),
            pack_columns<Lanes>(value, a.value_stride, count, a.head_dim, columns, scratch.values), count};
  }

  void finish(const Task& task, const RowTile& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t row = task.row_begin + tile.row + i;
      write(task.first_stream + row / a.tokens, task.head, row % a.tokens, tile.sums + i * columns, tile.largest[i],
            tile.total[i]);
    }
  }

  void keep(const Task& task, const RowTile& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      float* to = task.partial + (tile.row + i) * (a.head_dim + 2);
      std::memcpy(to, tile.sums + i * columns, a.head_dim * sizeof(float));
      to[a.head_dim] = tile.largest[i];
      to[a.head_dim + 1] = tile.total[i];
    }
  }

  void write(int64_t stream, int64_t head, int64_t token, const float* sums, float largest, float total) const {
    auto out = const_cast<Element*>(at<Element>(a.out, a.out_stride, stream, head, token));
    const bool empty = total == 0;  // no key
    for (int64_t d = 0; d < a.head_dim; ++d) narrow(empty ? 0 : sums[d] / total, out + d);
    a.lse[stream * a.lse_stride[0] + head * a.lse_stride[1] + token * a.lse_stride[2]] =
        empty ? -INFINITY : largest + logf(total);
  }

  const Attention& a;
  const int64_t lanes = lanes_of<Lanes>(a.head_dim);
  const int64_t columns = round_up(a.head_dim, kWidth);
};

int64_t scratch_floats(const Attention& a) {
  int64_t floats = 0;
  with_storage(
      a, [&](auto element, auto lanes) { floats = Attend<decltype(element), decltype(lanes)>{a}.scratch_floats(); });
  return floats;
}

void attend(const Attention& a, const Task& task, const Task* following, float* scratch) {
  with_storage(
      a, [&](auto element, auto lanes) { Attend<decltype(element), decltype(lanes)>{a}(task, following, scratch); });
}

void merge(const Attention& a, const Partials& partials, int64_t stream, int64_t head, int64_t token) {
  with_storage(a, [&](auto element, auto lanes) {
    Attend<decltype(element), decltype(lanes)>{a}.merge(partials, stream, head, token);
  });
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kKernels, capability)
extern const Kernels KERNELS(CPU_CAPABILITY) = {scratch_floats, attend, merge};
