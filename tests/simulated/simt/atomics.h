// Atomics, and reading in a loop. Fibers are never interrupted, so each is one step; but others may come in between.
#pragma once

#include "scheduler.h"

namespace simt {

template <typename T, typename Update>
T atomic(T* address, Update update) {
    machine.perhaps_yield();
    const T before = *const_cast<volatile T*>(address);
    *const_cast<volatile T*>(address) = update(before);
    weak_memory.publish(*machine.current);
    weak_memory.observe(*machine.current);
    machine.perhaps_yield();
    return before;
}

// What a spinning thread reads: the others get their turn.
template <typename T>
T load(const T* address) {
    machine.yield(true);
    weak_memory.observe(*machine.current);
    return *const_cast<const volatile T*>(address);
}

}  // namespace simt
