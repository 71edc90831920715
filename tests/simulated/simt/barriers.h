// Where the threads of a thread block or of a cluster wait for one another. A barrier that not all threads reach, or
// reach at different lines, is an error.
#pragma once

#include "scheduler.h"

namespace simt {

// Whether the predicate holds for any thread of the block.
inline bool syncthreads(Site site, bool predicate = false) {
    Block& block = *machine.current->block;
    Barrier& barrier = block.barrier;
    if (barrier.waiting.empty()) barrier.site = site;
    if (!(barrier.site == site))
        machine.fail(text("divergent barrier: other threads of the block wait at ", barrier.site.text()), site);
    barrier.any |= predicate;
    if (static_cast<int>(barrier.waiting.size()) + 1 < block.threads) {
        barrier.waiting.push_back(machine.current);
        machine.wait("a barrier", site);
        return barrier.was_any;
    }
    barrier.was_any = barrier.any;
    barrier.any = false;
    weak_memory.barrier_passed(block);
    for (Fiber* fiber : barrier.waiting) machine.wake(fiber);
    barrier.waiting.clear();
    machine.yield(false);
    return barrier.was_any;
}

inline void cluster_arrive(Site site) {
    Cluster& cluster = *machine.current->block->cluster;
    if (!cluster.arrivals.emplace(machine.current, cluster.phase).second)
        machine.fail("cluster barrier: arrived twice without waiting", site);
    int threads = 0;
    for (const auto& block : cluster.blocks) threads += block->threads;
    if (++cluster.arrived == threads) {
        cluster.arrived = 0;
        ++cluster.phase;
        for (Fiber* fiber : cluster.waiting) machine.wake(fiber);
        cluster.waiting.clear();
    }
}

inline void cluster_wait(Site site) {
    Cluster& cluster = *machine.current->block->cluster;
    const auto arrival = cluster.arrivals.find(machine.current);
    if (arrival == cluster.arrivals.end()) machine.fail("cluster barrier: waits without having arrived", site);
    const int phase = arrival->second;
    cluster.arrivals.erase(arrival);
    if (cluster.phase == phase) {
        cluster.waiting.push_back(machine.current);
        machine.wait("a cluster barrier", site);
    } else {
        machine.yield(false);
    }
}

inline int cluster_rank() { return machine.current->block->rank; }
inline int cluster_size() { return static_cast<int>(machine.current->block->cluster->blocks.size()); }

}  // namespace simt
