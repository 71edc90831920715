// The GPUs that the CUDA runtime sees.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace skipnet::cuda {

// (name, compute capability such as "9.0") of each; throws std::runtime_error in the runtime's words.
std::vector<std::pair<std::string, std::string>> devices();

// What a plan depends on.
struct Limits {
    int multiprocessors;
    int shared_memory;  // bytes that a thread block can have
};
Limits limits(int device);

// Makes a device the current one for as long as it lives.
class CurrentDevice {
public:
    explicit CurrentDevice(int device);
    ~CurrentDevice();
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

private:
    int device_, before_;
};

}  // namespace skipnet::cuda
