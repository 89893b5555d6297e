// The attention of one task, compiled once per instruction set with -DCPU_CAPABILITY=<its name> (setup.py).
//
// Rows are the vector dimension of the scores: a tile of 8 to 32 query rows, transposed once, meets a key at a time, each
// of its elements broadcast, so K is read as it lies in memory. The softmax is then elementwise, without a sum across lanes.
// The output has D as vector dimension, each weight broadcast, so V is read as it lies too.
// Keys come in blocks that stay in the first-level cache, with a running maximum and sum per row (online softmax).

#include "shared_cross_attention.h"
#include "shared_cross_attention_tiles.h"

namespace {

constexpr int64_t kMaxPaddedRows = kMaxTaskRows + 32;  // tiles are at most 32 wide, the last one partly empty

template <class Element>
const Element* at(const void* data, const int64_t* stride, int64_t i, int64_t head, int64_t token) {
  return static_cast<const Element*>(data) + i * stride[0] + head * stride[1] + token * stride[2];
}

// The buffers of one task, each a whole number of cache lines.
struct Scratch {
  float *queries, *sums, *largest, *total, *keys, *values, *scores;

  Scratch(float* memory, int64_t lanes, int64_t columns)
      : queries(memory), sums(queries + kMaxPaddedRows * lanes), largest(sums + kMaxPaddedRows * columns), total(largest + kMaxPaddedRows),
        keys(total + kMaxPaddedRows), values(keys + kKeyBlock * lanes), scores(values + kKeyBlock * columns) {}

  static int64_t floats(int64_t lanes, int64_t columns) {
    return kMaxPaddedRows * (lanes + columns + 2) + kKeyBlock * (lanes + columns + kMaxTileWidth);
  }
};
static_assert(kMaxPaddedRows % 16 == 0 && kKeyBlock % 16 == 0 && kMaxTileWidth <= 32);

// Element: of the tensors. Lanes: how sums over it are taken.
template <class Element, class Lanes>
class Attend {
 public:
  explicit Attend(const Attention& attention) : a(attention) {
    constexpr bool same_lanes = sizeof(Element) * Lanes::kElements == sizeof(float);
    keys_in_place = same_lanes && a.key_stride[3] == 1 && a.head_dim % Lanes::kElements == 0 && a.key_stride[2] % Lanes::kElements == 0;
    values_in_place = sizeof(Element) == sizeof(float) && a.value_stride[3] == 1 && a.head_dim == columns;
  }

  int64_t scratch_floats() const { return Scratch::floats(lanes, columns); }

  void operator()(const Task& task, const Task* following, float* memory) const {
    const Scratch scratch(memory, lanes, columns);
    const int64_t rows = task.row_end - task.row_begin;
    for_tiles(scratch, rows, [&](const RowTile& tile) { start(task, tile); });
    for (int64_t key = task.key_begin; key < task.key_end; key += kKeyBlock) {
      const KeyBlock block = read(task, key, least(kKeyBlock, task.key_end - key), scratch);
      const int64_t next = key + block.count;
      Ahead ahead = next < task.key_end ? ahead_of(task, next) : following ? ahead_of(*following, following->key_begin) : Ahead{};
      for_tiles(scratch, rows, [&](const RowTile& tile) {
        const auto attend = tile.width == 2 * kWidth ? attend_tile<Lanes, kWidth, 2>
            : tile.width == kWidth                   ? attend_tile<Lanes, kWidth, 1>
                                                     : attend_tile<Lanes, kNarrowWidth, 1>;
        attend(tile, block, ahead, lanes, columns, a.scale, scratch.scores);
        ahead.count = 0;
      });
    }
    for_tiles(scratch, rows, [&](const RowTile& tile) { task.partial ? keep(task, tile) : finish(task, tile); });
  }

  // One row from the sums of its key splits.
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
    int64_t padded = 0;
    for (int64_t row = 0; row < rows;) {
      const int64_t width = tile_width(rows - row);
      const int64_t count = least(width, rows - row);
      f(RowTile{
          row, count, width, scratch.queries + padded * lanes, scratch.largest + padded, scratch.total + padded, scratch.sums + row * columns});
      row += count;
      padded += width;
    }
  }

  void start(const Task& task, const RowTile& tile) const {
    for (int64_t i = 0; i < tile.width; ++i) {
      tile.largest[i] = -INFINITY;
      tile.total[i] = 0;
      if (i < tile.rows) {
        const int64_t row = task.row_begin + tile.row + i;
        const auto query = at<Element>(a.query, a.query_stride, task.first_stream + row / a.tokens, task.head, row % a.tokens);
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
    KeyBlock block{scratch.keys, scratch.values, lanes, columns, count};
    if (keys_in_place) {
      block.keys = reinterpret_cast<const float*>(key);
      block.key_stride = a.key_stride[2] / Lanes::kElements;
    } else {
      for (int64_t k = 0; k < count; ++k) pack<Lanes>(key + k * a.key_stride[2], a.key_stride[3], a.head_dim, scratch.keys + k * lanes, 1);
    }
    if (values_in_place) {
      block.values = reinterpret_cast<const float*>(value);
      block.value_stride = a.value_stride[2];
    } else {
      for (int64_t k = 0; k < count; k += Lanes::kElements) {
        const Element* row = value + k * a.value_stride[2];
        const Element* next = k + 1 < count ? row + a.value_stride[2] : nullptr;
        pack_value<Lanes>(row, next, a.value_stride[3], a.head_dim, columns, scratch.values + k / Lanes::kElements * columns);
      }
    }
    return block;
  }

  Ahead ahead_of(const Task& task, int64_t first) const {
    if (a.key_stride[3] != 1 || a.value_stride[3] != 1) return {};
    constexpr int64_t bytes = sizeof(Element);
    return {
        reinterpret_cast<const char*>(at<Element>(a.key, a.key_stride, task.input, task.head, first)),
        reinterpret_cast<const char*>(at<Element>(a.value, a.value_stride, task.input, task.head, first)),
        a.key_stride[2] * bytes, a.value_stride[2] * bytes, a.head_dim * bytes, least(kKeyBlock, task.key_end - first),
    };
  }

  void finish(const Task& task, const RowTile& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t row = task.row_begin + tile.row + i;
      write(task.first_stream + row / a.tokens, task.head, row % a.tokens, tile.sums + i * columns, tile.largest[i], tile.total[i]);
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
    a.lse[stream * a.lse_stride[0] + head * a.lse_stride[1] + token * a.lse_stride[2]] = empty ? -INFINITY : largest + logf(total);
  }

  const Attention& a;
  const int64_t lanes = (a.head_dim + Lanes::kElements - 1) / Lanes::kElements;
  const int64_t columns = round_up(a.head_dim, kWidth);
  bool keys_in_place, values_in_place;
};

template <class F>
void with_storage(const Attention& a, const F& f) {
#ifdef __AVX512BF16__
  using Bfloat16Sums = Bfloat16Lanes;
#else
  using Bfloat16Sums = Float32Lanes;
#endif
  if (a.storage == Storage::bfloat16) {
    f(Attend<uint16_t, Bfloat16Sums>(a));
  } else {
    f(Attend<float, Float32Lanes>(a));
  }
}

int64_t scratch_floats(const Attention& a) {
  int64_t floats = 0;
  with_storage(a, [&](const auto& attend) { floats = attend.scratch_floats(); });
  return floats;
}

void attend(const Attention& a, const Task& task, const Task* following, float* scratch) {
  with_storage(a, [&](const auto& attend) { attend(task, following, scratch); });
}

void merge(const Attention& a, const Partials& partials, int64_t stream, int64_t head, int64_t token) {
  with_storage(a, [&](const auto& attend) { attend.merge(partials, stream, head, token); });
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kKernels, capability)
extern const Kernels KERNELS(CPU_CAPABILITY) = {scratch_floats, attend, merge};
