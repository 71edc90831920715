// What the CPU's two strategies have in common: a packed network comes in, a call goes from images to logits.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../network.h"

namespace skipnet::cpu {

// A convolution as it comes from Python, batch normalisation folded in.
struct ConvolutionWeights {
    int in, out, kernel, stride;  // padding is kernel / 2
    const float* weight;          // [out, in, kernel, kernel]
    const float* bias;            // [out]
};

struct BlockWeights {
    ConvolutionWeights first, last;
    bool projects;
    ConvolutionWeights projection;  // only where it projects
    bool bottleneck;
    ConvolutionWeights middle;  // only in a bottleneck, between first and last
};

// A feed-forward gate's convolutions, each followed by ReLU; its tail is a FeedforwardTail.
struct GateConvolutions {
    bool max_pool;  // 2x2, first
    std::vector<ConvolutionWeights> layers;
};

struct NetworkWeights {
    bool bfloat16;      // the weights are; products are formed from bfloat16 where the instruction set has such
    int height, width;  // of the images
    int classes;
    ConvolutionWeights stem;
    bool max_pool;  // 3x3 with stride 2, after the stem
    std::vector<BlockWeights> blocks;
    std::vector<Embedding> embeddings;    // RNNGate: one per block
    Lstm lstm;                            // RNNGate
    std::vector<GateConvolutions> gates;  // feed-forward: one per block
    std::vector<FeedforwardTail> tails;   // feed-forward: one per block
    const float* head_weight;             // [classes, features]
    const float* head_bias;               // [classes]
};

// A call's images, [batch, in, height, width], as they come: float32, or bfloat16 where that is null.
struct Images {
    const float* float32;
    const std::uint16_t* bfloat16;
    bool rounds;  // float32 to bfloat16, to nearest even, as a bfloat16 network would have got it

    float operator[](std::size_t i) const {
        std::uint32_t bits;
        if (float32) {
            if (!rounds || float32[i] != float32[i]) return float32[i];
            std::memcpy(&bits, float32 + i, sizeof bits);
            bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
        } else {
            bits = static_cast<std::uint32_t>(bfloat16[i]) << 16;
        }
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

// One call. Everything belongs to the caller.
struct Call {
    int batch;
    int num_gates;  // to evaluate: blocks - 1, or one more; 0 in a dense network
    int threads;    // at most
    Images images;
    const bool* forced;    // [blocks - 1, batch], or null
    float* logits;         // [batch, classes]
    float* gate_logits;    // [num_gates, batch]
    float* probabilities;  // [num_gates, batch]
    bool* executed;        // [num_gates, batch]
    float* hidden;         // [batch, hidden], RNNGate's last state
    float* cell;           // [batch, hidden]
};

// A packed network. Calls may come from several threads at once.
class Engine {
public:
    virtual ~Engine() = default;
    virtual void run(const Call& call) = 0;
};

// What this machine can run of what was built, best first: "amx", "avx512bf16", "avx512", "avx2", "portable".
std::vector<std::string> instruction_sets();

}  // namespace skipnet::cpu
