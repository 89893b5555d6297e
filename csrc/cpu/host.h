// Shared code of the native CPU operators: selection of the kernel for this CPU, memory, threads, tensors.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string_view>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Capability { kDefault, kAVX2, kAVX512, kAVX512BF16 };

// PEFT_KERNELS_CPU_CAPABILITY=default, avx2, avx512 or avx512bf16 selects a lower one, for tests.
Capability find_capability() {
  const char* wanted = std::getenv("PEFT_KERNELS_CPU_CAPABILITY");
  [[maybe_unused]] const auto may = [&](std::string_view name) { return !wanted || name == wanted; };
#ifdef HAVE_X86_KERNELS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (may("avx512bf16") && avx512 && __builtin_cpu_supports("avx512bf16")) return kAVX512BF16;
  if (may("avx512") && avx512) return kAVX512;
  if (may("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAVX2;
#endif
  return kDefault;
}

// Selects, among kernels compiled once per instruction set (setup.py), those for this CPU.
#ifdef HAVE_X86_KERNELS
#define KERNELS_FOR_THIS_CPU(name) choose_kernels({&name##Default, &name##AVX2, &name##AVX512, &name##AVX512BF16})
#else
#define KERNELS_FOR_THIS_CPU(name) choose_kernels({&name##Default})
#endif

template <class Kernels>
const Kernels& choose_kernels(std::initializer_list<const Kernels*> by_capability) {
  static const Capability capability = find_capability();
  return *by_capability.begin()[capability];
}

// Memory kept between calls: page faults of fresh memory would cost a decode step a tenth of its time.
class Buffer {
 public:
  float* at_least(int64_t floats) {
    if (capacity_ < floats) {
      memory_.reset(static_cast<float*>(::operator new[](floats * sizeof(float), kLine)));
      capacity_ = floats;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, kLine); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t capacity_ = 0;
};

inline std::vector<int64_t> to_vector(const Tensor& x, int64_t count, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 1 && x.size(0) == count, name, " must be a CPU tensor of ", count,
                  " elements");
  std::vector<int64_t> values(count);
  const int64_t stride = x.stride(0);
  if (x.scalar_type() == ScalarType::Int) {
    const auto data = static_cast<const int32_t*>(x.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[i] = data[i * stride];
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long, name, " must be int32 or int64");
    const auto data = static_cast<const int64_t*>(x.const_data_ptr());
    for (int64_t i = 0; i < count; ++i) values[i] = data[i * stride];
  }
  return values;
}

// Returns an uninitialised tensor laid out in memory as (batch, tokens, heads, ...).
inline Tensor token_major(const std::vector<int64_t>& sizes, ScalarType dtype) {
  const int64_t width = sizes.size() == 4 ? sizes[3] : 1;
  const int64_t strides[] = {sizes[1] * sizes[2] * width, width, sizes[1] * width, 1};
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, shim_dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void copy_strides(const Tensor& x, int64_t* strides) {
  const auto from = x.strides();
  std::copy(from.begin(), from.end(), strides);
}

// Calls f(task, the task that this thread is likely to take next, or null). Every thread takes the next task when it
// finishes one, because inputs differ in length. The result of a task does not depend on the thread.
template <class Task, class F>
void for_each_task(const std::vector<Task>& tasks, const F& f) {
  const int64_t count = tasks.size(), threads = torch::stable::get_num_threads();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, threads), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(tasks[i], i + threads < count ? &tasks[i + threads] : nullptr);
  });
}

}  // namespace
