// What the library is made of, and the instruction sets that it may use here.
#include "amx.h"

#ifndef CARPOOL_SOURCES
#define CARPOOL_SOURCES ""
#endif

extern "C" {

// Of which sources this was made: as kernels/native.py digests them.
const char* carpool_cpu_sources() { return CARPOOL_SOURCES; }

// The best instruction set this CPU has for the kernels: 0 none that serves, 1 AVX2, 2 AVX-512, 3 AVX-512 BF16, 4 that and
// AMX in bfloat16.
int carpool_cpu_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return 1;
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return carpool_has_amx() > 0 ? 4 : 3;
}
}
