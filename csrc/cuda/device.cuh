// The device behind the launchers: its tensors, the current stream, the launch. No synchronization.
// tests/cuda_on_host has a file of this name for the CPU.

#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#define DISPATCH_KEY CUDA

namespace peft_kernels {

using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline bool on_device(const Tensor& x) { return x.is_cuda(); }

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// Returns the current stream from libtorch_cuda, which is looked up on first use, so that this file links against a
// torch without CUDA.
inline cudaStream_t current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors(int device) {
  int count;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device");
  return count;
}

template <class Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int device, const Params& params) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "too large for one launch");
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, 0, current_stream(device)>>>(params);
  check_cuda(cudaGetLastError(), "launch");
}

}  // namespace peft_kernels
