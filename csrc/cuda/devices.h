// The GPUs that the CUDA runtime sees.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace skipnet::cuda {

// (name, compute capability such as "9.0") of each; throws std::runtime_error in the runtime's words.
std::vector<std::pair<std::string, std::string>> devices();

}  // namespace skipnet::cuda
