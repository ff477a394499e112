// Loaded before all else: while told so, nothing of more than a page is allocated in C++.
#include <atomic>
#include <cstdlib>
#include <new>

static std::atomic<bool> none{false};

void* operator new(size_t bytes) {
    void* found = none && bytes > 4096 ? nullptr : std::malloc(bytes);
    if (!found) throw std::bad_alloc();
    return found;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

extern "C" void no_memory(int whether) { none = whether; }
