// Stores into the shared memory of a cluster's other thread blocks (st.async), and the counters that say when they have
// come (mbarrier). Until somebody waits for it, a store leaves poison in its place; then stores come in any order,
// those of the next phase among them.
#pragma once

#include <cstring>
#include <utility>

#include "shared_memory.h"

namespace simt {

inline StoreCounterState& counter_at(Block& block, const void* counter, const char* what, Site site) {
    const auto found = block.counters.find(counter);
    if (found == block.counters.end()) machine.fail(text(what, ": nothing is counted there yet"), site);
    return found->second;
}

inline void begin_counting(const void* counter, Site site) {
    check_shared(counter, 8, "mbarrier.init", site);
    if (!machine.current->block->counters.emplace(counter, StoreCounterState{}).second)
        machine.fail("mbarrier.init: it counts already", site);
}

inline void fence_counters() {
    Block& block = *machine.current->block;
    for (auto& [place, counter] : block.counters) counter.known_after = block.cluster->phase;
}

// Ends the counter's phase if there is nothing left to come in it.
inline void settle(StoreCounterState& counter) {
    if (!counter.expected || counter.bytes != 0) return;
    counter.expected = false;
    ++counter.phase;
    for (Fiber* fiber : std::exchange(counter.waiting, {})) machine.wake(fiber);
}

inline void expect_stores(const void* at, int bytes, Site site) {
    StoreCounterState& counter = counter_at(*machine.current->block, at, "mbarrier.arrive", site);
    if (counter.expected) machine.fail("mbarrier.arrive: twice in a phase", site);
    counter.expected = true;
    counter.bytes += bytes;
    settle(counter);
    machine.perhaps_yield();
}

inline void store_async(void* place, unsigned value, const void* at, int rank, Site site) {
    Block& block = *machine.current->block;
    if (rank < 0 || rank >= cluster_size()) machine.fail(text("mapa: block ", rank, " of ", cluster_size()), site);
    check_shared(place, sizeof value, "st.async", site);
    check_shared(at, 8, "st.async", site);
    Block& other = *block.cluster->blocks[rank];
    if (other.running == 0) machine.fail(text("st.async: block ", rank, " has ended"), site);
    const auto there = [&](const void* own) {
        return other.shared->data() + (static_cast<const unsigned char*>(own) - block.shared->data());
    };
    StoreCounterState& counter = counter_at(other, there(at), "st.async", site);
    if (counter.known_after >= block.cluster->phase)
        machine.fail("st.async: no fence and barrier of the cluster since the counter's beginning", site);
    {
        const SharedMemoryOpen open(other);
        std::memset(there(place), kPoison, sizeof value);
    }
    counter.coming.push_back({there(place), value});
    for (Fiber* fiber : std::exchange(counter.waiting, {})) machine.wake(fiber);
    machine.perhaps_yield();
}

inline void wait_for_stores(const void* at, bool odd, Site site) {
    StoreCounterState& counter = counter_at(*machine.current->block, at, "mbarrier.try_wait", site);
    while (counter.phase % 2 == odd) {
        if (counter.coming.empty()) {
            counter.waiting.push_back(machine.current);
            machine.wait("stores of other blocks", site);
            continue;
        }
        std::swap(counter.coming[machine.random(counter.coming.size())], counter.coming.back());
        const ComingStore store = counter.coming.back();
        counter.coming.pop_back();
        {
            const SharedMemoryOpen open;
            std::memcpy(store.to, &store.value, sizeof store.value);
        }
        counter.bytes -= static_cast<int>(sizeof store.value);
        settle(counter);
    }
    machine.yield(false);
}

}  // namespace simt
