// How kernels are launched, and what a launcher asks of the device. On the CPU tests/simulated/simt runs the grid.
#pragma once

#include "stream.h"

#ifdef SKIPNET_SIMT
#include "launch_on_host.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace skipnet::cuda {

struct Grid {
    dim3 blocks, threads;
    std::size_t shared = 0;  // bytes of dynamic shared memory
    int cluster = 1;         // thread blocks in a cluster, along x
    bool allowed = false;    // allow_shared_memory has been called: the launch leaves the kernel's limit alone
    bool dependent = false;  // may begin before the kernel before it ends: calls wait_for_previous_grid (ptx.cuh)
};

inline void check_cuda(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Whether a kernel knows of dependent launches. Code that the driver has made of PTX for older GPUs does not wait.
inline bool knows_dependent_launches(const void* kernel) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    return attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
}

// kernel(arguments...) on the stream of the current device.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, Stream stream, Arguments... arguments) {
    if (grid.shared > 48 * 1024 && !grid.allowed)
        check_cuda(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)),
            name);
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config{};
    config.gridDim = grid.blocks;
    config.blockDim = grid.threads;
    config.dynamicSmemBytes = grid.shared;
    config.stream = stream;
    config.attrs = attributes;
    if (grid.cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
    }
    if (grid.dependent && knows_dependent_launches(reinterpret_cast<const void*>(kernel))) {
        cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

// A number that the current device has.
inline int device_attribute(cudaDeviceAttr attribute) {
    int device, value;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Bytes that a thread block can have.
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Lets a kernel's launches take all the shared memory that the current device gives a thread block, and loads the
// kernel. Once, outside of launches: a limit set by a launch would fall with a smaller one, below what another launch
// in the same captured graph takes; and a kernel loaded by its first launch may be loaded inside a capture.
template <typename... Parameters>
void allow_shared_memory(void (*kernel)(Parameters...)) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory_limit()),
               "cudaFuncSetAttribute");
}

// How many of a kernel's thread blocks a multiprocessor holds at a time; of more than 48 KiB only if it is allowed
// them.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, std::size_t shared) {
    int blocks;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
}

}  // namespace skipnet::cuda

#endif
