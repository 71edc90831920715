// Plain loads from shared memory and stores to it: how often a warp's lanes have to take turns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "shared_memory.h"

namespace simt {

// The n-th access of a lane in a line of a source belongs to the n-th ones of its warp's other lanes. A warp moves 128
// bytes at a time: 32 lanes' four bytes, or eight lanes' sixteen. Of 32 banks each gives one word, to all that want it.
class PlainAccesses {
public:
    bool counts = false;

    void add(const Fiber& thread, const void* address, int bytes, Site site) {
        const Line line{site.name(), site.line, bytes};
        const int turn = turns_[{line, thread.block->number, thread.linear}]++;
        Group& group = groups_[{line, thread.block->number, thread.linear / warpSize, turn}];
        group.push_back({thread.lane(), reinterpret_cast<std::uintptr_t>(address)});
    }

    // "FILE:LINE BYTES ACCESSES TURNS" for each line of a source: how many times 128 bytes were moved, and turns that
    // were taken beyond one each.
    std::string told() const {
        std::map<Line, std::pair<int, int>> totals;
        for (const auto& [key, group] : groups_) {
            auto& [accesses, turns] = totals[std::get<0>(key)];
            const int bytes = std::get<2>(std::get<0>(key)), at_once = 128 / bytes;
            for (int first = 0; first < warpSize; first += at_once) {
                std::map<std::uintptr_t, std::set<std::uintptr_t>> banks;
                for (const auto& [lane, address] : group)
                    for (int byte = 0; byte < bytes; byte += 4)
                        if (lane >= first && lane < first + at_once)
                            banks[(address + byte) / 4 % 32].insert((address + byte) / 4);
                std::size_t most = 0;
                for (const auto& [bank, words] : banks) most = std::max(most, words.size());
                accesses += most > 0;
                turns += most > 1 ? static_cast<int>(most) - 1 : 0;
            }
        }
        std::string all;
        for (const auto& [line, total] : totals)
            all += text(std::get<0>(line), ":", std::get<1>(line), " ", std::get<2>(line), " ", total.first, " ",
                        total.second, "\n");
        return all;
    }
    void clear() { turns_.clear(), groups_.clear(); }

private:
    using Line = std::tuple<std::string, int, int>;
    using Group = std::vector<std::pair<int, std::uintptr_t>>;  // lanes and their addresses
    std::map<std::tuple<Line, int, int>, int> turns_;           // by block and thread
    std::map<std::tuple<Line, int, int, int>, Group> groups_;   // by block, warp and turn
};

inline PlainAccesses plain_accesses;

template <typename T>
T load_shared(const T* from, Site site) {
    check_shared(from, sizeof(T), "a load", site);
    if (plain_accesses.counts) plain_accesses.add(*machine.current, from, sizeof(T), site);
    const SharedMemoryOpen open;
    return *from;
}
template <typename T>
void store_shared(T* to, const T& value, Site site) {
    check_shared(to, sizeof(T), "a store", site);
    if (plain_accesses.counts) plain_accesses.add(*machine.current, to, sizeof(T), site);
    const SharedMemoryOpen open;
    *to = value;
}

}  // namespace simt
