#include "gate_step.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../gate.h"

namespace skipnet::cpu {
namespace {

// For loops that the compiler vectorises: it makes a copy for each instruction set, and the loader chooses.
// No sum is reordered by that: every lane is a channel or a class of its own.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SKIPNET_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SKIPNET_CLONES
#endif

SKIPNET_CLONES void add(const float* from, int count, float* sums) {
    for (int i = 0; i < count; ++i) sums[i] += from[i];
}

SKIPNET_CLONES void add(const std::uint16_t* bfloat16, int count, float* sums) {
    for (int i = 0; i < count; ++i) {
        const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16[i]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        sums[i] += value;
    }
}

SKIPNET_CLONES void add_scaled(const float* from, float scale, int count, float* sums) {
    for (int i = 0; i < count; ++i) sums[i] += scale * from[i];
}

// Pixels in ascending order whatever the batch: the order is part of the result.
template <typename Element>
void pool_rows(const Activation& x, const std::int64_t* rows, std::int64_t count, float* pooled) {
    for (std::int64_t i = 0; i < count; ++i) {
        const Element* from = static_cast<const Element*>(x.data) + rows[i] * x.pixels * x.channels;
        float* to = pooled + rows[i] * x.channels;
        std::fill_n(to, x.channels, 0.0f);
        for (int pixel = 0; pixel < x.pixels; ++pixel, from += x.channels) add(from, x.channels, to);
        for (int channel = 0; channel < x.channels; ++channel) to[channel] /= static_cast<float>(x.pixels);
    }
}

}  // namespace

void pool(const Activation& activation, const std::int64_t* rows, std::int64_t count, float* pooled) {
    if (activation.bfloat16)
        pool_rows<std::uint16_t>(activation, rows, count, pooled);
    else
        pool_rows<float>(activation, rows, count, pooled);
}

std::int64_t compact(const bool* executed, int batch, std::int64_t* rows) {
    std::int64_t count = 0;
    for (int image = 0; image < batch; ++image)
        if (executed[image]) rows[count++] = image;
    return count;
}

std::int64_t gate_step(const Embedding& embedding, const Lstm& lstm, int batch, const float* pooled, float* hidden,
                       float* cell, const Decision& decision, std::int64_t* rows) {
    std::vector<float> scratch(lstm.embed + 4 * lstm.hidden);
    float* feature = scratch.data();
    float* gates = feature + lstm.embed;
    for (int image = 0; image < batch; ++image) {
        const float* x = pooled + static_cast<std::int64_t>(image) * embedding.channels;
        float* h = hidden + static_cast<std::int64_t>(image) * lstm.hidden;
        float* c = cell + static_cast<std::int64_t>(image) * lstm.hidden;
        for (int k = 0; k < lstm.embed; ++k)
            feature[k] = dot(embedding.weight + static_cast<std::int64_t>(k) * embedding.channels, x,
                             embedding.channels, embedding.bias[k]);
        lstm_step(lstm, feature, h, c, gates);
        decide(decision, image, dot(lstm.projection_weight, h, lstm.hidden, lstm.projection_bias));
    }
    return compact(decision.executed, batch, rows);
}

std::int64_t gate_step(const FeedforwardTail& tail, int batch, const float* pooled, const Decision& decision,
                       std::int64_t* rows) {
    for (int image = 0; image < batch; ++image)
        decide(decision, image,
               dot(tail.weight, pooled + static_cast<std::int64_t>(image) * tail.channels, tail.channels, tail.bias));
    return compact(decision.executed, batch, rows);
}

void classify(const float* pooled, int batch, int channels, const float* weight, const float* bias, int classes,
              float* logits) {
    for (int image = 0; image < batch; ++image, pooled += channels, logits += classes) {
        std::copy_n(bias, classes, logits);
        for (int channel = 0; channel < channels; ++channel)
            add_scaled(weight + static_cast<std::int64_t>(channel) * classes, pooled[channel], classes, logits);
    }
}

}  // namespace skipnet::cpu
