// The calls that g++ -fsanitize=thread plants before every load and store, answered for CUDA's model of memory rather
// than for pthreads'. An access must
//   lie within an argument (to the byte), a __shared__ array, the dynamic shared memory asked for, or the thread's stack;
//   be aligned to its size; not write what is const;
//   not read shared memory, or an output, that nobody has written;
//   not meet another thread's access of the same bytes, one of them a write, unless a barrier lies between: of the block,
//   or within a warp __syncwarp. Nothing orders two blocks. Atomics may meet each other.
#include "checker.h"
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <string>
#include <unordered_map>
#include <vector>

namespace emu {

struct Buffer {  // an argument
  char *low, *high;
  bool constant, fresh;  // fresh: as allocated, nobody has written it
  int argument;
  std::vector<bool> written;  // a flag a byte, of a fresh one
};
struct Array {  // a __shared__ array: where in the thread-local block, and its bytes
  size_t offset, size;
};
struct Access {
  unsigned block, epoch, thread, clock;  // epoch: barriers of the block so far; clock: of the thread's warp barriers
  uint8_t bytes;                         // which of the granule's four
  bool write, atomic;
  void* pc;
};
struct Granule {  // four bytes
  std::vector<Access> accesses;
  uint8_t written = 0;
};
struct Clocks { unsigned of_lane[32]; };  // what a thread knows of its warp

static Place place;
static std::vector<Buffer> buffers;
static std::vector<Array> arrays;
static std::vector<Clocks> clocks;
static std::unordered_map<uintptr_t, Granule> shared_memory, global_memory;
static unsigned block, epoch;

// Replaced by file:line in module.py.
static std::string where(void* pc) {
  Dl_info info;
  if (!dladdr(pc, &info)) return "?";
  char text[32];
  snprintf(text, sizeof text, "<+0x%zx>", size_t(static_cast<char*>(pc) - static_cast<char*>(info.dli_fbase)) - 1);
  return text;
}

void check_launch(const Place& given) {
  place = given;
  global_memory.clear();
}
void check_block_start(unsigned b) {
  block = b;
  epoch = 0;
  shared_memory.clear();
  clocks.assign(block_size.x * block_size.y * block_size.z, Clocks{});
  for (size_t i = 0; i < clocks.size(); ++i) clocks[i].of_lane[i % 32] = 1;
}
void check_block_barrier() { ++epoch; }
void check_warp_barrier(unsigned warp, unsigned lanes) {
  Clocks joined{};
  for (unsigned l = 0; l < 32; ++l)
    if (lanes >> l & 1)
      for (int k = 0; k < 32; ++k)
        joined.of_lane[k] = std::max(joined.of_lane[k], clocks[warp * 32 + l].of_lane[k]);
  for (unsigned l = 0; l < 32; ++l)
    if (lanes >> l & 1) {
      clocks[warp * 32 + l] = joined;
      ++clocks[warp * 32 + l].of_lane[l];
    }
}

static bool in_module(const char* p) {  // constants of the kernel, and block_index and its like
  static char *low, *high;
  if (!low) {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&in_module), &info);
    low = static_cast<char*>(info.dli_fbase);
    auto visit = [](dl_phdr_info* i, size_t, void*) {
      if (reinterpret_cast<char*>(i->dlpi_addr) == low)
        for (int k = 0; k < i->dlpi_phnum; ++k)
          if (i->dlpi_phdr[k].p_type == PT_LOAD)
            high = std::max(high, low + i->dlpi_phdr[k].p_vaddr + i->dlpi_phdr[k].p_memsz);
      return 0;
    };
    dl_iterate_phdr(visit, nullptr);
  }
  return p >= low && p < high;
}

static void check_shared_bounds(char* p, unsigned n, const char* verb, void* pc) {
  char* dynamic_limit = place.dynamic_low + EMU_SHARED_LIMIT;
  if (p >= place.dynamic_low && p < dynamic_limit) {
    if (p + n > place.dynamic_low + config.shared)
      fail("out of bounds: %s of %u bytes at %s, byte %td of %u bytes of dynamic shared memory", verb, n,
           where(pc).c_str(), p - place.dynamic_low, config.shared);
    return;
  }
  size_t offset = p - place.shared_low;
  const Array* before = nullptr;
  for (auto& a : arrays) {
    if (offset >= a.offset && offset + n <= a.offset + a.size) return;
    if (a.offset <= offset && (!before || a.offset > before->offset)) before = &a;
  }
  if (before)
    fail("out of bounds: %s of %u bytes at %s, byte %zu of a __shared__ array of %zu bytes", verb, n, where(pc).c_str(),
         offset - before->offset, before->size);
  fail("out of bounds: %s of %u bytes at %s, before every __shared__ array", verb, n, where(pc).c_str());
}

static void fail_outside(char* p, unsigned n, const char* verb, void* pc) {
  const Buffer* nearest = nullptr;
  ptrdiff_t least = 4096;
  for (auto& b : buffers) {
    ptrdiff_t distance = p < b.low ? b.low - p : p + n - b.high;
    if (distance < least) nearest = &b, least = distance;
  }
  if (nearest)
    fail("out of bounds: %s of %u bytes at %s, byte %td of argument %d, which has %td bytes", verb, n, where(pc).c_str(),
         p - nearest->low, nearest->argument, nearest->high - nearest->low);
  fail("out of bounds: %s of %u bytes at %s, address %p is near no argument", verb, n, where(pc).c_str(),
       static_cast<void*>(p));
}

// Fails if this access races with one of the granule's; then keeps it there.
static void check_races(Granule& granule, const Access& mine, bool shared) {
  size_t kept = 0;
  bool have = false;
  for (auto& other : granule.accesses) {
    bool same_block = other.block == mine.block;
    if (same_block && other.epoch < epoch) continue;  // a barrier lies between, and will for all to come
    bool me = same_block && other.thread == mine.thread;
    if (me && other.bytes == mine.bytes && other.write == mine.write && other.atomic == mine.atomic) {
      other = mine;
      have = true;
    }
    if (!me && (other.bytes & mine.bytes) && (other.write || mine.write) && !(other.atomic && mine.atomic)) {
      bool ordered = same_block && other.thread / 32 == mine.thread / 32 &&
                     clocks[mine.thread].of_lane[other.thread % 32] >= other.clock;
      if (!ordered)
        fail("race on %s memory: %s at %s; %s at %s by thread %u of block %u, no barrier between",
             shared ? "shared" : "global", mine.write ? "write" : "read", where(mine.pc).c_str(),
             other.write ? "write" : "read", where(other.pc).c_str(), other.thread, other.block);
    }
    granule.accesses[kept++] = other;
  }
  granule.accesses.resize(kept);
  if (!have) granule.accesses.push_back(mine);
}

static void access(void* address, unsigned n, bool write, bool atomic, void* pc) {
  if (!current || !current->stack) return;  // no CUDA thread: the host's side of the kernel's file
  char* p = static_cast<char*>(address);
  if (p >= place.stacks_low && p < place.stacks_high) {
    if (p < current->stack || p >= current->stack + STACK)
      fail("%s of another thread's local variable at %s", write ? "write" : "read", where(pc).c_str());
    return;
  }
  if (p >= place.fibers_low && p < place.fibers_high) return;
  const char* verb = write ? "write" : "read";
  bool shared = p >= place.shared_low && p < place.shared_high;
  Buffer* buffer = nullptr;
  if (!shared) {
    for (auto& b : buffers)
      if (p >= b.low && p + n <= b.high) buffer = &b;
    if (!buffer && !write && in_module(p)) return;
  }
  if (config.preempt && random_number() % config.preempt == 0) give_up_turn();
  uintptr_t a = reinterpret_cast<uintptr_t>(p);
  if (a % n) fail("misaligned %s of %u bytes at %s: its address is %lu past a multiple of them", verb, n, where(pc).c_str(), a % n);
  if (shared) check_shared_bounds(p, n, verb, pc);
  else if (!buffer) fail_outside(p, n, verb, pc);
  else if (write && buffer->constant) fail("write to const argument %d at %s", buffer->argument, where(pc).c_str());
  else if (buffer->constant) return;  // nobody may write it: no race is possible

  if (buffer && buffer->fresh)
    for (char* q = p; q < p + n; ++q) {
      if (write) buffer->written[q - buffer->low] = true;
      else if (!buffer->written[q - buffer->low])
        fail("uninitialised: read of argument %d at %s, byte %td, which nobody has written", buffer->argument,
             where(pc).c_str(), q - buffer->low);
    }
  Access mine{block, epoch, current->index, clocks[current->index].of_lane[current->lane], 0, write, atomic, pc};
  auto& memory = shared ? shared_memory : global_memory;
  for (uintptr_t g = a / 4; g <= (a + n - 1) / 4; ++g) {
    mine.bytes = 0;
    for (unsigned k = 0; k < 4; ++k)
      if (g * 4 + k >= a && g * 4 + k < a + n) mine.bytes |= 1u << k;
    Granule& granule = memory[g];
    check_races(granule, mine, shared);
    if (write) granule.written |= mine.bytes;
    else if (shared && (granule.written & mine.bytes) != mine.bytes)
      fail("uninitialised: read of shared memory at %s that nobody in the block has written", where(pc).c_str());
  }
}

}  // namespace emu

#define HERE __builtin_return_address(0)
extern "C" {
void emu_add_buffer(char* low, size_t size, int constant, int fresh, int argument) {
  emu::buffers.push_back({low, low + size, constant != 0, fresh != 0, argument, std::vector<bool>(fresh ? size : 0)});
}
void emu_add_array(size_t offset, size_t size) { emu::arrays.push_back({offset, size}); }
// The first byte of a fresh argument that nobody wrote; -1 if there is none.
long emu_first_unwritten(int argument) {
  for (auto& b : emu::buffers)
    if (b.argument == argument && b.fresh) {
      auto it = std::find(b.written.begin(), b.written.end(), false);
      if (it != b.written.end()) return it - b.written.begin();
    }
  return -1;
}
void emu_forget_buffers() { emu::buffers.clear(); }
void emu_note_atomic(void* p, unsigned n, void* pc) { emu::access(p, n, true, true, pc); }

uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }  // guards of statics
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
#define EMU_HOOK(name, n, write) \
  void __tsan_##name##n(void* p) { emu::access(p, n, write, false, HERE); }
#define EMU_HOOKS(n)                                                                   \
  EMU_HOOK(read, n, false) EMU_HOOK(write, n, true)                                    \
  EMU_HOOK(unaligned_read, n, false) EMU_HOOK(unaligned_write, n, true)                \
  EMU_HOOK(volatile_read, n, false) EMU_HOOK(volatile_write, n, true)
EMU_HOOKS(1) EMU_HOOKS(2) EMU_HOOKS(4) EMU_HOOKS(8) EMU_HOOKS(16)
void __tsan_read_range(char* p, size_t n) { for (size_t i = 0; i < n; ++i) emu::access(p + i, 1, false, false, HERE); }
void __tsan_write_range(char* p, size_t n) { for (size_t i = 0; i < n; ++i) emu::access(p + i, 1, true, false, HERE); }
}
