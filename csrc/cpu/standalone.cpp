// What is measured beside the convolutions; compiled once for each instruction set, like resident.cpp.
#include "standalone.h"

#include "gate_step.h"
#include "variant.h"

// Makes the compiler believe that vector registers are looked at, so that every round is needed.
#if defined(__aarch64__)
#define SKIPNET_REGISTER "+w"
#else
#define SKIPNET_REGISTER "+x"
#endif
#define SKIPNET_KEEP(p, q, r, s) \
    asm volatile("" : SKIPNET_REGISTER(p), SKIPNET_REGISTER(q), SKIPNET_REGISTER(r), SKIPNET_REGISTER(s))

namespace skipnet::cpu {
namespace {

class Gate final : public StandaloneGate {
public:
    Gate(const Embedding& embedding, const Lstm& lstm)
        : channels_(embedding.channels), embedding_(embedding.weight, embedding.bias, channels_, lstm.embed),
          cell_(lstm), feature_(lstm.embed), hidden_lanes_(cell_.lanes()), cell_lanes_(2 * cell_.lanes()) {}

    void step(int batch, const float* pooled, float* hidden, float* cell, float* logit) override {
        const std::size_t bytes = cell_.hidden() * sizeof(float);
        for (int image = 0; image < batch; ++image, hidden += cell_.hidden(), cell += cell_.hidden()) {
            std::memcpy(hidden_lanes_.get(), hidden, bytes);
            std::memcpy(cell_lanes_.get(), cell, bytes);
            embedding_.run(pooled + static_cast<std::size_t>(image) * channels_, feature_.get());
            logit[image] = cell_.step(feature_.get(), hidden_lanes_.get(), cell_lanes_.get());
            std::memcpy(hidden, hidden_lanes_.get(), bytes);
            std::memcpy(cell, cell_lanes_.get(), bytes);
        }
    }

private:
    int channels_;
    Linear embedding_;
    LstmCell cell_;
    Buffer feature_, hidden_lanes_, cell_lanes_;
};

}  // namespace

std::unique_ptr<StandaloneGate> SKIPNET_VARIANT(make_gate)(const Embedding& embedding, const Lstm& lstm) {
    return std::make_unique<Gate>(embedding, lstm);
}

double SKIPNET_VARIANT(multiply_add)(long rounds) {
    // Twelve chains: more than the latency times the throughput of any core so far.
    const Vector factor = broadcast(0.5f), term = broadcast(1.0f);
    Vector a = term, b = term, c = term, d = term, e = term, f = term;
    Vector g = term, h = term, i = term, j = term, k = term, l = term;
    for (long round = 0; round < rounds; ++round) {
        a = a * factor + term, b = b * factor + term, c = c * factor + term, d = d * factor + term;
        e = e * factor + term, f = f * factor + term, g = g * factor + term, h = h * factor + term;
        i = i * factor + term, j = j * factor + term, k = k * factor + term, l = l * factor + term;
        SKIPNET_KEEP(a, b, c, d);
        SKIPNET_KEEP(e, f, g, h);
        SKIPNET_KEEP(i, j, k, l);
    }
    return 2.0 * 12 * kWidth * static_cast<double>(rounds);
}

}  // namespace skipnet::cpu
