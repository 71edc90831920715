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

#define SKIPNET_DECLARE(isa)                                                                                           \
    std::unique_ptr<Engine> make_resident_##isa(const NetworkWeights& weights);                                        \
    std::unique_ptr<Engine> make_compacted_##isa(const NetworkWeights& weights);                                       \
    std::unique_ptr<StandaloneConv> make_resident_conv_##isa(const ConvolutionWeights& weights, int batch, int height, \
                                                             int width);                                               \
    std::unique_ptr<StandaloneConv> make_compacted_conv_##isa(const ConvolutionWeights& weights, int batch,            \
                                                              int height, int width);                                  \
    std::unique_ptr<StandaloneGate> make_gate_##isa(const Embedding& embedding, const Lstm& lstm);                     \
    double multiply_add_##isa(long rounds);

SKIPNET_DECLARE(portable)
#ifdef SKIPNET_X86
SKIPNET_DECLARE(avx2)
SKIPNET_DECLARE(avx512)
SKIPNET_DECLARE(avx512bf16)
SKIPNET_DECLARE(amx)
#endif

namespace {

// What each strategy is made of, for one operand (vector.h).
struct Strategies {
    decltype(&make_resident_portable) make_resident;
    decltype(&make_resident_conv_portable) make_resident_conv;
    decltype(&make_compacted_portable) make_compacted;
    decltype(&make_compacted_conv_portable) make_compacted_conv;
};

struct InstructionSet {
    std::string name;
    bool runs;  // on this machine
    Strategies float32, bfloat16;
    decltype(&make_gate_portable) make_gate;
    decltype(&multiply_add_portable) multiply_add;
};

#define SKIPNET_RESIDENT(isa) make_resident_##isa, make_resident_conv_##isa
#define SKIPNET_COMPACTED(isa) make_compacted_##isa, make_compacted_conv_##isa
#define SKIPNET_FLOAT32(isa) {SKIPNET_RESIDENT(isa), SKIPNET_COMPACTED(isa)}

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
const std::vector<InstructionSet>& known_sets() {
#ifdef SKIPNET_X86
    __builtin_cpu_init();
    static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    static const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool amx = avx512bf16 && has_amx();
    // Sets with products of bfloat16 form those of float32 as avx512 does; only the resident strategy has tile
    // registers.
    static const std::vector<InstructionSet> all{
        {"amx",
         amx,
         SKIPNET_FLOAT32(avx512),
         {SKIPNET_RESIDENT(amx), SKIPNET_COMPACTED(avx512bf16)},
         make_gate_avx512,
         multiply_add_avx512},
        {"avx512bf16",
         avx512bf16,
         SKIPNET_FLOAT32(avx512),
         {SKIPNET_RESIDENT(avx512bf16), SKIPNET_COMPACTED(avx512bf16)},
         make_gate_avx512,
         multiply_add_avx512},
        {"avx512", avx512, SKIPNET_FLOAT32(avx512), SKIPNET_FLOAT32(avx512), make_gate_avx512, multiply_add_avx512},
        {"avx2", avx2, SKIPNET_FLOAT32(avx2), SKIPNET_FLOAT32(avx2), make_gate_avx2, multiply_add_avx2},
        {"portable", true, SKIPNET_FLOAT32(portable), SKIPNET_FLOAT32(portable), make_gate_portable,
         multiply_add_portable}};
#else
    static const std::vector<InstructionSet> all{{"portable", true, SKIPNET_FLOAT32(portable),
                                                  SKIPNET_FLOAT32(portable), make_gate_portable,
                                                  multiply_add_portable}};
#endif
    return all;
}

const InstructionSet& instruction_set_of(const std::string& name) {
    for (const InstructionSet& known : known_sets())
        if (known.name == name && known.runs) return known;
    fail("instruction_set: '", name, "' is not one that this machine runs");
}

const Strategies& strategies_of(const std::string& instruction_set, bool bfloat16) {
    const InstructionSet& known = instruction_set_of(instruction_set);
    return bfloat16 ? known.bfloat16 : known.float32;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& known : known_sets())
        if (known.runs) names.push_back(known.name);
    return names;
}

std::unique_ptr<Engine> make_resident(const NetworkWeights& weights, const std::string& instruction_set) {
    return strategies_of(instruction_set, weights.bfloat16).make_resident(weights);
}

std::unique_ptr<Engine> make_compacted(const NetworkWeights& weights, const std::string& instruction_set) {
    // Feed-forward gates are float32's, and read what the blocks wrote.
    return strategies_of(instruction_set, weights.bfloat16 && weights.gates.empty()).make_compacted(weights);
}

std::unique_ptr<StandaloneConv> make_standalone_conv(const ConvolutionWeights& weights, bool compacted, bool bfloat16,
                                                     int batch, int height, int width,
                                                     const std::string& instruction_set) {
    const Strategies& strategies = strategies_of(instruction_set, bfloat16);
    return (compacted ? strategies.make_compacted_conv : strategies.make_resident_conv)(weights, batch, height, width);
}

std::unique_ptr<StandaloneGate> make_gate(const Embedding& embedding, const Lstm& lstm,
                                          const std::string& instruction_set) {
    return instruction_set_of(instruction_set).make_gate(embedding, lstm);
}

double multiply_add(long rounds, const std::string& instruction_set) {
    return instruction_set_of(instruction_set).multiply_add(rounds);
}

}  // namespace skipnet::cpu
