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
struct Team {
    int rank, size;
    Barrier* barrier;  // of `size`

    void meet() const {
        if (size > 1) barrier->wait();
    }
};

// The caller and the threads that join it for a call. The others are kept between calls and spin for a moment before
// they sleep. Where they are busy with another caller's work, or cannot be had, the caller is alone: so no machine is
// oversubscribed. A forked child hires threads of its own.
class Crew {
public:
    // Calls for threads - 1 others and goes without those that have not come after `patience`: a thread in whose place
    // the system runs something else would hold up everyone at the first barrier, for milliseconds.
    Crew(int threads, std::chrono::microseconds patience);
    ~Crew();
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    int size() const { return size_; }

    // Runs work(context, rank) for rank 0 .. size() - 1, of which the caller is 0; returns when all are done. Once.
    void run(void (*work)(void* context, int rank), void* context);

private:
    class Pool* pool_ = nullptr;  // null where the caller is alone, or done
    int size_ = 1;
};

}  // namespace skipnet::cpu
