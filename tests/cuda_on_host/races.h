// Detection of races between CUDA threads: two accesses to the same memory in one launch, at least one of them a write,
// by different blocks, or by different threads of a block without a __syncthreads between them. The kernels are
// compiled with -fsanitize=thread, which calls a function at every access; races.cpp defines those functions.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace races {

// A launch begins. Accesses to the threads' stacks are ignored.
void begin(const void* stacks, size_t size);

// Accesses are those of this thread from now on; after pause, the host's.
void resume(unsigned block, unsigned thread);
void pause();

// All threads of the block have arrived at a barrier, or a block begins.
void barrier();

// This memory is freed.
void forget(const void* memory, size_t size);

// Reports a race of the current thread.
void report(const std::string& what);

}  // namespace races
