// Plain structs: what a packed gate is. Nothing here owns memory.
#pragma once

namespace skipnet {

// RNNGate's cell, shared by all gates, and its projection. PyTorch's gate order: i, f, g, o.
struct Lstm {
    int embed;                       // size of the embedded feature
    int hidden;                      // size of the state
    const float* input_weight;       // [4 * hidden, embed]
    const float* hidden_weight;      // [4 * hidden, hidden]
    const float* bias;               // [4 * hidden], the sum of PyTorch's two
    const float* projection_weight;  // [hidden]
    float projection_bias;
};

// One block's own part of RNNGate.
struct Embedding {
    int channels;
    const float* weight;  // [embed, channels]
    const float* bias;    // [embed]
};

// The tail of one block's feed-forward gate: from the pooled feature to the execute logit.
struct FeedforwardTail {
    int channels;
    const float* weight;  // [channels]
    float bias;
};

// Where a gate's decisions go. One gate's row of the call's decisions.
struct Decision {
    float* logit;        // [batch], the execute logits
    float* probability;  // [batch], their sigmoid
    bool* executed;      // [batch]
    const bool* forced;  // [batch], replaces the gate's own decision; may be null
};

}  // namespace skipnet
