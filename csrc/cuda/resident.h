// The resident strategy on the GPU: a whole CIFAR-scale SkipNet, images to logits, in one launch.
#pragma once

#include <cstddef>

#include "../gate.h"
#include "element.h"
#include "stream.h"

namespace skipnet::cuda {

constexpr int kMaxStages = 3;  // of residual blocks
constexpr int kMaxUnits = 32;  // of the embedding and of the LSTM: a warp's lanes

// Channels that a stage computes with; fewer are padded with zeros.
constexpr SKIPNET_HD int stage_channels(int stage) { return 16 << stage; }

// One stage of residual blocks. Convolutions are fragments as resident.cu reads them.
struct ResidentStage {
    int blocks;
    int height, width;        // of its activations; set by lay_out
    float share;              // of a pixel in an average; set by lay_out
    int strips, regions;      // regions side by side, and all of them; set by lay_out
    int pieces;               // whose sums make a pool; set by lay_out
    int inverse;              // of strips, times 2^16: regions are so few that it divides by them; set by lay_out
    int whole;                // whether no region has a pixel outside, and rows are 1 KiB; set by lay_out
    const void* entry;        // where a stage begins anew: its first block's first convolution, then the projection
    const float* entry_bias;  // [2, channels], of both
    const void* inner;        // all other 3x3 convolutions in order: 2 * blocks, or one less after an entry
    const float* inner_bias;  // [convolutions, channels]
    const float* embeddings;  // RNNGate: [blocks, embed * channels + embed, rounded up to 4]
};

// Everything points to device memory.
struct ResidentNetwork {
    ElementType element;    // float16 or bfloat16
    int in, height, width;  // of the images
    int stages, classes;
    int blocks;  // of all stages; set by lay_out
    const void* stem;
    const float* stem_bias;  // [16]
    ResidentStage stage[kMaxStages];
    int embed, hidden;  // RNNGate's sizes; 0 in a dense network
    const float* lstm;  // [embed + hidden, hidden, 4] weights, [hidden, 4] bias, [hidden + 1] projection
    const float* head;  // [channels + 1, classes], the last row is the bias
};

// One call. Everything belongs to the caller, on the device.
struct ResidentCall {
    int batch;
    int num_gates;                  // to evaluate: blocks - 1, or one more; 0 in a dense network
    const void* images;             // [batch, in, height, width]
    const bool* forced;             // [batch, blocks - 1], or null
    int forced_image, forced_gate;  // strides: decisions may be the same for all images
    void* logits;                   // [batch, classes]
    float* gate_logits;             // [num_gates, batch]
    float* probabilities;           // [num_gates, batch]
    bool* executed;                 // [num_gates, batch]
    float* hidden;                  // [batch, hidden], RNNGate's last state
    float* cell;                    // [batch, hidden]
    int* work_counter;              // [1], zero: turns taken beyond every thread block's first; if the plan is dynamic
    int forced_count = 0;           // of forced gates, set by run_resident: the last block's decides nothing
};

// How a batch is spread over a device.
struct ResidentPlan {
    int images;    // that a thread block takes at a time
    int blocks;    // thread blocks
    bool dynamic;  // there are more images than fit at once: call.work_counter is needed
    int cluster;   // thread blocks that share an image
};

// How much a network's weights take.
struct ResidentWeights {
    std::size_t fragments;  // bytes
    std::size_t floats;
};

// Sets everything that follows from a network's numbers: the stages' sizes, and pointers into two arrays that hold the
// weights in the order of the structs' fields.
ResidentWeights lay_out(ResidentNetwork& network, const void* fragments, const float* floats);

// Bytes of shared memory for so many images in a thread block.
int resident_shared_memory(const ResidentNetwork& network, int images);

// What a plan depends on.
struct ResidentDevice {
    int multiprocessors;
    int shared_memory;  // bytes that a thread block can have
};

// Loads a network's kernels onto the current device, once before its first run there.
ResidentDevice place_resident(const ResidentNetwork& network);

// Never with clusters: a caller may ask for them (why: docs/cuda-design.md).
ResidentPlan plan_resident(const ResidentNetwork& network, int batch, const ResidentDevice& device);

// Launches on the current device.
void run_resident(const ResidentNetwork& network, const ResidentCall& call, const ResidentPlan& plan, Stream stream);

}  // namespace skipnet::cuda
