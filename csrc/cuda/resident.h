// The resident strategy on the GPU: a whole CIFAR-scale SkipNet, images to logits, in one launch.
#pragma once

#include <cstddef>

#include "../gate.h"
#include "element.h"
#include "stream.h"

namespace skipnet::cuda {

constexpr int kGroups = 3;      // of blocks, at most
constexpr int kMostUnits = 32;  // of the embedding and of the LSTM: a warp's lanes

// Channels that a group computes with; fewer are padded with zeros.
constexpr SKIPNET_HD int group_channels(int group) { return 16 << group; }

// One group of blocks. Convolutions are fragments as resident.cu reads them.
struct ResidentGroup {
    int blocks;
    int height, width;         // of its activations; set by lay_out
    const void* entry;         // where a group begins anew: its first block's first convolution, then the projection
    const float* entry_bias;   // [2, channels], of both
    const void* inner;         // all other 3x3 convolutions in order: 2 * blocks, or one less after an entry
    const float* inner_bias;   // [convolutions, channels]
    const float* embeddings;   // RNNGate: [blocks, embed * channels + embed, rounded up to 4]
};

// Everything points to device memory.
struct ResidentNetwork {
    ElementType element;       // float16 or bfloat16
    int in, height, width;     // of the images
    int groups, classes;
    const void* stem;
    const float* stem_bias;    // [16]
    ResidentGroup group[kGroups];
    int embed, hidden;         // RNNGate's sizes; 0 in a dense network
    const float* lstm;         // [embed + hidden, hidden, 4] weights, [hidden, 4] bias, [hidden + 1] projection
    const float* head;         // [channels + 1, classes], the last row is the bias
};

// One call. Everything belongs to the caller, on the device.
struct ResidentCall {
    int batch, steps;       // gates to evaluate: blocks - 1, or one more; 0 in a dense network
    const void* images;     // [batch, in, height, width]
    const bool* forced;     // [batch, blocks - 1], or null
    int forced_image, forced_gate;  // strides: decisions may be the same for all images
    void* logits;           // [batch, classes]
    float* gate_logits;     // [steps, batch]
    float* probabilities;   // [steps, batch]
    bool* executed;         // [steps, batch]
    float* hidden;          // [batch, hidden], RNNGate's last state
    float* cell;            // [batch, hidden]
    int* taken;             // [1], zero: images taken beyond every block of threads' first few; if the plan queues
};

// How a batch is spread over a device.
struct ResidentPlan {
    int images;  // that a block of threads takes at a time
    int blocks;
    bool queues;  // there are more images than fit at once: call.taken is needed
    int cluster;  // blocks of threads that share an image
};

// How much a network's weights take.
struct ResidentWeights {
    std::size_t fragments;  // bytes
    std::size_t floats;
};

// Sets everything that follows from a network's numbers: the groups' sizes, and pointers into two arrays that hold the
// weights in the order of the structs' fields.
ResidentWeights lay_out(ResidentNetwork& network, const void* fragments, const float* floats);

// Bytes of shared memory for so many images in a block of threads.
int resident_shared_memory(const ResidentNetwork& network, int images);

// What a plan depends on.
struct ResidentDevice {
    int multiprocessors;
    int shared_memory;  // bytes that a block of threads can have
    int pairs, fours;   // clusters of so many blocks of threads that run at a time
};

// The current device.
ResidentDevice resident_device(const ResidentNetwork& network);

ResidentPlan plan_resident(const ResidentNetwork& network, int batch, const ResidentDevice& device);

// Launches on the current device.
void run_resident(const ResidentNetwork& network, const ResidentCall& call, const ResidentPlan& plan, Stream stream);

}  // namespace skipnet::cuda
