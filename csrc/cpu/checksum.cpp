// Checksums of the memory of tensors on the CPU.

#include "checksum.h"

#include "host.h"

namespace {

constexpr int64_t kTaskBytes = 1 << 20;

struct Part {
  const char* memory;
  int64_t bytes;
  int64_t tensor;
};

// Returns one int64 per contiguous tensor: the checksum of its bytes in order, independent of the number of threads.
Tensor checksums(const std::vector<Tensor>& tensors) {
  std::vector<Part> parts;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "tensors must be contiguous and on the CPU");
    const auto memory = static_cast<const char*>(x.const_data_ptr());
    const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
    for (int64_t at = 0; at < bytes; at += kTaskBytes)
      parts.push_back({memory + at, std::min(kTaskBytes, bytes - at), static_cast<int64_t>(i)});
  }
  std::vector<uint64_t> sums(parts.size());
  const ChecksumKernels& kernel = KERNELS_FOR_THIS_CPU(kChecksumKernels);
  for_each_task(parts, [&](const Part& part, const Part*) {
    sums[&part - parts.data()] = kernel.checksum(part.memory, part.bytes);
  });
  Tensor out = torch::stable::empty({static_cast<int64_t>(tensors.size())}, ScalarType::Long);
  const auto to = static_cast<uint64_t*>(out.mutable_data_ptr());
  std::fill_n(to, tensors.size(), 0);
  for (size_t i = 0; i < parts.size(); ++i) {
    uint64_t& sum = to[parts[i].tensor];
    sum = (sum ^ sums[i]) * 0x9e3779b97f4a7c15u;
    sum ^= sum >> 32;
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("checksums_cpu", TORCH_BOX(&checksums)); }
