// Helpers sleep until a call is shared. One that is awake goes from desk to desk, takes part after part, and leaves when
// nothing has come for a while, no batch is led any more, or its core is wanted by a batch of its own: then, at the end
// of its part, it makes way. Nobody waits for a helper that has not begun: a call goes on with whoever is there. One that
// has begun and then lost its core to another program is waited for, and after that nothing is shared for a while.
#include "crew.h"

#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>

namespace {

typedef std::chrono::steady_clock Clock;

// Between two calls of one batch lie some tens of µs of Python. To be woken takes as long, and a system call.
constexpr auto PATIENCE = std::chrono::microseconds(200);
constexpr int SPINS = 32;  // looks around between two at the clock

// A helper is late if it takes so much longer for its last part than the caller for one of its own. What is idle to us
// may be busy for others: a core shared with them costs more than it brings.
constexpr auto GRACE = std::chrono::microseconds(200);
constexpr auto REST = std::chrono::milliseconds(100);

// Where a call lies while it is shared. Not on the caller's stack, which a helper that comes late would find gone.
struct alignas(64) Desk {
    std::atomic<bool> taken{false}, open{false};
    std::atomic<int> inside{0};       // helpers who may look at what follows
    std::atomic<int> next{0};         // the first part that nobody has taken
    std::atomic<bool> lacked{false};  // whether some part found no memory
    void (*part)(void* call, int i) = nullptr;
    void* call = nullptr;
    int parts = 0;
};

constexpr int DESKS = 64;  // calls shared at once; one more is computed by its caller

struct Crew {
    Desk desks[DESKS];
    std::atomic<int> cores{1}, leaders{0}, awake{0}, helped{0};
    std::atomic<Clock::duration> rests_until{Clock::duration::zero()};
    std::mutex door;
    std::condition_variable bell;
    int invited = 0, hired = 0;  // who may come in; threads there are
    cpu_set_t cpus;              // that a helper may run on: those of the process, not of the worker that calls it first
};

// Never destroyed: helpers outlive what is.
alignas(Crew) char room[sizeof(Crew)];
Crew& crew = *new (room) Crew;

// Whether this helper's core is wanted by one who leads; then it is not counted as awake any more.
bool makes_way() {
    int awake = crew.awake.load();
    while (crew.leaders.load() + awake > crew.cores.load())
        if (crew.awake.compare_exchange_weak(awake, awake - 1)) return true;
    return false;
}

// What it throws must end neither a helper's thread nor the caller's wait for the helpers.
void compute(Desk& desk, int i) {
    try {
        desk.part(desk.call, i);
    } catch (const std::bad_alloc&) {
        desk.lacked.store(true);
    }
}

enum Outcome { NOTHING, HELPED, MADE_WAY };

Outcome help_at(Desk& desk) {
    if (!desk.open.load(std::memory_order_relaxed)) return NOTHING;
    Outcome outcome = NOTHING;
    desk.inside.fetch_add(1);
    if (desk.open.load())
        while (desk.next.load(std::memory_order_relaxed) < desk.parts) {
            if (makes_way()) {
                outcome = MADE_WAY;
                break;
            }
            const int i = desk.next.fetch_add(1);
            if (i >= desk.parts) break;
            compute(desk, i);
            crew.helped.fetch_add(1, std::memory_order_relaxed);
            outcome = HELPED;
        }
    desk.inside.fetch_sub(1);
    return outcome;
}

// One round of all desks.
Outcome help() {
    Outcome best = NOTHING;
    const int used = std::min(DESKS, crew.cores.load(std::memory_order_relaxed));
    for (int i = 0; i < used; i++) {
        const Outcome outcome = help_at(crew.desks[i]);
        if (outcome == MADE_WAY) return MADE_WAY;
        if (outcome == HELPED) best = HELPED;
    }
    return best;
}

void stay_awake() {
    auto since = Clock::now();
    for (;;) {
        for (int i = 0; i < SPINS; i++) {
            switch (help()) {
                case MADE_WAY: return;
                case HELPED: since = Clock::now(); break;
                case NOTHING: _mm_pause();
            }
        }
        if (makes_way()) return;
        if (crew.leaders.load() == 0 || Clock::now() - since > PATIENCE) {
            crew.awake.fetch_sub(1);
            return;
        }
    }
}

void* live(void*) {
    sched_setaffinity(0, sizeof crew.cpus, &crew.cpus);
    for (;;) {
        {
            std::unique_lock<std::mutex> lock(crew.door);
            crew.bell.wait(lock, [] { return crew.invited > 0; });
            crew.invited--;
        }
        stay_awake();
    }
}

// Called with the door locked. Signals are for the threads of those who asked for them.
bool hire_one() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool hired = pthread_create(&thread, nullptr, live, nullptr) == 0;
    if (hired) {
        pthread_setname_np(thread, "carpool-crew");
        pthread_detach(thread);
        crew.hired++;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return hired;
}

// Wake as many as are of use and find a core.
void invite(int most) {
    const int leaders = crew.leaders.load(), wanted = std::min(most * leaders, crew.cores.load() - leaders);
    int awake = crew.awake.load();
    do {
        if (awake >= wanted) return;
    } while (!crew.awake.compare_exchange_weak(awake, wanted));
    int coming = wanted - awake;
    std::lock_guard<std::mutex> lock(crew.door);
    while (crew.hired < wanted && hire_one()) {
    }
    if (crew.hired < wanted) {  // the system has no more threads for us
        const int fewer = std::min(coming, wanted - crew.hired);
        crew.awake.fetch_sub(fewer), coming -= fewer;
    }
    crew.invited += coming;
    for (int i = 0; i < coming; i++) crew.bell.notify_one();
}

// Until the helpers are through, each with one part at most: that takes `each`, more or less.
void wait_for(const Desk& desk, Clock::duration each) {
    const auto since = Clock::now();
    for (int spins = 1; desk.inside.load(); spins++)
        if (spins % 1024)
            _mm_pause();
        else
            sched_yield();  // it may wait for this core
    const auto now = Clock::now();
    if (now - since > 2 * each + GRACE) crew.rests_until = (now + REST).time_since_epoch();
}

// A forked child has none of the threads, and a door that may be locked for ever.
void begin_anew() {
    const int cores = crew.cores.load();
    const cpu_set_t cpus = crew.cpus;
    new (room) Crew;
    crew.cores = cores, crew.cpus = cpus;
}

}  // namespace

int idle_cores() {
    const int leaders = crew.leaders.load(), idle = crew.cores.load() - leaders;
    const bool at_work = leaders > 0 && idle > 0 && Clock::now().time_since_epoch() >= crew.rests_until.load();
    return at_work ? idle : 0;
}

void share(int parts, void (*part)(void* call, int i), void* call) {
    Desk* desk = nullptr;
    const int used = std::min(DESKS, crew.cores.load());
    for (int i = 0; parts > 1 && i < used && !desk; i++)
        if (!crew.desks[i].taken.exchange(true)) desk = &crew.desks[i];
    if (!desk) {
        for (int i = 0; i < parts; i++) part(call, i);
        return;
    }
    desk->part = part, desk->call = call, desk->parts = parts;
    desk->next.store(0), desk->lacked.store(false);
    desk->open.store(true);
    invite(parts - 1);
    const auto begun = Clock::now();
    int own = 0;
    for (int i; (i = desk->next.fetch_add(1)) < parts; own++) compute(*desk, i);
    // In one order for all: a helper that found it open is seen inside, one that comes now finds it closed.
    desk->open.store(false);
    if (desk->inside.load()) wait_for(*desk, (Clock::now() - begun) / std::max(own, 1));
    const bool lacked = desk->lacked.load();
    desk->taken.store(false);
    if (lacked) throw std::bad_alloc();
}

extern "C" {

int carpool_crew_hire(int cores) {
    static const int watched = (pthread_atfork(nullptr, nullptr, begin_anew), 1);
    (void)watched;
    std::lock_guard<std::mutex> lock(crew.door);
    sched_getaffinity(0, sizeof crew.cpus, &crew.cpus);
    return crew.cores.exchange(cores);
}

void carpool_crew_lead(int change) { crew.leaders.fetch_add(change); }
int carpool_crew_helped() { return crew.helped.load(); }
}
