// The part of label_cross_attention between its small matmuls, on the CPU, forward and backward: checks and division
// into tasks.

#include "label_cross_attention.h"

#include <cstring>
#include <tuple>

#include "host.h"

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

thread_local Buffer label_scratch;   // used by every thread
thread_local Buffer packed_of_row;   // used by every thread
thread_local Buffer packed_of_call;  // the calling thread's buffer, read by all
thread_local Buffer sums_of_groups;  // the calling thread's buffer, written by all

Storage storage_of(const Tensor& x, const char* name) {
  const bool fits = x.is_cpu() && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(fits, name, " must be float32 or bfloat16, on the CPU");
  return x.scalar_type() == ScalarType::Float ? Storage::float32 : Storage::bfloat16;
}

// Requests permission for AMX's registers, which Linux grants per process.
bool get_amx() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequest = 0x1023, kTiles = 18;      // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // bfloat16 and tiles
  unsigned a, b, c, d;
  if (std::getenv("PEFT_KERNELS_CPU_CAPABILITY") || find_capability() != kAVX512BF16) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kNeeded) == kNeeded &&
         syscall(SYS_arch_prctl, kRequest, kTiles) == 0;
#else
  return false;
#endif
}

// A call's sizes, its rows, and the first token of each row's weights.
struct Problem {
  LabelAttention attention;
  std::vector<LabelRow> rows;
  std::vector<int64_t> first_token, tokens;  // per row, padding included
  int64_t longest = 0;

  int64_t queries() const { return attention.heads * attention.slots; }
  int64_t row_floats() const { return queries() * attention.width; }
};

// queries: (heads, batch or 1, slots, width).
Problem check(const Tensor& queries, const Tensor& features, const std::optional<Tensor>& lengths,
              const std::optional<Tensor>& offsets, double scale) {
  const Storage of_queries = storage_of(queries, "queries"), of_features = storage_of(features, "features");
  STD_TORCH_CHECK(queries.dim() == 4 && queries.is_contiguous(), "queries must be (heads, B, slots, d), contiguous");
  STD_TORCH_CHECK(of_queries == of_features || of_queries == Storage::float32,
                  "queries must be float32 or as the features are");
  const int64_t width = queries.size(3), dims = features.dim();
  STD_TORCH_CHECK(dims == (offsets ? 2 : 3) && features.size(dims - 1) == width, "features must be (B, n, ", width,
                  "), with offsets (total, ", width, ")");
  STD_TORCH_CHECK(width <= 1 || features.stride(dims - 1) == 1, "features must have dense rows");
  STD_TORCH_CHECK(!lengths || !offsets, "lengths and offsets exclude each other");
  const int64_t batch = offsets ? offsets->numel() - 1 : features.size(0), padded = features.size(dims - 2);
  STD_TORCH_CHECK(batch >= 0 && (queries.size(1) == 1 || queries.size(1) == batch), "queries must have 1 row or ",
                  batch);
  static const bool have_amx = get_amx();
  const bool amx = have_amx && of_queries == Storage::bfloat16 && width % 32 == 0 && features.stride(dims - 2) % 2 == 0;
  Problem p{{queries.size(0), queries.size(2), batch, width, static_cast<float>(scale), of_features, of_queries, amx},
            {},
            {},
            {}};
  const auto begin = offsets ? to_vector(*offsets, batch + 1, "offsets") : std::vector<int64_t>();
  const auto given = lengths ? to_vector(*lengths, batch, "lengths") : std::vector<int64_t>(batch, padded);
  const char* data = static_cast<const char*>(features.const_data_ptr());
  const int64_t token_stride = features.stride(dims - 2), bytes = of_features == Storage::float32 ? 4 : 2;
  if (offsets) STD_TORCH_CHECK(begin[0] == 0 && begin[batch] == padded, "offsets must go from 0 to ", padded);
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t length = offsets ? begin[row + 1] - begin[row] : given[row];
    STD_TORCH_CHECK(0 <= length && length <= padded,
                    offsets ? "offsets must not decrease" : "lengths must lie in [0, n]", ", got ", length);
    const int64_t first = offsets ? begin[row] * token_stride : row * features.stride(0);
    p.rows.push_back({row, data + first * bytes, token_stride, length});
    p.first_token.push_back(offsets ? begin[row] : row * padded);
    p.tokens.push_back(offsets ? length : padded);
    p.longest = std::max(p.longest, length);
  }
  return p;
}

// Returns pooled (heads, B, slots, d) in the queries' dtype, and weights (B, n, heads * slots) or (total, heads *
// slots), float32, empty without keep.
std::tuple<Tensor, Tensor> forward(const Tensor& queries, const Tensor& features, const std::optional<Tensor>& lengths,
                                   const std::optional<Tensor>& offsets, double scale, bool keep) {
  const Problem p = check(queries, features, lengths, offsets, scale);
  const LabelAttention& a = p.attention;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < features.dim(); ++i) sizes.push_back(features.size(i));
  sizes.push_back(p.queries());
  Tensor pooled = torch::stable::new_empty(queries, {a.heads, a.batch, a.slots, a.width});
  Tensor weights = torch::stable::new_empty(queries, keep ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  if (pooled.numel() == 0) return {pooled, weights};
  void* to = pooled.mutable_data_ptr();
  float* kept = keep ? static_cast<float*>(weights.mutable_data_ptr()) : nullptr;
  const void* from = queries.const_data_ptr();
  const LabelKernels& kernel = KERNELS_FOR_THIS_CPU(kLabelKernels);
  const int64_t packed_floats = kernel.packed_floats(a), scratch_floats = kernel.scratch_floats(a, p.longest),
                given = queries.size(1);
  float* shared = nullptr;
  if (given == 1) {
    shared = packed_of_call.at_least(packed_floats);
    kernel.pack(a, from, 1, 0, shared);
  }
  for_each_task(p.rows, [&](const LabelRow& row, const LabelRow*) {
    float* packed = shared;
    if (!shared) {
      packed = packed_of_row.at_least(packed_floats);
      kernel.pack(a, from, given, row.row, packed);
    }
    float* of_row = keep ? kept + p.first_token[row.row] * p.queries() : nullptr;
    kernel.forward(a, row, packed, to, of_row, label_scratch.at_least(scratch_floats));
    if (keep) std::fill_n(of_row + row.length * p.queries(), (p.tokens[row.row] - row.length) * p.queries(), 0.f);
  });
  return {pooled, weights};
}

// Rows [begin, end) whose gradients one task adds up, in order. Groups have about equal numbers of tokens.
struct Group {
  int64_t begin, end;
  float* sums;
};

std::vector<Group> groups_of(const Problem& p, bool shared) {
  const int64_t batch = p.attention.batch, threads = torch::stable::get_num_threads();
  std::vector<Group> groups;
  if (!shared) {
    for (int64_t row = 0; row < batch; ++row) groups.push_back({row, row + 1, nullptr});
    return groups;
  }
  int64_t total = 0, done = 0;
  for (const LabelRow& row : p.rows) total += row.length + 1;
  const int64_t count = std::min(batch, threads > 1 ? 2 * threads : 1);
  for (int64_t row = 0; row < batch; ++row) {
    if (done * count >= static_cast<int64_t>(groups.size()) * total) groups.push_back({row, row, nullptr});
    groups.back().end = row + 1;
    done += p.rows[row].length + 1;
  }
  return groups;
}

// Returns the gradient of the queries in float32: (heads, B, slots, d), or its sum (heads, 1, slots, d) if the rows
// share the queries.
Tensor backward(const Tensor& grad_pooled, const Tensor& features, const Tensor& weights,
                const std::optional<Tensor>& lengths, const std::optional<Tensor>& offsets, double scale, bool shared) {
  const Problem p = check(grad_pooled, features, lengths, offsets, scale);
  const LabelAttention& a = p.attention;
  STD_TORCH_CHECK(grad_pooled.size(1) == a.batch, "grad_pooled must have ", a.batch, " rows");
  const int64_t tokens = features.dim() == 2 ? features.size(0) : a.batch * features.size(1);
  const bool fits = weights.is_cpu() && weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
                    weights.numel() == tokens * p.queries();
  STD_TORCH_CHECK(fits, "weights must be ", tokens * p.queries(), " contiguous float32 on the CPU");
  Tensor grad =
      torch::stable::new_zeros(grad_pooled, {a.heads, shared ? 1 : a.batch, a.slots, a.width}, ScalarType::Float);
  if (grad.numel() == 0 || a.batch == 0) return grad;
  float* to = static_cast<float*>(grad.mutable_data_ptr());
  const void* from = grad_pooled.const_data_ptr();
  const float* kept = static_cast<const float*>(weights.const_data_ptr());
  const LabelKernels& kernel = KERNELS_FOR_THIS_CPU(kLabelKernels);
  const int64_t packed_floats = kernel.packed_floats(a), scratch_floats = kernel.scratch_floats(a, p.longest),
                floats = p.row_floats();
  std::vector<Group> groups = groups_of(p, shared);
  float* sums = sums_of_groups.at_least(groups.size() * floats);
  for (Group& group : groups) {
    group.sums = sums;
    sums += floats;
  }
  for_each_task(groups, [&](const Group& group, const Group*) {
    std::memset(group.sums, 0, floats * sizeof(float));
    for (int64_t row = group.begin; row < group.end; ++row) {
      float* packed = packed_of_row.at_least(packed_floats);
      kernel.pack(a, from, a.batch, row, packed);
      kernel.backward(a, p.rows[row], packed, kept + p.first_token[row] * p.queries(), group.sums,
                      label_scratch.at_least(scratch_floats));
    }
    if (shared) return;
    for (int64_t head = 0; head < a.heads; ++head) {
      const int64_t each = a.slots * a.width;
      std::memcpy(to + (head * a.batch + group.begin) * each, group.sums + head * each, each * sizeof(float));
    }
  });
  if (shared) {
    for (const Group& group : groups) {
      for (int64_t i = 0; i < floats; ++i) to[i] += group.sums[i];
    }
  }
  return grad;
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("label_cross_attention_cpu", TORCH_BOX(&forward));
  m.impl("label_cross_attention_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace
