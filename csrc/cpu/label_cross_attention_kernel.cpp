// The attention of a few dozen queries over the features of one row of the batch, compiled once per instruction set
// with -DCPU_CAPABILITY=<its name> (setup.py).
//
// Scores are laid out as [token][query]: queries are the vector dimension and each element of a feature is broadcast,
// so features are read in their memory layout and the softmax has no sum across lanes. Pooling has the features' width
// as vector dimension. Long sums are computed in parts: the rounding errors of one long chain would be larger than
// PyTorch's.

#include <math.h>  // not <cmath>: its inline functions would be shared between instruction sets

#include "amx.h"
#include "label_cross_attention.h"
#include "tiles.h"

namespace {

constexpr int64_t kStreams = 2 * kAmxTile;         // tokens read in parallel, each a prefetch stream of the hardware
constexpr int64_t kTokens = 128;                   // tokens pooled at a time
constexpr int64_t kSumLanes = 128;                 // lanes per part of a score's sum
constexpr int64_t kPanel = kTileVectors * kWidth;  // columns pooled at a time: those of kTokens features fit in L1

// Transposes x: x[i][j] becomes x[j][i].
inline void transpose(Float<kWidth>* x) {
  Bits<kWidth> low, high;  // lane indices into the concatenation of two vectors
  for (int i = 0; i < kWidth; ++i) {
    low[i] = i / 2 + (i % 2) * kWidth;
    high[i] = low[i] + kWidth / 2;
  }
  for (int stage = 1; stage < kWidth; stage *= 2) {
    Float<kWidth> y[kWidth];
    unrolled<kWidth / 2, 1>([&](int i, int) {
#ifdef __clang__
      for (int j = 0; j < kWidth; ++j) {
        y[2 * i][j] = j % 2 ? x[i + kWidth / 2][j / 2] : x[i][j / 2];
        y[2 * i + 1][j] = j % 2 ? x[i + kWidth / 2][(j + kWidth) / 2] : x[i][(j + kWidth) / 2];
      }
#else
      y[2 * i] = __builtin_shuffle(x[i], x[i + kWidth / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + kWidth / 2], high);
#endif
    });
    unrolled<kWidth, 1>([&](int i, int) { x[i] = y[i]; });
  }
}

// One lane of a row of `width` elements; elements past the last are 0.
template <class Lanes, class Element>
float lane_of(const Element* row, int64_t lane, int64_t width) {
  if constexpr (Lanes::kElements == 1) {
    return widen(row[lane]);
  } else {
    const Element pair[2] = {row[2 * lane], 2 * lane + 1 < width ? row[2 * lane + 1] : Element(0)};
    float bits;
    std::memcpy(&bits, pair, sizeof bits);
    return bits;
  }
}

template <class Lanes, class Element>
Float<kWidth> load_lanes(const Element* row, int64_t lane) {
  if constexpr (Lanes::kElements == 1) {
    return load_elements<kWidth>(row + lane);
  } else {
    return load<kWidth>(reinterpret_cast<const float*>(row + 2 * lane));
  }
}

struct Scratch {
  float *ones, *sums, *features, *panel, *scores, *weights;

  Scratch(float* memory, int64_t queries, int64_t padded, int64_t lanes, int64_t tokens)
      : ones(memory),
        sums(ones + most(queries)),
        features(sums + padded * kPanel),
        panel(features + kStreams * round_up(lanes, 16)),
        scores(panel + kTokens * kPanel),
        weights(scores + tokens * padded) {
    for (int64_t i = 0; i < most(queries); ++i) ones[i] = 1;
  }

  static int64_t most(int64_t queries) { return round_up(queries > kTokens ? queries : kTokens, 16); }

  static int64_t floats(int64_t queries, int64_t padded, int64_t lanes, int64_t tokens) {
    return most(queries) + padded * kPanel + kStreams * round_up(lanes, 16) + kTokens * kPanel + 2 * tokens * padded;
  }
};

// Element: type of the features. Query: type of queries and pooled features. Lanes: how sums over both are computed.
template <class Element, class Query, class Lanes>
class Attend {
 public:
  explicit Attend(const LabelAttention& attention) : a(attention) {}

  int64_t packed_floats() const { return lanes * padded; }
  int64_t scratch_floats(int64_t longest) const {
    return Scratch::floats(queries, padded, lanes, round_up(longest, kStreams));
  }

  // packed[lane][query]
  void pack(const void* from, int64_t batch, int64_t row, float* packed) const {
    for (int64_t q = 0; q < padded; q += kWidth) {
      const Query* rows[kWidth];
      for (int64_t i = 0; i < kWidth; ++i)
        rows[i] = q + i < queries ? at(static_cast<const Query*>(from), batch, row, q + i) : nullptr;
      int64_t lane = 0;
      for (; (lane + kWidth) * Lanes::kElements <= a.width; lane += kWidth) {
        Float<kWidth> x[kWidth];
        for (int i = 0; i < kWidth; ++i) x[i] = rows[i] ? load_lanes<Lanes>(rows[i], lane) : Float<kWidth>{};
        transpose(x);
        for (int i = 0; i < kWidth; ++i) store<kWidth>(packed + (lane + i) * padded + q, x[i]);
      }
      for (; lane < lanes; ++lane) {
        for (int64_t i = 0; i < kWidth; ++i)
          packed[lane * padded + q + i] = rows[i] ? lane_of<Lanes>(rows[i], lane, a.width) : 0;
      }
    }
  }

  void forward(const LabelRow& row, const float* packed, void* pooled, float* weights, float* memory) const {
    const Scratch scratch(memory, queries, padded, lanes, round_up(row.length, kStreams));
    products(row, packed, scratch.scores, scratch);
    softmax(scratch.scores, row.length);
    if (weights) {
      for (int64_t t = 0; t < row.length; ++t)
        std::memcpy(weights + t * queries, scratch.scores + t * padded, queries * sizeof(float));
    }
    pair(row, scratch);
    for (int64_t column = 0; column < columns; column += kPanel) {
      const int64_t count = least(kPanel, columns - column);
      pool(row, scratch.scores, column, count, scratch.sums, count, true, scratch);
      for (int64_t q = 0; q < queries; ++q) {
        auto to = const_cast<Query*>(at(static_cast<const Query*>(pooled), a.batch, row.row, q)) + column;
        narrow<Lanes>(scratch.sums + q * count, least(count, a.width - column), to);
      }
    }
  }

  void backward(const LabelRow& row, const float* packed, const float* weights, float* sums, float* memory) const {
    const Scratch scratch(memory, queries, padded, lanes, round_up(row.length, kStreams));
    products(row, packed, scratch.scores, scratch);
    for (int64_t t = 0; t < row.length; ++t) {
      std::memcpy(scratch.weights + t * padded, weights + t * queries, queries * sizeof(float));
      for (int64_t q = queries; q < padded; ++q) scratch.weights[t * padded + q] = 0;
    }
    for (int64_t q = 0; q < padded; q += kWidth) {
      float *grad = scratch.scores + q, *weight = scratch.weights + q;
      Float<kWidth> mean = {};
      for (int64_t t = 0; t < row.length; ++t)
        mean += load<kWidth>(weight + t * padded) * load<kWidth>(grad + t * padded);
      for (int64_t t = 0; t < row.length; ++t) {
        const Float<kWidth> centred = load<kWidth>(grad + t * padded) - mean;
        store<kWidth>(grad + t * padded, load<kWidth>(weight + t * padded) * centred * a.scale);
      }
    }
    pair(row, scratch);
    for (int64_t column = 0; column < a.width; column += kPanel) {
      const int64_t count = least(kPanel, columns - column), given = least(count, a.width - column);
      const bool whole = given == count && !a.amx;
      pool(row, scratch.scores, column, count, whole ? sums + column : scratch.sums, whole ? a.width : count, !whole,
           scratch);
      if (whole) continue;
      for (int64_t q = 0; q < queries; ++q) {
        for (int64_t i = 0; i < given; ++i) sums[q * a.width + column + i] += scratch.sums[q * count + i];
      }
    }
  }

 private:
  const Query* at(const Query* data, int64_t batch, int64_t row, int64_t q) const {
    return data + ((q / a.slots * batch + row) * a.slots + q % a.slots) * a.width;
  }

  const Element* feature(const LabelRow& row, int64_t token) const {
    return static_cast<const Element*>(row.features) + token * row.token_stride;
  }

  // `count` features as lanes along their width; not copied if memory already has that layout.
  Packed rows_of(const LabelRow& row, int64_t token, int64_t count, float* to) const {
    constexpr bool same_lanes = sizeof(Element) * Lanes::kElements == sizeof(float);
    const bool whole = !a.amx || count % kAmxTile == 0;  // AMX reads whole tiles
    if (same_lanes && whole && a.width % Lanes::kElements == 0 && row.token_stride % Lanes::kElements == 0) {
      return {reinterpret_cast<const float*>(feature(row, token)), row.token_stride / Lanes::kElements};
    }
    for (int64_t t = 0; t < count; ++t) {
      const Element* from = feature(row, token + t);
      int64_t lane = 0;
      for (; (lane + kWidth) * Lanes::kElements <= a.width; lane += kWidth)
        store<kWidth>(to + t * lanes + lane, load_lanes<Lanes>(from, lane));
      for (; lane < lanes; ++lane) to[t * lanes + lane] = lane_of<Lanes>(from, lane, a.width);
    }
    return {to, lanes};
  }

  // out[token][query] = sums over the width.
  void products(const LabelRow& row, const float* packed, float* out, const Scratch& scratch) const {
    for (int64_t token = 0; token < row.length; token += kStreams) {
      const int64_t count = least(kStreams, row.length - token);
      const Packed features = rows_of(row, token, count, scratch.features);
#ifdef __AVX512BF16__
      if (a.amx) {
        amx_products(features, {packed, padded}, lanes, false, out + token * padded, round_up(count, kAmxTile), padded,
                     padded);
        continue;
      }
#endif
      for (int64_t lane = 0; lane < lanes; lane += kSumLanes) {
        const Weights<true> part{features.data + lane, features.stride};
        const Packed those{packed + lane * padded, padded};
        accumulate<Lanes>(part, those, least(kSumLanes, lanes - lane), lane ? scratch.ones : nullptr,
                          out + token * padded, count, padded);
      }
    }
  }

  // Softmax over the tokens, in place.
  void softmax(float* scores, int64_t length) const {
    for (int64_t q = 0; q < padded; q += kWidth) {
      float* column = scores + q;
      Float<kWidth> largest = Float<kWidth>{} - INFINITY, total = {};
      for (int64_t t = 0; t < length; ++t) largest = maximum<kWidth>(load<kWidth>(column + t * padded), largest);
      for (int64_t t = 0; t < length; ++t) {
        const Float<kWidth> weight = exp<kWidth>((load<kWidth>(column + t * padded) - largest) * a.scale);
        store<kWidth>(column + t * padded, weight);
        total += weight;
      }
      const Float<kWidth> factor = 1.0f / total;
      for (int64_t t = 0; t < length; ++t)
        store<kWidth>(column + t * padded, load<kWidth>(column + t * padded) * factor);
    }
  }

  // Packs the weights of two tokens into each lane, in place; for AMX, transposed so that lanes are contiguous.
  void pair(const LabelRow& row, const Scratch& scratch) const {
    if constexpr (Lanes::kElements == 2) {
      float* weights = scratch.scores;
      for (int64_t t = 0; t < row.length; t += 2) {
        for (int64_t q = 0; q < padded; q += kWidth) {
          const Float<kWidth> second =
              t + 1 < row.length ? load<kWidth>(weights + (t + 1) * padded + q) : Float<kWidth>{};
          store<kWidth>(weights + t / 2 * padded + q,
                        Lanes::template pair<kWidth>(load<kWidth>(weights + t * padded + q), second));
        }
      }
      if (!a.amx) return;
      const int64_t given = lanes_of<Lanes>(row.length), tiled = lanes_of_row(row);
      for (int64_t q = 0; q < padded; q += kWidth) {
        for (int64_t lane = 0; lane < tiled; lane += kWidth) {
          Float<kWidth> x[kWidth];
          for (int i = 0; i < kWidth; ++i)
            x[i] = lane + i < given ? load<kWidth>(weights + (lane + i) * padded + q) : Float<kWidth>{};
          transpose(x);
          for (int i = 0; i < kWidth; ++i) store<kWidth>(scratch.weights + (q + i) * tiled + lane, x[i]);
        }
      }
    }
  }

  // Lanes of a query's weights, padded to whole AMX tiles.
  int64_t lanes_of_row(const LabelRow& row) const { return round_up(lanes_of<Lanes>(row.length), kAmxTile); }

  // sums[query][column] += weights (lane, query) times columns of the features; with `fresh`, sums are overwritten.
  void pool(const LabelRow& row, const float* weights, int64_t column, int64_t count, float* sums, int64_t stride,
            bool fresh, const Scratch& scratch) const {
    for (int64_t token = 0; token < row.length; token += kTokens) {
      const int64_t tokens = least(kTokens, row.length - token), these = lanes_of<Lanes>(tokens);
      for (int64_t t = 0; t < tokens; t += Lanes::kElements) {
        const Element* first = feature(row, token + t) + column;
        pack_columns(first, t + 1 < tokens ? first + row.token_stride : nullptr, least(count, a.width - column), count,
                     scratch.panel + t / Lanes::kElements * count);
      }
      const bool add = !fresh || token != 0;
#ifdef __AVX512BF16__
      if (a.amx) {
        const int64_t tiled = round_up(these, kAmxTile);
        std::memset(scratch.panel + these * count, 0, (tiled - these) * count * sizeof(float));
        const Packed part{scratch.weights + token / Lanes::kElements, lanes_of_row(row)};
        amx_products(part, {scratch.panel, count}, tiled, add, sums, padded, count, stride);
        continue;
      }
#endif
      const Weights<false> part{weights + token / Lanes::kElements * padded, padded};
      accumulate<Lanes>(part, Packed{scratch.panel, count}, these, add ? scratch.ones : nullptr, sums, queries, count,
                        stride);
    }
    if (fresh && row.length == 0) std::memset(sums, 0, queries * stride * sizeof(float));
  }

  // `given` elements of a row, or their pairs with those of `next` (null after the last row), padded with 0 to `count`.
  static void pack_columns(const Element* row, const Element* next, int64_t given, int64_t count, float* to) {
    int64_t i = 0;
    if constexpr (Lanes::kElements == 1) {
      for (; i + kWidth <= given; i += kWidth) store<kWidth>(to + i, load_elements<kWidth>(row + i));
      for (; i < given; ++i) to[i] = widen(row[i]);
    } else {
      const auto pair = [&](uint32_t first, uint32_t second) {
        const uint32_t bits = first | second << 16;
        std::memcpy(to + i, &bits, sizeof bits);
      };
      if (next) {
        for (; i < given; ++i) pair(row[i], next[i]);
      } else {
        for (; i < given; ++i) pair(row[i], 0);
      }
    }
    for (; i < count; ++i) to[i] = 0;
  }

  const LabelAttention& a;
  const int64_t queries = a.heads * a.slots;
  const int64_t padded = round_up(queries, kWidth);
  const int64_t lanes = lanes_of<Lanes>(a.width);
  const int64_t columns = round_up(a.width, kWidth);
};

template <class F>
void with_storage(const LabelAttention& a, const F& f) {
#ifdef __AVX512BF16__
  using Bfloat16Sums = Bfloat16Lanes;
#else
  using Bfloat16Sums = Float32Lanes;
#endif
  if (a.features == Storage::float32) {
    f(Attend<float, float, Float32Lanes>{a});
  } else if (a.queries == Storage::float32) {
    f(Attend<uint16_t, float, Float32Lanes>{a});
  } else {
    f(Attend<uint16_t, uint16_t, Bfloat16Sums>{a});
  }
}

int64_t packed_floats(const LabelAttention& a) {
  int64_t floats = 0;
  with_storage(a, [&](const auto& attend) { floats = attend.packed_floats(); });
  return floats;
}

int64_t scratch_floats(const LabelAttention& a, int64_t longest) {
  int64_t floats = 0;
  with_storage(a, [&](const auto& attend) { floats = attend.scratch_floats(longest); });
  return floats;
}

void pack(const LabelAttention& a, const void* queries, int64_t batch, int64_t row, float* packed) {
  with_storage(a, [&](const auto& attend) { attend.pack(queries, batch, row, packed); });
}

void forward(const LabelAttention& a, const LabelRow& row, const float* packed, void* pooled, float* weights,
             float* scratch) {
  with_storage(a, [&](const auto& attend) { attend.forward(row, packed, pooled, weights, scratch); });
}

void backward(const LabelAttention& a, const LabelRow& row, const float* packed, const float* weights, float* sums,
              float* scratch) {
  with_storage(a, [&](const auto& attend) { attend.backward(row, packed, weights, sums, scratch); });
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kLabelKernels, capability)
extern const LabelKernels KERNELS(CPU_CAPABILITY) = {packed_floats, scratch_floats, pack, forward, backward};
