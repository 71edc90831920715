// What threads of different thread blocks know of one another's stores by __stcg. As in the PTX memory model, a store
// is known to whoever reads an atomic that was written after a fence after it, and then has a fence. Barriers pass on
// to the block. To all others the place holds poison.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "grid.h"

namespace simt {

class WeakMemory {
public:
    template <typename T>
    void store(const Fiber& thread, T* to, const T& value) {
        static_assert(std::is_trivially_copyable_v<T> && sizeof value <= sizeof(Store::value));
        std::memset(static_cast<void*>(to), kPoison, sizeof value);
        Store store{
            reinterpret_cast<unsigned char*>(to), sizeof value, {}, thread.block->number, thread.linear, false, {}};
        std::memcpy(store.value, &value, sizeof value);
        stores_.push_back(store);
        ++pending_[store.to];
    }
    // What a store of the same size has left.
    template <typename T>
    T load(const Fiber& thread, const T* from) const {
        const auto* place = reinterpret_cast<const unsigned char*>(from);
        T value = *from;
        if (pending_.count(place))
            for (const Store& store : stores_)
                if (store.to == place && comes_before(store, thread)) {
                    std::memcpy(&value, store.value, sizeof value);
                    return value;
                }
        const auto landed = landed_.find(place);
        if (landed != landed_.end() && landed->second.block != thread.block->number &&
            landed->second.when > thread.seen)
            std::memset(&value, kPoison, sizeof value);
        return value;
    }
    void fence(Fiber& thread) {
        for (Store& store : stores_)
            if (comes_before(store, thread)) store.fenced_by.push_back(thread.linear);
        thread.seen = thread.observed;
    }
    // A thread writes an atomic.
    void publish(const Fiber& thread) {
        const auto pending = std::stable_partition(stores_.begin(), stores_.end(), [&](const Store& store) {
            return store.block == thread.block->number &&
                   std::count(store.fenced_by.begin(), store.fenced_by.end(), thread.linear);
        });
        for (auto store = stores_.begin(); store != pending; ++store) land(*store);
        stores_.erase(stores_.begin(), pending);
    }
    // A thread reads an atomic.
    void observe(Fiber& thread) const { thread.observed = landed_count_; }
    void barrier_passed(const Block& block) {
        for (Store& store : stores_) store.past_barrier |= store.block == block.number;
        std::size_t observed = 0, seen = 0;
        for (const Fiber* thread : block.fibers) {
            observed = std::max(observed, thread->observed);
            seen = std::max(seen, thread->seen);
        }
        for (Fiber* thread : block.fibers) thread->observed = observed, thread->seen = seen;
    }
    // The end of a grid makes all its stores known.
    void end_of_grid(const Launch& launch) {
        const auto its = [&](int block) { return block >= launch.first && block < launch.first + launch.blocks; };
        const auto others =
            std::stable_partition(stores_.begin(), stores_.end(), [&](const Store& store) { return its(store.block); });
        for (auto store = stores_.begin(); store != others; ++store) land(*store);
        stores_.erase(stores_.begin(), others);
        for (auto place = landed_.begin(); place != landed_.end();)
            place = its(place->second.block) ? landed_.erase(place) : std::next(place);
    }

private:
    // A store that other thread blocks cannot count on yet.
    struct Store {
        unsigned char* to;
        std::size_t size;
        unsigned char value[16];
        int block, thread;
        bool past_barrier;           // known to all threads of the block, each of which may have a fence for it
        std::vector<int> fenced_by;  // threads of the block: an atomic that one of them writes makes it land
    };
    struct Landed {
        std::size_t when;
        int block;
    };

    static bool comes_before(const Store& store, const Fiber& thread) {
        return store.block == thread.block->number && (store.past_barrier || store.thread == thread.linear);
    }
    void land(const Store& store) {
        if (--pending_[store.to] == 0) pending_.erase(store.to);
        std::memcpy(store.to, store.value, store.size);
        landed_[store.to] = {++landed_count_, store.block};
    }

    std::vector<Store> stores_;
    std::unordered_map<const unsigned char*, int> pending_;    // how many of them, by place
    std::unordered_map<const unsigned char*, Landed> landed_;  // in this grid
    std::size_t landed_count_ = 0;
};

inline WeakMemory weak_memory;

}  // namespace simt
