// Which of the compiled variants this machine runs, and the way to each.
#include <algorithm>

#if defined(SKIPNET_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../check.h"
#include "compacted/compacted.h"
#include "resident/resident.h"
#include "standalone.h"

namespace skipnet::cpu {

#define SKIPNET_DECLARE(isa)                                                                                        \
    std::unique_ptr<Engine> make_resident_##isa(const NetworkWeights& weights);                                     \
    std::unique_ptr<Engine> make_compacted_##isa(const NetworkWeights& weights);                                    \
    std::unique_ptr<Standalone> make_standalone_##isa(const ConvolutionWeights& weights, bool compacted,            \
                                                      bool bfloat16, int batch, int height, int width);             \
    std::unique_ptr<StandaloneGate> make_gate_##isa(const Embedding& embedding, const Lstm& lstm);                  \
    double multiply_add_##isa(long rounds);

SKIPNET_DECLARE(portable)
#ifdef SKIPNET_X86
SKIPNET_DECLARE(avx2)
SKIPNET_DECLARE(avx512)
SKIPNET_DECLARE(avx512bf16)
SKIPNET_DECLARE(amx)
#endif

namespace {

// One instruction set's functions.
struct Variant {
    std::string name;
    bool runs;  // on this machine
    decltype(&make_resident_portable) make_resident;
    decltype(&make_compacted_portable) make_compacted;
    decltype(&make_standalone_portable) make_standalone;
    decltype(&make_gate_portable) make_gate;
    decltype(&multiply_add_portable) multiply_add;
};

#define SKIPNET_VARIANT_OF(isa, runs) \
    {#isa, runs, make_resident_##isa, make_compacted_##isa, make_standalone_##isa, make_gate_##isa, multiply_add_##isa}

#if defined(SKIPNET_SOFTWARE_AMX)
bool has_amx() { return true; }  // the tests' build, see amx.h
#elif defined(SKIPNET_X86) && defined(__linux__)
// Whether the processor has AMX for bfloat16 and the system lets this process use it.
bool has_amx() {
    constexpr unsigned kTile = 1u << 24, kBfloat16 = 1u << 22;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBfloat16)) != (kTile | kBfloat16)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif defined(SKIPNET_X86)
bool has_amx() { return false; }
#endif

// Best first.
const std::vector<Variant>& variants() {
#ifdef SKIPNET_X86
    __builtin_cpu_init();
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    static const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool amx = avx512bf16 && has_amx();
    static const std::vector<Variant> all{
        SKIPNET_VARIANT_OF(amx, amx),
        SKIPNET_VARIANT_OF(avx512bf16, avx512bf16), SKIPNET_VARIANT_OF(avx512, avx512), SKIPNET_VARIANT_OF(avx2, avx2),
        SKIPNET_VARIANT_OF(portable, true)};
#else
    static const std::vector<Variant> all{SKIPNET_VARIANT_OF(portable, true)};
#endif
    return all;
}

const Variant& variant(const std::string& name) {
    for (const Variant& known : variants())
        if (known.name == name && known.runs) return known;
    fail("instruction_set: '", name, "' is not one that this machine runs");
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Variant& known : variants())
        if (known.runs) names.push_back(known.name);
    return names;
}

std::unique_ptr<Engine> make_resident(const NetworkWeights& weights, const std::string& instruction_set) {
    return variant(instruction_set).make_resident(weights);
}

std::unique_ptr<Engine> make_compacted(const NetworkWeights& weights, const std::string& instruction_set) {
    return variant(instruction_set).make_compacted(weights);
}

std::unique_ptr<Standalone> make_standalone(const ConvolutionWeights& weights, bool compacted, bool bfloat16, int batch,
                                            int height, int width, const std::string& instruction_set) {
    return variant(instruction_set).make_standalone(weights, compacted, bfloat16, batch, height, width);
}

std::unique_ptr<StandaloneGate> make_gate(const Embedding& embedding, const Lstm& lstm,
                                          const std::string& instruction_set) {
    return variant(instruction_set).make_gate(embedding, lstm);
}

double multiply_add(long rounds, const std::string& instruction_set) {
    return variant(instruction_set).multiply_add(rounds);
}

}  // namespace skipnet::cpu
