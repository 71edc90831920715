// Threads that share a call's work.
#pragma once

#include <atomic>

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
struct Team {
    int rank, size;
    Barrier* barrier;  // of `size`

    void meet() const {
        if (size > 1) barrier->wait();
    }
};

// Runs work(context, rank) for rank 0 .. threads - 1 and returns when all are done. The caller is rank 0; the others
// are kept between calls and spin for a moment before they sleep. Where the threads are busy with another caller's
// work, or cannot be had, `threads` is 1: so no machine is oversubscribed. Returns nothing to wait for after a fork.
void run_threads(int threads, void (*work)(void* context, int rank, int threads), void* context);

}  // namespace skipnet::cpu
