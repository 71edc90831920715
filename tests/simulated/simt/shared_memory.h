// The dynamic shared memory of a thread block and of its cluster's others.
#pragma once

#include "barriers.h"

namespace simt {

inline unsigned char* shared_memory() { return machine.current->block->shared->data(); }

inline void check_shared(const void* address, std::size_t bytes, const char* what, Site site) {
    const Guarded& shared = *machine.current->block->shared;
    const auto offset = static_cast<const unsigned char*>(address) - shared.data();
    if (!shared.holds(address, bytes))
        machine.fail(text(what, ": byte ", offset, " of ", shared.size(), " bytes of shared memory"), site);
    if (reinterpret_cast<std::uintptr_t>(address) % bytes)
        machine.fail(text(what, ": byte ", offset, " of shared memory is not aligned to ", bytes), site);
}

// Where `own`, an address in this block's shared memory, lies in that of another block of the cluster.
inline void* peer(void* own, int rank, Site site) {
    Block& block = *machine.current->block;
    if (rank < 0 || rank >= cluster_size()) machine.fail(text("mapa: block ", rank, " of ", cluster_size()), site);
    if (!block.shared->holds(own, 1)) machine.fail("mapa: not an address in this block's shared memory", site);
    Block& other = *block.cluster->blocks[rank];
    return other.shared->data() + (static_cast<unsigned char*>(own) - block.shared->data());
}

}  // namespace simt
