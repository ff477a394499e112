// Whether this process may use tiles.
#include "amx.h"

#if !defined(CARPOOL_SOFT_TILES) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// Whether the CPU has tiles and multiplies bfloat16 in them, the kernel saves them when threads change (XCR0), and grants them
// to this process: 8 KB more to save a thread, so it wants to be asked.
int ask() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, SAVED = 3u << 17;
    if ((d & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return 0;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    if ((a & SAVED) != SAVED) return -1;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of asm/prctl.h, which may be older than the kernel
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 1 : -1;
}

}  // namespace
#endif

extern "C" int carpool_has_amx() {
#ifdef CARPOOL_SOFT_TILES
    return 1;
#elif defined(__linux__)
    static const int has = ask();
    return has;
#else
    return 0;
#endif
}
