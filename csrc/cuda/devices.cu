#include "devices.h"

#include <cuda_runtime.h>

#include <stdexcept>

namespace skipnet::cuda {
namespace {

void check(cudaError_t status) {
    if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace

std::vector<std::pair<std::string, std::string>> devices() {
    int count = 0;
    check(cudaGetDeviceCount(&count));
    std::vector<std::pair<std::string, std::string>> names;
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties;
        check(cudaGetDeviceProperties(&properties, device));
        names.emplace_back(properties.name,
                           std::to_string(properties.major) + "." + std::to_string(properties.minor));
    }
    return names;
}

Limits limits(int device) {
    Limits device_limits;
    check(cudaDeviceGetAttribute(&device_limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check(cudaDeviceGetAttribute(&device_limits.shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return device_limits;
}

CurrentDevice::CurrentDevice(int device) : device_(device) {
    check(cudaGetDevice(&before_));
    if (device_ != before_) check(cudaSetDevice(device_));
}

CurrentDevice::~CurrentDevice() {
    if (device_ != before_) cudaSetDevice(before_);
}

}  // namespace skipnet::cuda
