// What one core can do: `peaks KIND` prints the rate of the best of many short windows, in units of 10^9 a second of CPU
// time: floating-point operations (fma, vdpbf16ps, amx_bf16), integer ones (vpdpbusd, amx_int8), or bytes read and written
// (copy). It exits with status 3 where this CPU, or its kernel, does not have the instructions.
//
// What is multiplied lies in registers, as many chains of sums as hide an instruction's latency; tiles are loaded from
// the first-level cache as in any product, four loads for four multiplications, since from registers alone they are
// twice as fast as any program can be.

#include <immintrin.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kWindows = 40;
constexpr double kWindowSeconds = 0.005;
constexpr int kChains = 14;  // an instruction takes 4 to 6 cycles, and at most two start in one
constexpr int kTurns = 1000;

double cpu_seconds() {
    timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

// The best window's rate of `work`, which does `amount` of something.
template <class Work>
double best_rate(double amount, Work work) {
    for (double end = cpu_seconds() + 0.05; cpu_seconds() < end;) work();  // the clock goes up, caches fill
    double best = 0;
    for (int window = 0; window < kWindows; ++window) {
        const double began = cpu_seconds();
        double now = began;
        long calls = 0;
        for (; now - began < kWindowSeconds; now = cpu_seconds(), ++calls) work();
        best = std::max(best, calls * amount / (now - began));
    }
    return best;
}

// One multiply-add in each of 14 chains, kTurns times, in registers that are named: 14 and 15 are the sources, all zero.
#define ALL_CHAINS(LINE) \
    LINE(0) LINE(1) LINE(2) LINE(3) LINE(4) LINE(5) LINE(6) LINE(7) LINE(8) LINE(9) LINE(10) LINE(11) LINE(12) LINE(13)
#define CHAINS(NAME, LINE)                                                                                \
    void NAME() {                                                                                         \
        asm volatile("vzeroall" : : : CLOBBERED);                                                         \
        for (int turn = 0; turn < kTurns; ++turn) asm volatile(ALL_CHAINS(LINE) : : : CLOBBERED);         \
    }
#define CLOBBERED                                                                                         \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",    \
        "xmm12", "xmm13", "xmm14", "xmm15"

#define FMA_256(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n"
#define FMA_512(n) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #n "\n"
#define DOT_BF16(n) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #n "\n"
#define DOT_INT8(n) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #n "\n"
CHAINS(fma_256, FMA_256)
CHAINS(fma_512, FMA_512)
CHAINS(dot_bf16, DOT_BF16)
CHAINS(dot_int8, DOT_INT8)

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

alignas(64) uint8_t tiles[8][1024];  // tiles 4 to 7: two of each side, as wide as a k loop's one step

// 2 x 2 tiles of sums, four loads, four products; `INSTRUCTION` adds 16 x 16 sums of 64 bytes each.
#define TILES(NAME, INSTRUCTION)                                                                         \
    __attribute__((target("amx-tile,amx-bf16,amx-int8"))) void NAME() {                                 \
        for (int turn = 0; turn < kTurns; ++turn) {                                                      \
            _tile_loadd(4, tiles[4], 64);                                                                \
            _tile_loadd(6, tiles[6], 64);                                                                \
            INSTRUCTION(0, 4, 6);                                                                        \
            _tile_loadd(7, tiles[7], 64);                                                                \
            INSTRUCTION(1, 4, 7);                                                                        \
            _tile_loadd(5, tiles[5], 64);                                                                \
            INSTRUCTION(2, 5, 6);                                                                        \
            INSTRUCTION(3, 5, 7);                                                                        \
        }                                                                                                \
    }

TILES(tile_bf16, _tile_dpbf16ps)
TILES(tile_int8, _tile_dpbusd)

__attribute__((target("amx-tile"))) void configure_tiles() {
    TileConfig config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
}

// CPUID leaf 7, subleaf 0, EDX; and leave to use tile registers (XFEATURE_XTILEDATA, 18), which Linux gives on request.
bool has_tiles(int bit) {
    unsigned a = 7, b, c = 0, d;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (d >> bit & 1) && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
}

double vector_rate(void (*work)(), int operations_each) {
    return best_rate(double(operations_each) * kChains * kTurns, work);
}

double tile_rate(void (*work)(), int operations_each) {
    configure_tiles();
    return best_rate(4.0 * operations_each * kTurns, work);
}

// From one megabyte to another: rows that a layer has just written and the next one reads.
double copy_rate() {
    std::vector<char> from(1 << 20, 1), to(1 << 20);
    return best_rate(2.0 * from.size(), [&] {
        std::memcpy(to.data(), from.data(), from.size());
        asm volatile("" : : "r"(to.data()) : "memory");
    });
}

double rate_of(const char* kind) {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f");
    if (!std::strcmp(kind, "copy")) return copy_rate();
    if (!std::strcmp(kind, "fma") && wide) return vector_rate(fma_512, 2 * 16);
    if (!std::strcmp(kind, "fma") && __builtin_cpu_supports("fma")) return vector_rate(fma_256, 2 * 8);
    if (!std::strcmp(kind, "vdpbf16ps") && __builtin_cpu_supports("avx512bf16")) return vector_rate(dot_bf16, 2 * 32);
    if (!std::strcmp(kind, "vpdpbusd") && __builtin_cpu_supports("avx512vnni")) return vector_rate(dot_int8, 2 * 64);
    if (!std::strcmp(kind, "amx_bf16") && has_tiles(22)) return tile_rate(tile_bf16, 2 * 16 * 16 * 32);
    if (!std::strcmp(kind, "amx_int8") && has_tiles(25)) return tile_rate(tile_int8, 2 * 16 * 16 * 64);
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    const double rate = count == 2 ? rate_of(arguments[1]) : 0;
    if (rate == 0) return 3;
    std::printf("%.3f\n", rate / 1e9);
}
