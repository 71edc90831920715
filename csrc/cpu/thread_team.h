// Threads that share a call's work.
#pragma once

#include <atomic>
#include <chrono>

namespace skipnet::cpu {

// Meets `size` threads, again and again. Spins: the threads meet after every convolution, every few microseconds.
class Barrier {
public:
    explicit Barrier(int size) : size_(size) {}
    void wait();

private:
    const int size_;
    alignas(64) std::atomic<int> waiting_{0};
    alignas(64) std::atomic<unsigned> round_{0};
};

// The threads that work on the same images together.
struct ThreadGroup {
    int rank, size;
    Barrier* shared;  // of `size`; null where a thread is alone

    void barrier() const {
        if (size > 1) shared->wait();
    }
};

// The caller and the threads that join it for a call. The others are kept between calls and spin for a moment before
// they sleep. Where they are busy with another caller's work, or cannot be had, the caller is alone: so no machine is
// oversubscribed. A forked child spawns threads of its own.
class ThreadTeam {
public:
    // Calls for threads - 1 others and goes without those that have not joined after `join_timeout`: a thread in whose
    // place the system runs something else would hold up all others at the first barrier, for milliseconds.
    ThreadTeam(int threads, std::chrono::microseconds join_timeout);
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int size() const { return size_; }

    // Runs work(context, rank) for rank 0 .. size() - 1, of which the caller is 0; returns when all are done. Once.
    void run(void (*work)(void* context, int rank), void* context);

private:
    class Pool* pool_ = nullptr;  // null where the caller is alone, or done
    int size_ = 1;
};

}  // namespace skipnet::cpu
