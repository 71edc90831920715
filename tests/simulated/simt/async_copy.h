// cp.async: fills its destination with NaN and copies only when its group is waited for.
#pragma once

#include <cstring>
#include <utility>

#include "shared_memory.h"

namespace simt {

inline void cp_async(void* to, const void* from, int bytes, bool filled, Site site) {
    check_shared(to, bytes, "cp.async", site);
    if (filled && reinterpret_cast<std::uintptr_t>(from) % bytes)
        machine.fail(text("cp.async: the source is not aligned to ", bytes), site);
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
