// Whether this process may use tiles.
#include "amx.h"

#if !defined(CARPOOL_SOFT_TILES) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// What leaf 7 of CPUID says in EDX.
unsigned features() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) ? d : 0;
}

// Whether the CPU has tiles and multiplies bfloat16 in them, the kernel saves them when threads change (XCR0), and grants them
// to this process: 8 KB more to save a thread, so it wants to be asked.
int ask() {
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, SAVED = 3u << 17;
    if ((features() & (AMX_BF16 | AMX_TILE)) != (AMX_BF16 | AMX_TILE)) return 0;
    unsigned saved, high;
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & SAVED) != SAVED) return -1;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of asm/prctl.h, which may be older than the kernel
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 ? 1 : -1;
}

}  // namespace
#endif

extern "C" {

int carpool_has_amx() {
#ifdef CARPOOL_SOFT_TILES
    return 1;
#elif defined(__linux__)
    static const int has = ask();
    return has;
#else
    return 0;
#endif
}

int carpool_has_amx_int8() {
#ifdef CARPOOL_SOFT_TILES
    return 1;
#elif defined(__linux__)
    constexpr unsigned AMX_INT8 = 1u << 25;
    static const bool has = carpool_has_amx() > 0 && (features() & AMX_INT8);
    return has;
#else
    return 0;
#endif
}
}
