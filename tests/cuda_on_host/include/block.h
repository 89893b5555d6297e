// Blocks of CUDA threads on the CPU. A thread is a fiber; it runs until it waits for others at a barrier or a warp
// collective. Threads and blocks run in a chosen order. A thread that waits in vain, a lane that is missing from a mask
// and a race are errors that name kernel, block, thread and line.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

using Site = std::source_location;

struct Index {
  unsigned x = 0;
};
extern Index threadIdx, blockIdx, blockDim;

namespace cuda_on_host {

// Runs body() in every thread of every block. Throws std::runtime_error with the first error.
void run(const void* kernel, unsigned blocks, unsigned threads, const std::function<void()>& body);

// Waits for all threads of the block that have not returned.
void barrier(const Site& site);

// Waits for the lanes in `mask`, which must be in the same call; returns the lanes' values.
std::array<uint64_t, 32> exchange(const char* call, unsigned mask, uint64_t value, const Site& site);

// Checks that a shuffle reads from a lane in its mask.
void check_source(unsigned mask, unsigned lane, const Site& site);

// Returns the block's memory of a __shared__ variable, filled with NaN, at an address that is aligned no better than
// declared. `key` identifies the variable.
void* shared_memory(const void* key, size_t size, size_t alignment);

template <class T, size_t alignment, class Key>
T& shared(Key) {
  static const char key = 0;
  return *static_cast<T*>(shared_memory(&key, sizeof(T), alignment > alignof(T) ? alignment : alignof(T)));
}

}  // namespace cuda_on_host
