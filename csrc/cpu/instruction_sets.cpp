// Which of the compiled variants this machine runs.
#include <algorithm>

#include "../check.h"
#include "resident.h"

namespace skipnet::cpu {

std::unique_ptr<Resident> make_resident_portable(const NetworkWeights& weights);
#ifdef SKIPNET_X86
std::unique_ptr<Resident> make_resident_avx2(const NetworkWeights& weights);
std::unique_ptr<Resident> make_resident_avx512(const NetworkWeights& weights);
#endif

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#ifdef SKIPNET_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        found.push_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
    found.push_back("portable");
    return found;
}

std::unique_ptr<Resident> make_resident(const NetworkWeights& weights, const std::string& instruction_set) {
    const auto known = instruction_sets();
    check(std::find(known.begin(), known.end(), instruction_set) != known.end(), "instruction_set: '", instruction_set,
          "' is not one that this machine runs");
#ifdef SKIPNET_X86
    if (instruction_set == "avx512") return make_resident_avx512(weights);
    if (instruction_set == "avx2") return make_resident_avx2(weights);
#endif
    return make_resident_portable(weights);
}

}  // namespace skipnet::cpu
