// The compacted strategy on the GPU, for any network: block by block on the executing images, all on the caller's
// stream. Which images execute stays on the device; grids are sized for the whole batch and read the count.
#pragma once

#include <cstddef>
#include <vector>

#include "../network.h"
#include "gathered_conv.h"

namespace skipnet::cuda {

struct CompactedBlock {
    std::vector<Convolution> convolutions;  // two or three
    std::vector<Convolution> projection;    // one, or none where the shortcut is the identity
};

// A feed-forward gate; its convolutions are float32 whatever the network is.
struct CompactedGate {
    std::vector<Convolution> convolutions;
    FeedforwardTail tail;
};

// Channels are padded to multiples of 8. Pointers are to the device's memory; lay_out sets them.
struct CompactedNetwork {
    ElementType element;
    int in, height, width;  // of the images
    bool stem_pools;        // a 3x3 max pool with stride 2 follows the stem
    bool gates_pool;        // a 2x2 max pool comes first in a feed-forward gate
    Convolution stem;       // takes pairs of pixels where its stride is 2 and `in` 4 at most
    std::vector<CompactedBlock> blocks;
    std::vector<Embedding> embeddings;  // RNNGate: one per block
    Lstm lstm;                          // RNNGate
    std::vector<CompactedGate> gates;   // feed-forward: one per block
    Convolution head;                   // 1x1 from the pooled features to the classes, float32
};

// One call. Everything belongs to the caller, on the device.
struct CompactedCall {
    int batch;
    int num_gates;         // to evaluate: blocks - 1, or one more; 0 in a dense network
    int* present;          // [1], how many of the batch's places hold an image, the first ones; null: all of them.
                           // What comes out of the others is undefined.
    const void* images;    // [batch, in, height, width]
    const bool* forced;    // [blocks - 1, batch], or null
    float* logits;         // [batch, head.out]
    float* gate_logits;    // [num_gates, batch]
    float* probabilities;  // [num_gates, batch]
    bool* executed;        // [num_gates, batch]
    float* hidden;         // [batch, hidden], RNNGate's last state
    float* cell;           // [batch, hidden]
    void* workspace;       // workspace_bytes, aligned to 256; its contents do not matter
};

struct CompactedWeights {
    std::size_t elements;  // of the network's type
    std::size_t floats;
};

// Sets all pointers into two arrays that hold the weights in the order stem, blocks (convolutions, projection), head,
// and then, a gate after the other, embeddings or feed-forward gates, and the LSTM. Pieces start at multiples of 8.
CompactedWeights lay_out(CompactedNetwork& network, const void* elements, const float* floats);

std::size_t workspace_bytes(const CompactedNetwork& network, int batch);

// Launches on the current device and returns at once.
void run_compacted(const CompactedNetwork& network, const CompactedCall& call, Stream stream);

}  // namespace skipnet::cuda
