// Interface between the operator and its kernel: no torch header here or in the kernel, which is compiled once per
// instruction set.

#pragma once

#include <cstdint>

struct ChecksumKernels {
  uint64_t (*checksum)(const void* memory, int64_t bytes);
};

extern const ChecksumKernels kChecksumKernelsDefault;
extern const ChecksumKernels kChecksumKernelsAVX2;
extern const ChecksumKernels kChecksumKernelsAVX512;
extern const ChecksumKernels kChecksumKernelsAVX512BF16;
