// The kernels by themselves, to be tested and measured one at a time.
#pragma once

#include <memory>
#include <string>

#include "engine.h"

namespace skipnet::cpu {

// One convolution with its own memory: relu(convolution(x) + bias), as an engine runs it, on one thread.
class StandaloneConv {
public:
    virtual ~StandaloneConv() = default;
    virtual void load(const float* x) = 0;  // [batch, height, width, in]
    virtual void run() = 0;                 // what is measured
    virtual void read(float* y) const = 0;  // [batch, out height, out width, out]
    virtual int out_height() const = 0;
    virtual int out_width() const = 0;
};

// compacted: as that engine does it, otherwise as the resident one. bfloat16: form products from it, where the
// instruction set has such.
std::unique_ptr<StandaloneConv> make_standalone_conv(const ConvolutionWeights& weights, bool compacted, bool bfloat16,
                                                     int batch, int height, int width,
                                                     const std::string& instruction_set);

// RNNGate after one block by itself: embed, LSTM step, execute logit, as both engines run it.
class StandaloneGate {
public:
    virtual ~StandaloneGate() = default;
    // hidden and cell, [batch, hidden], advance in place.
    virtual void step(int batch, const float* pooled /* [batch, channels] */, float* hidden, float* cell,
                      float* logit /* [batch] */) = 0;
};

std::unique_ptr<StandaloneGate> make_gate(const Embedding& embedding, const Lstm& lstm,
                                          const std::string& instruction_set);

// Fused multiply-adds of whole vectors, as many as the core does when nothing else is in the way; two operations each.
// Returns how many operations were done: the caller holds the clock.
double multiply_add(long rounds, const std::string& instruction_set);

}  // namespace skipnet::cpu
