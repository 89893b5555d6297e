// The scheduler of block.h: fibers, barriers, warp collectives, shared memory.

#include "block.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "races.h"

Index threadIdx, blockIdx, blockDim;

// ASan keeps the bounds of the current stack; these functions exist if it is loaded.
#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
WEAK void __asan_unpoison_memory_region(const volatile void* begin, size_t size);

// Pushes the registers that a callee saves, stores the stack pointer in *from, and continues on the stack `to`.
void cuda_on_host_switch(void** from, void* to);
}
asm(R"(
.text
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");

namespace {

constexpr unsigned kLanes = 32, kMaxThreads = 1024;
constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;  // address space; pages are allocated when touched

enum class State { kReady, kWaits, kReturned };

struct Thread {
  void* stack_pointer;
  void* fake_stack;
  State state;
  const char* call;  // it waits in this call
  Site site;
  unsigned mask;  // 0: a barrier
  uint64_t value;
  std::array<uint64_t, kLanes> values;  // result of a collective
};

struct Shared {
  void* allocation;
  void* address;
  size_t size;
};

enum class Order { kAscending, kDescending, kShuffled };

struct Launch {
  std::string kernel;
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::map<const void*, Shared> shared;
  std::string error;  // the first
};

std::mutex mutex;  // one launch at a time
Order order = Order::kAscending;
Launch* launch;
char* stacks;
void* scheduler;  // its stack pointer
const void* scheduler_bottom;
size_t scheduler_size;

char* stack_of(unsigned thread) { return stacks + thread * (kStack + kGuard) + kGuard; }

std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname) return "a kernel";
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = readable ? readable : info.dli_sname;
  std::free(readable);
  return name.substr(0, name.find('('));
}

std::string text_of(const char* call, const Site& site) {
  const std::string file = site.file_name();
  return std::string(call) + " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line()) + ")";
}

std::string text_of(const Thread& t) {
  return t.state == State::kReturned ? "has returned" : "is at " + text_of(t.call, t.site);
}

bool same_call(const Thread& a, const Thread& b) {
  return b.state == State::kWaits && a.mask == b.mask && a.site.line() == b.site.line() &&
         std::strcmp(a.call, b.call) == 0 && std::strcmp(a.site.file_name(), b.site.file_name()) == 0;
}

// Returns the thread that `t` waits for, or null if all have arrived.
const Thread* missing(const Thread& t) {
  auto& threads = launch->threads;
  const unsigned index = &t - threads.data(), first = t.mask ? index / kLanes * kLanes : 0;
  const unsigned end = t.mask ? std::min<unsigned>(first + kLanes, threads.size()) : threads.size();
  for (unsigned i = first; i < end; ++i) {
    const bool awaited = t.mask ? t.mask >> (i - first) & 1 : threads[i].state != State::kReturned;
    if (awaited && !same_call(t, threads[i])) return &threads[i];
  }
  return nullptr;
}

// Lets a thread and those that it waits for continue.
void release(Thread& t) {
  auto& threads = launch->threads;
  if (t.mask == 0) {
    for (Thread& other : threads) {
      if (other.state == State::kWaits) other.state = State::kReady;
    }
    races::barrier();
    return;
  }
  const unsigned first = (&t - threads.data()) / kLanes * kLanes, mask = t.mask;
  std::array<uint64_t, kLanes> values{};
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) values[lane] = threads[first + lane].value;
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) threads[first + lane].values = values, threads[first + lane].state = State::kReady;
  }
}

void to_scheduler(bool returned) {
  Thread& t = launch->threads[threadIdx.x];
  races::pause();
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(returned ? nullptr : &t.fake_stack, scheduler_bottom, scheduler_size);
  }
  cuda_on_host_switch(&t.stack_pointer, scheduler);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(t.fake_stack, nullptr, nullptr);
}

void fiber() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
  (*launch->body)();
  launch->threads[threadIdx.x].state = State::kReturned;
  to_scheduler(true);
}

void start(unsigned index) {
  Thread& t = launch->threads[index];
  t = {};
  void** top =
      reinterpret_cast<void**>(stack_of(index) + kStack) - 2;  // as after a call: 8 bytes past a multiple of 16
  *top = reinterpret_cast<void*>(fiber);
  t.stack_pointer = top - 6;
}

void resume(unsigned index) {
  Thread& t = launch->threads[index];
  void* fake_stack = nullptr;
  threadIdx.x = index;
  races::resume(blockIdx.x, index);
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake_stack, stack_of(index), kStack);
  cuda_on_host_switch(&scheduler, t.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

std::string where(unsigned thread) {
  return launch->kernel + ", block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread) + ": ";
}

void fail(unsigned thread, const std::string& what) {
  if (launch->error.empty()) launch->error = where(thread) + what;
}

std::vector<unsigned> ordered(unsigned count, std::mt19937& random) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::kDescending) std::reverse(indices.begin(), indices.end());
  if (order == Order::kShuffled) std::shuffle(indices.begin(), indices.end(), random);
  return indices;
}

void run_block(unsigned threads, std::mt19937& random) {
  launch->threads.resize(threads);
  for (unsigned i = 0; i < threads; ++i) start(i);
  const auto indices = ordered(threads, random);
  races::barrier();
  for (unsigned returned = 0; returned < threads && launch->error.empty();) {
    bool progress = false;
    for (const unsigned i : indices) {
      Thread& t = launch->threads[i];
      if (t.state == State::kWaits && !missing(t)) release(t);
      if (t.state != State::kReady) continue;
      resume(i);
      returned += t.state == State::kReturned;
      progress = true;
    }
    if (progress) continue;
    for (unsigned i = 0; i < threads; ++i) {
      if (const Thread& t = launch->threads[i]; t.state == State::kWaits) {
        const Thread* other = missing(t);
        const auto index = std::to_string(other - launch->threads.data());
        fail(i, "waits at " + text_of(t.call, t.site) + " for thread " + index + ", which " + text_of(*other));
      }
    }
  }
  for (const auto& [key, memory] : launch->shared) {
    races::forget(memory.address, memory.size);
    std::free(memory.allocation);
  }
  launch->shared.clear();
}

}  // namespace

void races::report(const std::string& what) { fail(threadIdx.x, what); }

namespace cuda_on_host {

void run(const void* kernel, unsigned blocks, unsigned threads, const std::function<void()>& body) {
  const std::lock_guard lock(mutex);
  if (threads == 0 || threads > kMaxThreads || threads % kLanes) throw std::runtime_error("a launch takes whole warps");
  if (blocks == 0) throw std::runtime_error("a launch takes at least one block");
  if (!stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, kMaxThreads * (kStack + kGuard), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no address space for stacks");
    stacks = static_cast<char*>(memory);
    for (unsigned i = 0; i < kMaxThreads; ++i) mprotect(stack_of(i) - kGuard, kGuard, PROT_NONE);
  }
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stacks, kMaxThreads * (kStack + kGuard));
  Launch current{name_of(kernel), &body, {}, {}, {}};
  launch = &current;
  races::begin(stacks, kMaxThreads * (kStack + kGuard));
  blockDim.x = threads;
  std::mt19937 random(blocks);
  for (const unsigned block : ordered(blocks, random)) {
    blockIdx.x = block;
    run_block(threads, random);
    if (!current.error.empty()) break;
  }
  launch = nullptr;
  if (!current.error.empty()) throw std::runtime_error(current.error);
}

void wait(const char* call, unsigned mask, uint64_t value, const Site& site) {
  Thread& t = launch->threads[threadIdx.x];
  t.state = State::kWaits, t.call = call, t.site = site, t.mask = mask, t.value = value;
  to_scheduler(false);
}

void barrier(const Site& site) { wait("__syncthreads", 0, 0, site); }

std::array<uint64_t, 32> exchange(const char* call, unsigned mask, uint64_t value, const Site& site) {
  if (!(mask >> threadIdx.x % kLanes & 1)) fail(threadIdx.x, "is not in the mask of " + text_of(call, site));
  wait(call, mask, value, site);
  return launch->threads[threadIdx.x].values;
}

void check_source(unsigned mask, unsigned lane, const Site& site) {
  if (mask >> lane & 1) return;
  fail(threadIdx.x, "reads from a lane outside the mask of " + text_of("__shfl_sync", site));
}

void* shared_memory(const void* key, size_t size, size_t alignment) {
  Shared& memory = launch->shared[key];
  if (!memory.allocation) {
    const size_t more = std::max<size_t>(alignment, sizeof(void*));
    if (posix_memalign(&memory.allocation, 2 * more, alignment + size)) throw std::bad_alloc();
    memory.address = static_cast<char*>(memory.allocation) + alignment;
    memory.size = size;
    std::memset(memory.address, 0xFF, size);
  }
  return memory.address;
}

}  // namespace cuda_on_host

extern "C" void cuda_on_host_order(int value) { order = static_cast<Order>(value); }
