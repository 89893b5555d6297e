// The functions that -fsanitize=thread calls, and what they remember of each two bytes of memory.

#include "races.h"

#include <array>
#include <memory>
#include <unordered_map>

namespace {

constexpr int kPageBits = 12, kCellBits = 1;  // the narrowest element that a kernel writes has two bytes

struct Access {
  uint32_t interval = 0;  // counts the barriers of all blocks of the launch, from 1; 0: none
  uint32_t block = 0;
  uint16_t thread = 0;

  // Whether nothing orders this access before one of `other`'s.
  bool unordered(const Access& other) const {
    return interval && (block != other.block || (interval == other.interval && thread != other.thread));
  }
};

struct Cell {
  Access written, read;
  bool read_by_others = false;  // in the interval and block of `read`
  bool read_by_blocks = false;  // other than that of `read`
};

using Page = std::array<Cell, 1 << (kPageBits - kCellBits)>;

bool active;
Access now;
uintptr_t stacks_begin, stacks_end;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_number = -1;
Page* last_page;

Cell& cell_of(uintptr_t address) {
  if (const uintptr_t number = address >> kPageBits; number != last_number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_number = number, last_page = page.get();
  }
  return (*last_page)[(address & ((1 << kPageBits) - 1)) >> kCellBits];
}

void report(const char* what, const char* before, const Access& other) {
  races::report(std::string(what) + " what thread " + std::to_string(other.thread) + " of block " +
                std::to_string(other.block) + before + ", without a barrier between them");
}

void on_read(Cell& cell) {
  if (cell.written.unordered(now)) report("reads", " has written", cell.written);
  if (cell.read.interval && cell.read.block != now.block) cell.read_by_blocks = true;
  if (cell.read.block == now.block && cell.read.interval == now.interval) {
    cell.read_by_others |= cell.read.thread != now.thread;
  } else {
    cell.read = now, cell.read_by_others = false;
  }
}

void on_write(Cell& cell) {
  if (cell.written.unordered(now)) report("writes", " has written", cell.written);
  const bool others = cell.read_by_others && cell.read.interval == now.interval && cell.read.block == now.block;
  if (others || cell.read_by_blocks || cell.read.unordered(now)) report("writes", " has read", cell.read);
  cell.written = now;
}

void access(void* memory, size_t size, bool write) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  if (!active || (stacks_begin <= begin && begin < stacks_end)) return;
  for (uintptr_t at = begin >> kCellBits << kCellBits; at < begin + size; at += 1 << kCellBits) {
    write ? on_write(cell_of(at)) : on_read(cell_of(at));
  }
}

}  // namespace

namespace races {

void begin(const void* stacks, size_t size) {
  pages.clear();
  last_number = -1;
  now = {};
  stacks_begin = reinterpret_cast<uintptr_t>(stacks), stacks_end = stacks_begin + size;
}

void resume(unsigned block, unsigned thread) { now.block = block, now.thread = thread, active = true; }
void pause() { active = false; }
void barrier() { ++now.interval; }

void forget(const void* memory, size_t size) {
  for (size_t i = 0; i < size; i += 1 << kCellBits) cell_of(reinterpret_cast<uintptr_t>(memory) + i) = {};
}

}  // namespace races

#define ACCESS(name, size)                                                        \
  void __tsan_read##name(void* memory) { access(memory, size, false); }           \
  void __tsan_write##name(void* memory) { access(memory, size, true); }           \
  void __tsan_unaligned_read##name(void* memory) { access(memory, size, false); } \
  void __tsan_unaligned_write##name(void* memory) { access(memory, size, true); }

extern "C" {
ACCESS(1, 1)
ACCESS(2, 2)
ACCESS(4, 4)
ACCESS(8, 8)
ACCESS(16, 16)
void __tsan_read_range(void* memory, size_t size) { access(memory, size, false); }
void __tsan_write_range(void* memory, size_t size) { access(memory, size, true); }
int __tsan_atomic32_fetch_add(volatile int* to, int value, int) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
