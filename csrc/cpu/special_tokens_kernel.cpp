// The rows of special tokens and the gradients of their vectors, compiled once per instruction set with
// -DCPU_CAPABILITY=<its name>.

#include "injection_kernel.h"
#include "special_tokens.h"
#include "tiles.h"

namespace {

template <class Element>
Element* hidden_row(const HiddenRows& hidden, int64_t row, int64_t position) {
  return static_cast<Element*>(hidden.data) + row * hidden.batch_stride + position * hidden.token_stride;
}

template <class Element>
void add_to(const HiddenRows& hidden, const Injection& injection, const Occurrence& at, float* scratch) {
  Element* const to = hidden_row<Element>(hidden, at.row, injection.slots[at.row * injection.slots_per_row + at.slot]);
  for (int64_t d = 0; d < injection.width; ++d) scratch[d] = widen(to[d]);
  inject(injection, at.row, at.slot, scratch);
  for (int64_t d = 0; d < injection.width; ++d) narrow(scratch[d], to + d);
}

template <class Element>
void sum_of(const HiddenRows& grad, const Injection& injection, const VectorTask& task) {
  for (int64_t d = task.begin; d < task.end; ++d) task.sums[d] = 0;
  for (const Occurrence* at = task.occurrences; at != task.occurrences + task.count; ++at) {
    const Element* const from =
        hidden_row<Element>(grad, at->row, injection.slots[at->row * injection.slots_per_row + at->slot]);
    add_kept(injection, at->row, at->slot, task.begin, task.end, [=](int64_t d) { return widen(from[d]); }, task.sums);
  }
}

template <class F>
void with_element(Storage storage, const F& f) {
  storage == Storage::float32 ? f(float{}) : f(uint16_t{});
}

void add(const HiddenRows& hidden, const Injection& injection, const Occurrence& at, float* scratch) {
  with_element(hidden.storage, [&](auto element) { add_to<decltype(element)>(hidden, injection, at, scratch); });
}

void sum(const HiddenRows& grad, const Injection& injection, const VectorTask& task) {
  with_element(grad.storage, [&](auto element) { sum_of<decltype(element)>(grad, injection, task); });
}

}  // namespace

#define CONCATENATE(a, b) a##b
#define KERNELS(capability) CONCATENATE(kSpecialTokenKernels, capability)
extern const SpecialTokenKernels KERNELS(CPU_CAPABILITY) = {add, sum};
