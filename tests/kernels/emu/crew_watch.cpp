// The crew at work for several callers at once, under gcc's thread sanitizer. Prints what went wrong, or "ran clean".
#include "crew.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <new>
#include <thread>
#include <vector>

using namespace std::chrono_literals;

namespace {

constexpr int CORES = 4;

struct Leading {
    Leading() { carpool_crew_lead(1); }
    ~Leading() { carpool_crew_lead(-1); }
};

void end(const char* how, int code) {
    std::printf("%s\n", how);
    std::fflush(stdout);
    _exit(code);
}

void fail(const char* what) { end(what, 1); }

// Each part once, all of them when `share` returns. The counts are plain: only the crew keeps who reads from who writes.
void shared_once(int parts, int rounds, std::chrono::microseconds slow) {
    for (int round = 0; round < rounds; round++) {
        std::vector<int> times(parts);
        share(parts, [&](int i) {
            if (slow.count()) std::this_thread::sleep_for(slow);
            times[i]++;
        });
        for (int i = 0; i < parts; i++)
            if (times[i] != 1) fail("a part was not computed once");
    }
}

// While callers come and go, and are more or fewer than cores.
void by_many(int callers) {
    std::vector<std::thread> threads;
    for (int c = 0; c < callers; c++)
        threads.emplace_back([c] {
            for (int batch = 0; batch < 20; batch++) {
                const Leading leading;
                shared_once(1 + (batch * 7 + c) % 23, 20, 0us);
            }
        });
    for (auto& thread : threads) thread.join();
}

int helped_by(int parts, std::chrono::microseconds slow) {
    const int before = carpool_crew_helped();
    shared_once(parts, 1, slow);
    return carpool_crew_helped() - before;
}

void in_a_fork() {
    const pid_t child = fork();
    if (child == 0) {
        const Leading leading;
        _exit(helped_by(8, 5ms) > 0 ? 0 : 2);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status)) fail("a forked child has no crew");
}

// Nothing is shared for a while after a helper kept its caller waiting.
void after_one_that_was_late() {
    const auto caller = std::this_thread::get_id();
    std::atomic<bool> others{false};
    share(2, [&](int) {
        if (std::this_thread::get_id() != caller) {
            others = true;
            std::this_thread::sleep_for(50ms);
        }
        for (int i = 0; i < 2000 && !others; i++) std::this_thread::sleep_for(1ms);  // a helper is to have the other part
    });
    if (idle_cores() != 0) fail("a crew that was late did not rest");
    std::this_thread::sleep_for(150ms);
    if (idle_cores() != CORES - 1) fail("the crew did not come back");
}

// Whoever computes the part; more calls than there are desks.
void without_memory() {
    for (int round = 0; round < 100; round++) {
        std::atomic<int> computed{0};
        bool thrown = false;
        try {
            share(8, [&](int i) {
                computed++;
                if (i % 2) throw std::bad_alloc();
            });
        } catch (const std::bad_alloc&) {
            thrown = true;
        }
        if (!thrown) fail("a part lacked memory and nobody was told");
        if (computed != 8) fail("a call was left while parts of it were not computed");
    }
    shared_once(8, 100, 0us);
}

}  // namespace

int main(int, char** arguments) {
    if (idle_cores() != 0) fail("there are helpers before any are hired");
    carpool_crew_hire(CORES);
    if (idle_cores() != 0 || helped_by(8, 1ms) != 0) fail("a call was shared that no batch led");
    {
        const Leading leading;
        if (idle_cores() != CORES - 1) fail("cores are idle and not said to be");
        if (parts_of(1, 8) != 1 || parts_of(int64_t(1) << 40, 8) != 8) fail("small work is cut, or large work is not");
        if (helped_by(16, 5ms) == 0) fail("nobody helped");
        without_memory();
        if (helped_by(16, 5ms) == 0) fail("nobody helps any more");
        const Leading second, third, fourth;
        if (idle_cores() != 0 || parts_of(int64_t(1) << 40, 8) != 1) fail("cores that lead are said to be idle");
    }
    for (int callers : {1, 3, CORES, 2 * CORES}) by_many(callers);
    if (!arguments[1]) {  // the sanitizer does not follow into children of processes with threads
        in_a_fork();
        const Leading leading;
        after_one_that_was_late();
    }
    end("ran clean", 0);
}
