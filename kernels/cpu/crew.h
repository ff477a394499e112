// Idle cores help with the call under way. A kernel is single-threaded; what it is asked for falls into parts (tokens,
// outputs, heads) that are computed alike whoever takes them. So one short queue, one long text or the last batch of many
// is not left to one core while others wait, and a result is the same to the bit, however many there were.
#pragma once

#include <algorithm>
#include <cstdint>

// Cores on which nobody computes: 0 unless a batch is led (`carpool_crew_lead`).
int idle_cores();

// part(call, i) for each i < parts, once: by whoever calls, and those idle. Returns when all are done, or then throws
// bad_alloc if a part did.
void share(int parts, void (*part)(void* call, int i), void* call);

template <typename F>
void share(int parts, F part) {
    share(parts, [](void* call, int i) { (*static_cast<F*>(call))(i); }, &part);
}

// Multiply-adds of about 10 µs, ten times what it costs to share: of vectors (AVX-512 BF16) and, by what tiles are to
// reach and not measured, of those.
constexpr int64_t LEAST = 1 << 20, LEAST_IN_TILES = 1 << 23;

// Into how many parts so many multiply-adds are cut, at most `most` and none below `least`; 1 where nobody is idle.
inline int parts_of(int64_t work, int most, int64_t least = LEAST) {
    constexpr int EACH = 3;  // so that one who comes late or is held up keeps the others little
    const int idle = idle_cores();
    return idle ? int(std::max<int64_t>(1, std::min({int64_t(most), int64_t(EACH) * (idle + 1), work / least}))) : 1;
}

extern "C" {

// At most so many threads are to compute at once from now on, callers and helpers together; how many it were before.
int carpool_crew_hire(int cores);
// +1: this thread begins a batch, -1: it is through with it. Helpers make way for those who lead.
void carpool_crew_lead(int change);
// Parts that helpers have computed so far; begins again at 0 behind the largest int.
int carpool_crew_helped();
}
