// Fibers, their turns, barriers and exchanges within a warp. Never instrumented.
#include "checker.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <link.h>
#include <sys/mman.h>
#include <vector>
#include <xmmintrin.h>

// Every `extern __shared__` array has this name: build.py renames it.
alignas(1024) thread_local unsigned char emu_dynamic[EMU_SHARED_LIMIT];

namespace emu {

Fiber* current;
uint3 block_index;
dim3 block_size, grid_size;
Config config;
int block_or, block_and, block_count;

char* shared_base;  // what translated PTX counts addresses of shared memory from

static Fiber main_fiber;
static std::vector<Fiber> fibers;
static Body body;
static void* context;
static const char* kernel_name;
static bool failed;
static char message[4096];
static unsigned threads, live, waiting;
static uint64_t random_state;

uint64_t random_number() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

// Saves the callee-saved registers and the stack pointer, takes the other's: x86-64, System V.
extern "C" void emu_switch(void** save, void* to);
asm(".text\n.p2align 4\n.type emu_switch,@function\nemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size emu_switch,.-emu_switch\n");

static void go(Fiber* to) {
  Fiber* from = current;
  current = to;
  emu_switch(&from->sp, to->sp);
}

void give_up_turn() { go(&main_fiber); }

// Keeps the first failure of a launch.
static void note_list(const Fiber& who, const char* format, va_list list) {
  if (failed) return;
  failed = true;
  int n = snprintf(message, sizeof message, "%s: block (%u, %u, %u), thread (%u, %u, %u): ", kernel_name,
                   block_index.x, block_index.y, block_index.z, who.tid.x, who.tid.y, who.tid.z);
  vsnprintf(message + n, sizeof message - n, format, list);
}
static void note(const Fiber& who, const char* format, ...) {
  va_list list;
  va_start(list, format);
  note_list(who, format, list);
  va_end(list);
}
void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  note_list(*current, format, list);
  va_end(list);
  go(&main_fiber);
  abort();  // a failed launch runs no fiber again
}

static void fiber_main() {
  body(context);
  current->state = State::done;
  --live;
  go(&main_fiber);
  abort();
}

static unsigned exited(unsigned warp) {  // lanes that are past their end, or were never there
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    unsigned i = warp * 32 + lane;
    if (i >= threads || fibers[i].state == State::done) lanes |= 1u << lane;
  }
  return lanes;
}

// The last thread to arrive opens the barrier for all.
static void try_block() {
  if (!live || waiting != live) return;
  Fiber* first = nullptr;
  int any = 0, all = 1, count = 0;
  for (auto& f : fibers) {
    if (f.state != State::at_block) continue;
    if (!first) first = &f;
    if (f.operation != first->operation || f.line != first->line)
      return note(f, "barrier divergence: threads meet at two different barriers (line %d and line %d)", f.line,
                  first->line);
    any |= f.predicate != 0;
    all &= f.predicate != 0;
    count += f.predicate != 0;
  }
  if (live != threads)
    return note(*first, "barrier divergence: %u of %u threads are past their end, the others wait in line %d",
                threads - live, threads, first->line);
  block_or = any, block_and = all, block_count = count;
  check_block_barrier();
  for (auto& f : fibers)
    if (f.state == State::at_block) f.state = State::ready;
  waiting = 0;
}

void wait_for_block(int operation, int predicate, int line) {
  current->operation = operation;
  current->predicate = predicate;
  current->line = line;
  current->state = State::at_block;
  ++waiting;
  try_block();
  if (failed || current->state == State::at_block) give_up_turn();
}

static bool try_warp(Fiber* me) {
  Fiber* warp = &fibers[me->warp * 32];
  unsigned lanes = me->mask & ~exited(me->warp), ballot = 0;
  for (unsigned l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    if (warp[l].state != State::at_warp || warp[l].mask != me->mask || warp[l].operation != me->operation) return false;
    if (warp[l].predicate) ballot |= 1u << l;
  }
  for (unsigned l = 0; l < 32; ++l)
    if ((lanes >> l & 1) && warp[l].line != me->line) {
      note(warp[l], "warp divergence: lanes run one operation of the warp in two places (line %d and line %d)",
           warp[l].line, me->line);
      return false;
    }
  for (unsigned l = 0; l < 32; ++l) {
    if (!(lanes >> l & 1)) continue;
    Fiber& f = warp[l];
    switch (f.operation) {
      case SHUFFLE:
        if (f.source < 0 || f.source > 31 || !(lanes >> f.source & 1)) {
          note(f, "shuffle reads lane %d, which takes no part (mask %08x, line %d)", f.source, f.mask, f.line);
          return false;
        }
        f.got = warp[f.source].given;
        break;
      case BALLOT: f.got = ballot; break;
      case ANY: f.got = ballot != 0; break;
      case ALL: f.got = ballot == lanes; break;
    }
  }
  for (unsigned l = 0; l < 32; ++l)
    if (lanes >> l & 1) warp[l].state = State::ready;
  // Only __syncwarp orders memory; shuffles and votes exchange registers.
  if (me->operation == SYNCWARP) check_warp_barrier(me->warp, lanes);
  return true;
}

void wait_for_warp(int operation, unsigned mask, uint64_t given, int source, int predicate, int line) {
  Fiber* me = current;
  if (!(mask >> me->lane & 1)) fail("lane %u calls with mask %08x, which leaves it out (line %d)", me->lane, mask, line);
  me->operation = operation;
  me->mask = mask;
  me->given = given;
  me->source = source;
  me->predicate = predicate;
  me->line = line;
  me->state = State::at_warp;
  if (!try_warp(me)) give_up_turn();
}

static void describe(char (&out)[96], const Fiber& f) {
  static const char* names[] = {"",         "__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count",
                                "__syncwarp", "a shuffle",     "__ballot_sync",    "__any_sync",        "__all_sync"};
  if (f.state == State::done) snprintf(out, sizeof out, "past its end");
  else snprintf(out, sizeof out, "at %s in line %d (mask %08x)", names[f.operation], f.line, f.mask);
}

// Nobody can go on: name one who waits, and one who waits for something else.
static void note_deadlock() {
  Fiber *one = nullptr, *other = nullptr;
  for (auto& f : fibers)
    if (!one && f.state == State::at_warp) one = &f;
  for (auto& f : fibers)
    if (!one && f.state == State::at_block) one = &f;
  for (auto& f : fibers)
    if (!other && (f.state != one->state || f.operation != one->operation || f.mask != one->mask)) other = &f;
  char first[96], second[96] = "none";
  describe(first, *one);
  if (other) describe(second, *other);
  note(*one, "deadlock: it waits %s; another is %s; %u of %u threads are past their end", first, second, threads - live,
       threads);
}

// The thread-local block of this module, which is the block's shared memory.
static int find_shared(dl_phdr_info* info, size_t, void* p) {
  auto* place = static_cast<Place*>(p);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_TLS || !info->dlpi_tls_data) continue;
    char* low = static_cast<char*>(info->dlpi_tls_data);
    char* high = low + info->dlpi_phdr[i].p_memsz;
    if (place->dynamic_low >= low && place->dynamic_low < high) place->shared_low = low, place->shared_high = high;
  }
  return 0;
}

static void start_block(const Place& place, char* stacks, unsigned b) {
  block_index = {b % config.grid_x, b / config.grid_x % config.grid_y, b / config.grid_x / config.grid_y};
  // Shared memory holds what the block before left: here NaN, and -1.
  char* end = place.dynamic_low + EMU_SHARED_LIMIT;
  memset(place.dynamic_low, 0xFF, config.shared);
  memset(place.shared_low, 0xFF, place.dynamic_low - place.shared_low);
  memset(end, 0xFF, place.shared_high - end);
  live = threads;
  waiting = 0;
  current = &main_fiber;
  check_block_start(b);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = fibers[i] = {};
    f.index = i, f.warp = i / 32, f.lane = i % 32;
    f.tid = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    f.stack = stacks + STACK * i;
    // Staggered by cache lines: stacks at multiples of 64 KiB would fight for the same sets of the cache.
    void** top = reinterpret_cast<void**>(f.stack + STACK - (i % 16) * 64);
    *--top = nullptr;  // a return address, so that fiber_main's frame is aligned as after a call
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    f.sp = top;
  }
}

static void shuffle(std::vector<unsigned>& items) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_number() % i]);
}
static std::vector<unsigned> turns(unsigned n) {
  std::vector<unsigned> items(n);
  for (unsigned i = 0; i < n; ++i) items[i] = config.order == REVERSE ? n - 1 - i : i;
  return items;
}

static void run_block(std::vector<unsigned>& order) {
  while (live && !failed) {
    if (config.order == RANDOM) shuffle(order);
    bool ran = false;
    for (unsigned i : order) {
      if (failed) return;
      if (fibers[i].state != State::ready) continue;
      ran = true;
      go(&fibers[i]);
    }
    if (failed || ran) continue;
    // None was ready: the end of one may have been what others waited for.
    try_block();
    bool released = false;
    for (auto& f : fibers) {
      released |= f.state == State::ready;
      if (!released && !failed && f.state == State::at_warp) released |= try_warp(&f);
    }
    if (!released && !failed) note_deadlock();
  }
}

int run(const Config& given, Body kernel, void* kernel_context, const char* name) {
  config = given, body = kernel, context = kernel_context, kernel_name = name;
  failed = false, message[0] = 0;
  random_state = config.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
  block_size = {config.block_x, config.block_y, config.block_z};
  grid_size = {config.grid_x, config.grid_y, config.grid_z};
  block_index = {};
  uint64_t size = uint64_t(config.block_x) * config.block_y * config.block_z;
  uint64_t blocks = uint64_t(config.grid_x) * config.grid_y * config.grid_z;
  if (!size || size > 1024 || config.block_z > 64) return note(main_fiber, "a block of %lu threads", size), 1;
  if (!blocks || config.grid_x > 0x7fffffff || config.grid_y > 65535 || config.grid_z > 65535)
    return note(main_fiber, "a grid of %lu blocks", blocks), 1;
  if (config.shared > EMU_SHARED_LIMIT)
    return note(main_fiber, "%u bytes of dynamic shared memory", config.shared), 1;
  threads = unsigned(size);

  static char* stacks;  // of the largest block yet
  static unsigned stacked;
  if (stacked < threads) {
    if (stacks) munmap(stacks, STACK * stacked);
    void* p = mmap(nullptr, STACK * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return stacked = 0, stacks = nullptr, note(main_fiber, "no memory for stacks"), 1;
    stacks = static_cast<char*>(p), stacked = threads;
  }
  fibers.assign(threads, Fiber{});
  Place place{};
  place.dynamic_low = reinterpret_cast<char*>(emu_dynamic);
  emu_dynamic[0] = 0;  // a thread's first touch of its block is what makes it
  dl_iterate_phdr(find_shared, &place);
  shared_base = place.shared_low;
  place.stacks_low = stacks, place.stacks_high = stacks + STACK * stacked;
  place.fibers_low = reinterpret_cast<char*>(fibers.data());
  place.fibers_high = place.fibers_low + threads * sizeof(Fiber);
  check_launch(place);

  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // subnormals are zero, read and written: CuPy compiles with -ftz=true
  auto order = turns(threads), block_order = turns(unsigned(blocks));
  if (config.order == RANDOM) shuffle(block_order);
  for (unsigned b : block_order) {
    start_block(place, stacks, b);
    run_block(order);
    if (failed) break;
  }
  current = &main_fiber;
  _mm_setcsr(before);
  return failed;
}

}  // namespace emu

extern "C" const char* emu_error() { return emu::message; }
