#include "gate_step.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../gate.h"

namespace skipnet::cpu {
namespace {

float to_float(float value) { return value; }

float to_float(std::uint16_t bfloat16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// One image, pixels in ascending order whatever the batch: the order is part of the result.
template <typename Element>
void pool_image(const Element* image /* [pixels, channels] */, int pixels, int channels, float* pooled) {
    std::fill_n(pooled, channels, 0.0f);
    for (int pixel = 0; pixel < pixels; ++pixel, image += channels)
        for (int channel = 0; channel < channels; ++channel) pooled[channel] += to_float(image[channel]);
    for (int channel = 0; channel < channels; ++channel) pooled[channel] /= static_cast<float>(pixels);
}

template <typename Element>
void pool_rows(const Activation& activation, const std::int64_t* rows, std::int64_t count, float* pooled) {
    const auto* data = static_cast<const Element*>(activation.data);
    const std::int64_t image_size = static_cast<std::int64_t>(activation.pixels) * activation.channels;
    for (std::int64_t i = 0; i < count; ++i)
        pool_image(data + rows[i] * image_size, activation.pixels, activation.channels,
                   pooled + rows[i] * activation.channels);
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
            for (int k = 0; k < classes; ++k) logits[k] += pooled[channel] * weight[channel * classes + k];
    }
}

}  // namespace skipnet::cpu
