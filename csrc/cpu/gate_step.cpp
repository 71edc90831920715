#include "gate_step.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../gate.h"
#include "threads.h"

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

struct Pooling {
    const Activation& activation;
    const std::int64_t* rows;
    std::int64_t count;
    float* pooled;
};

// Some channels of every listed image, pixels in ascending order whatever the batch: the order is part of the result.
template <typename Element>
void pool_channels(const Pooling& job, int first, int last) {
    const Activation& x = job.activation;
    for (std::int64_t i = 0; i < job.count; ++i) {
        const Element* from = static_cast<const Element*>(x.data) + job.rows[i] * x.pixels * x.channels + first;
        float* to = job.pooled + job.rows[i] * x.channels + first;
        std::fill_n(to, last - first, 0.0f);
        for (int pixel = 0; pixel < x.pixels; ++pixel) add(from + static_cast<std::int64_t>(pixel) * x.channels, last - first, to);
        for (int channel = 0; channel < last - first; ++channel) to[channel] /= static_cast<float>(x.pixels);
    }
}

constexpr std::int64_t kWorthwhile = 1 << 16;  // elements: below, waking a thread takes longer than the work

}  // namespace

void pool(const Activation& activation, const std::int64_t* rows, std::int64_t count, float* pooled, int threads) {
    Pooling job{activation, rows, count, pooled};
    const bool small = count * activation.pixels * activation.channels < kWorthwhile;
    run_threads(small ? 1 : threads, [](void* context, int rank, int size) {
        const auto& job = *static_cast<const Pooling*>(context);
        const int channels = job.activation.channels, first = channels * rank / size, last = channels * (rank + 1) / size;
        if (job.activation.bfloat16)
            pool_channels<std::uint16_t>(job, first, last);
        else
            pool_channels<float>(job, first, last);
    }, &job);
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
