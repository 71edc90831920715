// The dynamic shared memory of a thread block.
#pragma once

#include "barriers.h"

namespace simt {

// Whether shared memory is closed to all but the functions of ptx.cuh that know of it: others fault.
inline bool shared_memory_closed = false;

class SharedMemoryOpen {
public:
    explicit SharedMemoryOpen(Block& block = *machine.current->block) : shared_(*block.shared) {
        if (shared_memory_closed) shared_.permit();
    }
    SharedMemoryOpen(const SharedMemoryOpen&) = delete;
    ~SharedMemoryOpen() {
        if (shared_memory_closed) shared_.forbid();
    }

private:
    Guarded& shared_;
};

inline unsigned char* shared_memory() {
    if (shared_memory_closed) machine.current->block->shared->forbid();
    return machine.current->block->shared->data();
}

inline void check_shared(const void* address, std::size_t bytes, const char* what, Site site) {
    const Guarded& shared = *machine.current->block->shared;
    const auto offset = static_cast<const unsigned char*>(address) - shared.data();
    if (!shared.holds(address, bytes))
        machine.fail(text(what, ": byte ", offset, " of ", shared.size(), " bytes of shared memory"), site);
    if (reinterpret_cast<std::uintptr_t>(address) % bytes)
        machine.fail(text(what, ": byte ", offset, " of shared memory is not aligned to ", bytes), site);
}

}  // namespace simt
