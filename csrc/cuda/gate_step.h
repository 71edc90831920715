// The gate step on the GPU: finishes the pool, embeds, advances the LSTM, decides and compacts, for any batch; in a
// launch of its own, or in that of the block's last convolution (gathered_conv.h). All pointers are to the device's
// memory, those inside of the structs of network.h as well.
#pragma once

#include "../network.h"
#include "compaction.h"
#include "stream.h"

namespace skipnet::cuda {

// Global average pool, not finished: what the convolutions' epilogues leave. An image that skips keeps its sums.
struct PooledSums {
    const float* sums;  // [batch, tiles, channels], over the pixels of a tile of the image
    int tiles;
    int pixels;  // of the whole image
};

// RNNGate after its block's last convolution, if it can in the tail of that. Everything as below.
struct GateTail {
    Embedding embedding;
    Lstm lstm;
    const int* present;
    float *hidden, *cell;
    Decision decision;
    const bool* executed;  // [batch], who executes this block: the convolution's list; null: everybody
    RowList list;          // receives who executes the next one; not the convolution's
    int* arrivals;         // [batch + 1], zero between calls
};

// RNNGate after one block, for the first `present` places of the batch, or all where that is null: nothing of the
// others is read, written or listed. `arrivals` is scratch that is zero between calls.
void gate_step(const Embedding& embedding, const Lstm& lstm, int batch, const int* present /* [1] */,
               const PooledSums& pooled, float* hidden /* [batch, hidden], in place */,
               float* cell /* [batch, hidden], in place */, const Decision& decision, const RowList& list,
               int* arrivals /* [1] */, bool dependent /* as GatheredConv has it */, Stream stream);

// The same for the tail of a feed-forward gate.
void gate_step(const FeedforwardTail& tail, int batch, const int* present /* [1] */, const PooledSums& pooled,
               const Decision& decision, const RowList& list, int* arrivals /* [1] */, bool dependent, Stream stream);

}  // namespace skipnet::cuda
