// Threads that share a call's work, and how they divide it.
#pragma once

#include <atomic>
#include <cstdint>

namespace skipnet::cpu {

// What threads do together, in regions that all of them go through in one order. A region's units are claimed, not
// divided in advance: a thread that comes late finds the regions that are done and joins in the one that is not; one
// that the system stops halfway is waited for only for the unit that it has claimed.
class SharedWork {
public:
    static constexpr int kMaxUnits = 32;  // of a region

    // A unit of region `region`, of which there are `units`, for thread `rank` of `size`; -1 when all are done. Each
    // thread begins with a share of its own, so that it meets its own data again in its cache. Regions are numbered
    // from 1.
    int claim(std::uint32_t region, int units, int rank, int size);

    // The same after a claimed unit, which is done.
    int claim_next(std::uint32_t region, int units, int rank, int size);

private:
    int claim_from(std::uint64_t seen, std::uint32_t region, int units, int rank, int size);

    // The region, how many of its units are not done, and which are not claimed.
    alignas(64) std::atomic<std::uint64_t> state_{0};
};

// One thread on its way through shared work.
class ThreadGroup {
public:
    ThreadGroup() = default;  // alone
    ThreadGroup(int rank, int size, SharedWork& shared) : rank_(rank), size_(size), shared_(&shared) {}

    int rank() const { return rank_; }
    int size() const { return size_; }

    // Has function(begin, end) called for all of 0 .. total - 1, in parts, by whoever of the group comes; returns when
    // all is done. Every thread of the group calls it in the same order with the same totals.
    template <typename Function>
    void share(int total, const Function& function) const {
        if (total == 0) return;
        if (size_ == 1) return function(0, total);
        constexpr int kUnits = 2;  // of each thread: one that is slower leaves some to the others
        int units = kUnits * size_ < SharedWork::kMaxUnits ? kUnits * size_ : SharedWork::kMaxUnits;
        if (units > total) units = total;
        ++region_;
        for (int unit = shared_->claim(region_, units, rank_, size_); unit >= 0;
             unit = shared_->claim_next(region_, units, rank_, size_))
            function(total * unit / units, total * (unit + 1) / units);
    }

private:
    int rank_ = 0, size_ = 1;
    SharedWork* shared_ = nullptr;      // null where the thread is alone
    mutable std::uint32_t region_ = 0;  // the last one that this thread came to
};

// The caller and the threads that help it with a call. They are kept between calls, spin while calls follow one another
// closely, then sleep. Where they are busy with another caller's work, or cannot be had, the caller is alone: so no
// machine is oversubscribed. A forked child spawns threads of its own.
class ThreadTeam {
public:
    // At most `threads`, the caller included.
    explicit ThreadTeam(int threads);
    ~ThreadTeam();
    ThreadTeam(const ThreadTeam&) = delete;
    ThreadTeam& operator=(const ThreadTeam&) = delete;

    int size() const { return size_; }

    // Runs work(context, rank): at once for rank 0, the caller, and for each of 1 .. size() - 1 whenever a thread comes
    // for it, if one does. What is done must not depend on who comes. Returns when all that came have left. Once.
    void run(void (*work)(void* context, int rank), void* context);

private:
    class Pool* pool_ = nullptr;  // null where the caller is alone, or done
    int size_ = 1;
};

// How many processors the calling thread may run on.
int allowed_processors();

// For how long at most a thread spins for the next call before it sleeps; 0: never.
void set_spin_microseconds(int most);

}  // namespace skipnet::cpu
