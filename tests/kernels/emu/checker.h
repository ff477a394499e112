// What the runtime tells the checker. In fast mode there is none, and every call is empty.
#pragma once
#include "runtime.h"

namespace emu {

struct Place {  // where the memory that a kernel may touch lies
  char *shared_low, *shared_high;    // the block's shared memory: the module's thread-local block
  char* dynamic_low;                 // of which this is the dynamic part
  char *stacks_low, *stacks_high;    // all fibers' stacks
  char *fibers_low, *fibers_high;    // threadIdx and its like
};
constexpr size_t STACK = 64 * 1024;  // bytes a fiber

[[noreturn]] void fail(const char* format, ...);  // called from a fiber: the launch ends with this message
uint64_t random_number();
void give_up_turn();
extern Config config;

#ifdef EMU_CHECK
void check_launch(const Place& place);
void check_block_start(unsigned block);
void check_block_barrier();
void check_warp_barrier(unsigned warp, unsigned lanes);
#else
inline void check_launch(const Place&) {}
inline void check_block_start(unsigned) {}
inline void check_block_barrier() {}
inline void check_warp_barrier(unsigned, unsigned) {}
#endif

}  // namespace emu
