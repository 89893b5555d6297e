// Rows of the result and sums of its gradient, compiled once per instruction set with -DCPU_CAPABILITY=<its name>
// (setup.py).
//
// A task takes a few positions of one adapter: it computes their rows of scale * a @ b once, into L1, and adds them to
// the table's rows of every batch row that has the adapter. Only the result is written to memory.

#include "decomposed_prompt_embedding.h"
#include "tiles.h"

namespace {

constexpr int64_t kBlockColumns = 1024;  // columns of the update at a time: kTaskPositions rows of them fit in L1
static_assert(kColumnMultiple % kWidth == 0 && kBlockColumns % kColumnMultiple == 0);

constexpr int kAhead = 3;  // rows of the table to prefetch: their addresses are random, and one row is too short to
                           // hide the memory latency

// to = factor * row + update (or without update), while `ahead` is prefetched.
template <bool UPDATED, class Element>
void write_row(const Element* row, const Element* ahead, float factor, const float* update, int64_t count,
               Element* __restrict to) {
  constexpr int64_t line = 64 / sizeof(Element);
  const auto sum = [&](int64_t d) {
    narrow(UPDATED ? factor * widen(row[d]) + update[d] : factor * widen(row[d]), to + d);
  };
  int64_t begin = 0;
  for (; begin + line <= count; begin += line) {
    __builtin_prefetch(ahead + begin);
    for (int64_t d = begin; d < begin + line; ++d) sum(d);
  }
  for (int64_t d = begin; d < count; ++d) sum(d);
}

template <class Element>
Element* out_row(const Embedding& e, int64_t row, int64_t column) {
  return static_cast<Element*>(e.out) + (row * (e.virtual_tokens + e.length) + column) * e.width;
}

int64_t token_column(int64_t token, int64_t first, int64_t virtual_tokens) {
  return token < first ? token : token + virtual_tokens;
}

template <class Element>
const Element* table_row(const Embedding& e, int64_t row, int64_t token) {
  return static_cast<const Element*>(e.weight) + e.ids[row * e.length + token] * e.weight_stride;
}

// scale * a @ b for a task's positions and `stride` columns; the table's rows of the first batch row are prefetched
// meanwhile.
template <class Element>
void low_rank_update(const Embedding& e, const EmbeddingTask& task, int64_t column, int64_t stride, float* update) {
  constexpr int64_t step = kTileVectors * kWidth;
  const float* a = e.a + (task.adapter * e.positions + task.begin) * e.rank;
  const float* b = e.b + task.adapter * e.rank * e.columns + column;
  const int64_t positions = task.end - task.begin, row = task.rows[0], shift = e.offsets[row];
  for (int64_t d = 0; d < stride; d += step) {
    const int64_t columns = least(step, stride - d);
    for (int64_t p = task.begin; p < least(task.end, e.length - shift); ++p) {
      const Element* from = table_row<Element>(e, row, p + shift) + column + d;
      for (int64_t i = 0; i < columns; i += 64 / sizeof(Element)) __builtin_prefetch(from + i, 0, 2);
    }
    accumulate<Float32Lanes>(Weights<true>{a, e.rank}, {b + d, e.columns}, e.rank, nullptr, update + d, positions,
                             columns, stride);
  }
  for (int64_t i = 0; i < positions * stride; ++i) update[i] *= e.scale;
}

// The result at some positions and columns of one row, with the update taken from registers: the matmul overlaps with
// memory accesses.
template <class Element, int ROWS, int VECTORS>
void row_tile(const Embedding& e, const EmbeddingTask& task, int64_t position, int64_t column) {
  const int64_t row = task.rows[0], token = position + e.offsets[row];
  const Element* from[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    from[r] = table_row<Element>(e, row, token + r) + column;
    for (int i = 0; i < VECTORS * kWidth; i += 64 / sizeof(Element)) __builtin_prefetch(from[r] + i);
  }
  Float<kWidth> sums[ROWS][VECTORS];
  const float* a = e.a + (task.adapter * e.positions + position) * e.rank;
  const float* b = e.b + task.adapter * e.rank * e.columns + column;
  tile_sums<Float32Lanes>(Weights<true>{a, e.rank}, {b, e.columns}, e.rank, sums);
  unrolled<ROWS, 1>([&](int r, int) {
    Element* to = out_row<Element>(e, row, token_column(token + r, e.first, e.virtual_tokens)) + column;
    unrolled<1, VECTORS>([&](int, int v) {
      const auto embedding = e.embed_scale * load_elements<kWidth>(from[r] + v * kWidth);
      store_elements<kWidth>(to + v * kWidth, embedding + e.scale * sums[r][v]);
    });
  });
}

template <class Element>
using RowTile = void (*)(const Embedding&, const EmbeddingTask&, int64_t, int64_t);

template <class Element, int VECTORS>
constexpr RowTile<Element> kRowTiles[kTileRows] = {
    row_tile<Element, 1, VECTORS>, row_tile<Element, 2, VECTORS>, row_tile<Element, 3, VECTORS>,
    row_tile<Element, 4, VECTORS>, row_tile<Element, 5, VECTORS>, row_tile<Element, 6, VECTORS>,
};

// A whole task of one row, if the width is a multiple of kWidth.
template <class Element>
void row_of(const Embedding& e, const EmbeddingTask& task) {
  const int64_t end = least(task.end, e.length - e.offsets[task.rows[0]]);
  for (int64_t column = 0; column < e.width;) {
    const bool wide = column + kTileVectors * kWidth <= e.width;
    for (int64_t p = task.begin; p < end; p += kTileRows) {
      const int64_t rows = least(kTileRows, end - p);
      (wide ? kRowTiles<Element, kTileVectors> : kRowTiles<Element, 1>)[rows - 1](e, task, p, column);
    }
    column += wide ? kTileVectors * kWidth : kWidth;
  }
}

template <class Element>
void tokens_of(const Embedding& e, const EmbeddingTask& task, float* scratch) {
  const int64_t positions = task.end - task.begin;
  const bool updated = task.adapter >= 0;
  if (updated && !e.delta && task.row_count == 1 && e.width % kWidth == 0) return row_of<Element>(e, task);
  for (int64_t column = 0; column < e.width; column += kBlockColumns) {
    const int64_t count = least(kBlockColumns, e.width - column);
    const float* update = scratch;
    int64_t stride = least(kBlockColumns, e.columns - column);
    if (updated && e.delta) {
      update = e.delta + (task.adapter * e.positions + task.begin) * e.width + column;
      stride = e.width;
    } else if (updated) {
      low_rank_update<Element>(e, task, column, stride, scratch);
    }
    const auto token_of = [&](int64_t i) {
      return task.begin + i % positions + (updated ? e.offsets[task.rows[i / positions]] : 0);
    };
    const auto source = [&](int64_t i) {
      return table_row<Element>(e, task.rows[i / positions], token_of(i)) + column;
    };
    const int64_t end = task.row_count * positions;
    for (int64_t i = 0; i < end; ++i) {
      if (token_of(i) >= e.length) continue;
      const Element* from = source(i);
      const Element* ahead = i + kAhead < end && token_of(i + kAhead) < e.length ? source(i + kAhead) : from;
      Element* to =
          out_row<Element>(e, task.rows[i / positions], token_column(token_of(i), e.first, e.virtual_tokens)) + column;
      if (updated) {
        write_row<true>(from, ahead, e.embed_scale, update + i % positions * stride, count, to);
      } else {
        write_row<false>(from, ahead, e.embed_scale, update, count, to);
      }
    }
  }
}

template <class Element>
void prompt_of(const Embedding& e, int64_t row, int64_t adapter) {
  Element* to = out_row<Element>(e, row, e.first);
  const int64_t count = e.virtual_tokens * e.width;
  if (adapter < 0) {
    std::memset(to, 0, count * sizeof(Element));
  } else {
    const float* from = e.prompt + adapter * count;
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to + i);
  }
}

template <class Element>
void add(const Element* row, int64_t count, bool first, float* __restrict sums) {
  if (first) {
    for (int64_t d = 0; d < count; ++d) sums[d] = widen(row[d]);
  } else {
    for (int64_t d = 0; d < count; ++d) sums[d] += widen(row[d]);
  }
}

template <class Element>
void sum_of(const GradientRows& g, const GradientTask& task) {
  float* const sums = task.prompt ? g.grad_prompt + task.adapter * g.virtual_tokens * g.width
                                  : g.grad_delta + task.adapter * g.positions * g.width;
  for (int64_t p = task.begin; p < task.end; ++p) {
    float* const to = sums + p * g.width;
    bool first = true;
    for (int64_t r = 0; r < task.row_count; ++r) {
      const int64_t row = task.rows[r];
      const int64_t token = p + g.offsets[row];
      if (!task.prompt && token >= g.length) continue;
      const int64_t column = task.prompt ? g.first + p : token_column(token, g.first, g.virtual_tokens);
      add(static_cast<const Element*>(g.grad) + row * g.batch_stride + column * g.column_stride, g.width, first, to);
      first = false;
    }
    if (first) std::memset(to, 0, g.width * sizeof(float));
  }
}

constexpr int64_t kSumColumns = 256;  // columns of a gradient at a time: kLowRankPositions rows of them fit in L1

// sums[p][d] over the batch for `count` columns, and 0 for the rest up to `columns`; returns whether any row
// contributed.
template <class Element>
bool sum_block(const GradientRows& g, const LowRankTask& task, int64_t begin, int64_t end, int64_t column,
               int64_t count, int64_t columns, float* sums) {
  bool any = false;
  for (int64_t p = begin; p < end; ++p, sums += columns) {
    bool first = true;
    for (int64_t r = 0; r < task.row_count; ++r) {
      const int64_t row = task.rows[r], token = p + g.offsets[row];
      if (token >= g.length) continue;
      const int64_t at =
          row * g.batch_stride + token_column(token, g.first, g.virtual_tokens) * g.column_stride + column;
      add(static_cast<const Element*>(g.grad) + at, count, first, sums);
      first = false;
    }
    std::memset(first ? sums : sums + count, 0, (first ? columns : columns - count) * sizeof(float));
    any |= !first;
  }
  return any;
}

// The update's gradient exists one block at a time: kLowRankPositions rows, kSumColumns columns. Its contribution to
// a's gradient is kept until all columns are done, and its contribution to b's gradient is added to `partial`.
template <class Element>
void low_rank_of(const GradientRows& g, const LowRank& l, const LowRankTask& task, float* scratch) {
  float* const sums = scratch;
  float* const grad_a = sums + kLowRankPositions * kSumColumns;
  float ones[kMaxRank];
  for (float& one : ones) one = 1;
  bool first_of_b = true;
  for (int64_t begin = task.begin; begin < task.end; begin += kLowRankPositions) {
    const int64_t end = least(begin + kLowRankPositions, task.end), positions = end - begin;
    bool any = false;
    for (int64_t column = 0; column < g.width; column += kSumColumns) {
      const int64_t count = least(kSumColumns, g.width - column), columns = least(kSumColumns, l.columns - column);
      any = sum_block<Element>(g, task, begin, end, column, count, columns, sums);
      if (!any) break;
      if (l.b) {
        const float* b = l.b + (task.adapter * g.width + column) * l.lanes;
        accumulate<Float32Lanes>(Weights<true>{sums, columns}, {b, l.lanes}, count, column ? ones : nullptr, grad_a,
                                 positions, l.lanes);
      }
      if (l.a) {
        const float* a = l.a + (task.adapter * g.positions + begin) * l.rank;
        const float* rescale = first_of_b ? nullptr : ones;
        accumulate<Float32Lanes>(Weights<false>{a, l.rank}, {sums, columns}, positions, rescale, task.partial + column,
                                 l.rank, columns, l.columns);
      }
    }
    first_of_b &= !any;
    if (l.b) {
      for (int64_t p = begin; p < end; ++p) {
        float* to = l.grad_a + (task.adapter * g.positions + p) * l.rank;
        for (int64_t r = 0; r < l.rank; ++r) to[r] = any ? l.scale * grad_a[(p - begin) * l.lanes + r] : 0;
      }
    }
  }
  if (l.a && first_of_b) std::memset(task.partial, 0, l.rank * l.columns * sizeof(float));
}

void reduce(const float* partials, int64_t parts, const LowRank& l, int64_t width, float* to) {
  for (int64_t r = 0; r < l.rank; ++r) {
    for (int64_t d = 0; d < width; ++d) {
      float sum = partials[r * l.columns + d];
      for (int64_t part = 1; part < parts; ++part) sum += partials[(part * l.rank + r) * l.columns + d];
      to[r * width + d] = l.scale * sum;
    }
  }
}

template <class F>
void with_element(Storage storage, const F& f) {
  storage == Storage::float32 ? f(float{}) : f(uint16_t{});
}

void tokens(const Embedding& e, const EmbeddingTask& task, float* scratch) {
  with_element(e.storage, [&](auto element) { tokens_of<decltype(element)>(e, task, scratch); });
}

void prompt(const Embedding& e, int64_t row, int64_t adapter) {
  with_element(e.storage, [&](auto element) { prompt_of<decltype(element)>(e, row, adapter); });
}

void sum(const GradientRows& g, const GradientTask& task) {
  with_element(g.storage, [&](auto element) { sum_of<decltype(element)>(g, task); });
}

void low_rank(const GradientRows& g, const LowRank& l, const LowRankTask& task, float* scratch) {
  with_element(g.storage, [&](auto element) { low_rank_of<decltype(element)>(g, l, task, scratch); });
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kEmbeddingKernels, capability)
extern const EmbeddingKernels KERNELS(CPU_CAPABILITY) = {kTaskPositions * kBlockColumns,
                                                         kLowRankPositions * (kSumColumns + kMaxRank),
                                                         tokens,
                                                         prompt,
                                                         sum,
                                                         low_rank,
                                                         reduce};
