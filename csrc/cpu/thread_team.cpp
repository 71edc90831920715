#include "thread_team.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdint>
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

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

constexpr int kPauses = 2048;  // some 20 microseconds: longer than threads that all run wait for each other

// Spins until done() is true; later on it gives the processor away, for the others may have none.
template <typename Done>
void spin(Done done) {
    for (int i = 0; !done(); ++i) {
        if (i < kPauses)
            pause();
        else
            std::this_thread::yield();
    }
}

constexpr int kIdlePauses = 8192;  // of an idle worker before it sleeps: about 100 microseconds

}  // namespace

// Workers and the call that they are wanted for. One caller has it at a time.
class Pool {
public:
    std::mutex busy;  // the caller's

    // How many of so many workers come in time. start() has to follow, then wait().
    int gather(int workers, std::chrono::microseconds join_timeout) {
        spawn(workers);
        avoid_caller_cpu();
        wanted_ = workers;
        {
            std::lock_guard lock(mutex_);
            places_.store({places_.load(std::memory_order_relaxed).job + 1, workers}, std::memory_order_release);
        }
        wake_.notify_all();
        const auto end = std::chrono::steady_clock::now() + join_timeout;
        spin([&] {
            return places_.load(std::memory_order_relaxed).left == 0 || std::chrono::steady_clock::now() > end;
        });
        Places open = places_.load(std::memory_order_relaxed);
        while (!places_.compare_exchange_weak(open, {open.job, 0}, std::memory_order_acquire)) {
        }
        return workers - open.left;
    }

    // Has those that came work; without work, sends them away.
    void start(int workers, void (*work)(void*, int), void* context) {
        work_ = work;
        context_ = context;
        running_.store(workers, std::memory_order_relaxed);
        started_.store(places_.load(std::memory_order_relaxed).job, std::memory_order_release);
    }

    void wait() {
        spin([this] { return running_.load(std::memory_order_acquire) == 0; });
    }

private:
    // Of a call, and how many workers it still takes.
    struct Places {
        std::uint32_t job;
        std::int32_t left;
    };

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

    void worker_loop() {
        std::uint32_t seen = 0;
        const auto called = [&] { return places_.load(std::memory_order_acquire).job != seen; };
        for (;;) {
            for (int i = 0; i < kIdlePauses && !called(); ++i) pause();
            if (!called()) {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, called);
            }
            Places open = places_.load(std::memory_order_acquire);
            while (open.left > 0 &&
                   !places_.compare_exchange_weak(open, {open.job, open.left - 1}, std::memory_order_acq_rel)) {
            }
            seen = open.job;
            if (open.left == 0) continue;
            const int rank = wanted_ - open.left + 1;
            spin([&] { return started_.load(std::memory_order_acquire) == seen; });
            if (work_) work_(context_, rank);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    int kept_free_ = -1, informed_ = 0;  // a processor, and how many workers know
    alignas(64) std::atomic<Places> places_{{0, 0}};
    alignas(64) std::atomic<std::uint32_t> started_{0};  // the job
    alignas(64) std::atomic<int> running_{0};
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

}  // namespace

void Barrier::wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
        waiting_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    spin([this, round] { return round_.load(std::memory_order_acquire) != round; });
}

ThreadTeam::ThreadTeam(int threads, std::chrono::microseconds join_timeout) {
    if (threads <= 1) return;
    std::call_once(once, [] {
        start_pool();
        pthread_atfork(nullptr, nullptr, start_pool);
    });
    if (!pool->busy.try_lock()) return;
    pool_ = pool;
    size_ = 1 + pool_->gather(threads - 1, join_timeout);
}

ThreadTeam::~ThreadTeam() {
    if (!pool_) return;
    pool_->start(size_ - 1, nullptr, nullptr);
    pool_->wait();
    pool_->busy.unlock();
}

void ThreadTeam::run(void (*work)(void* context, int rank), void* context) {
    if (pool_) pool_->start(size_ - 1, work, context);
    work(context, 0);
    if (!pool_) return;
    pool_->wait();
    pool_->busy.unlock();
    pool_ = nullptr;
}

}  // namespace skipnet::cpu
