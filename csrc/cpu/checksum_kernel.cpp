// A 64-bit checksum of memory at the speed of reading it.
//
// There are 128 lanes of 32 bits, and each takes every 128th word: lane = rotate(lane ^ word) * odd. A step is a
// bijection of the word for a given lane, so a change of one word changes the result; the rotation carries high bits
// down, so sign flips do not cancel. The lanes are the same for every instruction set, and so is the result.

#include "checksum.h"
#include "simd.h"

namespace {

constexpr int kLanes = 128;
constexpr int kVectors = kLanes / kWidth;
constexpr int64_t kBlock = kLanes * 4;  // bytes
constexpr uint32_t kOdd = 0x9e3779b1u;

using Lanes = Bits<kWidth>;

inline void mix(Lanes* lanes, const char* from) {
#pragma GCC unroll 32
  for (int v = 0; v < kVectors; ++v) {
    Lanes words;
    std::memcpy(&words, from + v * sizeof words, sizeof words);
    const Lanes mixed = lanes[v] ^ words;
    lanes[v] = ((mixed << 13) | (mixed >> 19)) * kOdd;
  }
}

uint64_t checksum(const void* memory, int64_t bytes) {
  const char* from = static_cast<const char*>(memory);
  uint32_t seeds[kLanes];
  for (int i = 0; i < kLanes; ++i) seeds[i] = kOdd * (i + 1);
  Lanes lanes[kVectors];
  std::memcpy(lanes, seeds, sizeof lanes);
  int64_t at = 0;
  for (; at + kBlock <= bytes; at += kBlock) mix(lanes, from + at);
  char rest[kBlock] = {};
  if (at < bytes) {
    std::memcpy(rest, from + at, bytes - at);
    mix(lanes, rest);
  }
  uint32_t words[kLanes];
  std::memcpy(words, lanes, sizeof words);
  uint64_t sum = static_cast<uint64_t>(bytes);
  for (const uint32_t word : words) {
    sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
    sum ^= sum >> 32;
  }
  return sum;
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define NAME(capability) CONCATENATE(kChecksumKernels, capability)
extern const ChecksumKernels NAME(CPU_CAPABILITY){checksum};
