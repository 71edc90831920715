// The gate step on the CPU: pool-finish, embed, LSTM, decide and compaction, in one call for the whole batch.
#pragma once

#include <cstdint>

#include "../network.h"

namespace skipnet::cpu {

// An activation in memory, channels last.
struct Activation {
    const void* data;  // [batch, pixels, channels]
    bool bfloat16;     // otherwise float32
    int batch, pixels, channels;
};

// Average over the pixels of the images in `rows`, accumulated in float32. On the caller's thread: next to
// PyTorch's, which spin for a while after a convolution, threads of our own cost more than they bring.
void pool(const Activation& activation, const std::int64_t* rows /* [count] */, std::int64_t count,
          float* pooled /* [batch, channels] */);

// The executing images in order; returns their number. The rest of `rows` is left alone.
std::int64_t compact(const bool* executed /* [batch] */, int batch, std::int64_t* rows /* [batch] */);

// RNNGate for a batch of pooled features; hidden and cell advance in place. Returns the executing images' number.
std::int64_t gate_step(const Embedding& embedding, const Lstm& lstm, int batch,
                       const float* pooled /* [batch, channels] */, float* hidden /* [batch, hidden] */,
                       float* cell /* [batch, hidden] */, const Decision& decision,
                       std::int64_t* rows /* [batch] */);

// The same for the tail of a feed-forward gate.
std::int64_t gate_step(const FeedforwardTail& tail, int batch, const float* pooled /* [batch, channels] */,
                       const Decision& decision, std::int64_t* rows /* [batch] */);

// The classifier: logits = pooled * weight^T + bias.
void classify(const float* pooled /* [batch, channels] */, int batch, int channels,
              const float* weight /* [channels, classes] */, const float* bias /* [classes] */, int classes,
              float* logits /* [batch, classes] */);

}  // namespace skipnet::cpu
