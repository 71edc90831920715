#include "thread_team.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace skipnet::cpu {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#else
    std::this_thread::yield();
#endif
}

constexpr int kPauses = 2048;            // some 20 microseconds: longer than threads that all run wait for each other
constexpr microseconds kHeldUp(300);     // waited for so long, a thread has been stopped by the system,
constexpr int kHeldUpShare = 20;         // if that is more than a 20th of the call so far: long units end far apart
constexpr microseconds kLeastSpin(200);  // between calls, where spinning is welcome
constexpr microseconds kMostAlone(100000);  // after having been held up

std::atomic<int> most_spin{5000};  // microseconds

// Spins until done() is true; later on it gives the processor away, for the others may have none. Returns for how long
// it did that.
template <typename Done>
microseconds spin(Done done) {
    for (int i = 0; i < kPauses; ++i) {
        if (done()) return {};
        pause();
    }
    const auto begin = Clock::now();
    while (!done()) std::this_thread::yield();
    return std::chrono::duration_cast<microseconds>(Clock::now() - begin);
}

}  // namespace

// Workers and the call that they are wanted for. One caller has it at a time.
class Pool {
public:
    std::mutex busy;  // the caller's

    // How many of so many workers are worth calling.
    int available(int workers) {
        if (Clock::now() < alone_until_) return 0;
        spawn(workers);
        return std::min(workers, static_cast<int>(workers_.size()));
    }

    void run(int workers, void (*work)(void*, int), void* context) {
        avoid_caller_cpu();
        note_call();
        work_ = work;
        context_ = context;
        wanted_ = workers;
        bool asleep;
        {
            std::lock_guard lock(mutex_);
            const Places places = places_.load(std::memory_order_relaxed);
            places_.store({places.job + 1, static_cast<std::int16_t>(workers), 0}, std::memory_order_release);
            asleep = asleep_ > 0;
        }
        if (asleep) wake_.notify_all();
        try {
            work(context, 0);
        } catch (...) {  // no memory: whoever is in the call uses the caller's
            finish();
            throw;
        }
        finish();
    }

    // Goes without workers for a while if the call has waited for one that the system had stopped: something else runs
    // in its place, and will again. Each time that it turns out so, for longer.
    void held_up(microseconds waited) {
        if (waited < kHeldUp) return;
        const auto now = Clock::now();
        if (waited * kHeldUpShare < now - begin_) return;
        const bool again = now < alone_until_ + 4 * alone_;
        alone_ = std::min(again ? 2 * alone_ : 4 * waited, kMostAlone);
        alone_until_ = now + alone_;
    }

private:
    // Of a call, how many workers it still takes, and how many are in it.
    struct alignas(8) Places {  // so aligned, clang needs no library to change it in one go
        std::uint32_t job;
        std::int16_t left, inside;
    };

    // Lets no worker in any more, and waits for those that are.
    void finish() {
        Places open = places_.load(std::memory_order_relaxed);
        while (!places_.compare_exchange_weak(open, {open.job, 0, open.inside}, std::memory_order_acquire)) {
        }
        held_up(spin([this] { return places_.load(std::memory_order_acquire).inside == 0; }));
        last_end_ = Clock::now();
    }

    // As many as the system lets us have.
    void spawn(int workers) {
        try {
            while (static_cast<int>(workers_.size()) < workers) workers_.emplace_back([this] { worker_loop(); });
        } catch (const std::system_error&) {
        }
    }

    // Keeps the workers off the caller's processor: woken there, one would wait until the caller's time is up, though
    // other processors may be idle.
    void avoid_caller_cpu() {
#if defined(__linux__)
        const int here = sched_getcpu(), count = static_cast<int>(workers_.size());
        if (here == kept_free_ && count == informed_) return;
        cpu_set_t others;
        if (sched_getaffinity(0, sizeof others, &others) != 0) return;
        CPU_CLR(here, &others);
        if (CPU_COUNT(&others) == 0) return;
        for (std::thread& worker : workers_) pthread_setaffinity_np(worker.native_handle(), sizeof others, &others);
        kept_free_ = here;
        informed_ = count;
#endif
    }

    // Has workers spin for somewhat longer than calls have lately been apart, unless that is longer than they may.
    void note_call() {
        const int most = most_spin.load(std::memory_order_relaxed);
        begin_ = Clock::now();
        gaps_[calls_++ % kGaps] = std::chrono::duration_cast<microseconds>(begin_ - last_end_);
        microseconds longest = kLeastSpin;
        for (microseconds gap : gaps_)
            if (2 * gap.count() <= most) longest = std::max(longest, 2 * gap);
        spin_.store(std::min<std::int64_t>(longest.count(), most), std::memory_order_relaxed);
    }

    void worker_loop() {
        std::uint32_t seen = 0;
        const auto called = [&] { return places_.load(std::memory_order_acquire).job != seen; };
        for (;;) {
            const auto end = Clock::now() + microseconds(spin_.load(std::memory_order_relaxed));
            while (!called() && Clock::now() < end)
                for (int i = 0; i < 32 && !called(); ++i) pause();
            if (!called()) {
                std::unique_lock lock(mutex_);
                ++asleep_;
                wake_.wait(lock, called);
                --asleep_;
            }
            Places open = places_.load(std::memory_order_acquire);
            while (open.left > 0 && !places_.compare_exchange_weak(open,
                                                                   {open.job, static_cast<std::int16_t>(open.left - 1),
                                                                    static_cast<std::int16_t>(open.inside + 1)},
                                                                   std::memory_order_acq_rel)) {
            }
            seen = open.job;
            if (open.left == 0) continue;
            work_(context_, wanted_ - open.left + 1);
            open = places_.load(std::memory_order_relaxed);
            while (!places_.compare_exchange_weak(
                open, {open.job, open.left, static_cast<std::int16_t>(open.inside - 1)}, std::memory_order_acq_rel)) {
            }
        }
    }

    static constexpr int kGaps = 8;

    std::mutex mutex_;
    std::condition_variable wake_;
    int asleep_ = 0;  // workers, under mutex_
    std::vector<std::thread> workers_;
    int kept_free_ = -1, informed_ = 0;  // a processor, and how many workers know
    microseconds gaps_[kGaps]{};         // between the last calls
    unsigned calls_ = 0;
    Clock::time_point begin_{}, last_end_ = Clock::now(), alone_until_{};  // of calls, and of going without workers
    microseconds alone_{};                                                 // how long the last time without workers was
    std::atomic<std::int64_t> spin_{kLeastSpin.count()};
    alignas(64) std::atomic<Places> places_{{0, 0, 0}};
    int wanted_ = 0;
    void (*work_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

namespace {

// Never destroyed: a worker may still be in it when the process ends. A forked child has none of its parent's
// threads and starts a pool of its own.
Pool* pool = nullptr;
std::once_flag once;

void start_pool() { pool = new Pool; }

// SharedWork's state in parts: the region from bit 40, units that are not done from 32, units that are free below.
constexpr std::uint64_t kNotDone = std::uint64_t{1} << 32;

std::uint32_t region_of(std::uint64_t state) { return static_cast<std::uint32_t>(state >> 40); }
std::uint32_t free_of(std::uint64_t state) { return static_cast<std::uint32_t>(state); }
bool done(std::uint64_t state) { return (state >> 32 & 0xff) == 0; }

int lowest(std::uint32_t units) { return __builtin_ctz(units); }
int highest(std::uint32_t units) { return 31 - __builtin_clz(units); }

// Which of some free units a thread takes: even ranks go up from where their share begins, odd ones down from where
// theirs ends, so that two neighbours meet only when nothing is left.
int choose(std::uint32_t free, int units, int rank, int size) {
    if (rank % 2 == 0) {
        const std::uint32_t from = free >> (units * rank / size) << (units * rank / size);
        return from ? lowest(from) : highest(free);
    }
    const std::uint32_t up_to = free & static_cast<std::uint32_t>((std::uint64_t{1} << units * (rank + 1) / size) - 1);
    return up_to ? highest(up_to) : lowest(free);
}

}  // namespace

int SharedWork::claim(std::uint32_t region, int units, int rank, int size) {
    const std::uint64_t fresh = std::uint64_t{region} << 40 | kNotDone * units | ((std::uint64_t{1} << units) - 1);
    std::uint64_t seen = state_.load(std::memory_order_acquire);
    while (region_of(seen) < region) {  // the last one is done: this thread has been through it
        const int unit = choose(free_of(fresh), units, rank, size);
        if (state_.compare_exchange_weak(seen, fresh & ~(std::uint64_t{1} << unit), std::memory_order_acq_rel,
                                         std::memory_order_acquire))
            return unit;
    }
    return claim_from(seen, region, units, rank, size);
}

int SharedWork::claim_next(std::uint32_t region, int units, int rank, int size) {
    std::uint64_t seen = state_.load(std::memory_order_acquire);
    for (;;) {
        const int unit = free_of(seen) ? choose(free_of(seen), units, rank, size) : -1;
        const std::uint64_t next = (unit < 0 ? seen : seen & ~(std::uint64_t{1} << unit)) - kNotDone;
        if (state_.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_acquire))
            return unit < 0 ? claim_from(next, region, units, rank, size) : unit;
    }
}

int SharedWork::claim_from(std::uint64_t seen, std::uint32_t region, int units, int rank, int size) {
    while (region_of(seen) == region && free_of(seen)) {
        const int unit = choose(free_of(seen), units, rank, size);
        if (state_.compare_exchange_weak(seen, seen & ~(std::uint64_t{1} << unit), std::memory_order_acq_rel,
                                         std::memory_order_acquire))
            return unit;
    }
    const microseconds waited = spin([&] {
        seen = state_.load(std::memory_order_acquire);
        return region_of(seen) != region || done(seen);
    });
    if (rank == 0) pool->held_up(waited);
    return -1;
}

int allowed_processors() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

void set_spin_microseconds(int most) { most_spin.store(most, std::memory_order_relaxed); }

ThreadTeam::ThreadTeam(int threads) {
    if (threads <= 1) return;
    std::call_once(once, [] {
        start_pool();
        pthread_atfork(nullptr, nullptr, start_pool);
    });
    if (!pool->busy.try_lock()) return;
    pool_ = pool;
    size_ = 1 + pool_->available(threads - 1);
}

ThreadTeam::~ThreadTeam() {
    if (pool_) pool_->busy.unlock();
}

void ThreadTeam::run(void (*work)(void* context, int rank), void* context) {
    if (size_ > 1)
        pool_->run(size_ - 1, work, context);
    else
        work(context, 0);
}

}  // namespace skipnet::cpu
