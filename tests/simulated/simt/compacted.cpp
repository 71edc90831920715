// Entries for tests/simulated/test_simt_compacted.py: the whole forward pass of the compacted strategy; and those of
// its kernels, so that they are compiled once.
#include "simt.h"

#include "cuda/compacted.cu"
#include "gate_step.cpp"
#include "gathered_conv.cpp"

using namespace skipnet;
using namespace skipnet::cuda;

namespace {

// A network from numbers in the order of the engine's description (skipnet_rt/engines/cuda_compacted.py), flattened.
class Reader {
public:
    Reader(const int* numbers, const float* biases) : numbers_(numbers), biases_(biases) {}

    CompactedNetwork network() {
        CompactedNetwork network{};
        network.element = static_cast<ElementType>(next());
        network.in = next();
        network.height = next();
        network.width = next();
        network.stem_pools = next();
        network.gates_pool = next();
        network.stem = layer();
        network.stem.pairs = next();
        for (int blocks = next(); blocks > 0; --blocks) {
            CompactedBlock block;
            block.convolutions = layers();
            block.projection = layers();
            network.blocks.push_back(block);
        }
        network.head = layer();
        network.lstm.embed = next();
        network.lstm.hidden = next();
        network.lstm.projection_bias = *biases_++;
        for (const CompactedBlock& block : network.blocks)
            if (network.lstm.hidden) network.embeddings.push_back({block.convolutions.back().out, nullptr, nullptr});
        for (int gates = next(); gates > 0; --gates) {
            CompactedGate gate{layers(), {}};
            gate.tail = {gate.convolutions.back().out, nullptr, *biases_++};
            network.gates.push_back(gate);
        }
        return network;
    }

private:
    int next() { return *numbers_++; }
    Convolution layer() {
        Convolution layer{};
        layer.in = next();
        layer.out = next();
        layer.kernel = next();
        layer.stride = next();
        return layer;
    }
    std::vector<Convolution> layers() {
        std::vector<Convolution> layers(next());
        for (Convolution& one : layers) one = layer();
        return layers;
    }

    const int* numbers_;
    const float* biases_;
};

}  // namespace

extern "C" {

// sizes: [elements, floats] of the weights, the workspace's bytes, and how many of them come first and are images' own.
const char* measure(const int* numbers, const float* biases, int batch, std::int64_t* sizes) {
    return simt::report([=] {
        CompactedNetwork network = Reader(numbers, biases).network();
        const CompactedWeights weights = lay_out(network, nullptr, nullptr);
        sizes[0] = static_cast<std::int64_t>(weights.elements);
        sizes[1] = static_cast<std::int64_t>(weights.floats);
        sizes[2] = static_cast<std::int64_t>(workspace_bytes(network, batch));
        unsigned char memory[1];
        Arena arena(memory);
        sizes[3] = reinterpret_cast<unsigned char*>(Workspace(network, batch, arena).features) - memory;
    });
}

const char* run(const int* numbers, const float* biases, const void* elements, const float* floats, int batch,
                int num_gates, int* present, const void* images, const bool* forced, float* logits, float* gate_logits,
                float* probabilities, bool* executed, float* hidden, float* cell, void* workspace) {
    return simt::report([=] {
        CompactedNetwork network = Reader(numbers, biases).network();
        lay_out(network, elements, floats);
        run_compacted(network,
                      {batch, num_gates, present, images, forced, logits, gate_logits, probabilities, executed, hidden,
                       cell, workspace},
                      nullptr);
    });
}
}
