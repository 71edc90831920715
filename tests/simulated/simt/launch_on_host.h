// The functions of csrc/cuda/launch.cuh on the CPU; what they mean is said there.
#pragma once

#include "simt.h"

namespace skipnet::cuda {

struct Grid {
    dim3 blocks, threads;
    std::size_t shared = 0;
    int cluster = 1;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, Stream, Arguments... arguments) {
    try {
        simt::machine.run(grid.blocks, grid.threads, grid.shared, grid.cluster, [=] { kernel(arguments...); });
    } catch (const simt::Error& error) {
        throw simt::Error(std::string(name) + ": " + error.what());
    }
}

inline int multiprocessors() { return simt::machine.multiprocessors; }
inline int shared_memory_limit() { return 227 * 1024; }

template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int, std::size_t) {
    return 2;
}

}  // namespace skipnet::cuda
