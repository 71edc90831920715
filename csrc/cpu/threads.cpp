#include "threads.h"

#include <pthread.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
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

constexpr int kPatience = 2048;  // pauses, some 20 microseconds: longer than threads that all run wait for each other

// Spins until done() is true; later on it gives the processor away, for the others may have none.
template <typename Done>
void spin(Done done) {
    for (int i = 0; !done(); ++i) {
        if (i < kPatience)
            pause();
        else
            std::this_thread::yield();
    }
}

constexpr int kSpins = 8192;  // of an idle worker before it sleeps: about 100 microseconds

class Pool {
public:
    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
            ++job_;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    // False where another caller has the threads, or there are none.
    bool run(int threads, void (*work)(void*, int, int), void* context) {
        std::unique_lock busy(busy_, std::try_to_lock);
        if (!busy) return false;
        if (!hire(threads - 1)) return false;
        work_ = work;
        context_ = context;
        threads_ = threads;
        running_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
        {
            std::lock_guard lock(mutex_);
            ++job_;
        }
        wake_.notify_all();
        work(context, 0, threads);
        spin([this] { return running_.load(std::memory_order_acquire) == 0; });
        return true;
    }

private:
    // False where the system has no more threads.
    bool hire(int workers) {
        try {
            while (static_cast<int>(workers_.size()) < workers)
                workers_.emplace_back([this, rank = static_cast<int>(workers_.size()) + 1,
                                       seen = job_.load(std::memory_order_relaxed)] { serve(rank, seen); });
        } catch (const std::system_error&) {
            return false;
        }
        return true;
    }

    // seen: the last job that is not for this worker.
    void serve(int rank, unsigned seen) {
        for (;;) {
            for (int i = 0; i < kSpins && job_.load(std::memory_order_acquire) == seen; ++i) pause();
            if (job_.load(std::memory_order_acquire) == seen) {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return job_.load(std::memory_order_acquire) != seen; });
            }
            ++seen;
            if (stopping_) return;
            if (rank < threads_) work_(context_, rank, threads_);
            running_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    std::atomic<unsigned> job_{0};
    std::atomic<int> running_{0};
    bool stopping_ = false;
    void (*work_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    int threads_ = 0;
};

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

void run_threads(int threads, void (*work)(void*, int, int), void* context) {
    std::call_once(once, [] {
        start_pool();
        pthread_atfork(nullptr, nullptr, start_pool);
    });
    if (threads == 1 || !pool->run(threads, work, context)) work(context, 0, 1);
}

}  // namespace skipnet::cpu
