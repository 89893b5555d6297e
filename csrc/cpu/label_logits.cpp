// label_logits and its backward on the CPU: checks and division into tasks.

#include "label_logits.h"

#include <cstring>

#include "host.h"
#include "storage.h"

namespace {

constexpr int64_t kTaskWork = 1 << 19;  // multiplications per task that are worth waking a thread

struct Texts {
  int64_t begin, end;
};

// Calls f(begin, end) in parallel, each for a few texts.
template <class F>
void for_texts(int64_t batch, int64_t work_per_text, const F& f) {
  const int64_t per_task = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, work_per_text));
  std::vector<Texts> tasks;
  for (int64_t b = 0; b < batch; b += per_task) tasks.push_back({b, std::min(b + per_task, batch)});
  for_each_task(tasks, [&](const Texts& texts, const Texts*) { f(texts.begin, texts.end); });
}

// Returns the (C, w) ids, row by row; each must lie in [-1, rows of the table).
std::vector<int64_t> word_ids(const Tensor& label_ids, int64_t table_rows) {
  const bool is_long = label_ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(label_ids.is_cpu() && label_ids.dim() == 2, "label_ids must be a (C, w) CPU tensor");
  STD_TORCH_CHECK(is_long || label_ids.scalar_type() == ScalarType::Int, "label_ids must be int32 or int64");
  std::vector<int64_t> ids(label_ids.numel());
  const int64_t words = label_ids.size(1);
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t at = i / words * label_ids.stride(0) + i % words * label_ids.stride(1);
    ids[i] = is_long ? static_cast<const int64_t*>(label_ids.const_data_ptr())[at]
                     : static_cast<const int32_t*>(label_ids.const_data_ptr())[at];
    STD_TORCH_CHECK(-1 <= ids[i] && ids[i] < table_rows, "label_ids must lie in [-1, ", table_rows, "), got ", ids[i]);
  }
  return ids;
}

WordRows word_rows(const Tensor& weight, const std::vector<int64_t>& ids) {
  const bool fits =
      weight.is_cpu() && (weight.scalar_type() == ScalarType::Float || weight.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(fits, "weight must be float32 or bfloat16, on the CPU");
  STD_TORCH_CHECK(weight.dim() == 2 && (weight.stride(1) == 1 || weight.size(1) <= 1),
                  "weight must be (V, H) with dense rows");
  const Storage storage = weight.scalar_type() == ScalarType::Float ? Storage::float32 : Storage::bfloat16;
  return {weight.const_data_ptr(),          weight.stride(0), storage, ids.data(),
          static_cast<int64_t>(ids.size()), weight.size(1)};
}

std::vector<float> bias_of_words(const Tensor& bias, const std::vector<int64_t>& ids, int64_t table_rows) {
  const bool is_float = bias.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(bias.is_cpu() && bias.dim() == 1 && bias.size(0) == table_rows, "bias must be a CPU tensor (",
                  table_rows, ",)");
  STD_TORCH_CHECK(is_float || bias.scalar_type() == ScalarType::BFloat16, "bias must be float32 or bfloat16");
  std::vector<float> values(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t at = std::max<int64_t>(ids[i], 0) * bias.stride(0);
    if (is_float) {
      values[i] = static_cast<const float*>(bias.const_data_ptr())[at];
    } else {
      const uint32_t bits = uint32_t(static_cast<const uint16_t*>(bias.const_data_ptr())[at]) << 16;
      std::memcpy(&values[i], &bits, sizeof bits);
    }
  }
  return values;
}

Tensor forward(const Tensor& hidden, const Tensor& weight, const Tensor& label_ids, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& positions) {
  const int64_t last = hidden.dim() - 1;
  STD_TORCH_CHECK(hidden.is_cpu() && last == (positions ? 2 : 1),
                  "hidden must be a CPU tensor, (B, S, H) with positions or (B, H) without");
  const bool dense = hidden.size(last) == weight.size(1) && (hidden.stride(last) == 1 || hidden.size(last) <= 1);
  STD_TORCH_CHECK(dense, "hidden must have dense rows of ", weight.size(1));
  STD_TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "hidden must have weight's dtype");
  const int64_t batch = hidden.size(0);
  const auto ids = word_ids(label_ids, weight.size(0));
  const WordRows words = word_rows(weight, ids);
  const auto biases = bias ? bias_of_words(*bias, ids, weight.size(0)) : std::vector<float>();
  const auto at = positions ? to_vector(*positions, batch, "positions") : std::vector<int64_t>(batch, 0);
  for (const int64_t position : at) {
    STD_TORCH_CHECK(!positions || (0 <= position && position < hidden.size(1)), "positions must lie in [0, ",
                    hidden.size(1), "), got ", position);
  }
  Tensor out = torch::stable::new_empty(hidden, {batch, label_ids.size(0), label_ids.size(1)}, ScalarType::Float);
  const auto to = static_cast<float*>(out.mutable_data_ptr());
  const auto from = static_cast<const char*>(hidden.const_data_ptr());
  const int64_t element = words.storage == Storage::float32 ? 4 : 2;
  const int64_t token_stride = positions ? hidden.stride(1) : 0;
  const LabelLogitKernels& kernel = KERNELS_FOR_THIS_CPU(kLabelLogitKernels);
  std::vector<const void*> rows(batch);
  for (int64_t b = 0; b < batch; ++b) rows[b] = from + (b * hidden.stride(0) + at[b] * token_stride) * element;
  for_texts(batch, words.words * words.width, [&](int64_t begin, int64_t end) {
    kernel.logits(words, &rows[begin], end - begin, bias ? biases.data() : nullptr, to + begin * words.words);
  });
  return out;
}

Tensor backward(const Tensor& grad_words, const Tensor& weight, const Tensor& label_ids) {
  const auto ids = word_ids(label_ids, weight.size(0));
  const WordRows words = word_rows(weight, ids);
  const bool fits = grad_words.is_cpu() && grad_words.scalar_type() == ScalarType::Float &&
                    grad_words.is_contiguous() && grad_words.dim() == 3;
  STD_TORCH_CHECK(fits && grad_words.size(1) == label_ids.size(0) && grad_words.size(2) == label_ids.size(1),
                  "grad_words must be a contiguous float32 CPU tensor (B, ", label_ids.size(0), ", ", label_ids.size(1),
                  ")");
  const int64_t batch = grad_words.size(0);
  Tensor out = torch::stable::new_empty(grad_words, {batch, words.width}, ScalarType::Float);
  const auto to = static_cast<float*>(out.mutable_data_ptr());
  const auto from = static_cast<const float*>(grad_words.const_data_ptr());
  const LabelLogitKernels& kernel = KERNELS_FOR_THIS_CPU(kLabelLogitKernels);
  for_texts(batch, words.words * words.width, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) kernel.backward(words, from + b * words.words, to + b * words.width);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("label_logits_cpu", TORCH_BOX(&forward));
  m.impl("label_logits_backward_cpu", TORCH_BOX(&backward));
}

}  // namespace
