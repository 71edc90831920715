// cp.async: fills its destination with NaN and copies only when its group is waited for.
#pragma once

#include <cstring>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "shared_memory.h"

namespace simt {

// Of cp.async's stores to shared memory: how often eight neighbouring lanes came, and how often two of them met a bank.
// A warp's lanes go the same way here: the n-th copy of one belongs to the n-th of the others.
class CopyPhases {
public:
    int phases = 0, conflicts = 0;

    void add(const Fiber& thread, const void* to) {
        const std::pair phase{thread.block->number, thread.linear / 8};
        int& copies = copies_[{phase.first, thread.linear}];
        std::vector<const void*>& rows = open_[{phase, copies++}];
        rows.push_back(to);
        if (rows.size() < 8) return;
        ++phases;
        std::set<std::uintptr_t> banks;
        for (const void* row : rows) banks.insert(reinterpret_cast<std::uintptr_t>(row) / 16 % 8);
        conflicts += banks.size() < 8;
        open_.erase({phase, copies - 1});
    }
    void clear() { *this = {}; }

private:
    std::map<std::pair<int, int>, int> copies_;  // of each thread
    std::map<std::pair<std::pair<int, int>, int>, std::vector<const void*>> open_;
};

inline bool counts_copies = false;
inline CopyPhases copy_phases;

inline void cp_async(void* to, const void* from, int bytes, bool filled, Site site) {
    check_shared(to, bytes, "cp.async", site);
    if (filled && reinterpret_cast<std::uintptr_t>(from) % bytes)
        machine.fail(text("cp.async: the source is not aligned to ", bytes), site);
    if (counts_copies) copy_phases.add(*machine.current, to);
    const SharedMemoryOpen open;
    std::memset(to, kPoison, bytes);
    machine.current->open_copies.push_back(
        {static_cast<unsigned char*>(to), filled ? static_cast<const unsigned char*>(from) : nullptr, bytes});
}

inline void cp_async_commit() {
    Fiber& self = *machine.current;
    self.copy_groups.push_back(std::move(self.open_copies));
    self.open_copies.clear();
}

// Lands all of the thread's groups but the `pending` newest.
inline void cp_async_wait(int pending) {
    const SharedMemoryOpen open;
    auto& groups = machine.current->copy_groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front())
            if (copy.from)
                std::memcpy(copy.to, copy.from, copy.bytes);
            else
                std::memset(copy.to, 0, copy.bytes);
        groups.erase(groups.begin());
    }
}

}  // namespace simt
