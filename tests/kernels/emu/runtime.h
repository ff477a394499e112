// What a kernel sees of the machine that runs it: one fiber a CUDA thread, blocks one after the other.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

// Code of the emulator itself, even where a kernel's file includes it, is not the kernel's: the checker must not see it.
#define EMU_UNSEEN __attribute__((no_sanitize("thread")))
#define EMU_CALL __attribute__((noinline, no_sanitize("thread")))
// 227 KiB: the most dynamic shared memory that any architecture gives a block.
#define EMU_SHARED_LIMIT (227 * 1024)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace emu {

enum class State : uint8_t { ready, at_block, at_warp, done };
enum Operation { SYNC = 1, SYNC_OR, SYNC_AND, SYNC_COUNT, SYNCWARP, SHUFFLE, BALLOT, ANY, ALL };

struct Fiber {
  void* sp = nullptr;     // where its stack stands while another fiber runs
  char* stack = nullptr;  // its lowest byte
  uint3 tid{};
  unsigned index = 0, warp = 0, lane = 0;
  State state = State::ready;
  // What it waits for: which operation, called in which line, with which lanes, and what it gave.
  int operation = 0, line = 0, source = 0, predicate = 0;
  unsigned mask = 0;
  uint64_t given = 0, got = 0;
};

enum Order : unsigned { FORWARD, REVERSE, RANDOM };

struct Config {  // mirrored by ctypes in module.py
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z;
  unsigned shared;   // bytes of dynamic shared memory
  unsigned order;    // Order: in which order threads and blocks take their turns
  uint64_t seed;
  unsigned preempt;  // check mode: give up the turn at one memory access in so many; 0: never
};

extern Fiber* current;
extern uint3 block_index;
extern dim3 block_size, grid_size;
extern int block_or, block_and, block_count;

using Body = void (*)(void*);
int run(const Config& config, Body body, void* context, const char* name);
void wait_for_block(int operation, int predicate, int line);
void wait_for_warp(int operation, unsigned mask, uint64_t given, int source, int predicate, int line);

template <class... A, size_t... I>
EMU_UNSEEN inline void apply(void (*kernel)(A...), void** cells, std::index_sequence<I...>) {
  kernel(*reinterpret_cast<std::remove_cv_t<std::remove_reference_t<A>>*>(cells[I])...);
}

// cells: the address of each argument's value, as cuLaunchKernel takes them.
template <class... A>
EMU_UNSEEN int launch(const Config* config, void** cells, void (*kernel)(A...), const char* name) {
  struct Context { void (*kernel)(A...); void** cells; } context{kernel, cells};
  auto body = [](void* p) EMU_UNSEEN {
    auto* c = static_cast<Context*>(p);
    apply(c->kernel, c->cells, std::index_sequence_for<A...>{});
  };
  return run(*config, body, &context, name);
}

// One argument's kind in three letters: P pointer, C pointer to const, F floating point, I integer; its bytes (of the
// element, for a pointer), 2 digits.
template <class T> EMU_UNSEEN inline void describe(char*& out) {
  size_t bytes = sizeof(T);
  char kind = std::is_floating_point_v<T> ? 'F' : 'I';
  if constexpr (std::is_pointer_v<T>) {
    using E = std::remove_pointer_t<T>;
    kind = std::is_const_v<E> ? 'C' : 'P';
    bytes = sizeof(E);
  }
  *out++ = kind;
  *out++ = char('0' + bytes / 10);
  *out++ = char('0' + bytes % 10);
}
template <class... A> EMU_UNSEEN const char* signature(void (*)(A...)) {
  static char text[3 * sizeof...(A) + 1];
  char* out = text;
  (describe<A>(out), ...);
  return text;
}

}  // namespace emu

#define EMU_EXPORT(name, ...)                                            \
  extern "C" int name(const emu::Config* config, void** cells) {         \
    return emu::launch(config, cells, &__VA_ARGS__, #__VA_ARGS__);       \
  }                                                                      \
  extern "C" const char* name##_signature() { return emu::signature(&__VA_ARGS__); }
