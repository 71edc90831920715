// The functions of csrc/cuda/launch.cuh on the CPU; what they mean is said there.
#pragma once

#include <map>
#include <memory>
#include <tuple>

#include "simt.h"

namespace skipnet::cuda {

struct Grid {
    dim3 blocks, threads;
    std::size_t shared = 0;
    int cluster = 1;
    bool allowed = false;
    bool dependent = false;
};

constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

// What a device knows of its kernels: bytes of shared memory that their launches may take.
inline std::map<const void*, std::size_t> allowed_shared_memory;

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, Stream, Arguments... arguments) {
    const void* known = reinterpret_cast<const void*>(kernel);
    if (!grid.allowed) allowed_shared_memory[known] = std::max(grid.shared, kSharedWithoutAsking);
    const auto allowed = allowed_shared_memory.find(known);
    if (grid.shared > (allowed == allowed_shared_memory.end() ? kSharedWithoutAsking : allowed->second))
        throw simt::Error(std::string(name) + ": more shared memory than the kernel has been allowed");
    // Kept outside of the lambda: a compiler that fills automatic variables with a pattern fills copies' padding, too,
    // and GCC 12 does so at a wrong place.
    const auto kept = std::make_shared<std::tuple<Parameters...>>(arguments...);
    simt::machine.launch(name, grid.blocks, grid.threads, grid.shared, grid.cluster, grid.dependent,
                         [kernel, kept] { std::apply(kernel, *kept); });
}

inline int multiprocessors() { return simt::machine.multiprocessors; }
inline int shared_memory_limit() { return 227 * 1024; }

template <typename... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...)) {
    allowed_shared_memory[reinterpret_cast<const void*>(kernel)] = shared_memory_limit();
}

template <typename... Parameters>
int resident_blocks(void (*)(Parameters...), int, std::size_t) {
    return 2;
}

}  // namespace skipnet::cuda
