// Which devices run the library's kernels.

#include <cuda_runtime.h>

// Returns why a device does not run them, or null. It opens no context on the device.
extern "C" __attribute__((visibility("default"))) const char* peft_kernels_cuda_device_error(int device) {
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};  // ascending; the last is in PTX too, for newer devices
  int major, minor;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return 100 * major + 10 * minor < architectures[0] ? "it is older than the architectures in the library" : nullptr;
}
